"""Money, time and memory as numbers: the units several rooms count in, and the texts that say a time or its length.

Who reads such a text keeps the form it accepts, and says itself what else it wanted.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

NUSD_PER_USD: Final = 1_000_000_000
DAY_S: Final = 86_400
DAY_MS: Final = DAY_S * 1000
HOUR_MS: Final = 3_600_000
MIB: Final = 1024 * 1024
LAST_MS: Final = 253_402_300_799_000
"""9999-12-31T23:59:59Z: later instants cannot be told as a date everywhere."""

AGE: Final = re.compile(r"([0-9]{1,6})([smhdw])")
"""A form of `duration_s`: the number, and the letter of its unit or nothing for seconds."""
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}


def usd(nusd: int) -> str:
    """Integer nano-dollars as exact decimal dollars."""
    sign = "-" if nusd < 0 else ""
    whole, part = divmod(abs(nusd), NUSD_PER_USD)
    return f"{sign}{whole}.{part:09d}"


def duration_s(text: str, form: re.Pattern[str]) -> float | None:
    """The seconds that a text of this form says; None for any other text."""
    said = form.fullmatch(text)
    return None if said is None else float(said[1]) * _UNITS_S[said[2]]


def ms_of(moment: datetime) -> int:
    """Milliseconds since the Unix epoch; UTC when the moment names no zone."""
    aware = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    return (aware - _EPOCH) // timedelta(milliseconds=1)


def instant_ms(text: str, now_ms: int, *, past: bool) -> int:
    """Epoch milliseconds of an ISO 8601 date or time, or of an AGE before now (`past`) or from now on.

    Raises ValueError for any other text.
    """
    age_s = duration_s(text, AGE)
    if age_s is None:
        return ms_of(datetime.fromisoformat(text))
    return now_ms + int(age_s * 1000) * (-1 if past else 1)
