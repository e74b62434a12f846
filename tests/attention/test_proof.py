"""Descriptions name what ran; waste and departures from the plan are rejections."""

from dataclasses import replace

import pytest

from kpt_lightning.attention.call import AttentionCall
from kpt_lightning.attention.proof import check_backend, describe

CAUSAL = AttentionCall(
    backend="cudnn", query=(4, 32, 4096, 64), key=(4, 32, 4096, 64), value_size=64, dtype="bfloat16", causal=True
)
DENSE = replace(CAUSAL, causal=False, mask=(4, 1, 4096, 4096))
ALL_PAIRS = 4 * 4 * 32 * 4096 * 4096 * 64


def test_a_causal_call_computes_half_of_all_pairs_and_needs_half() -> None:
    assert CAUSAL.all_pairs_flops == ALL_PAIRS
    assert CAUSAL.computed_flops == CAUSAL.useful_flops() == ALL_PAIRS / 2


def test_the_math_backend_computes_all_pairs_of_causal_attention() -> None:
    call = replace(CAUSAL, backend="math")
    assert call.computed_flops == 2 * call.useful_flops() == ALL_PAIRS


def test_calls_of_one_kind_are_one_line() -> None:
    (line,) = describe([CAUSAL] * 16)
    assert line
    assert line.reason == "16 calls: cuDNN, causal, no mask tensor, 4x32x4096x64 bfloat16"


def test_a_dense_mask_in_a_causal_model_is_rejected_with_its_waste() -> None:
    right, wrong = describe([CAUSAL] * 3 + [DENSE], causal=True)
    assert right
    assert not wrong
    assert wrong.reason.startswith("1 call: cuDNN, not causal, mask tensor 4x1x4096x4096")
    assert wrong.reason.endswith("dense mask: computed 2.0x the useful FLOPs")


@pytest.mark.parametrize("causal", [None, False])
def test_a_mask_in_a_model_that_is_not_known_to_be_causal_is_no_waste(causal: bool | None) -> None:
    (line,) = describe([DENSE], causal=causal)
    assert line


def test_key_heads_keys_and_dropout_are_told() -> None:
    call = replace(CAUSAL, key=(4, 8, 128, 64), dropout=0.1)
    assert str(call).endswith("4x32x4096x64 bfloat16, 8 key heads, 128 keys, dropout 0.1")


def test_no_call_is_a_rejection() -> None:
    (line,) = describe([])
    assert not line
    assert not check_backend([], "cudnn")


def test_calls_on_another_backend_than_planned_are_counted_and_named() -> None:
    assert check_backend([CAUSAL] * 2, "cudnn")
    verdict = check_backend([CAUSAL] * 15 + [replace(CAUSAL, backend="math")], "cudnn")
    assert not verdict
    assert "1 of 16 ran on 1 call: math" in verdict.reason
