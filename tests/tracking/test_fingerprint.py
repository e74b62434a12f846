import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from kpt_lightning.config import Float8Config
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.tracking import fingerprint as f


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_the_fingerprint_is_the_same_in_another_process_with_another_hash_seed():
    code = (
        "from torch import nn; from kpt_lightning.tracking.fingerprint import model_fingerprint as m;"
        "print(m(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == f.model_fingerprint(model())


def test_weights_buffers_and_training_mode_do_not_matter():
    other = model()
    with torch.no_grad():
        other[0].weight.zero_()
    other.register_buffer("amax", torch.zeros(3))
    other.eval()
    assert f.model_fingerprint(other) == f.model_fingerprint(model())


def test_compilation_in_place_or_by_wrapper_does_not_matter():
    in_place, wrapped = model(), model()
    in_place[0].compile(backend="eager")
    wrapped[0] = torch.compile(wrapped[0], backend="eager")
    assert f.model_fingerprint(in_place) == f.model_fingerprint(model())
    assert f.model_fingerprint(wrapped) == f.model_fingerprint(model())
    assert f.model_fingerprint(torch.compile(model(), backend="eager")) == f.model_fingerprint(model())


def test_fp8_conversion_does_not_matter():
    converted = model()
    assert convert_to_float8(converted, ["0"], Float8Config(emulate=True, only_where_it_pays=False))
    assert f.model_fingerprint(converted) == f.model_fingerprint(model())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.append(nn.Linear(4, 4)),
        lambda m: m.__setitem__(0, nn.Linear(16, 16, bias=False)),
        lambda m: m[0].to(torch.bfloat16),
        lambda m: m[0].requires_grad_(False),
    ],
    ids=["layer", "shape", "dtype", "frozen"],
)
def test_structure_matters(change):
    other = model()
    change(other)
    assert f.model_fingerprint(other) != f.model_fingerprint(model())


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_lazy_layer_has_a_fingerprint_before_its_first_pass():
    assert f.model_fingerprint(nn.LazyLinear(4)) == f.model_fingerprint(nn.LazyLinear(4))


def test_environment_holds_strings_hides_the_host_and_takes_extras(tmp_path):
    facts = f.environment({"driver": "1"}, tmp_path)
    assert facts["torch"] == str(torch.__version__)
    assert type(facts["torch"]) is str
    assert facts["driver"] == "1"
    assert socket.gethostname() not in facts.values()
    assert {"python", "os", "host", "lightning"} <= facts.keys()
    assert f.CODE_KEY not in facts


def test_git_commit_is_that_of_the_directory(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", *identity, "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert f.git_commit(tmp_path) is None
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert f.git_commit(tmp_path) == git("rev-parse", "HEAD")
