"""The CI example: its files hold real commands, its scripts run, and a planted slow-down turns the build red."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

from kpt_lightning.cli.main import app
from kpt_lightning.reports.markdown import MARKER
from kpt_lightning.tracking.store import RunStore

CI = Path(__file__).parents[2] / "examples" / "ci"
USAGE_ERROR = typer.BadParameter.__mro__[1]
FILES = ["github-actions.yml", "gitlab-ci.yml"]

# A training that takes no time: what a step took is in a file of the checkout. Each run differs a little.
TRAINING = """
import sys
from pathlib import Path
from kpt_lightning.tracking.record import Metric, RunKey, RunRecord
from kpt_lightning.tracking.fingerprint import git_commit
from kpt_lightning.tracking.store import RunStore
import uuid
store = RunStore()
seconds = float(Path("seconds").read_text()) * (1 + 0.01 * (len(store.ids()) % 3))
key = RunKey(name="own", model="a", config="b", device="cpu", device_count=1, strategy="single", precision="32-true")
store.add(RunRecord(
    run_id=uuid.uuid4().hex, created_at="2026-01-01T00:00:00+00:00", key=key, status="finished",
    metrics={"step_time": Metric(median=seconds, unit="s", better="lower")},
    environment={"torch": "2", "git_commit": git_commit() or ""},
))
"""


def document(name: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((CI / name).read_text(encoding="utf-8"))
    return data


def scripts(name: str) -> dict[str, str]:
    """Each shell script of a file, by the name of its step or the place in its job."""
    if name == "github-actions.yml":
        steps = [step for job in document(name)["jobs"].values() for step in job["steps"]]
        return {step["name"]: step["run"] for step in steps if "run" in step}
    return {
        f"{job} {part}": "\n".join(value[part])
        for job, value in document(name).items() if isinstance(value, dict)
        for part in ("before_script", "script") if part in value
    }  # fmt: skip


def commands(script: str) -> list[list[str]]:
    """The arguments of each ``kpt``, with those of each call where it stands in a function."""
    joined = script.replace("\\\n", " ")
    calls = [shlex.split(call) for call in re.findall(r"^\s*judge (--[^|&;\n]*)", joined, re.MULTILINE)]
    found = []
    for line in re.findall(r"(?:^|[;&|({])\s*kpt ([^|&;>\n]*)", joined, re.MULTILINE):
        arguments = shlex.split(line)
        if "$@" in arguments:
            found += [[*arguments[: arguments.index("$@")], *call] for call in calls]
        else:
            found.append(arguments)
    return found


def parse(arguments: list[str]) -> None:
    """Let the real program read its arguments, without running it."""
    command: Any = get_command(app)
    rest = list(arguments)
    while hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    assert command.make_context("kpt", rest).params


@pytest.mark.parametrize("name", FILES)
def test_every_kpt_command_exists_with_its_options(name: str) -> None:
    every = [arguments for script in scripts(name).values() for arguments in commands(script)]
    assert {tuple(arguments[:2]) for arguments in every} >= {("regress", "check"), ("regress", "import")}
    for arguments in every:
        parse(arguments)


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    for wrong in ("regress chek", "regress check --formt json", "regress check --format pdf", "regress import"):
        with pytest.raises((KeyError, USAGE_ERROR)):
            parse(wrong.split())


@pytest.mark.parametrize("name", FILES)
def test_every_script_is_valid_shell(name: str) -> None:
    for script in scripts(name).values():
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_actions_are_pinned_and_only_the_job_that_comments_may_write() -> None:
    text, jobs = (CI / "github-actions.yml").read_text(encoding="utf-8"), document("github-actions.yml")["jobs"]
    uses = re.findall(r"uses: (.*)", text)
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", each) for each in uses)
    assert document("github-actions.yml")["permissions"] == {}
    assert {name: job["permissions"] for name, job in jobs.items()} == {
        "measure": {"contents": "read"}, "comment": {"pull-requests": "write"}
    }  # fmt: skip
    assert not any("checkout" in step.get("uses", "") for step in jobs["comment"]["steps"])
    checkouts = [step for step in jobs["measure"]["steps"] if "checkout" in step.get("uses", "")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)
    # A title or branch name in a script would be run.
    assert not any("${{" in script for script in scripts("github-actions.yml").values())


def test_gitlab_jobs_have_images_of_a_version_and_keep_the_reports() -> None:
    jobs = {name: job for name, job in document("gitlab-ci.yml").items() if isinstance(job, dict)}
    assert all(re.fullmatch(r"\w+:\d[\d.]*", job["image"]) for job in jobs.values())
    measure, comment = jobs["training-speed"], jobs["training-speed-comment"]
    assert measure["artifacts"]["reports"]["junit"] == "report/junit.xml"
    assert (measure["artifacts"]["when"], measure["allow_failure"]) == ("always", {"exit_codes": 3})
    assert comment["variables"]["GIT_STRATEGY"] == "none"
    assert "KPT_COMMENT_TOKEN" not in "".join(measure["script"])


@pytest.mark.parametrize("name", FILES)
def test_the_comment_is_found_by_the_marker_that_markdown_writes(name: str) -> None:
    assert f'startswith("{MARKER}")' in (CI / name).read_text(encoding="utf-8")


def test_the_readme_is_short_and_names_each_file() -> None:
    text = (CI / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert all(path.name in text for path in CI.iterdir() if path.is_file() and path.name != "README.md")


@pytest.mark.parametrize("example", ["train.py", "run_locally.py"])
def test_a_script_is_short_and_its_docstring_has_the_command(example: str) -> None:
    text = (CI / example).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    assert re.match(r'""".*Run: python examples/ci/', text)


