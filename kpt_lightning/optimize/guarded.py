"""Running a candidate's code: whatever it raises is its rejection, and the model is afterwards as before."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.errors import KptError
from kpt_lightning.optimize.put_back import put_back
from kpt_lightning.optimize.trial_record import TrialRecord
from kpt_lightning.validation.attempt import one_line
from kpt_lightning.validation.loss_run import OutOfTimeError


def guarded(subject: Subject, record: TrialRecord, judge: Callable[[], TrialRecord]) -> TrialRecord:
    """What ``judge`` makes of ``record``, with the time that it took.

    Raises:
        KptError: The device does not answer any more, or the state of the model could not be put back.
    """
    start = time.monotonic()
    try:
        with put_back(subject) as left:
            judged = _attempted(record, judge)
            if (traces := left()) and judged.ended == "judged":
                judged = judged.refused(f"failed: its undo leaves {traces} changed", "failed")
    except RuntimeError:
        # What is put back is copied on the device.
        check_device(subject.device)
        raise
    if judged.ended == "failed":
        check_device(subject.device)
    return replace(judged, seconds=record.seconds + time.monotonic() - start)


def _attempted(record: TrialRecord, judge: Callable[[], TrialRecord]) -> TrialRecord:
    try:
        return judge()
    except OutOfTimeError as error:
        return record.refused(str(error), "no time")
    except Exception as error:  # noqa: BLE001  a candidate may fail in any way, and the run goes on
        return record.refused(f"failed: {told(error)}", "failed")


def told(error: Exception) -> str:
    """The error on one line; its type where it is not this package's own."""
    return one_line(error) if isinstance(error, KptError) else one_line(f"{type(error).__name__}: {error}")


def check_device(device: torch.device) -> None:
    """Raise KptError where a failure has left the device unusable, as an illegal access does."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise KptError(
            f"a trial has left {device} unusable ({one_line(error)}). Start the process anew without this candidate"
        ) from error
