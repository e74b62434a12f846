"""Saying what attention did, and whether that is what was planned."""

from collections import Counter
from collections.abc import Sequence

from kpt_lightning.attention.call import TITLES, AttentionCall
from kpt_lightning.decision import Accepted, Decision, Rejected

_SUBJECT = "attention"


def describe(calls: Sequence[AttentionCall], *, causal: bool | None = None) -> list[Decision]:
    """One decision for each kind of call.

    Args:
        calls: From :func:`~kpt_lightning.attention.observe.observe_attention`.
        causal: True where the model is known to be causal, so that a call with a mask tensor wastes half of its work.

    Returns:
        Accepted with what ran; Rejected where work was wasted, or where no attention was seen.
    """
    if not calls:
        return [Rejected(_SUBJECT, "no call seen: none is made, or it is written out in matrix products")]
    return [_judge(call, count, causal) for call, count in Counter(calls).items()]


def check_backend(calls: Sequence[AttentionCall], planned: str) -> Decision:
    """Whether every call ran on the planned backend.

    Args:
        calls: What ran.
        planned: A key of :data:`~kpt_lightning.attention.call.TITLES`.
    """
    others = Counter(call for call in calls if call.backend != planned)
    if not calls:
        return Rejected(_SUBJECT, f"{TITLES[planned]} was planned and no attention call was seen")
    if others:
        text = "; ".join(f"{_times(count)}: {call}" for call, count in others.items())
        return Rejected(_SUBJECT, f"{TITLES[planned]} was planned, but {others.total()} of {len(calls)} ran on {text}")
    return Accepted(_SUBJECT, f"{_times(len(calls))} ran on {TITLES[planned]} as planned")


def _judge(call: AttentionCall, count: int, causal: bool | None) -> Decision:
    text = f"{_times(count)}: {call}"
    wasted = call.computed_flops / call.useful_flops(causal if call.mask is not None else None)
    if wasted > 1 and call.mask is not None:
        return Rejected(_SUBJECT, f"{text}; dense mask: computed {wasted:.1f}x the useful FLOPs")
    return Accepted(_SUBJECT, text)


def _times(count: int) -> str:
    return f"{count} call" if count == 1 else f"{count} calls"
