"""The pull request of the two CI files, played on this machine. Run: python examples/ci/run_locally.py.

A branch without a change is green, then slow_down.patch makes it red. Exits with 0 when both came out so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from kpt_lightning.tracking.exchange import add_runs
from kpt_lightning.tracking.store import RunStore

HERE = Path(__file__).parent
NEW = 4
# Fits of one process are more alike than runs are, so that a difference between two processes looks certain. A real
# build starts one process a run and fails from moderate on; here only a severe loss counts.
JUDGE = ["--new", str(NEW), "--metric", "step_time", "--metric", "samples_per_second", "--fail-on", "severe"]
GREEN, RED = 0, 1
ATTEMPTS = 3
TURN_OVER = "turn over"


class Training:
    """The training of one checkout, which fits once a turn; its runs are in ``<checkout>.sqlite``."""

    def __init__(self, checkout: Path) -> None:
        self.history = checkout.with_suffix(".sqlite")
        self.log = checkout.with_suffix(".log")
        command = [sys.executable, "train.py", "--fits", "1000", "--turn-over", TURN_OVER]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=checkout, env=os.environ | {"KPT_HISTORY": str(self.history)}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip

    def fit(self) -> None:
        """One run."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        if f"{TURN_OVER}\n" not in iter(self.process.stdout.readline, ""):
            raise SystemExit(f"the training ended early:\n{self.log.read_text()}")

    def end(self) -> None:
        """No more turns."""
        self.process.communicate()


def git(folder: Path, *arguments: str) -> None:
    """Run git under a name of the example's own."""
    identity = ["-c", "user.name=example", "-c", "user.email=example@localhost", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)


def measure(history: Path, base: Training, head: Training) -> None:
    """Fit base and head in turns, so that what else the machine does slows both; the head's runs come last."""
    for _ in range(NEW):
        for training in (base, head, base):
            training.fit()
    for training in (base, head):
        add_runs(RunStore(history), RunStore(training.history).all())


def check(history: Path, form: str, output: Path) -> int:
    """Write one report, print the table, return the exit status."""
    command = [sys.executable, "-m", "kpt_lightning.cli.main", "regress", "check", "--store", str(history)]
    status = subprocess.run([*command, *JUDGE, "--format", form, "--output", str(output)]).returncode
    print(f"Exit status {status}; {form} in {output}\n", flush=True)
    return status


def judged(work: Path, base: Training, branch: str, expected: int) -> bool:
    """Whether the check of a branch comes out as expected."""
    head, history = Training(work / branch), work / "runs.sqlite"
    try:
        # A busy machine can blur one attempt; what is slower stays slower.
        for _ in range(ATTEMPTS):
            measure(history, base, head)
            if check(history, "markdown", work / f"{branch}.md") == expected:
                return True
    finally:
        head.end()
    return False


def play(work: Path) -> bool:
    """Both acts; whether each came out as it should."""
    (work / "base").mkdir(parents=True)
    shutil.copy(HERE / "train.py", work / "base")
    git(work / "base", "init", "--quiet")
    git(work / "base", "add", "train.py")
    git(work / "base", "commit", "--quiet", "--message", "Train")
    for branch in ("unchanged", "slower"):
        git(work, "clone", "--quiet", "base", branch)
    git(work / "slower", "apply", str(HERE / "slow_down.patch"))
    git(work / "slower", "commit", "--quiet", "--all", "--message", "Log how sensitive the model is")

    base = Training(work / "base")
    try:
        print("A branch without a change:", flush=True)
        green = judged(work, base, "unchanged", GREEN)
        print("A branch with slow_down.patch:", flush=True)
        red = judged(work, base, "slower", RED)
    finally:
        base.end()
    red = check(work / "runs.sqlite", "junit", work / "slower.xml") == RED and red
    print(f"The comment on the pull request:\n\n{(work / 'slower.md').read_text(encoding='utf-8')}")
    return green and red


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="a new folder for everything; a temporary one by default")
    work = (parser.parse_args().work or Path(tempfile.mkdtemp(prefix="kpt-ci-")) / "work").resolve()
    ok = play(work)
    print(f"{'As it should be' if ok else 'NOT as it should be: green, then red'}; everything is in {work}")
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
