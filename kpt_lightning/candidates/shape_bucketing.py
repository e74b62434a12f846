"""Fewer different sequence lengths: batches of a language model are padded to a multiple, where that is faster."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.padded_collate import PADDED, PaddedCollate, over_sequence
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Decision, Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.measure.interleave import SLOW_ROUNDS, measure_gain
from kpt_lightning.measure.loading import sample_batches, why_not_measurable
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.attempt import Failure, attempt
from kpt_lightning.validation.gates import Numerics, gate
from kpt_lightning.validation.reading import Reading, distance, judge, read
from kpt_lightning.validation.rounding import rounding_noise
from kpt_lightning.validation.state import preserved
from kpt_lightning.validation.workload import Workload

_MULTIPLES = (8, 64)
"""8 rows fill a tensor core's tile in 16 bits (https://docs.nvidia.com/deeplearning/performance/
dl-performance-matrix-multiplication/index.html); 64 leaves few lengths, each of which is compiled once."""

_BATCHES = 6


class ShapeBucketing:
    """The loader's collate function wrapped by one that pads ``input_ids``, ``attention_mask`` and ``labels``.

    Proposed after the model's loss and gradients were seen to stay and its steps on batches of the loader to be faster.
    """

    name = "shape_bucketing"
    level = Level.CONSERVATIVE
    stage = Stage.INPUT
    turn = 85
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """One change for each multiple that makes training faster."""
        if reason := _why_not(subject.loader):
            return [Rejected(self.name, reason)]
        if not subject.own_loss:
            # A loss of the user's may divide by what padding changes, and is not run on batches of the loader here.
            return [Rejected(self.name, "code of yours computes the loss; padding is judged where the model does")]
        assert isinstance(subject.loader, DataLoader)
        batches = [_to(each, subject.device) for each in sample_batches(subject.loader, _BATCHES)]
        if reason := next((why for each in batches if (why := _why_not_batch(each))), None):
            return [Rejected(self.name, reason)]
        lengths = sorted({each["input_ids"].shape[1] for each in batches})
        if len(lengths) == 1:
            return [Rejected(self.name, f"all batches have length {lengths[0]}: there is nothing to even out")]
        return [self._proposal(subject, batches, lengths, multiple) for multiple in _MULTIPLES]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> Callable[[Any], Any]:
        """Wrap the collate function."""
        if reason := _why_not(subject.loader):
            raise ConfigError("plan.shape_bucketing", dict(setting), reason, "Make a new plan")
        loader: Any = subject.loader
        before: Callable[[Any], Any] = loader.collate_fn
        loader.collate_fn = PaddedCollate(before, **setting)
        return before

    def undo(self, subject: Subject, applied: Callable[[Any], Any]) -> None:
        """The collate function before."""
        loader: Any = subject.loader
        loader.collate_fn = applied

    def _proposal(
        self, subject: Subject, batches: Sequence[Any], lengths: Sequence[int], multiple: int
    ) -> Change | Rejected:
        setting = {"multiple": multiple, **_limits(subject.model)}
        verdicts = []
        # A mask of ones stays one, which keeps attention's causal fast path; a model that looks ahead needs zeros.
        for mask in (1, 0):
            padding = PaddedCollate(_nothing, mask=mask, **setting)
            verdicts.append(_same_numbers(subject, batches, padding))
            if verdicts[-1]:
                return self._judged(subject, batches, lengths, padding)
        return Rejected(self.name, f"multiples of {multiple}: {verdicts[-1].reason}")

    def _judged(
        self, subject: Subject, batches: Sequence[Any], lengths: Sequence[int], padding: PaddedCollate
    ) -> Change | Rejected:
        used: list[Any] = []

        @contextmanager
        def state(chosen: Sequence[Any]) -> Iterator[None]:
            used[:] = chosen
            yield

        def steps() -> None:
            for each in used:
                with subject.forward_context():
                    loss = Workload(subject.model, each).loss()
                loss.backward()  # type: ignore[no-untyped-call]
                subject.model.zero_grad(set_to_none=True)

        padded = [padding.pad(each) for each in batches]
        with preserved(subject.model):
            gain = measure_gain(
                lambda: state(batches), lambda: state(padded), steps, device=subject.device, rounds=SLOW_ROUNDS
            )
        figures = f"lengths {lengths[0]} to {lengths[-1]} to multiples of {padding.multiple}: {gain.ratio:.3f}x"
        if gain.low <= 1.0:
            return Rejected(self.name, f"{figures}, not surely faster")
        setting = {key: getattr(padding, key) for key in ("multiple", "token", "mask", "longest")}
        return Change(candidate=self.name, setting=setting, reason=figures, predicted=gain.ratio)


CANDIDATE = ShapeBucketing()


def _why_not(loader: Any) -> str | None:
    if loader is None:
        return "no data loader is known; pass it as loader="
    if type(loader) is not DataLoader:
        return f"{type(loader).__name__} is not torch's own DataLoader: how it collates is not known"
    if isinstance(loader.collate_fn, PaddedCollate):
        return "its batches are padded already"
    return why_not_measurable(loader)


def _why_not_batch(batch: Any) -> str | None:
    if not isinstance(batch, Mapping) or not all(name in batch for name in ("input_ids", "attention_mask", "labels")):
        return "its batches are no mapping with input_ids, attention_mask and labels"
    if batch["input_ids"].dim() != 2:
        return "its input_ids have no dimension for the sequence"
    odd = [key for key, value in batch.items() if key not in PADDED and over_sequence(value, batch)]
    return f"how to pad {odd[0]!r} is not known" if odd else None


def _limits(model: nn.Module) -> dict[str, Any]:
    """What the configuration of transformers tells about padding."""
    config = next((each.config for each in model.modules() if hasattr(each, "config")), None)
    token = getattr(config, "pad_token_id", None)
    longest = getattr(config, "max_position_embeddings", None)
    return {"token": token if isinstance(token, int) else 0, "longest": longest if isinstance(longest, int) else None}


def _same_numbers(subject: Subject, batches: Sequence[Any], padding: PaddedCollate) -> Decision:
    """Loss and gradients of padded batches against those of the batches themselves, without dropout."""
    limits = gate(Numerics.ROUNDING, subject.compute_dtype)
    verdict: Decision = Rejected("padding", "no batch")
    with preserved(subject.model):
        subject.model.eval()
        for batch in batches:
            readings = [attempt(partial(_read, subject, one)) for one in (batch, padding.pad(batch))]
            failed = next((each for each in readings if isinstance(each, Failure)), None)
            if failed is not None:
                return Rejected("padding", f"the model called with a batch gives no loss: {failed.text}")
            exact, other = (each.value for each in readings if not isinstance(each, Failure))
            verdict = judge(distance(exact, other), limits, None)
            if not verdict:
                # A gradient that is zero but for rounding has no digits in common with itself.
                with rounding_noise(subject.model, subject.compute_dtype):
                    rounding = distance(exact, _read(subject, batch))
                verdict = judge(distance(exact, other), limits, rounding)
            if not verdict:
                return Rejected("padding", f"with padding, {verdict.reason}")
    return verdict


def _read(subject: Subject, batch: Any) -> Reading:
    def forward() -> tuple[Tensor, dict[str, Tensor]]:
        with subject.forward_context():
            return Workload(subject.model, batch).loss(), {}

    return read(subject.model, forward)


def _to(batch: Any, device: torch.device) -> Any:
    kept = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda item: item.to(device) if isinstance(item, Tensor) else item, kept)


def _nothing(samples: Any) -> Any:
    return samples
