from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

from kpt_lightning.errors import ConfigError
from kpt_lightning.recipes import collate
from kpt_lightning.recipes.packing import pack, unpacked
from kpt_lightning.recipes.spans import NOT_LEARNED, Document

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

LENGTHS = [5, 9, 3, 7, 12, 2, 6]


@pytest.fixture
def documents() -> list[Document]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 256, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Document(each, each) for each in ids]


def logits_alone(model: nn.Module, documents: list[Document]) -> dict[tuple[int, ...], Tensor]:
    """Logits of each document when it is all that the model sees."""
    return {
        tuple(each.input_ids): model(input_ids=torch.tensor([each.input_ids]), use_cache=False).logits[0]
        for each in documents
    }


def logits_packed(model: nn.Module, batch: dict[str, Tensor]) -> dict[tuple[int, ...], Tensor]:
    """Logits of each document in a packed batch, padding included."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits.flatten(0, 1)
    starts = (batch["position_ids"].flatten() == 0).nonzero().flatten().tolist()
    ids = batch["input_ids"].flatten().tensor_split(starts[1:])
    return {tuple(each.tolist()): part for each, part in zip(ids, logits.tensor_split(starts[1:]), strict=True)}


@pytest.mark.parametrize("layout", [collate.rows, collate.one_row])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_document_gets_the_logits_that_it_gets_alone(
    layout: collate.Collate, attention: str, byte_llama: "LlamaForCausalLM", documents: list[Document]
) -> None:
    byte_llama.set_attn_implementation(attention)
    batch = layout(pack(documents, 16, padding_token=0).rows)
    assert batch["input_ids"].shape == ((3, 16) if layout is collate.rows else (1, 48))
    with torch.no_grad():
        alone, packed = logits_alone(byte_llama, documents), logits_packed(byte_llama, batch)
    assert set(alone) <= set(packed)
    for ids, logits in alone.items():
        torch.testing.assert_close(packed[ids], logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", [collate.rows, collate.one_row])
def test_loss_and_gradients_of_packed_rows_are_those_of_the_documents(
    layout: collate.Collate, byte_llama: "LlamaForCausalLM", documents: list[Document]
) -> None:
    def gradients(batches: list[dict[str, Tensor]]) -> tuple[float, dict[str, Tensor]]:
        byte_llama.zero_grad()
        weights = [int((batch["labels"][:, 1:] != NOT_LEARNED).sum()) for batch in batches]
        total = sum(byte_llama(**batch).loss * weight for batch, weight in zip(batches, weights, strict=True))
        loss = total / sum(weights)
        loss.backward()
        return loss.item(), {name: each.grad.clone() for name, each in byte_llama.named_parameters()}

    packed_loss, packed = gradients([layout(pack(documents, 16, padding_token=0).rows)])
    alone_loss, alone = gradients([{name: row[name][None] for name in row} for row in unpacked(documents).rows])
    together = collate.padded(unpacked(documents).rows, padding_token=0, longest=64)
    padded_loss, _ = gradients([together])
    assert packed_loss == pytest.approx(alone_loss, abs=1e-5)
    assert padded_loss == pytest.approx(alone_loss, abs=1e-5)
    for name, gradient in alone.items():
        torch.testing.assert_close(packed[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("longest", "length"), [(64, 16), (14, 14), (12, 12)])
def test_padding_stops_at_a_multiple_of_sixteen_or_the_longest_row(
    longest: int, length: int, documents: list[Document]
) -> None:
    batch = collate.padded(unpacked(documents).rows, padding_token=7, longest=longest)
    assert {name: tuple(value.shape) for name, value in batch.items()} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask"), (7, length)
    )
    assert batch["attention_mask"].sum(1).tolist() == LENGTHS
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == 7).all()
    assert (batch["labels"][padding] == NOT_LEARNED).all()
    assert torch.equal(batch["labels"][~padding], batch["input_ids"][~padding])


def test_documents_apart_is_proved_on_the_model_itself(byte_llama: "LlamaForCausalLM") -> None:
    byte_llama.train()
    assert collate.keeps_documents_apart(byte_llama)
    assert byte_llama.training
    # transformers looks at the positions only where it makes no key-value cache.
    byte_llama.config.use_cache = True
    seen = collate.keeps_documents_apart(byte_llama)
    assert not seen
    assert "set it to False" in seen.reason
    with pytest.raises(
        ConfigError, match=r"data\.packing=True: LlamaForCausalLM lets packed.*Set data\.packing to fal"
    ):
        collate.collate_for(byte_llama, packing=True, padding_token=0, longest=16)
    assert collate.collate_for(byte_llama, packing=False, padding_token=0, longest=16)


# peft asks transformers by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_around_a_model_do_not_hide_that_it_takes_positions(byte_llama: "LlamaForCausalLM") -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(byte_llama, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert collate.keeps_documents_apart(adapted)


def test_a_model_without_positions_cannot_take_packed_rows() -> None:
    class Recurrent(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    seen = collate.keeps_documents_apart(Recurrent())
    assert not seen
    assert "takes no position_ids" in seen.reason


@pytest.mark.parametrize(("attention", "layout"), [("sdpa", collate.rows), ("flash_attention_2", collate.one_row)])
def test_flash_attention_gets_one_row(attention: str, layout: Any, byte_llama: "LlamaForCausalLM") -> None:
    made = collate.collate_for(byte_llama, packing=True, padding_token=0, longest=16)
    assert made is collate.rows
    # The kernel itself needs a GPU; what is chosen depends on the name alone.
    byte_llama.config._attn_implementation_internal = attention
    assert collate.packed_layout(byte_llama) is layout
