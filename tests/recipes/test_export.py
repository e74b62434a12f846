import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import lightning_run
from kpt_lightning.recipes.export import check_output
from kpt_lightning.recipes.registry import default_config

CASES = [
    ("causal-lm-full", {}),
    ("causal-lm-lora", {}),
    ("causal-lm-lora", {"merge": True}),
    ("causal-lm-qlora", {"base": "int4"}),
    ("causal-lm-qlora", {"merge": True}),
]

# Prints the logits that a process without this package computes.
READER = """
import json, sys
sys.modules["kpt_lightning"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder, base in json.loads(sys.argv[1]):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("Read by another process.", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.save(model.eval()(input_ids=tokens).logits, f"{folder}.logits")
"""


def test_what_is_written_is_the_trained_model_to_a_process_without_this_package(
    byte_folder: Path, tmp_path: Path
) -> None:
    import json

    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(byte_folder)("Read by another process.", return_tensors="pt").input_ids
    results, asked = [], []
    for number, (recipe, changes) in enumerate(CASES):
        output = tmp_path / f"out{number}"
        config = default_config(
            recipe, model=str(byte_folder), steps=3, held_out_batches=1, learning_rate=1e-2, output=output,
            data={"sequence_length": 32}, **changes,
        )  # fmt: skip
        results.append(lightning_run.fine_tune(config, strategy="auto", say=lambda said: None))
        is_adapter = config.method != "full" and not config.merge
        asked.append((str(output), str(byte_folder) if is_adapter else None))
        assert (output / "adapter_model.safetensors").exists() == is_adapter
        assert (output / "model.safetensors").exists() != is_adapter
    command = [sys.executable, "-W", "ignore", "-c", READER, json.dumps(asked)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for result, (folder, _), (recipe, _) in zip(results, asked, CASES, strict=True):
        with torch.no_grad():
            ours = result.model.eval()(input_ids=tokens).logits
        theirs = torch.load(f"{folder}.logits")
        # The adapters of qlora are read onto weights that were not quantized.
        allowed = {"atol": 1e-5, "rtol": 1e-4} if recipe != "causal-lm-qlora" else {"atol": 0.05, "rtol": 0.1}
        torch.testing.assert_close(theirs, ours, **allowed)


def test_overwriting_leaves_nothing_of_the_old_folder(byte_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "adapter_config.json").write_text("{}")
    config = default_config(
        "causal-lm-full", model=str(byte_folder), steps=1, held_out_batches=1, output=output,
        data={"sequence_length": 32},
    )  # fmt: skip
    lightning_run.fine_tune(config, strategy="auto", overwrite=True, say=lambda said: None)
    assert (output / "model.safetensors").exists()
    assert not (output / "adapter_config.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["byte-llama", "out"]


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match=r"is a file\. Name a folder"):
        check_output(tmp_path / "out", overwrite=True)


def test_the_working_directory_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot be exchanged as a whole\. Name a folder below it"):
        check_output(tmp_path, overwrite=True)


def test_an_empty_folder_and_a_new_one_are_free(tmp_path: Path) -> None:
    check_output(None, overwrite=False)
    check_output(tmp_path, overwrite=False)
    check_output(tmp_path / "a" / "b", overwrite=False)
