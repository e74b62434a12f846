"""Run example scripts that nobody here wrote, unmodified: plain, and with ``-m kpt_lightning.launch`` before them.

Each runs twice under ``accelerate launch`` on the same local data, offline. The losses that it gives to
``Accelerator.backward`` are noted in both runs and compared by the package's own gate for fewer bits.

    python benchmarks/foreign_scripts.py --accelerate DIR --transformers DIR --trl DIR --out foreign.md
"""

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from hashlib import sha256
from importlib import metadata, util
from pathlib import Path
from statistics import fmean

import torch
import yaml
from foreign_cases import CASES, Case
from foreign_data import make_data

from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.loss_run import judge_losses

PROBE = Path(__file__).parent / "foreign_probe"
KPT = ("-m", "kpt_lightning.launch", "--kpt-config")
SHOWN = ("accelerate", "transformers", "trl", "datasets", "evaluate", "torch", "kpt-lightning")
# Layers of this size gain nothing from FP8, and are converted to see that it trains.
CONFIG = {"precision": "fp8", "float8": {"only_where_it_pays": False}}
SECONDS = 600


@dataclass
class Outcome:
    """Of one run."""

    command: str
    code: int
    losses: list[float]
    said: list[str] = field(default_factory=list)
    end: str = ""


def main() -> None:
    options = parse()
    work = Path(tempfile.mkdtemp(prefix="foreign-")) if options.work is None else options.work.resolve()
    make_data(work / "data")
    (work / "acc.yaml").write_text(yaml.safe_dump(launcher_config()))
    config = CONFIG if torch.cuda.is_available() else {**CONFIG, "float8": {**CONFIG["float8"], "emulate": True}}
    (work / "kpt.yaml").write_text(
        yaml.safe_dump(config) if options.kpt_config is None else options.kpt_config.read_text()
    )
    sections, rows, bad = [], [], 0
    for case in CASES:
        if options.only not in case.name:
            continue
        if why := why_not(case, getattr(options, case.checkout)):
            rows.append(f"| {case.name} | not run: {why} | | | | | |")
            continue
        plain, kpt = (run(case, getattr(options, case.checkout), work, variant) for variant in ("plain", "kpt"))
        verdict = compare(plain, kpt)
        bad += not verdict
        rows.append(row(case, plain, kpt, verdict))
        # A checkout may be a fork: the digest says which file was run.
        digest = sha256((getattr(options, case.checkout) / case.script).read_bytes()).hexdigest()
        sections.append(details(case, digest, plain, kpt, verdict))
        print(rows[-1], flush=True)
        options.out.write_text(report(rows, sections, (work / "kpt.yaml").read_text()))
    raise SystemExit(1 if bad else 0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("accelerate", "transformers", "trl"):
        parser.add_argument(f"--{name}", type=Path, help=f"checkout of {name}; its scripts are left out without")
    parser.add_argument("--kpt-config", type=Path, help="settings; default: FP8 for every layer, emulated on a CPU")
    parser.add_argument("--only", default="", help="scripts whose name holds this")
    parser.add_argument("--work", type=Path, help="an empty folder for data and runs; default: a temporary one")
    parser.add_argument("--out", type=Path, default=Path("foreign_scripts.md"), help="the log, Markdown")
    return parser.parse_args()


def launcher_config() -> dict[str, object]:
    """Of ``accelerate launch``: one process, on the GPU where there is one."""
    return {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": "NO", "mixed_precision": "no", "num_machines": 1,
        "num_processes": 1, "use_cpu": not torch.cuda.is_available(), "machine_rank": 0,
        "main_training_function": "main",
    }  # fmt: skip


def why_not(case: Case, checkout: Path | None) -> str:
    """Why it cannot run here, empty where it can."""
    if checkout is None:
        return f"no checkout of {case.checkout} was given"
    if not (checkout / case.script).is_file():
        return "this checkout has no such script"
    absent = [name for name in case.needs if util.find_spec(name) is None]
    return case.cannot or (f"{', '.join(absent)} not installed" if absent else "")


def run(case: Case, checkout: Path, work: Path, variant: str) -> Outcome:
    """One run in a folder of its own, where the local data have the hub's names."""
    folder = work / case.name.replace("/", "_") / variant
    folder.mkdir(parents=True)
    for entry in (work / "data").iterdir():
        (folder / entry.name).symlink_to(entry)
    losses = folder / "losses.txt"
    arguments = shlex.split(case.arguments.format(data=work / "data", out=folder / "out"))
    kpt = [*KPT, str(work / "kpt.yaml")] if variant == "kpt" else []
    launch = ["--config_file", str(work / "acc.yaml"), *kpt, str((checkout / case.script).resolve()), *arguments]
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "cache"),
        "FOREIGN_LOSSES": str(losses), "PYTHONPATH": str(PROBE), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    begun = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", *launch], cwd=folder, env=environment,
            capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        code, said = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as expired:
        code, said = -1, f"not through after {SECONDS} s\n{expired.stderr!r}"
    print(f"{case.name} {variant}: exit {code} after {time.monotonic() - begun:.0f} s", flush=True)
    shown = shlex.join(["accelerate", "launch", *launch])
    places = {folder: "RUN", work: "WORK", checkout.resolve(): case.checkout}
    for path, name in (places | {Path(sys.prefix): "PYTHON", Path(sys.base_prefix): "PYTHON"}).items():
        shown, said = shown.replace(str(path), name), said.replace(str(path), name)
    numbers = [float(line) for line in losses.read_text().split()] if losses.exists() else []
    lines = said.splitlines()
    return Outcome(shown, code, numbers, [each for each in lines if each.startswith("kpt: ")], "\n".join(lines[-15:]))


