"""Cross entropy of rows of logits: the kernels against float64, and the operators under PyTorch's own checks."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.cross_entropy import (
    IGNORED,
    cross_entropy_backward,
    cross_entropy_backward_quantize,
    cross_entropy_rows,
)
from kpt_lightning.validation.numerics import relative_error, sqnr_db

pytest.importorskip("triton", reason="the kernels are written in Triton")

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 200), (5, 64), (9, 131), (4, 300)]
# A cast to fp8 keeps 2 or 3 bits of mantissa: about 19 dB and 25 dB for the many sizes of a softmax.
LEAST_DB = {E5M2: 17.0, E4M3: 22.0}
# NumPy, which the interpreter computes with, warns of what IEEE arithmetic defines.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


def config(rows: int = 4, columns: int = 64) -> Any:
    """Blocks that do not fit, in tensors small enough for the interpreter."""
    from kpt_lightning.kernels.cross_entropy_triton import LaunchConfig

    return LaunchConfig(rows=rows, columns=columns, num_warps=4, num_stages=1)


def by_kernel(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, logsumexp and gradient."""
    from kpt_lightning.kernels.cross_entropy_triton import launch_backward, launch_rows

    loss, logsumexp = launch_rows(logits, labels, IGNORED, config())
    return loss, logsumexp, launch_backward(logits, labels, logsumexp, IGNORED, config())


def quantized_by_kernel(
    logits: Tensor,
    labels: Tensor,
    logsumexp: Tensor,
    dtype: torch.dtype,
    width: int,
    columns: Tensor | None,
    offset: int,
) -> Tensor:
    from kpt_lightning.kernels.cross_entropy_triton import launch_backward_quantize

    return launch_backward_quantize(logits, labels, logsumexp, dtype, width, columns, offset, IGNORED, config())


