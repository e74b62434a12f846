"""What no metric shows: a loss that stopped being finite, a run that died for want of memory."""

from collections.abc import Collection, Sequence
from datetime import datetime

from kpt_lightning.measure.statistics import Interval
from kpt_lightning.tracking.acks import Ack, AckEnd
from kpt_lightning.tracking.change_points import CONFIDENCE
from kpt_lightning.tracking.check import Checked
from kpt_lightning.tracking.gate import Verdict
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import OUT_OF_MEMORY

FINITE_LOSS, ENOUGH_MEMORY = "finite_loss", "enough_memory"
"""Names of the two in the place of a metric: 1 where all was well, 0 where not."""

REASONS = {
    FINITE_LOSS: "a loss is not finite any more",
    ENOUGH_MEMORY: f"the run died {OUT_OF_MEMORY}, which earlier runs did not",
}


def broken_runs(
    records: Sequence[RunRecord], *, now: datetime, metrics: Collection[str] | None = None, acks: Sequence[Ack] = ()
) -> list[Checked]:
    """A severe regression for each key whose newest run broke in a way that an earlier finished run did not.

    Nothing is said of keys where all is well, unless that ends an acknowledgement.

    Args:
        records: A history, oldest first.
        now: Aware time by which acknowledgements expire.
        metrics: Names that are judged; all if not given.
        acks: Acknowledgements; those that are not live are passed over.
    """
    by_key: dict[str, list[RunRecord]] = {}
    for record in records:
        by_key.setdefault(record.key.digest, []).append(record)
    live = {(ack.key_digest, ack.metric): ack for ack in acks if ack.state(now) == "live"}
    found = []
    for key_digest, runs in by_key.items():
        for name in (FINITE_LOSS, ENOUGH_MEMORY):
            if metrics is None or name in metrics:
                found += _look(name, runs, live.get((key_digest, name)), now)
    return found


def _look(name: str, runs: Sequence[RunRecord], ack: Ack | None, now: datetime) -> list[Checked]:
    known = [(run, well) for run in runs if (well := _is_well(name, run)) is not None]
    base = [run for run, well in known[:-1] if well]
    if not base:
        return []
    newest, well = known[-1]
    if well and ack is None:
        return []
    end = AckEnd(kind="recovered", created_at=now.isoformat(timespec="milliseconds"), run_id=newest.run_id)
    return [
        Checked(
            key=newest.key, metric=name, unit="1", before=1.0, now=float(well), verdict=_verdict(name, well, len(base)),
            base_runs=tuple(run.run_id for run in base), new_runs=(newest.run_id,),
            acknowledged=None if well else ack, ended=(ack, end) if well and ack is not None else None,
        )
    ]  # fmt: skip


def _is_well(name: str, run: RunRecord) -> bool | None:
    """None where the run does not tell."""
    if name == FINITE_LOSS:
        return run.loss_finite if run.status == "finished" else None
    if run.details.get("cause") == OUT_OF_MEMORY:
        return False
    return True if run.status == "finished" else None


def _verdict(name: str, well: bool, base: int) -> Verdict:
    shift = 0.0 if well else -1.0
    interval = Interval(shift, shift, CONFIDENCE)
    if well:
        return Verdict("pass", None, shift, interval, None, base, "as in earlier runs")
    return Verdict("regression", "severe", shift, interval, None, base, REASONS[name])
