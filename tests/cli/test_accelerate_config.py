import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kpt_lightning.config import KptConfig
from kpt_lightning.huggingface.accelerate_check import check_accelerate_yaml
from tests.cli.kpt_command import kpt

SCRIPT = """
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

accelerator = Accelerator()
model = torch.nn.Linear(4, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
accelerator.backward(model(torch.ones(2, 4, device=accelerator.device)).sum())
optimizer.step()
ranks = gather_object([accelerator.process_index])
if accelerator.is_main_process:
    print("trained", accelerator.num_processes, accelerator.mixed_precision, ranks, flush=True)
accelerator.end_training()
"""


# torch's own threads, now and then, on a busy machine, after the script's last line.
ABORTED_AT_EXIT = "terminate called without an active exception"


def write(folder: Path, *options: str):
    return kpt(
        "accelerate-config", "--output", str(folder / "acc.yaml"), "--kpt-output", str(folder / "kpt.yaml"), *options
    )


def launch(command: str, folder: Path) -> str:
    """Run the printed shell line, without the part that is kpt's launcher, on a script of its own."""
    before, _, rest = command.partition("accelerate launch ")
    options = rest.partition(" -m kpt_lightning.launch")[0].split()
    (folder / "train.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(word.split("=") for word in before.split())
    words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, str(folder / "train.py")]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    if ABORTED_AT_EXIT in done.stderr:
        done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("options", "said"), [((), "trained 1 no [0]"), (("--processes", "2"), "trained 2 no [0, 1]")])
def test_accelerate_launch_trains_with_the_printed_command(tmp_path, options, said):
    done = write(tmp_path, "--yes", "--cpu", *options)
    assert done.status == 0, done.err
    command = done.out.strip().splitlines()[-1]
    assert f"-m kpt_lightning.launch --kpt-config {tmp_path / 'kpt.yaml'} train.py" in command
    assert said in launch(command, tmp_path)


def test_without_a_flag_the_files_are_for_this_machine_and_kpt_has_its_defaults(tmp_path):
    done = write(tmp_path)
    assert done.status == 0, done.err
    check_accelerate_yaml(tmp_path / "acc.yaml")
    assert KptConfig.from_yaml(tmp_path / "kpt.yaml") == KptConfig()


def test_flags_go_into_the_files(tmp_path):
    options = ("--gpu", "--processes", "4", "--parallel", "fsdp2", "--level", "aggressive", "--precision", "fp8")
    done = write(tmp_path, *options)
    assert done.status == 0, done.err
    written = yaml.safe_load((tmp_path / "acc.yaml").read_text())
    assert (written["distributed_type"], written["num_processes"], written["use_cpu"]) == ("FSDP", 4, False)
    assert written["mixed_precision"] == "bf16"
    assert written["fsdp_config"]["fsdp_version"] == 2
    config = KptConfig.from_yaml(tmp_path / "kpt.yaml")
    assert (config.level, config.precision) == ("aggressive", "fp8")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--cpu", "--precision", "fp8"), "use_cpu"),
        (("--cpu", "--parallel", "fsdp2"), "parallel='fsdp2'"),
        (("--gpu", "--processes", "1", "--parallel", "ddp"), "processes=1"),
        (("--processes", "2", "--parallel", "single"), "parallel='single'"),
        (("--processes", "0"), "processes=0"),
        (("--level", "bold"), "level='bold'"),
        (("--gpu", "--precision", "32", "--mixed-precision", "bf16"), "mixed_precision='bf16'"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_no_file(tmp_path, options, named):
    done = write(tmp_path, "--yes", *options)
    assert done.status == 2
    assert named in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["acc.yaml", "kpt.yaml"])
def test_a_file_that_is_there_stays_unless_told_otherwise(tmp_path, name):
    (tmp_path / name).write_text("mine")
    done = write(tmp_path, "--yes")
    assert done.status == 2
    assert "--overwrite" in done.err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    assert write(tmp_path, "--yes", "--overwrite", "--cpu", "--precision", "fp8").status == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"], "refused, and yet replaced"
    assert write(tmp_path, "--yes", "--overwrite").status == 0


def test_one_file_cannot_be_both(tmp_path):
    done = kpt("accelerate-config", "--output", str(tmp_path / "a"), "--kpt-output", str(tmp_path / "a"))
    assert (done.status, list(tmp_path.iterdir())) == (2, [])


def test_on_a_terminal_it_asks_and_an_empty_line_is_the_default(tmp_path):
    """In a pseudo-terminal, as a person sees it."""
    pty = pytest.importorskip("pty", reason="needs the pty module, which is Unix only")
    answers = b"tpu\ngpu\n2\nfsdp2\n\nfp8\n\n"
    words = [sys.executable, "-m", "kpt_lightning.cli.main", "accelerate-config"]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        words, cwd=tmp_path, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, close_fds=True
    )
    os.write(leader, answers)
    out = process.communicate(timeout=60)[0].decode()
    os.close(leader)
    os.close(follower)
    assert process.returncode == 0, out
    assert "'tpu' is none of gpu, cpu" in out
    assert "How do they train together?" in out
    written = yaml.safe_load((tmp_path / "acc.yaml").read_text())
    assert (written["distributed_type"], written["num_processes"]) == ("FSDP", 2)
    assert KptConfig.from_yaml(tmp_path / "kpt.yaml") == KptConfig(precision="fp8")