def compare(plain: Outcome, kpt: Outcome) -> Decision:
    """The gate for fewer bits, on the mean of the last quarter of the losses."""
    if plain.code or kpt.code:
        alike = "both exit alike" if plain.code == kpt.code else "exit statuses differ"
        return Rejected("loss curves", f"{alike}: {plain.code} and {kpt.code}")
    if not plain.losses or len(plain.losses) != len(kpt.losses):
        return Rejected("loss curves", f"{len(plain.losses)} losses plain, {len(kpt.losses)} with kpt")
    spreads = gate(Numerics.PRECISION, torch.float32).loss_spreads
    assert spreads is not None
    quarter = max(1, len(plain.losses) // 4)
    start = fmean(plain.losses[: min(quarter, 3)])
    before, after = (fmean(each.losses[-quarter:]) for each in (plain, kpt))
    text = f"mean of the last {quarter} losses {after:.4f}, plain {before:.4f}, from {start:.4f}"
    if before >= start:
        return Rejected("loss curves", f"{text}: the plain run does not learn, which tells nothing")
    good = judge_losses([before], [after], start, spreads)
    return Accepted("loss curves", text) if good else Rejected("loss curves", text)


def row(case: Case, plain: Outcome, kpt: Outcome, verdict: Decision) -> str:
    exits = f"{plain.code} / {kpt.code}"
    if not plain.losses or not kpt.losses:
        return f"| {case.name} | {exits} | | | | | {verdict.reason} |"
    distances = [abs(one - other) for one, other in zip(plain.losses, kpt.losses, strict=False)]
    ends = f"{plain.losses[-1]:.4f} / {kpt.losses[-1]:.4f}"
    return (
        f"| {case.name} | {exits} | {len(plain.losses)} | {plain.losses[0]:.4f} / {kpt.losses[0]:.4f} | {ends} "
        f"| {max(distances):.4f} | {'agree' if verdict else verdict.reason} |"
    )


def details(case: Case, digest: str, plain: Outcome, kpt: Outcome, verdict: Decision) -> str:
    lines = [
        f"## {case.name}",
        "",
        f"SHA-256 of the script: `{digest}`",
        "",
        "```sh",
        plain.command,
        kpt.command,
        "```",
        "",
        f"Verdict: {verdict.reason}.",
        "",
    ]
    lines += [f"- {each}" for each in kpt.said] + [""]
    for name, outcome in (("plain", plain), ("kpt", kpt)):
        if outcome.code:
            lines += [f"End of the {name} run:", "", "```text", outcome.end, "```", ""]
        else:
            lines += [f"Losses, {name}: {' '.join(f'{each:.4f}' for each in outcome.losses)}", ""]
    return "\n".join(lines)


def report(rows: list[str], sections: list[str], config: str) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN if util.find_spec(name.replace("-", "_")))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    head = [
        f"# Scripts of others, {date.today()}", "",
        f"{device}, Python {platform.python_version()}, {versions}. Unmodified, offline, on local data, each plain and "
        "with `-m kpt_lightning.launch`, with these settings:", "",
        "```yaml", config.strip(), "```", "",
        "Each loss is what the script gave to `Accelerator.backward`. The verdict is the package's gate for fewer "
        "bits: the mean of the last quarter of the losses may lie above the plain run's by a tenth of its fall.", "",
        "| script | exit, plain / kpt | losses | first, plain / kpt | last, plain / kpt | largest distance | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    return "\n".join([*head, *rows, "", *sections]) + "\n"


if __name__ == "__main__":
    main()
