"""The output head and the loss of a transformers causal language model as one: the logits are never all in memory.

The head gives logits that are computed only where somebody looks at them (deferred_logits.py), and the model's loss
function takes the hidden states out of them. A model that changes the logits in between, or a user who reads them, gets
them; the loss function then does what it did before.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.class_swap import has_hooks, swap_all, swap_back, why_not_swap
from kpt_lightning.candidates.compile_loss import LOSS_SLOT, restore_loss
from kpt_lightning.candidates.deferred_logits import DeferredLogits, defer
from kpt_lightning.candidates.own_kernels import why_no_kernels
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Accepted, Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.kernels.linear_cross_entropy import linear_cross_entropy
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.precision.float8_cross_entropy import float8_linear_cross_entropy
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.calls import ModuleCall
from kpt_lightning.validation.draw import draw, foreign_argument
from kpt_lightning.validation.gates import PARITY_ULPS, Numerics
from kpt_lightning.validation.numerics import relative_error
from kpt_lightning.validation.state import preserved

Loss = Callable[..., Tensor]

# Where memory is the goal: GEMMs of fewer rows leave a GPU idle.
_FEWEST_ROWS = 1024

# TF32 has 10 bits of mantissa.
_TF32_EPS = 2.0**-10

# Rows of the random comparison, with a length that is no multiple of anything.
_BATCH, _LENGTH = 2, 33


def deferred_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward function of a changed head: the logits are due where a gradient may be wanted of them."""
    # A distributed weight knows best how it is multiplied.
    distributed = isinstance(self.weight, DTensor) or isinstance(input, DTensor)
    if distributed or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(input, self.weight, self.bias)
    return defer(input, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class FusedLoss:
    """A loss function in place of transformers' ForCausalLMLoss.

    Attributes:
        original: What was there; called for logits that are computed already.
        chunk_rows: As in ``linear_cross_entropy``.
        float8: Arguments of ``float8_linear_cross_entropy``, which then computes it; None for the dtype of the model.
    """

    original: Loss
    chunk_rows: int | None = None
    float8: Mapping[str, Any] | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Arguments as of the original, which ignores other ones, too."""
        shifted = shift_labels
        if shifted is None and labels is not None:
            # Tokens before n predict n.
            shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if not _fusable(logits, shifted, vocab_size, num_items_in_batch):
            return self.original(
                logits, labels, vocab_size, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index,
                shift_labels=shift_labels, **kwargs,
            )  # fmt: skip
        assert isinstance(logits, DeferredLogits)
        assert shifted is not None
        operands = logits.operands
        logits.bypassed = True
        # Autocast's dtype is that of the hidden states already.
        rows = operands.hidden.reshape(-1, operands.hidden.shape[-1])
        wanted = shifted.reshape(-1).to(rows.device)
        options: dict[str, Any] = {
            "ignore_index": ignore_index, "reduction": "mean" if num_items_in_batch is None else "sum",
            "num_items": num_items_in_batch, "chunk_rows": self.chunk_rows,
        }  # fmt: skip
        with torch.autocast(rows.device.type, enabled=False):
            if self.float8 is not None:
                options |= self.float8
                return float8_linear_cross_entropy(rows, operands.weight, wanted, **options)
            return linear_cross_entropy(rows, operands.weight, wanted, operands.bias, **options)


class LinearCrossEntropy:
    """Output head and loss of a transformers causal language model, a chunk of rows at a time."""

    name = "linear_cross_entropy"
    level = Level.CONSERVATIVE
    stage = Stage.MODULES
    # Before compile_loss, which then finds the loss function taken: not both can be.
    turn = 9
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    # Asked for after the device: on a CPU plain PyTorch does it.
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change where memory is wanted and the fused loss is proved to be the model's own."""
        if subject.goal != "memory":
            # On a GPU it takes the place of compile_loss, and which of them is faster is not measured.
            return [Rejected(self.name, "it saves memory; goal='memory' would try it")]
        if reason := why_no_kernels(subject):
            return [Rejected(self.name, reason)]
        verdict = decide_head(subject.model, subject.calls)
        if not verdict:
            return [Rejected(self.name, verdict.reason)]
        saves = _saved_bytes(subject.calls[verdict.subject], _FEWEST_ROWS)
        if saves <= 0:
            return [Rejected(self.name, f"the logits are too few for chunks of {_FEWEST_ROWS} rows to save memory")]
        setting = {"head": verdict.subject, "chunk_rows": _FEWEST_ROWS}
        return [Change(candidate=self.name, setting=setting, reason=verdict.reason, saves_bytes=saves)]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> tuple[Any, list[nn.Module]]:
        """Change head and loss function, in place. Raises ConfigError where they are not as they were planned."""
        return join(subject.model, setting["head"], f"plan.{self.name}", chunk_rows=setting["chunk_rows"])

    def undo(self, subject: Subject, applied: tuple[Any, list[nn.Module]]) -> None:
        """Restore both."""
        part(applied)


CANDIDATE = LinearCrossEntropy()


def join(model: nn.Module, head: str, field: str, **options: Any) -> tuple[Any, list[nn.Module]]:
    """Make head and loss function one.

    Args:
        model: That holds them.
        head: Name of the head.
        field: Where the name comes from, for the message.
        **options: Of :class:`FusedLoss`.

    Returns:
        For :func:`part`.

    Raises:
        ConfigError: The model has another head, or one that stays as it is.
    """
    found = _parts(model)
    if isinstance(found, str) or found.head_name != head:
        reason = found if isinstance(found, str) else f"the head of this model is {found.head_name!r}"
        raise ConfigError(field, head, reason, "Make a new plan")
    loss = FusedLoss(found.owner.loss_function, **options)
    heads = swap_all(model, deferred_forward, {found.head_name: None}, field)
    found.owner.loss_function = loss
    return found.owner, heads


def part(joined: tuple[Any, list[nn.Module]]) -> None:
    """Undo :func:`join`."""
    owner, heads = joined
    restore_loss(owner)
    swap_back(heads)


def decide_head(model: nn.Module, calls: Mapping[str, ModuleCall]) -> Decision:
    """Whether the loss of ``model`` can be computed from what goes into its head; the subject is the head's name.

    Proved twice: the fused loss against the model's loss function on random hidden states, with their gradients; and
    one forward pass as recorded in which the loss function must be given what the head returned.
    """
    found = _parts(model)
    if isinstance(found, str):
        return Rejected("linear cross entropy", found)
    call, head_call = calls.get(found.owner_name), calls.get(found.head_name)
    if call is None or head_call is None:
        return Rejected(found.head_name, "no call of the model was recorded, so nothing can be compared")
    reason = _why_other_loss(found, head_call) or _why_not_reached(model, found, call)
    if reason:
        return Rejected(found.head_name, reason)
    return Accepted(
        found.head_name, f"head and loss of {type(found.owner).__name__} as one, from chunks of rows of logits"
    )


@dataclass(frozen=True, slots=True)
class _Parts:
    """The module with the loss function, and its head."""

    owner_name: str
    owner: Any
    head_name: str
    head: nn.Linear


def _parts(model: nn.Module) -> _Parts | str:
    """Those of the outermost causal language model, or why there are none that can be changed."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        slot = getattr(type(module), "loss_function", None)
        if not isinstance(slot, property) or slot.fset is None:
            continue
        # Models without an output head raise here, or have no such method.
        asked = attempt(partial(_output_head, module))
        if isinstance(asked, Failure) or (head := asked.value) is None:
            continue
        if LOSS_SLOT in vars(module):
            return f"the loss function of {name or type(module).__name__!r} was replaced already"
        names = [each for each, candidate in modules.items() if candidate is head]
        if not names:
            return f"the output head that {type(module).__name__} names is none of its modules"
        return _why_not_head(head) or _Parts(name, module, names[0], head)
    return "no module with a transformers loss_function and an output head; a loss of your own runs as it is"


def _output_head(module: Any) -> Any:
    return module.get_output_embeddings()


def _why_not_head(head: nn.Module) -> str | None:
    if reason := why_not_swap(head):
        return f"the head: {reason}"
    if type(head) is not nn.Linear:
        return f"the head is {type(head).__name__}, not a plain nn.Linear"
    if has_hooks(head):
        return "a hook is on the head"
    if torch.nn.utils.parametrize.is_parametrized(head):
        return "the head's weight is computed by a parametrization"
    return None


def _why_other_loss(found: _Parts, call: ModuleCall) -> str | None:
    """Compare loss and gradients on random hidden states: plain, with a count of items, and with shifted labels."""
    dtype = call.autocast or found.head.weight.dtype
    lowered = found.head.weight.is_cuda and torch.get_float32_matmul_precision() != "highest"
    allowed = PARITY_ULPS * max(torch.finfo(dtype).eps, _TF32_EPS if lowered else 0.0) / 2
    uses: tuple[dict[str, Any], ...] = ({}, {"num_items_in_batch": 17}, {"shift_labels": True})
    for extra in uses:
        pair = attempt(partial(_both_losses, found, call, extra))
        if isinstance(pair, Failure):
            return f"the loss function fails on random logits: {pair.text}"
        for name, own, fused in zip(("loss", "gradient of hidden", "gradient of weight"), *pair.value, strict=True):
            error = relative_error(own, fused) if bool(own.any()) else float(fused.abs().max())
            if not error <= allowed:
                title = type(found.owner).__name__
                return f"{name} of {title}'s own loss is another: relative error {error:.1e}, allowed {allowed:.1e}"
    return None


def _both_losses(found: _Parts, call: ModuleCall, extra: Mapping[str, Any]) -> list[list[Tensor]]:
    """The model's own, and the fused one."""
    return [_random_loss(found, call, fused, extra) for fused in (False, True)]


def _random_loss(found: _Parts, call: ModuleCall, fused: bool, extra: Mapping[str, Any]) -> list[Tensor]:
    """Loss and gradients of hidden states and weight; nobody's ``.grad`` is written."""
    weight = found.head.weight.detach().requires_grad_()
    bias = None if found.head.bias is None else found.head.bias.detach()
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (_BATCH, _LENGTH, weight.shape[1])
    hidden = torch.randn(shape, generator=generator, device=weight.device).to(weight.dtype).requires_grad_()
    labels = torch.randint(len(weight), shape[:2], generator=generator, device=weight.device)
    labels[:, ::5] = -100
    arguments: dict[str, Any] = {
        key: labels.roll(1, dims=1) if key == "shift_labels" else value for key, value in extra.items()
    }
    original = found.owner.loss_function
    with torch.enable_grad(), _as_recorded(weight.device, call):
        head: Callable[..., Tensor] = defer if fused else F.linear
        loss = (FusedLoss(original) if fused else original)(
            logits=head(hidden, weight, bias), labels=labels, vocab_size=len(weight), **arguments
        )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]


