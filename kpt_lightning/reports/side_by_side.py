"""Two runs of any keys side by side, as data."""

from typing import Any

from kpt_lightning.tracking.differences import differences
from kpt_lightning.tracking.record import RunRecord


def side_by_side(a: RunRecord, b: RunRecord) -> dict[str, Any]:
    """Metrics of both runs, and what else differs.

    Returns:
        JSON-like: "runs", the two ids; "same_key"; "metrics", name to "a" and "b" (medians, None where a run lacks it),
        "units" of both and "change" (``b / a - 1``; None where one is missing, of another unit, or ``a`` is not
        positive); "differences", see :func:`kpt_lightning.tracking.differences.differences`.
    """
    names = dict.fromkeys([*a.metrics, *b.metrics])
    return {
        "runs": [a.run_id, b.run_id],
        "same_key": a.key == b.key,
        "metrics": {name: _metric(a, b, name) for name in names},
        "differences": differences(a, b),
    }


def _metric(a: RunRecord, b: RunRecord, name: str) -> dict[str, Any]:
    left, right = a.metrics.get(name), b.metrics.get(name)
    change = None
    if left is not None and right is not None and left.unit == right.unit and left.median > 0.0:
        change = right.median / left.median - 1
    return {
        "a": left and left.median, "b": right and right.median,
        "units": [left.unit if left else "", right.unit if right else ""], "change": change,
    }  # fmt: skip
