"""Whether the kernels of this package can run where a model is."""

from kpt_lightning.candidates.subject import Subject
from kpt_lightning.optional import TRITON


def why_no_kernels(subject: Subject) -> str | None:
    """Why not, or None: a GPU needs Triton, on a CPU the plain references run."""
    if subject.device.type != "cuda" or (installed := TRITON.available()):
        return None
    return installed.reason
