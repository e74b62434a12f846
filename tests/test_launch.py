"""Real processes, as a user starts them."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.huggingface.conftest import FP8

LOOP = """
import json, sys, torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tests.huggingface.tiny import llama, rows, train

accelerator = Accelerator(gradient_accumulation_steps=2)
{before}
model = llama()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=4))
losses = train(accelerator, model, optimizer, loader)
accelerator.print(json.dumps({{"losses": losses, "argv": sys.argv, "kind": type(model).__name__}}))
accelerator.end_training()
"""

# Accelerate shards on accelerators alone; its code for it runs on a CPU all the same.
SHARDED = """
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    cpu_ram_efficient_loading=False)
accelerator.state.distributed_type = DistributedType.FSDP
"""

REPOSITORY = Path(__file__).parents[1]
# torch's own threads, now and then, on a busy machine, after the script's last line.
ABORTED_AT_EXIT = "terminate called without an active exception"
LAUNCH = ("-m", "kpt_lightning.launch")


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "KPT_"))}
    return {
        **kept, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY), **more,
    }  # fmt: skip


def run(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    for _ in range(2):
        done = subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=120)
        if ABORTED_AT_EXIT not in done.stderr:
            break
    return done


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, object] = json.loads(line)
    return found


def write(folder: Path, text: str, name: str = "train.py") -> None:
    (folder / name).write_text(textwrap.dedent(text))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, LOOP.format(before=""))
    (tmp_path / "kpt.yaml").write_text(json.dumps(FP8))
    return tmp_path


def test_accelerate_launches_an_unmodified_script_in_fp8(folder: Path) -> None:
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1")
    launcher = (*launcher, "--mixed_precision", "bf16", "--dynamo_backend", "no")
    plain = answer(run(folder, *launcher, "train.py", "--rate", "3"))
    done = run(folder, *launcher, *LAUNCH, "--kpt-config", "kpt.yaml", "train.py", "--rate", "3")
    ours = answer(done)
    assert ours["argv"] == plain["argv"] == ["train.py", "--rate", "3"]
    assert ours["losses"] != plain["losses"]
    assert ours["losses"] == pytest.approx(plain["losses"], rel=0.01)
    assert "14 of 15 linear layers in FP8" in done.stderr
    assert "kpt: proved: fp8 calls" in done.stderr


@pytest.mark.parametrize(("before", "kind"), [("", "DistributedDataParallel"), (SHARDED, "FSDPLlamaForCausalLM")])
def test_two_processes_train_in_fp8_and_agree_with_the_plain_run(folder: Path, before: str, kind: str) -> None:
    write(folder, LOOP.format(before=before))
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    plain = answer(run(folder, *launcher, "train.py"))
    done = run(folder, *launcher, *LAUNCH, "--kpt-config", "kpt.yaml", "train.py")
    ours = answer(done)
    assert ours["kind"] == plain["kind"] == kind
    assert ours["losses"] == pytest.approx(plain["losses"], rel=0.01)
    assert done.stderr.count("linear layers in FP8") == 1
    assert "kpt: proved: fp8 calls" in done.stderr


def test_the_config_may_come_from_the_environment(folder: Path) -> None:
    done = run(folder, *LAUNCH, "train.py", KPT_CONFIG="kpt.yaml")
    assert "linear layers in FP8" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kpt-config", "bad.yaml", "train.py"], "kpt: levle='high': is not a setting. Known here: level"),
        (["--kpt-config", "none.yaml", "train.py"], "kpt: config='none.yaml': cannot be read"),
        (["--kpt-plan", "kpt.yaml", "train.py"], "kpt: plan"),
        (["absent.py"], "kpt: script='absent.py': is no file"),
        ([], "the following arguments are required: script"),
    ],
)
def test_wrong_usage_ends_in_one_line_before_the_script_starts(
    folder: Path, arguments: list[str], message: str
) -> None:
    (folder / "bad.yaml").write_text("levle: high\n")
    done = run(folder, *LAUNCH, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_traceback_begins_with_the_script(tmp_path: Path) -> None:
    write(tmp_path, "def fall():\n    raise ValueError('broken')\nfall()\n")
    plain, ours = run(tmp_path, "train.py"), run(tmp_path, *LAUNCH, "train.py")
    assert ours.returncode == plain.returncode == 1
    assert ours.stderr.splitlines()[-1] == "ValueError: broken"
    frames = [line.strip() for line in ours.stderr.splitlines() if line.strip().startswith("File")]
    assert len(frames) == 2
    assert all("train.py" in frame for frame in frames)


@pytest.mark.parametrize(("code", "status"), [("7", 7), ("0", 0), ("None", 0), ("'no'", 1)])
def test_the_exit_status_is_the_scripts(tmp_path: Path, code: str, status: int) -> None:
    write(tmp_path, f"import sys\nsys.exit({code})\n")
    assert run(tmp_path, *LAUNCH, "train.py").returncode == status


def test_the_script_sees_what_python_would_show_it(tmp_path: Path) -> None:
    text = """
    import json, os, sys, beside
    module = sys.modules["__main__"]
    print(json.dumps([__name__, sys.argv, os.getcwd(), sys.path[0], os.path.basename(__file__), module.__file__,
                      beside.VALUE, module.__spec__ is None]))
    """
    (tmp_path / "inner").mkdir()
    write(tmp_path, text, "inner/train.py")
    write(tmp_path, "VALUE = 1", "inner/beside.py")
    plain, ours = run(tmp_path, "inner/train.py", "-m", "x"), run(tmp_path, *LAUNCH, "inner/train.py", "-m", "x")
    assert json.loads(ours.stdout) == json.loads(plain.stdout)


def test_a_module_is_run_as_python_runs_it(folder: Path) -> None:
    (folder / "package").mkdir()
    write(folder, "from package.other import VALUE\nimport sys\nprint(__name__, sys.argv[1:], VALUE)", "package/run.py")
    write(folder, "VALUE = 3", "package/other.py")
    done = run(folder, *LAUNCH, "-m", "package.run", "-x", "4")
    assert done.stdout == "__main__ ['-x', '4'] 3\n"


def test_spawned_workers_find_the_scripts_own_classes(tmp_path: Path) -> None:
    text = """
    import torch
    from torch.utils.data import DataLoader, Dataset
    class Rows(Dataset):
        def __len__(self): return 4
        def __getitem__(self, index): return torch.tensor(index)
    if __name__ == "__main__":
        loader = DataLoader(Rows(), num_workers=1, multiprocessing_context="spawn")
        print(sum(int(batch) for batch in loader))
    """
    write(tmp_path, text)
    done = run(tmp_path, *LAUNCH, "train.py")
    assert done.stdout == "6\n", done.stderr


def test_a_fork_that_ends_like_the_script_tells_nothing_twice(tmp_path: Path) -> None:
    write(tmp_path, "import os\nchild = os.fork()\nif child: os.waitpid(child, 0)\n")
    done = run(tmp_path, *LAUNCH, "train.py")
    assert done.returncode == 0
    assert done.stderr.count("no model was prepared") == 1


def test_nothing_prepared_fails_where_it_must(tmp_path: Path) -> None:
    write(tmp_path, "print('done')")
    (tmp_path / "kpt.yaml").write_text("on_mismatch: raise\n")
    done = run(tmp_path, *LAUNCH, "--kpt-config", "kpt.yaml", "train.py")
    assert done.returncode == 1
    assert "no model was prepared for training" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_ends_the_script_and_leaves_no_process(tmp_path: Path) -> None:
    text = """
    import os, time
    from torch.utils.data import DataLoader
    if __name__ == "__main__":
        workers = iter(DataLoader(range(10**6), num_workers=1))
        next(workers)
        print(os.getpid(), workers._workers[0].pid, flush=True)
        time.sleep(60)
    """
    write(tmp_path, text)
    command = [sys.executable, *LAUNCH, "train.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pids = [int(each) for each in process.stdout.readline().split()]
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in told
    give_up = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < give_up
        time.sleep(0.05)