def _why_not_reached(model: nn.Module, found: _Parts, call: ModuleCall) -> str | None:
    """Run the model as recorded, and see whether the head's logits reach the loss function, and nobody else."""
    if foreign := foreign_argument(call):
        return f"the model is called with a {foreign}, which may keep state, so it cannot be run once more"
    with preserved(model):
        seen = attempt(lambda: _run_watched(model, found, call))
    if isinstance(seen, Failure):
        return f"the model fails on its recorded call: {seen.text}"
    if not seen.value:
        return "the model does not call its loss function: it is given no labels, or has a loss of its own"
    logits = seen.value[0]
    if not isinstance(logits, DeferredLogits) or not logits.bypassed:
        return "the model changes the logits between head and loss"
    if logits.computed:
        return "the model itself computes with the logits"
    return None


def _run_watched(model: nn.Module, found: _Parts, call: ModuleCall) -> list[Any]:
    """What the loss function was given as logits, each time it was called."""
    given: list[Any] = []
    args, kwargs = draw(call, scale=1.0, seed=0)
    found.owner.train(call.training)
    with torch.enable_grad(), _as_recorded(found.head.weight.device, call), _fused_and_watched(model, found, given):
        found.owner(*args, **kwargs)
    return given


@contextmanager
def _fused_and_watched(model: nn.Module, found: _Parts, given: list[Any]) -> Iterator[None]:
    fused = FusedLoss(found.owner.loss_function)

    def watched(logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given.append(logits)
        return fused(logits, *args, **kwargs)

    heads = swap_all(model, deferred_forward, {found.head_name: None}, "linear_cross_entropy")
    found.owner.loss_function = watched
    try:
        yield
    finally:
        restore_loss(found.owner)
        swap_back(heads)


def _as_recorded(device: torch.device, call: ModuleCall) -> Any:
    return nullcontext() if call.autocast is None else torch.autocast(device.type, call.autocast)


def _fusable(
    logits: Tensor, shift_labels: Tensor | None, vocab_size: int, num_items: Tensor | int | None
) -> bool:  # fmt: skip
    """Whether the loss is that of these logits as the head gave them; the original tells what is wrong otherwise."""
    return (
        isinstance(logits, DeferredLogits)
        and not logits.computed
        and logits.shape[-1] == vocab_size
        and shift_labels is not None
        and shift_labels.dtype == torch.int64
        and shift_labels.numel() * vocab_size == logits.numel()
        and (not isinstance(num_items, Tensor) or num_items.numel() == 1)
    )


def _saved_bytes(call: ModuleCall, rows: int) -> int:
    """Of the peak in the loss: two fp32 tensors of the size of the logits, against a chunk of logits and gradient."""
    *leading, classes = call.output.shape
    count = math.prod(leading)
    return int(8 * count * classes - 2 * min(count, rows) * classes * call.output.dtype.itemsize)
