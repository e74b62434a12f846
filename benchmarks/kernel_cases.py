"""What bench_kernels.py times: each kernel at the sizes of a model, its launch configurations, reference and check."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kpt_lightning.kernels.gated import gated_gradient, gated_value
from kpt_lightning.kernels.quantize import cast_both
from kpt_lightning.kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference
from kpt_lightning.validation.numerics import sqnr_db

TOKENS = 16384
SIZES = {"1b": (2048, 8192), "8b": (4096, 14336)}
"""Hidden and MLP width of Llama-3.2-1B and Llama-3.1-8B."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LEAST_DB = {E4M3: 25.0, E5M2: 19.0}
"""Of normal data, or a product of it, rounded once to FP8 with the right scale; below it a kernel is wrong."""
NEAR_DB = 45.0
"""Of a result that is rounded to bf16 once or twice."""

CHUNK, VOCABULARY = 4096, 128256
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One kernel at one size.

    Attributes:
        size: Shown in the table.
        inputs: Given to every function below.
        launches: Name of a launch configuration -> the kernels' launch function with it.
        reference: Plain PyTorch of the same arguments; torch.compile of it is the baseline.
        moved: Bytes read and written.
        check: Result -> SQNR in dB, or any figure of likeness; raises SystemExit where the result is wrong.
    """

    size: str
    inputs: tuple[Any, ...]
    launches: dict[str, Callable[..., Any]]
    reference: Callable[..., Any]
    moved: int
    check: Callable[[Any], float]


def quantize_cases(sizes: list[str]) -> Iterator[Case]:
    from kpt_lightning.kernels import quantize_triton

    def launch(x: Tensor, config: Any) -> Any:
        return quantize_triton.quantize([x], E4M3, 1, True, True, config=config)

    for name in sizes:
        for width in (*SIZES[name], 2 * SIZES[name][1]):
            x = normal(TOKENS, width)
            yield float8_case(f"{name}: {TOKENS} x {width}", (x,), launch, quantize_triton.CONFIG, lambda x: x, E4M3)


def gated_cases(sizes: list[str], *, backward: bool) -> Iterator[Case]:
    from kpt_lightning.kernels import gated_triton as kernels

    launch, exact, first, dtype = (
        (kernels.gated_backward_quantize, gated_gradient, kernels.BACKWARD_CONFIG, E5M2) if backward
        else (kernels.gated_quantize, gated_value, kernels.FORWARD_CONFIG, E4M3)
    )  # fmt: skip
    launch, exact = partial(launch, activation="silu", dtype=dtype, columns=True), partial(exact, activation="silu")
    for name in sizes:
        width = SIZES[name][1]
        inputs = (*([normal(TOKENS, width)] if backward else []), normal(TOKENS, 2 * width))
        yield float8_case(f"{name}: {TOKENS} x (2 x {width})", inputs, launch, first, exact, dtype)


def float8_case(
    size: str, inputs: tuple[Tensor, ...], launch: Callable[..., Any], first: Any, exact: Callable[..., Tensor],
    dtype: torch.dtype,
) -> Case:  # fmt: skip
    """A kernel that reads its inputs twice, and writes ``exact`` of them in FP8, in both layouts."""

    def reference(*inputs: Tensor) -> Any:
        return cast_both(exact(*inputs), dtype)

    launches = {label: partial(launch, config=config) for label, config in launch_grid(first).items()}
    written = exact(*(x[:1] for x in inputs)).numel() * TOKENS
    moved = 2 * sum(x.nbytes for x in inputs) + 2 * written
    return Case(size, inputs, launches, reference, moved, lambda result: check_float8(exact(*inputs), dtype, result))


def norm_cases(sizes: list[str], *, backward: bool) -> Iterator[Case]:
    """Of the fp32 residual stream that bf16 autocast leaves, to bf16 and back."""
    from kpt_lightning.kernels import rms_norm_triton as kernels

    first = kernels.BACKWARD if backward else kernels.FORWARD
    changes = [{"elements_per_thread": count} for count in (4, 8, 16)]
    changes += [{"programs_per_sm": count} for count in (2, 3, 4, 6, 8)] + [
        {"num_stages": count} for count in (1, 2, 3)
    ]
    grid = {"default": first} | {
        f"{name}={value}": replace(first, **{name: value}) for change in changes for name, value in change.items()
    }

    def forward_launch(x: Tensor, weight: Tensor, config: Any) -> Any:
        return kernels.launch_forward(x, None, weight, EPS, 0.0, True, torch.bfloat16, config=config)[0]

    def forward_reference(x: Tensor, weight: Tensor) -> Any:
        return rms_norm_reference(x, weight, EPS, 0.0, "llama", torch.bfloat16)[0]

    def backward_launch(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, config: Any) -> Any:
        return kernels.launch_backward(grad, None, x, weight, rstd, 0.0, True, config=config)[0]

    def backward_reference(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Any:
        return rms_norm_backward_reference(grad, None, x, weight, rstd, 0.0, "llama")[0]

    launch, reference = (
        (backward_launch, backward_reference) if backward else (forward_launch, forward_reference)
    )  # fmt: skip
    for name in sizes:
        width = SIZES[name][0]
        x, weight = normal(TOKENS, width).float(), torch.ones(width, device="cuda")
        rstd = torch.rsqrt(x.square().mean(-1) + EPS)
        inputs = (normal(TOKENS, width + 1)[:, :width].contiguous(), x, weight, rstd) if backward else (x, weight)
        launches = {label: partial(launch, config=config) for label, config in grid.items()}
        # fp32 read, bf16 written; or bf16 and fp32 read, fp32 written.
        moved = TOKENS * width * (10 if backward else 6)
        check = partial(check_near, reference(*inputs))
        yield Case(f"{name}: {TOKENS} x {width}", inputs, launches, reference, moved, check)


def loss_cases(sizes: list[str]) -> Iterator[Case]:
    """Rows of a chunk of logits, read once."""
    from kpt_lightning.kernels import cross_entropy_triton as kernels

    first = kernels.ROWS_CONFIG
    grid = {"default": first} | {
        f"{columns} columns, {warps} warps, {stages} stages": replace(
            first, columns=columns, num_warps=warps, num_stages=stages
        )
        for columns in (4096, 8192, 16384) for warps in (8, 16) for stages in (1, 2, 3)
    }  # fmt: skip

    def launch(logits: Tensor, labels: Tensor, config: Any) -> Any:
        return kernels.launch_rows(logits, labels, -100, config=config)[0]

    def reference(logits: Tensor, labels: Tensor) -> Any:
        return F.cross_entropy(logits.float(), labels, reduction="none")

    logits = normal(CHUNK, VOCABULARY)
    labels = torch.randint(VOCABULARY, (CHUNK,), device="cuda")
    launches = {label: partial(launch, config=config) for label, config in grid.items()}
    check = partial(check_near, reference(logits, labels))
    yield Case(f"{CHUNK} x {VOCABULARY}", (logits, labels), launches, reference, logits.nbytes, check)


def loss_gradient_cases(sizes: list[str]) -> Iterator[Case]:
    """Softmax minus one-hot of a chunk of logits, read once and written in both FP8 layouts."""
    from kpt_lightning.kernels import cross_entropy_triton as kernels

    first = kernels.QUANTIZE_CONFIG
    grid = {"default": first} | {
        f"{rows} x {columns}, {warps} warps": replace(first, rows=rows, columns=columns, num_warps=warps)
        for rows, columns in ((64, 64), (128, 64), (128, 128)) for warps in (2, 4, 8)
    }  # fmt: skip

    def launch(logits: Tensor, labels: Tensor, logsumexp: Tensor, config: Any) -> Any:
        columns = torch.empty((VOCABULARY, CHUNK), dtype=E5M2, device="cuda")
        rows = kernels.launch_backward_quantize(
            logits, labels, logsumexp, E5M2, VOCABULARY, columns, 0, -100, config=config
        )
        return rows, columns, torch.tensor(1 / torch.finfo(E5M2).max, device="cuda")

    def exact(logits: Tensor, labels: Tensor, logsumexp: Tensor) -> Tensor:
        softmax = torch.exp(logits.float() - logsumexp[:, None])
        return softmax.scatter_add(1, labels[:, None], torch.full_like(softmax[:, :1], -1.0))

    logits = normal(CHUNK, VOCABULARY)
    labels = torch.randint(VOCABULARY, (CHUNK,), device="cuda")
    inputs = (logits, labels, logits.float().logsumexp(1))
    launches = {label: partial(launch, config=config) for label, config in grid.items()}
    yield Case(
        f"{CHUNK} x {VOCABULARY}", inputs, launches, lambda *given: cast_both(exact(*given), E5M2),
        2 * logits.nbytes, lambda result: check_float8(exact(*inputs), E5M2, result),
    )  # fmt: skip


KERNELS: dict[str, Callable[[list[str]], Iterator[Case]]] = {
    "quantize": quantize_cases,
    "gated": partial(gated_cases, backward=False),
    "gated_backward": partial(gated_cases, backward=True),
    "rms_norm": partial(norm_cases, backward=False),
    "rms_norm_backward": partial(norm_cases, backward=True),
    "cross_entropy": loss_cases,
    "cross_entropy_backward": loss_gradient_cases,
}


def launch_grid(first: Any) -> dict[str, Any]:
    """The default and what differs from it in one thing, or in the tile of one kernel, by name."""
    tiles = [
        (128, 128, 8),
        (64, 128, 8),
        (64, 64, 4),
        (64, 64, 8),
        (128, 64, 4),
        (128, 64, 8),
        (256, 64, 8),
        (32, 128, 4),
    ]
    changes: list[dict[str, Any]] = [{}, {"last_first": False}]
    changes += [{"cast_rows": rows, "cast_columns": columns, "cast_warps": warps} for rows, columns, warps in tiles]
    changes += [{"amax_rows": first.amax_rows * 2}, {"amax_rows": max(1, first.amax_rows // 2)}]
    changes += [{"amax_columns": columns} for columns in (512, 2048)] + [{"amax_warps": warps} for warps in (4, 16)]
    changes += [{"programs_per_sm": count} for count in (2, 6, 8)]
    grid: dict[Any, str] = {}
    for change in changes:
        label = ", ".join(f"{name}={value}" for name, value in change.items()) or "default"
        grid.setdefault(replace(first, **change), label)
    return {label: config for config, label in grid.items()}


def normal(*shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def check_float8(exact: Tensor, dtype: torch.dtype, result: tuple[Tensor, Tensor, Tensor]) -> float:
    """SQNR of both layouts."""
    rows, columns, scale = result
    if not torch.equal(rows.view(torch.uint8).t(), columns.view(torch.uint8)):
        raise SystemExit("the transposed layout is not the transpose of the rows")
    figure = sqnr_db(exact, rows.float() * scale)
    if not figure >= LEAST_DB[dtype]:
        raise SystemExit(f"SQNR {figure:.1f} dB, at least {LEAST_DB[dtype]} expected: the kernel is wrong")
    return figure


def check_near(exact: Tensor, result: Tensor) -> float:
    """SQNR of a result in bf16 or fp32."""
    figure = sqnr_db(exact, result)
    if not figure >= NEAR_DB:
        raise SystemExit(f"SQNR {figure:.1f} dB, at least {NEAR_DB} expected: the kernel is wrong")
    return figure
