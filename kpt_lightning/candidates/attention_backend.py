"""Which kernel torch's scaled_dot_product_attention takes, chosen by time on the sizes of this model."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from kpt_lightning.attention import flash_package
from kpt_lightning.attention.backend import SDP, preferring, try_backend
from kpt_lightning.attention.call import TITLES, AttentionCall
from kpt_lightning.candidates.candidate import Change, Stage
from kpt_lightning.candidates.replay import attention_setting, observe_model
from kpt_lightning.candidates.subject import Subject
from kpt_lightning.config import Level
from kpt_lightning.decision import Rejected
from kpt_lightning.errors import ConfigError
from kpt_lightning.optional import OptionalPackage
from kpt_lightning.validation.gates import Numerics

_BY_DEVICE = {"cuda": ("cudnn", "flash", "efficient", "fa3", "fa4"), "cpu": ("flash", "math")}


class AttentionBackend:
    """Another kernel for the same attention."""

    name = "attention_backend"
    level = Level.CONSERVATIVE
    stage = Stage.ATTENTION
    turn = 30
    numerics = Numerics.ROUNDING
    features: tuple[str, ...] = ()
    packages: tuple[OptionalPackage, ...] = ()

    def applies(self, subject: Subject) -> Sequence[Change | Rejected]:
        """Each backend that takes this model's calls and is faster on them alone."""
        backends = _BY_DEVICE.get(subject.device.type)
        if backends is None:
            return [Rejected(self.name, f"torch has one attention kernel for {subject.device.type}: nothing to choose")]
        calls = observe_model(subject)
        if isinstance(calls, Rejected):
            return [Rejected(self.name, calls.reason)]
        chosen = Counter(call for call in calls if call.backend in SDP)
        if not chosen:
            return [Rejected(self.name, _why_none(subject, calls))]
        running = {call.backend for call in chosen}
        if running & flash_package.IMPLEMENTATIONS.keys():
            # The user put it there; torch's own kernel and another package would have to take it out again.
            backends = tuple(each for each in backends if SDP[each] is not SDP["flash"])
        return [self._propose(subject, chosen, each) for each in backends if running != {each}]

    def apply(self, subject: Subject, setting: Mapping[str, Any]) -> ExitStack:
        """Put the choice around every forward pass.

        Raises:
            ConfigError: The backend is unknown, or its package is not installed here.
        """
        backend = setting["backend"]
        _check(backend)

        def context() -> AbstractContextManager[object]:
            return preferring(backend)

        with ExitStack() as undo:
            undo.enter_context(flash_package.activated(backend))
            subject.contexts.append(context)
            undo.callback(_remove, subject, context)
            return undo.pop_all()

    def undo(self, subject: Subject, applied: ExitStack) -> None:
        """Take the context away, and the package out."""
        applied.close()

    def _propose(self, subject: Subject, calls: Counter[AttentionCall], backend: str) -> Change | Rejected:
        if backend in flash_package.IMPLEMENTATIONS and not (verdict := flash_package.available(backend)):
            return Rejected(self.name, f"{TITLES[backend]}: {verdict.reason}")
        saved, surely, texts = 0.0, 0.0, []
        for call, count in calls.items():
            gain = try_backend(call, backend, subject.forward_context, subject.device)
            if isinstance(gain, Rejected):
                return Rejected(self.name, f"{TITLES[backend]} does not take {call}: {gain.reason}")
            saved += count * (gain.before - gain.after)
            surely += count * gain.before * (1 - 1 / max(gain.low, 1e-9))
            texts.append(f"{1e3 * gain.before:.3g} -> {1e3 * gain.after:.3g} ms for each of {count}: {call}")
        text = f"{TITLES[backend]}, forward and backward alone: {'; '.join(texts)}"
        if min(saved, surely) <= 0:
            return Rejected(self.name, f"not measurably faster: {text}")
        return Change(
            candidate=self.name, setting={"backend": backend}, reason=text, predicted=_predicted(subject, saved)
        )


CANDIDATE = AttentionBackend()


def _predicted(subject: Subject, saved: float) -> float | None:
    """The step without the seconds that the kernel alone saves: nothing else of the step changes."""
    if not subject.step_seconds or saved >= subject.step_seconds:
        return None
    return subject.step_seconds / (subject.step_seconds - saved)


def _why_none(subject: Subject, calls: Sequence[AttentionCall]) -> str:
    if calls:
        return f"attention does not run through scaled_dot_product_attention but {TITLES[calls[0].backend]}"
    setting = attention_setting(subject)
    if setting is None or setting == "sdpa":
        return "no call of scaled_dot_product_attention was seen: none is made, or it runs as matrix products"
    return f"the model's attention is {setting!r} (config._attn_implementation): no choice of torch's"


def _check(backend: str) -> None:
    if backend not in SDP:
        known = ", ".join(SDP)
        raise ConfigError("attention_backend.backend", backend, f"must be one of {known}", "Make a new plan")
    if backend in flash_package.IMPLEMENTATIONS and not (verdict := flash_package.available(backend)):
        raise ConfigError("attention_backend.backend", backend, verdict.reason, "Install it, or make a new plan")


def _remove(subject: Subject, context: Callable[[], AbstractContextManager[object]]) -> None:
    subject.contexts[:] = [each for each in subject.contexts if each is not context]
