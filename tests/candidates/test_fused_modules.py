"""Each model gets its norms and MLPs fused with the same loss and gradients, or is told why not."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from kpt_lightning.candidates import fused_mlp, fused_norm
from kpt_lightning.candidates.candidate import Change
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import KptConfig
from kpt_lightning.decision import Rejected
from kpt_lightning.hardware import detect
from kpt_lightning.optional import LIGER
from kpt_lightning.validation.calls import record_calls
from kpt_lightning.validation.numerics import relative_error

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
HEADS: dict[str, Any] = {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
NO_DROPOUT: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
NO_DROPOUT_BERT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.body(x).square().mean() + self.body(x)[..., 0].mean()}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    t = transformers
    if name == "TransformerEncoder":
        return Encoder()
    if name == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 16}
        return t.GPT2LMHeadModel(t.GPT2Config(**sizes, **NO_DROPOUT, use_cache=False))
    if name == "Bert":
        config = t.BertConfig(**SMALL, vocab_size=64, max_position_embeddings=16, **NO_DROPOUT_BERT)
        return t.BertForMaskedLM(config)
    if name == "ViT":
        return t.ViTForImageClassification(t.ViTConfig(**SMALL, image_size=8, patch_size=4, **NO_DROPOUT_BERT))
    config = getattr(t, f"{name}Config")(**SMALL, **HEADS, pad_token_id=0)
    return getattr(t, f"{name}ForCausalLM")(config)  # type: ignore[no-any-return]


def batch(name: str, net: nn.Module) -> dict[str, Tensor]:
    weight = next(net.parameters())
    generator = torch.Generator().manual_seed(1)
    if name == "TransformerEncoder":
        return {"x": torch.randn(2, 6, 32, generator=generator).to(weight)}
    if name == "ViT":
        labels = torch.tensor([0, 1], device=weight.device)
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator).to(weight), "labels": labels}
    ids = torch.randint(1, 64, (2, 12), generator=generator).to(weight.device)
    return {"input_ids": ids, "labels": ids}


def subject(name: str, net: nn.Module) -> Subject:
    given = batch(name, net)
    calls = record_calls(net, lambda: net(**given))
    device = next(net.parameters()).device
    return Subject(model=net, profile=detect(), config=KptConfig(), device=device, calls=calls, batch=given)


def results(name: str, net: nn.Module) -> dict[str, Tensor]:
    loss = net(**batch(name, net))["loss"]
    named = dict(net.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    # A key bias moves all scores of a row alike: its gradient is rounding alone.
    steady = {key: each for key, each in zip(named, found, strict=True) if each is not None and "key.bias" not in key}
    return {"loss": loss.detach(), **{k: v for k, v in steady.items() if "k_proj.bias" not in k}}


def farthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(relative_error(one[key], other[key]) for key in one if bool(one[key].any()))


RMS = {"Llama": 5, "Qwen3": 9, "Mistral": 5, "Gemma": 5}
OTHERS = ("GPT2", "Bert", "ViT", "TransformerEncoder")


@pytest.mark.parametrize("name", RMS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_rms_norms_are_fused_and_loss_and_gradients_stay(name: str, dtype: torch.dtype, limit: float) -> None:
    net = model(name).to(dtype)
    plain = results(name, net)
    sub = subject(name, net)
    (change,) = fused_norm.CANDIDATE.applies(sub)
    assert isinstance(change, Change), change
    assert sum(len(group["modules"]) for group in change.setting["groups"]) == RMS[name]

    done = fused_norm.CANDIDATE.apply(sub, change.setting)
    assert farthest(plain, results(name, net)) < limit
    fused_norm.CANDIDATE.undo(sub, done)
    after = results(name, net)
    assert all(torch.equal(plain[key], after[key]) for key in plain)


@pytest.mark.parametrize("name", OTHERS)
def test_models_with_torchs_own_norms_are_told_so(name: str) -> None:
    found = fused_norm.CANDIDATE.applies(subject(name, model(name)))

    assert all(isinstance(each, Rejected) and "torch's own, one kernel already" in each.reason for each in found)


@pytest.mark.parametrize(
    ("name", "reason"),
    [(name, "2 [A-Za-z0-9]+MLP such as .*: a gated MLP; Liger's kernels are Triton's") for name in RMS]
    + [("GPT2", "no module has three linear"), ("ViT", "no module has three linear")]
    + [("TransformerEncoder", "no module has three linear")]
    + [("Bert", "BertSelfAttention such as .*: it is called with")],
)
def test_mlps_are_found_and_the_reason_to_leave_them_is_told(name: str, reason: str) -> None:
    import re

    found = fused_mlp.CANDIDATE.applies(subject(name, model(name)))

    assert all(isinstance(each, Rejected) for each in found)
    assert any(re.search(reason, each.reason) for each in found), found


@pytest.mark.cuda
@pytest.mark.skipif(not LIGER.available(), reason=LIGER.available().reason)
@pytest.mark.parametrize("name", RMS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)])
def test_norms_and_mlps_by_liger_keep_loss_and_gradients(name: str, dtype: torch.dtype, limit: float) -> None:
    net = model(name).to("cuda", dtype)
    plain = results(name, net)
    sub = subject(name, net)
    norms = [each for each in fused_norm.CANDIDATE.applies(sub) if isinstance(each, Change)]
    mlps = [each for each in fused_mlp.CANDIDATE.applies(sub) if isinstance(each, Change)]
    assert [each.setting["backend"] for each in norms] == ["torch", "kpt", "liger"]
    assert len(mlps) == (1 if _activation(net) != "gelu" else 0)

    for change in norms:
        done = fused_norm.CANDIDATE.apply(sub, change.setting)
        also = [fused_mlp.CANDIDATE.apply(sub, each.setting) for each in mlps]
        assert farthest(plain, results(name, net)) < limit
        for each in also:
            fused_mlp.CANDIDATE.undo(sub, each)
        fused_norm.CANDIDATE.undo(sub, done)


def _activation(net: Any) -> str:
    return str(net.config.hidden_act)