def shell(script: str, folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """As a build server runs it, with this Python's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=folder, env=os.environ | {"PATH": path} | environment,
        text=True, capture_output=True, check=False,
    )  # fmt: skip


def own_training(folder: Path, seconds: float) -> Path:
    (folder / "examples" / "ci").mkdir(parents=True)
    (folder / "examples" / "ci" / "train.py").write_text(TRAINING)
    (folder / "seconds").write_text(str(seconds))
    return folder


@pytest.mark.slow
def test_the_steps_for_github_turn_red_for_a_slower_branch_and_leave_every_report(tmp_path: Path) -> None:
    own_training(tmp_path / "base", 0.1)
    own_training(tmp_path / "head", 0.13)
    steps, judged = scripts("github-actions.yml"), str(tmp_path / "judged.sqlite")
    places = {"HISTORY": str(tmp_path / "history" / "runs.sqlite"), "JUDGED": judged}
    done = shell(steps["Measure base and head in turns"], tmp_path, **places)
    assert done.returncode == 0, done.stderr
    # The branch's runs come last, and are in the copy alone.
    assert [len(RunStore(place).all()) for place in (places["HISTORY"], judged)] == [8, 12]
    done = shell(steps["Judge"], tmp_path, **places, GITHUB_STEP_SUMMARY=str(tmp_path / "summary"))
    assert done.returncode == 1, done.stderr
    assert "::error title=own%3A severe regression::step time +" in done.stdout
    comment = (tmp_path / "report" / "comment.md").read_text()
    assert comment.startswith(MARKER)
    assert (tmp_path / "summary").read_text() == comment
    assert ET.parse(tmp_path / "report" / "junit.xml").getroot().attrib["failures"] == "1"


@pytest.mark.slow
def test_the_script_for_gitlab_lets_a_branch_without_a_change_pass(tmp_path: Path) -> None:
    project = own_training(tmp_path / "project", 0.1)
    identity = ["-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "--message", "base"]):
        subprocess.run(["git", *command], cwd=project, check=True)
    sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=project, check=True, capture_output=True, text=True).stdout
    done = shell(
        scripts("gitlab-ci.yml")["training-speed script"], project, CI_MERGE_REQUEST_IID="7",
        CI_MERGE_REQUEST_DIFF_BASE_SHA=sha.strip(), CI_PROJECT_DIR=str(project), KPT_TEAM_HISTORY="",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(RunStore(project / "judged.sqlite").all()) == 12
    assert ET.parse(project / "report" / "junit.xml").getroot().attrib["failures"] == "0"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step", "status"), [(FILES[0], "Judge", 0), (FILES[1], "training-speed script", 3)])
def test_the_first_days_of_a_history_fail_no_build(tmp_path: Path, name: str, step: str, status: int) -> None:
    judge = scripts(name)[step]
    place = RunStore(tmp_path / "new.sqlite").open().place
    done = shell(
        judge[judge.index("judge() {") :], tmp_path, JUDGED=place, GITHUB_STEP_SUMMARY=str(tmp_path / "summary")
    )
    assert done.returncode == status, done.stderr
    assert "No finished run in this history" in (tmp_path / "report" / "comment.md").read_text()


@pytest.mark.slow
def test_a_planted_slow_down_turns_the_build_red_and_a_branch_without_one_stays_green(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(CI, clone, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, str(clone / "run_locally.py"), "--work", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    statuses = re.findall(r"Exit status (\d); (\w+) in", done.stdout)
    # An attempt that the machine blurred may come before the one that counts.
    assert ("0", "markdown") in statuses
    assert statuses[-2:] == [("1", "markdown"), ("1", "junit")]
    work = tmp_path / "work"
    green, red = ((work / f"{branch}.md").read_text(encoding="utf-8") for branch in ("unchanged", "slower"))
    assert green.startswith(f"{MARKER}\n### No regression that fails the build: 2 metrics")
    commit = subprocess.run(
        ["git", "rev-parse", "--short=10", "HEAD"], cwd=work / "slower", check=True, capture_output=True, text=True
    ).stdout.strip()
    assert re.search(r"### Severe regression: .* in ci-example, since run \w{8} of commit " + commit, red)
    assert red in done.stdout
    root = ET.parse(work / "slower.xml").getroot()
    assert {case.attrib["name"] for case in root.iter("testcase")} == {"step_time", "samples_per_second"}
    assert "severe regression" in {each.attrib["type"] for each in root.iter("failure")}
