from datetime import UTC, datetime, timedelta, timezone

import pytest

from kpt_lightning.errors import ConfigError
from kpt_lightning.tracking.expiry import expiry

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "until"),
    [
        ("14d", NOW + timedelta(days=14)),
        ("36h", NOW + timedelta(hours=36)),
        (" 2w ", NOW + timedelta(weeks=2)),
        ("2026-06-01", datetime(2026, 6, 2, tzinfo=UTC)),
        ("2026-06-01T13:00", datetime(2026, 6, 1, 13, tzinfo=UTC)),
        ("2026-06-01T13:00+02:00", None),
        ("2026-06-01T15:00+02:00", datetime(2026, 6, 1, 13, tzinfo=UTC)),
        ("2026-05-31", None),
        ("0d", None),
        ("-1d", None),
        ("soon", None),
        ("", None),
        ("14", None),
        ("99999999999d", None),
    ],
)
@pytest.mark.parametrize("zone", [UTC, timezone(timedelta(hours=-11))])
def test_a_span_or_a_date_names_a_moment_in_utc(text: str, until: datetime | None, zone: timezone) -> None:
    if until is None:
        with pytest.raises(ConfigError, match="--expires"):
            expiry(text, NOW.astimezone(zone))
    else:
        assert expiry(text, NOW.astimezone(zone)) == until
