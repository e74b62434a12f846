"""What happens to a run when it ended: it is stored, judged by its history, shown, and a regression is told."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from kpt_lightning.errors import ConfigError, HistoryError
from kpt_lightning.tracking import report
from kpt_lightning.tracking.acks import SEVERITIES, all_acks
from kpt_lightning.tracking.baselines import accepted_runs
from kpt_lightning.tracking.conclusion import Conclusion, RegressionWarning, conclude
from kpt_lightning.tracking.record import RunRecord
from kpt_lightning.tracking.recorder import OUT_OF_MEMORY, RunRecorder
from kpt_lightning.tracking.severity import Severity
from kpt_lightning.tracking.store import RunStore

Reaction = Literal["warn", "ignore", "fail"] | Callable[[Conclusion], None]

HISTORY_LIMIT = 200
"""Newest runs that a run is judged by; more would tell its noise no better (``thresholds.GATE_QUANTILES``)."""

_log = logging.getLogger(__name__)


class Judge:
    """Keeps runs in a store and judges each by those before it."""

    def __init__(
        self,
        store: RunStore | str | Path | None = None,
        *,
        on_regression: Reaction = "warn",
        fail_on: Severity = "minor",
        print_report: bool = True,
    ) -> None:
        """Check the settings; nothing is opened.

        Args:
            store: The history: a path, a database URL or a store. None is ``KPT_HISTORY``, else ``.kpt/runs.sqlite``
                under the current directory.
            on_regression: "warn", "ignore" (no warning of a drift either), "fail", which is left to the caller, or a
                function of the :class:`.conclusion.Conclusion`.
            fail_on: Least severity that counts: "minor", "moderate" or "severe".
            print_report: Print one table for each finished run.

        Raises:
            ConfigError: ``on_regression`` or ``fail_on`` is not one of these.
        """
        if not callable(on_regression) and on_regression not in ("warn", "ignore", "fail"):
            rule = 'must be one of "warn", "ignore", "fail" or a function of the comparison'
            raise ConfigError("on_regression", on_regression, rule, "Choose one of these")
        if fail_on not in SEVERITIES:
            raise ConfigError("fail_on", fail_on, f"must be one of {', '.join(SEVERITIES)}", "Choose one of these")
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        self.on_regression, self.fail_on, self.print_report = on_regression, fail_on, print_report

    def finished(self, record: RunRecord) -> Conclusion | None:
        """Store a finished run, judge it, print it, and tell a regression as it was asked for.

        A store that cannot be written is warned of: the training is over and good.

        Returns:
            None where no run came before, or the run was not stored.
        """
        try:
            found = self._keep(record)
        except HistoryError as error:
            warnings.warn(f"kpt: training finished, its record was not stored: {error}", stacklevel=2)
            return None
        if self.print_report:
            _print(record, found)
        if found is not None and found.regressed:
            self._tell(found)
        return found

    def broken_off(self, record: RunRecord) -> Conclusion | None:
        """Store a run that did not finish. Whatever goes wrong is logged: the user's exception is on its way.

        Returns:
            None unless what killed it is news to its history.
        """
        try:
            found = self._keep(record)
        except (HistoryError, RuntimeError, OSError) as error:
            _log.warning("kpt: this %s run has no record: %s", record.status, error)
            return None
        if found is None or not found.problems:
            return None
        self._log(found)
        return found

    def _tell(self, found: Conclusion) -> None:
        if callable(self.on_regression):
            self.on_regression(found)
        elif self.on_regression == "warn":
            warnings.warn(f"kpt: {'; '.join(found.regressions)}", RegressionWarning, stacklevel=3)

    def _log(self, found: Conclusion) -> None:
        """Where the user's own exception is on its way, nothing else may be raised."""
        if not callable(self.on_regression):
            if self.on_regression != "ignore":
                _log.warning("kpt: %s", "; ".join(found.regressions))
            return
        try:
            self.on_regression(found)
        except Exception:  # noqa: BLE001 - told, and must not hide the exception that ended the run
            _log.exception("kpt: on_regression raised")

    def _keep(self, record: RunRecord) -> Conclusion | None:
        known: dict[str, Any] = {
            "history": self.store.like(record.key, limit=HISTORY_LIMIT),
            "acks": all_acks(self.store),
            "accepted": accepted_runs(self.store),
            "fail_on": self.fail_on,
        }
        self.store.add(record)
        return conclude(record, **known)


def broken_off_record(
    recorder: RunRecorder, error: BaseException | None, cause: str | None = None
) -> RunRecord | None:  # fmt: skip
    """The record of a run that did not finish: interrupted where somebody ended it or nobody knows why, else failed.

    Args:
        recorder: Of the run; a device that does not answer any more is not waited for.
        error: What ended it, None where nobody knows.
        cause: In words, where there is no error.

    Returns:
        None where no step was measured, and where the device is past reading, which is logged.
    """
    wanted = error is None or isinstance(error, (KeyboardInterrupt, SystemExit))
    status = "interrupted" if wanted else "failed"
    try:
        recorder.stop(wait=False)
        return recorder.finish(status, cause=cause if error is None else _cause(error))
    except (RuntimeError, OSError) as fault:
        # Logged and not warned: a warning filter of "error" would hide the user's exception behind ours.
        _log.warning("kpt: this %s run has no record: %s", status, fault)
        return None


def _cause(error: BaseException) -> str:
    """What ended a run, without the message, which may hold what nobody wants to store."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return OUT_OF_MEMORY if isinstance(error, kinds) else type(error).__name__


def _print(record: RunRecord, found: Conclusion | None) -> None:
    console = Console()
    if found is None:
        console.print(report.record_table(record))
        console.print(report.NOTHING_TO_COMPARE)
    else:
        console.print(report.conclusion_table(found))
