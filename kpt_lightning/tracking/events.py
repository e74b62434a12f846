"""Who and when: what every entry of the append-only logs of baselines and acknowledgements says."""

import getpass
import os
from datetime import UTC, datetime


def author() -> str:
    """Login name of the user; the numeric id where the machine knows no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def utc_now() -> datetime:
    """Now, in UTC whatever the zone of the host."""
    return datetime.now(UTC)
