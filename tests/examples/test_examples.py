import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = ("--steps", "9", "--batch-size", "1", "--sequence-length", "64", "--held-out-batches", "2")


def run(example: str, folder: Path, *arguments: str) -> str:
    """Run an example as a user does and return what it printed."""
    command = [sys.executable, EXAMPLES / example, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_is_short_and_its_docstring_has_the_command(example: str) -> None:
    text = (EXAMPLES / example).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert re.match(r'""".*Run: (make|python) ', text)


def test_quickstart_trains_and_its_second_run_compares_itself_with_the_first(tmp_path: Path) -> None:
    first = run("lightning_quickstart.py", tmp_path, "--epochs", "1")
    second = run("lightning_quickstart.py", tmp_path, "--epochs", "1")
    # ln 8 is the loss of a guess among eight classes.
    assert float(first.rpartition("Loss after training: ")[2]) < 1.0
    assert "nothing to compare with" in first
    assert "nothing to compare with" not in second
    assert "1 run before: too few to judge" in second


@pytest.mark.slow
def test_a_plain_loop_trains_with_what_a_trial_kept_and_its_second_run_tries_nothing(tmp_path: Path) -> None:
    first = run("auto_optimize.py", tmp_path, "--max-seconds", "120")
    second = run("auto_optimize.py", tmp_path, "--max-seconds", "120")
    assert "Plan by trial: " in first
    assert "Plan by trial, kept from an earlier run: " in second
    for output in (first, second):
        assert "bit for bit those before: True" in output
        start, end = map(float, re.findall(r"Loss at step \d+: (\S+)", output))
        assert end < start
    # The same trials, read again and not made again.
    kept = [re.findall(r"precision 32 │ (by trial in \d+ s)", output) for output in (first, second)]
    assert kept[0] == kept[1] != []


@pytest.mark.slow
def test_demo_lowers_the_held_out_loss_and_its_second_run_compares_itself_with_the_first(tmp_path: Path) -> None:
    first, second = run("demo.py", tmp_path, *SMALL), run("demo.py", tmp_path, *SMALL)
    losses = [re.findall(r"Held-out loss (\S+) -> (\S+) nats", output) for output in (first, second)]
    # Same seed, same text, same order: the same figures.
    assert losses[0] == losses[1]
    ((before, after),) = losses[0]
    assert float(after) < float(before)
    for part in ("This machine:", "Plan by rules:", "precision", "tokens/s", "peak memory", "Record stored in"):
        assert part in first
        assert part in second
    assert "The first run like this" in first
    assert "Compared with 1 earlier run; five are enough to judge by." in second
