"""Whether memory is short, so that a change may cost speed to save it."""

import torch

from kpt_lightning.candidates.subject import Subject

_FULL = 0.9
"""Share of a CUDA device's memory at peak above which it counts as short: what is left goes to fragmentation."""

NOT_SHORT = 'memory is not short; goal="memory" would trade speed for it'


def shortage(subject: Subject) -> str | None:
    """Why memory is to be saved, None where it is not."""
    if subject.goal == "memory":
        return "memory is the goal"
    if subject.device.type != "cuda":
        return None
    peak, total = torch.cuda.max_memory_allocated(subject.device), torch.cuda.mem_get_info(subject.device)[1]
    return f"{peak / total:.0%} of the device's memory is used" if peak > _FULL * total else None
