import time
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kpt_lightning.candidates.candidate import Candidate, Change
from kpt_lightning.candidates.padded_collate import PaddedCollate
from kpt_lightning.candidates.shape_bucketing import CANDIDATE, _same_numbers
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError, KptError
from kpt_lightning.hardware import detect


def samples() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(1, 32, (5 + 3 * (place % 7),), generator=random) for place in range(28)]


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def with_positions(rows: list[Tensor]) -> dict[str, Tensor]:
    batch = collate(rows)
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}


def loader(fn: Any = collate, rows: Any = None, size: int = 2) -> DataLoader[Any]:
    return DataLoader(rows or samples(), batch_size=size, collate_fn=fn)


class Slow(nn.Module):
    """A language model whose kernels are slow on odd lengths."""

    def __init__(self, looks_ahead: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.looks_ahead = nn.Embedding(32, 8), nn.Linear(8, 32), looks_ahead
        self.lengths: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        time.sleep(0.004 if input_ids.shape[1] % 8 else 0.002)
        x = self.embed(input_ids)
        if self.looks_ahead:
            weights = attention_mask[..., None].to(x)
            x = x + (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return {"loss": nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())}


def subject(model: nn.Module, data: Any) -> Subject:
    return Subject(model=model, profile=detect(), config=KptConfig(), device=torch.device("cpu"), loader=data)


def reasons(answer: Any) -> str:
    assert all(isinstance(each, Rejected) for each in answer)
    return "; ".join(each.reason for each in answer)


def test_it_is_a_candidate() -> None:
    assert isinstance(CANDIDATE, Candidate)


def test_ragged_batches_are_padded_where_that_is_faster_and_go_back() -> None:
    model, data = Slow(), loader()
    on = subject(model, data)
    found = CANDIDATE.applies(on)
    assert isinstance(found[0], Change)
    assert found[0].setting == {"multiple": 8, "token": 0, "mask": 1, "longest": None}
    assert found[0].predicted > 1.0
    assert data.collate_fn is collate
    assert all(each.grad is None for each in model.parameters())
    exact = [float(model(**batch)["loss"].detach()) for batch in data]
    applied = CANDIDATE.apply(on, Change.from_dict(found[0].to_dict()).setting)
    batches = list(data)
    assert {batch["input_ids"].shape[1] % 8 for batch in batches} == {0}
    assert [float(model(**batch)["loss"].detach()) for batch in batches] == pytest.approx(exact, rel=1e-5)
    CANDIDATE.undo(on, applied)
    assert data.collate_fn is collate


@pytest.mark.parametrize("looks_ahead", [False, True])
def test_a_model_that_looks_ahead_needs_zeros_in_the_mask(looks_ahead: bool) -> None:
    on, batches = subject(Slow(looks_ahead), None), list(loader())[:3]
    assert bool(_same_numbers(on, batches, PaddedCollate(collate, 8, 0, 1, None))) is not looks_ahead
    assert _same_numbers(on, batches, PaddedCollate(collate, 8, 0, 0, None))


def tiny(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=40)
        return transformers.GPT2LMHeadModel(config)
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=32, **sizes))
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes))


@pytest.mark.parametrize(("kind", "masks"), [("llama", (True, True)), ("gpt2", (True, True)), ("bert", (False, True))])
def test_loss_and_gradients_stay_and_ones_in_the_mask_do_only_where_a_model_looks_back(kind: str, masks: Any) -> None:
    model, batches = tiny(kind), list(loader())[:3]
    model.train()
    for mask, same in zip((1, 0), masks, strict=True):
        padding = PaddedCollate(collate, 16, 0, mask, None)
        verdict = _same_numbers(subject(model, None), batches, padding)
        assert bool(verdict) is same, verdict.reason
    assert model.training


def test_nothing_is_padded_beyond_the_position_embeddings() -> None:
    padding = PaddedCollate(collate, 16, 0, 1, 20)
    assert padding(samples()[:1])["input_ids"].shape[1] == 16
    long = [torch.ones(18, dtype=torch.long)]
    assert padding(long)["input_ids"].shape[1] == 20
    longer = {"input_ids": torch.ones(1, 23, dtype=torch.long)}
    assert padding.pad(longer) is longer


def test_other_mappings_keep_their_kind_and_other_parts_their_shape() -> None:
    batch = UserDict(collate(samples()[:2]), weight=torch.ones(2), name="a")
    padded = PaddedCollate(collate, 64, 3, 0, None).pad(batch)
    assert type(padded) is UserDict
    assert (padded["input_ids"].shape, padded["weight"].shape, padded["name"]) == ((2, 64), (2,), "a")
    assert int(padded["input_ids"][0, -1]) == 3
    assert int(padded["labels"][0, -1]) == -100
    with pytest.raises(KptError, match="'position_ids'"):
        PaddedCollate(with_positions, 64, 0, 0, None)(samples()[:2])


CASES = {
    "no loader": (lambda: None, "no data loader"),
    "a list": (lambda: [1], "list is not torch's own"),
    "padded": (lambda: loader(PaddedCollate(collate, 8, 0, 1, None)), "padded already"),
    "no mapping": (lambda: loader(lambda rows: rows[0]), "no mapping with input_ids"),
    "positions": (lambda: loader(with_positions), "how to pad 'position_ids'"),
    "even": (lambda: loader(rows=[torch.ones(6, dtype=torch.long)] * 8), "nothing to even out"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_padded_is_declined_with_the_reason(case: str) -> None:
    make, why = CASES[case]
    assert why in reasons(CANDIDATE.applies(subject(Slow(), make())))


class Counts(Slow):
    """Its loss counts padding."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.head(self.embed(input_ids)).square().mean()}


class NoLoss(Slow):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        return self.embed(input_ids)


def test_a_model_whose_loss_changes_or_is_not_given_is_declined() -> None:
    assert "with padding, loss has" in reasons(CANDIDATE.applies(subject(Counts(), loader())))
    assert "gives no loss" in reasons(CANDIDATE.applies(subject(NoLoss(), loader())))


def test_padding_is_declined_where_code_of_the_users_computes_the_loss() -> None:
    on = subject(Slow(), loader())
    on.own_loss = False
    assert "code of yours computes the loss" in reasons(CANDIDATE.applies(on))


def test_a_stored_setting_is_refused_for_another_kind_of_loader() -> None:
    with pytest.raises(ConfigError, match="Make a new plan"):
        CANDIDATE.apply(subject(Slow(), [1]), {"multiple": 8, "token": 0, "mask": 1, "longest": None})