def random_rows(shape: tuple[int, int], dtype: torch.dtype, device: str, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (torch.randn(shape, generator=generator) * scale).to(device, dtype)
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    labels[1::3] = IGNORED
    return logits, labels.to(device)


def exact(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each row and its gradient by PyTorch in float64."""
    x = logits.double().requires_grad_()
    loss = F.cross_entropy(x, labels, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_of_the_kernels_are_those_of_float64(
    shape: tuple[int, int], dtype: torch.dtype, device: str
) -> None:
    logits, labels = random_rows(shape, dtype, device)
    loss, logsumexp, grad = by_kernel(logits, labels)
    wanted_loss, wanted_grad = exact(logits, labels)
    assert loss.dtype == logsumexp.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logsumexp.double(), logits.double().logsumexp(1), rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=max(eps, 1e-4), atol=max(1e-6, eps**2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_runs_on_a_cpu_is_that_of_float64(dtype: torch.dtype) -> None:
    logits, labels = random_rows((9, 131), dtype, "cpu")
    loss, logsumexp = cross_entropy_rows(logits, labels)
    wanted_loss, wanted_grad = exact(logits, labels)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=1e-5)
    grad = cross_entropy_backward(logits, labels, logsumexp)
    assert relative_error(wanted_grad, grad) < torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e37])
def test_huge_and_tiny_logits_neither_overflow_nor_lose_the_loss(scale: float, device: str) -> None:
    logits, labels = random_rows((6, 200), torch.float32, device, scale)
    loss, _, grad = by_kernel(logits, labels)
    wanted_loss, wanted_grad = exact(logits, labels)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=1e-5, atol=1e-5)
    # The exponent of a huge difference has that many bits less.
    torch.testing.assert_close(grad.double(), wanted_grad, rtol=1e-3, atol=1e-6)


def test_rows_with_nan_or_infinity_have_the_loss_and_gradient_nan_and_no_other_row_has(device: str) -> None:
    logits, _ = random_rows((5, 200), torch.float32, device)
    labels = torch.arange(5, device=device)
    logits[1, 150], logits[3, 7] = torch.nan, torch.inf
    loss, _, grad = by_kernel(logits, labels)
    assert loss.isnan().tolist() == [False, True, False, True, False]
    assert grad.isnan().all(dim=1).tolist()[1]
    assert grad.isnan().any(dim=1).tolist() == [False, True, False, True, False]


def test_masked_classes_have_probability_zero_even_where_a_row_begins_with_a_block_of_them(device: str) -> None:
    logits, _ = random_rows((2, 200), torch.float32, device)
    logits[:, :100] = -torch.inf
    labels = torch.tensor([150, 5], device=device)
    loss, _, grad = by_kernel(logits, labels)
    wanted_loss, wanted_grad = exact(logits[:1], labels[:1])
    torch.testing.assert_close(loss[:1].double(), wanted_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad[:1].double(), wanted_grad, rtol=1e-4, atol=1e-6)
    assert loss[1] == torch.inf
    torch.testing.assert_close(cross_entropy_rows(logits.cpu(), labels.cpu())[0], loss.cpu(), rtol=1e-5, atol=1e-5)


def test_ignored_rows_are_zero_whatever_they_hold(device: str) -> None:
    logits = torch.full((2, 70), torch.nan, device=device)
    labels = torch.full((2,), IGNORED, device=device)
    loss, logsumexp, grad = by_kernel(logits, labels)
    rows = quantized_by_kernel(logits, labels, logsumexp, E5M2, 80, None, 0)
    assert not loss.any()
    assert not grad.any()
    assert not rows.float().any()


def test_a_label_that_is_no_class_gives_nan_in_a_kernel_and_an_error_on_a_cpu(device: str) -> None:
    logits, _ = random_rows((2, 70), torch.float32, device)
    labels = torch.tensor([70, -1], device=device)
    loss, _, grad = by_kernel(logits, labels)
    assert loss.isnan().all()
    assert grad.isnan().all()
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy_rows(logits.cpu(), labels.cpu())


def test_rows_of_a_wider_matrix_are_read_in_place(device: str) -> None:
    wide, labels = random_rows((6, 210), torch.bfloat16, device)
    labels = labels.clamp(max=199)
    logits = wide[:, :200]
    for strided, dense in zip(by_kernel(logits, labels), by_kernel(logits.clone(), labels), strict=True):
        assert torch.equal(strided, dense)


def test_no_rows_give_empty_results_without_a_launch(device: str) -> None:
    logits, labels = torch.empty(0, 70, device=device), torch.empty(0, dtype=torch.int64, device=device)
    loss, logsumexp, grad = by_kernel(logits, labels)
    assert loss.shape == logsumexp.shape == (0,)
    assert grad.shape == (0, 70)
    assert quantized_by_kernel(logits, labels, logsumexp, E5M2, 80, None, 0).shape == (0, 80)
    assert cross_entropy_rows(logits, labels)[0].shape == (0,)


def test_the_kernels_give_the_same_bits_twice(device: str) -> None:
    logits, labels = random_rows((7, 200), torch.bfloat16, device)
    for first, second in zip(by_kernel(logits, labels), by_kernel(logits, labels), strict=True):
        assert torch.equal(first, second)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [E5M2, E4M3], ids=str)
@pytest.mark.parametrize(("shape", "width"), [((9, 131), 144), ((4, 64), 64), ((1, 1), 16)], ids=str)
def test_both_fp8_layouts_hold_the_gradient_and_zeros_in_the_padding(
    shape: tuple[int, int], width: int, dtype: torch.dtype, device: str
) -> None:
    logits, labels = random_rows(shape, torch.bfloat16, device)
    _, logsumexp, _ = by_kernel(logits, labels)
    count, classes = shape
    columns = torch.empty(width, count + 7, dtype=dtype, device=device)
    before = columns.view(torch.uint8).clone()
    rows = quantized_by_kernel(logits, labels, logsumexp, dtype, width, columns, 3)
    written = columns[:, 3 : 3 + count]
    assert torch.equal(written.t().contiguous().view(torch.uint8), rows.view(torch.uint8))
    assert torch.equal(columns.view(torch.uint8)[:, :3], before[:, :3])
    assert torch.equal(columns.view(torch.uint8)[:, 3 + count :], before[:, 3 + count :])
    assert not rows[:, classes:].float().any()
    found = rows[:, :classes].double() / torch.finfo(dtype).max
    assert sqnr_db(exact(logits, labels)[1], found) > LEAST_DB[dtype]


@pytest.mark.parametrize("classes", [128, 130])
def test_full_tiles_and_others_agree(device: str, classes: int) -> None:
    """Tiles that are full of classes read without a mask of columns."""
    from kpt_lightning.kernels.cross_entropy_triton import launch_backward_quantize

    logits, labels = random_rows((22, classes), torch.bfloat16, device)
    logsumexp = logits.float().logsumexp(1)
    found = []
    for tile in (64, 128, 256):
        columns = torch.full((classes, 24), float("nan"), device=device).to(E5M2)
        shape = replace(config(), columns=tile)
        rows = launch_backward_quantize(logits, labels, logsumexp, E5M2, classes, columns, 0, IGNORED, shape)
        found.append((rows.view(torch.uint8), columns.view(torch.uint8)))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_fp8_carries_nan_in_both_layouts(device: str) -> None:
    logits, _ = random_rows((4, 70), torch.float32, device)
    labels = torch.arange(4, device=device)
    logits[2, 9] = torch.nan
    _, logsumexp, _ = by_kernel(logits, labels)
    for dtype in (E5M2, E4M3):
        columns = torch.empty(70, 4, dtype=dtype, device=device)
        rows = quantized_by_kernel(logits, labels, logsumexp, dtype, 70, columns, 0)
        for found in (rows, columns.t()):
            assert found.float().isnan().any(dim=1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [E5M2, E4M3], ids=str)
def test_kernel_and_reference_agree_in_fp8(dtype: torch.dtype, device: str) -> None:
    logits, labels = random_rows((9, 131), torch.bfloat16, device)
    logsumexp = by_kernel(logits, labels)[1].cpu()
    kernel = quantized_by_kernel(logits, labels, logsumexp.to(device), dtype, 144, None, 0)
    columns = torch.empty(144, 9, dtype=dtype)
    rows, scale = cross_entropy_backward_quantize(
        logits.cpu(), labels.cpu(), logsumexp, dtype, width=144, columns=columns
    )  # fmt: skip
    assert float(scale) == pytest.approx(1 / torch.finfo(dtype).max)
    assert torch.equal(columns.t().float(), rows.float())
    # Where exp differs in its last bit, a value may round the other way.
    assert sqnr_db(rows.float(), kernel.cpu().float()) > 40.0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.sm89)])
def test_the_operators_pass_the_checks_of_pytorch_and_stay_whole_in_compiled_code(device: str) -> None:
    logits, labels = random_rows((9, 131), torch.bfloat16, device)
    labels = labels.clamp(max=99)
    _, logsumexp = cross_entropy_rows(logits[:, :100], labels)
    columns = torch.zeros(112, 12, dtype=E5M2, device=device)
    torch.library.opcheck(torch.ops.kpt.cross_entropy_rows, (logits[:, :100], labels, IGNORED))
    torch.library.opcheck(torch.ops.kpt.cross_entropy_backward, (logits[:, :100], labels, logsumexp, IGNORED))
    arguments = (logits[:, :100], labels, logsumexp, E5M2, 112, columns, 2, IGNORED)
    torch.library.opcheck(torch.ops.kpt.cross_entropy_backward_quantize, (*arguments[:5], None, 0, IGNORED))
    # The check of the schema compares mutated arguments by arithmetic that FP8 has none of.
    utilities = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(torch.ops.kpt.cross_entropy_backward_quantize, arguments, test_utils=utilities)

    def whole(logits: Tensor, labels: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        loss, logsumexp = cross_entropy_rows(logits, labels)
        grad = cross_entropy_backward(logits, labels, logsumexp)
        rows, scale = cross_entropy_backward_quantize(logits, labels, logsumexp, E5M2, width=112, columns=columns)
        return loss, logsumexp, grad, rows.float(), scale, columns.float()

    plain = whole(logits[:, :100], labels, columns.clone())
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")(logits[:, :100], labels, columns.clone())
    for one, other in zip(plain, compiled, strict=True):
        assert torch.equal(one, other)
    assert plain[-1].any()


COMPILED = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kpt_lightning.kernels import cross_entropy_triton as kernels

TYPES = dict(logits="*bf16", labels="*i64", loss="*fp32", logsumexp="*fp32", grad="*bf16", grad_rows="*fp8e5",
             grad_columns="*fp8e5")
CASES = [
    (kernels._rows_kernel, dict(CLASSES=50257, COLUMNS=1024, STAGES=2)),
    (kernels._backward_kernel, dict(COLUMNS=1024)),
    *(
        (kernels._backward_quantize_kernel,
         dict(LARGEST=57344.0, LOG2_LARGEST=15.8, RAGGED=False, WHOLE=whole, WITH_COLUMNS=True, ROWS=32, COLUMNS=32))
        for whole in (False, True)
    ),
    (kernels._labels_kernel, dict(LARGEST=57344.0, WITH_COLUMNS=True, ROWS=64)),
]
for kernel, constants in CASES:
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else TYPES.get(name, "i32") for name in names}
    source = ASTSource(kernel, types, constexprs={(names.index(name),): each for name, each in constants.items()})
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_the_kernels_compile_for_hopper_where_there_is_none(tmp_path: Path) -> None:
    """The interpreter lets pass what the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("logits", "labels", "match"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "logits must be"),
        (torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64), "logits must be"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), "labels must be"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int32), "labels must be"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(logits: Tensor, labels: Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        cross_entropy_rows(logits, labels)


@pytest.mark.parametrize(
    "change",
    [dict(width=3), dict(columns=torch.zeros(4, 2)), dict(columns=torch.zeros(4, 9).to(E5M2), offset=7)],
    ids=["width", "dtype", "offset"],
)
def test_columns_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"width|columns"):
        cross_entropy_backward_quantize(
            torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.zeros(3), E5M2, **change
        )
