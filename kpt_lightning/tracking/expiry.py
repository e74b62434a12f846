"""When an acknowledgement ends: a span from now, or a date."""

import re
from datetime import UTC, datetime, timedelta

from kpt_lightning.errors import ConfigError
from kpt_lightning.tracking.events import utc_now

SPANS = {"h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}


def expiry(text: str, now: datetime | None = None) -> datetime:
    """The time that ``14d``, ``36h``, ``2w``, ``2027-01-31`` or ``2027-01-31T12:00`` names, in UTC.

    A date lasts until its end; a time without a zone is UTC's.

    Args:
        text: As the user gave it.
        now: Aware time from which spans count; the present if not given.

    Raises:
        ConfigError: It is none of these, or is over already.
    """
    now = now or utc_now()
    try:
        found = _parse(text.strip(), now)
    except (ValueError, OverflowError):
        raise _wrong(text, "must be a span such as 14d, 36h or 2w, or a date such as 2027-01-31") from None
    if found <= now:
        raise _wrong(text, f"is over already: it is {now:%Y-%m-%dT%H:%M} in UTC")
    return found


def _parse(text: str, now: datetime) -> datetime:
    if span := re.fullmatch(r"(\d+)([hdw])", text):
        return now + int(span[1]) * SPANS[span[2]]
    found = datetime.fromisoformat(text)
    found = found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    return found + timedelta(days=1) if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text) else found


def _wrong(text: str, rule: str) -> ConfigError:
    return ConfigError("--expires", text, rule, "Give a time to come")
