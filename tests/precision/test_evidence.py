"""What counts as proof that FP8 ran, and what is reported where it did not."""

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kpt_lightning.config import Float8Config
from kpt_lightning.decision import Accepted, Rejected
from kpt_lightning.errors import VerificationError
from kpt_lightning.precision.convert import convert_to_float8
from kpt_lightning.precision.evidence import check_calls, check_kernels, check_merged, fp8_kernels
from kpt_lightning.precision.gemm import GemmCounts, count_gemms

# Kernel names recorded on an H200, and one of CUTLASS's rowwise GEMM.
FP8 = [
    "nvjet_sm90_qrtst_128x160_128x5_1x2_h_bz_coopA_algo2_TNT",
    "nvjet_sm90_qrsss_128x128_128x6_1x2_h_bz_coopA_algo2_TNT",
    "nvjet_sm90_qqtst_192x192_128x4_2x1_v_bz_coopB_TNN",
    "nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_ovscale_TNT",
    "nvjet_qqtst_128x128_128x6_2x1_v_bz_TNT",
    "nvjet_sm100_qqtst_128x128_128x6_2x1_v_bz_TNT",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<"
    "cute::tuple<int, int, int, int>, CollectiveMma<MainloopSm90TmaGmmaWarpSpecialized, cutlass::float_e4m3_t>>>>",
    "sm89_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x64_cublas",
]
NOT_FP8 = [
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT",
    "nvjet_tst_256x128_64x4_1x2_h_bz_NNT",
    "triton_poi_fused__to_copy_clamp_float8_gemm_mul_reciprocal_silu_t_view_18",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_cga1x1x",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl>",
    "void at::native::vectorized_elementwise_kernel<4, at::native::float8_copy_kernel_cuda(at::TensorIteratorBase&)"
    "::{lambda(float)#1}, std::array<char*, 2ul> >(int, at::native::float8_copy_kernel_cuda(at::TensorIteratorBase&)",
    "Memcpy DtoD (Device -> Device)",
]


def model_of(*sizes: int, recipe: str = "tensorwise") -> tuple[nn.Sequential, list[nn.Linear]]:
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(sizes)))
    config = Float8Config.model_validate({"emulate": True, "recipe": recipe})
    return model, convert_to_float8(model, [str(index) for index in range(len(model))], config)


def roles(counts: GemmCounts) -> list[int]:
    return [counts.of_role(role) for role in ("output", "grad_input", "grad_weight")]


@pytest.mark.parametrize("name", FP8)
def test_an_fp8_gemm_kernel_is_recognised(name: str) -> None:
    assert fp8_kernels([*NOT_FP8, name]) == [name]


@pytest.mark.parametrize("name", NOT_FP8)
def test_other_kernels_are_not_taken_for_fp8_gemms(name: str) -> None:
    assert fp8_kernels([name]) == []


def test_as_many_kernels_as_calls_are_accepted() -> None:
    assert check_kernels([*NOT_FP8, *FP8], len(FP8)) == Accepted(
        "fp8 kernels", f"8 FP8 GEMM kernels in the profiled step, such as {FP8[0]}"
    )


def test_fewer_kernels_than_calls_are_reported_with_both_numbers() -> None:
    verdict = check_kernels([*NOT_FP8, *FP8], 9)
    assert isinstance(verdict, Rejected)
    assert "8 FP8 GEMM kernels for 9 calls" in verdict.reason


def test_no_fp8_kernel_at_all_raises_and_names_the_numbers() -> None:
    with pytest.raises(VerificationError, match=re.escape("9 FP8 GEMMs were called")) as caught:
        check_kernels(NOT_FP8, 9)
    assert f"its {len(NOT_FP8)} CUDA kernels" in str(caught.value)


def test_products_that_were_to_be_merged_and_were_not_are_told() -> None:
    alone, merged = GemmCounts(), GemmCounts()
    alone.add("output", (16, 32, 64), (), emulated=False)
    merged.add("output", (16, 32, 64), (16, 16), emulated=False)
    assert check_merged(alone, False) == check_merged(merged, False) == []
    (verdict,) = check_merged(alone, True)
    assert not verdict
    assert "one by one" in verdict.reason
    (verdict,) = check_merged(merged, True)
    assert verdict == Accepted("merged GEMMs", "1 FP8 products ran inside of another's GEMM")


def test_no_call_at_all_raises_and_says_what_to_do() -> None:
    _, layers = model_of(32, 64)
    with pytest.raises(VerificationError, match=re.escape("float8.include")):
        check_calls(GemmCounts(), layers)


@pytest.mark.parametrize(
    ("recipe", "per_step"), [("tensorwise", [2, 2, 2]), ("rowwise", [2, 2, 2]), ("rowwise_with_gw_hp", [2, 2, 0])]
)
@pytest.mark.parametrize("accumulated", [1, 3])
def test_each_forward_and_backward_of_an_accumulated_step_is_counted(
    recipe: str, per_step: list[int], accumulated: int
) -> None:
    model, layers = model_of(32, 64, 32, recipe=recipe)
    with count_gemms() as counts:
        for _ in range(accumulated):
            model(torch.randn(16, 32, requires_grad=True)).sum().backward()
    assert roles(counts) == [accumulated * each for each in per_step]
    (verdict,) = check_calls(counts, layers)
    total, text = (
        counts.total,
        ", ".join(
            f"{role} {count}"
            for role, count in zip(("output", "grad_input", "grad_weight"), roles(counts), strict=True)
        ),
    )
    wanted = f"{total} emulated FP8 GEMMs by the end of step 1 ({text}) from 2 layers"
    assert verdict == Accepted("fp8 calls", wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_adds_the_outputs_that_it_recomputes(reentrant: bool) -> None:
    model, _ = model_of(32, 64, 32)
    x = torch.randn(16, 32, requires_grad=True)
    with count_gemms() as counts:
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert roles(counts) == [4, 2, 2]


def test_a_layer_that_never_ran_is_reported_by_its_size() -> None:
    model, layers = model_of(32, 64, 32, 96)
    with count_gemms() as counts:
        model[:2](torch.randn(16, 32, requires_grad=True)).sum().backward()
    ran, missing = check_calls(counts, layers)
    assert ran
    assert missing == Rejected("fp8 calls", "0 output GEMMs for 1 FP8 layers of size 32 -> 96 by the end of step 1")


def test_a_forward_alone_is_no_proof_of_training() -> None:
    model, layers = model_of(32, 64)
    with count_gemms() as counts, torch.no_grad():
        model(torch.randn(16, 32))
    assert [bool(each) for each in check_calls(counts, layers)] == [True, False]


def test_frozen_layers_need_no_backward_pass() -> None:
    model, layers = model_of(32, 64)
    model.requires_grad_(False)
    with count_gemms() as counts:
        model(torch.randn(16, 32))
    assert all(check_calls(counts, layers))


def test_padded_layers_are_found_by_their_padded_size() -> None:
    model, layers = model_of(30, 50)
    with count_gemms() as counts:
        model(torch.randn(5, 30)).sum().backward()
    assert all(check_calls(counts, layers))


class Reader(nn.Module):
    """Reads a layer's weight past its forward, as fused attention code does."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner[0].weight)


def test_a_weight_that_is_read_past_the_layer_is_caught() -> None:
    model, layers = model_of(32, 64)
    with count_gemms() as counts:
        Reader(model)(torch.randn(16, 32)).sum().backward()
    with pytest.raises(VerificationError, match="past the modules' forward"):
        check_calls(counts, layers)
