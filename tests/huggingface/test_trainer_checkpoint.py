"""Checkpoints of a real Hugging Face Trainer: resumed exactly, loaded without this library, whole after kill -9."""

from typing import Any

import pytest

from tests.huggingface.test_checkpoint import HERE, run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the Trainers did, in one process."""
    return run(str(HERE / "trainer_checkpoints.py"), str(tmp_path_factory.mktemp("trainer")))


@pytest.mark.parametrize("name", ["plain", "fp8"])
def test_a_run_resumed_at_step_2_has_the_losses_of_one_that_was_not_interrupted(found: Any, name: str) -> None:
    assert list(found[name]["losses"]) == ["1", "2", "3", "4"]
    assert found[name]["resumed"] == found[name]["losses"]


def test_a_converted_and_compiled_model_is_saved_by_its_plain_names_and_dtypes(found: Any) -> None:
    assert found["fp8"]["layers"] == 14
    assert found["fp8"]["losses"] != found["plain"]["losses"]
    assert found["fp8"]["keys"] == found["plain"]["keys"]
    assert not any("_orig_mod" in key for key in found["fp8"]["keys"])
    assert found["fp8"]["exported"]


def test_limit_and_best_checkpoint_are_the_trainers_own(found: Any) -> None:
    for name in ("plain", "fp8"):
        assert found[name]["folders"] == ["checkpoint-2", "checkpoint-4", "exported"]
        assert found[name]["best"] == "checkpoint-4"


def test_what_is_resumed_from_after_a_kill_is_whole(found: Any) -> None:
    files = [
        "config.json", "generation_config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt",
        "trainer_state.json", "training_args.bin",
    ]  # fmt: skip
    assert {each[0] for each in found["killed"]} == {"checkpoint-2", "checkpoint-4"}
    assert all(each[1:] == files for each in found["killed"])
    # The Trainer alone takes what was torn, which is why there is something to do.
    assert any(each[0] == "checkpoint-4" and each[1:] != files for each in found["killed_plain"])
