"""How a user's mistake is refused, and the checks that settings are made of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MALFORMED = (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError)  # who reads a file meets them
DONE, FAILED, REFUSED, STOPPED = 0, 1, 2, 75  # exit codes; 75: stopped on request, saved, resumable


class Refused(Exception):
    """A user's mistake: `key` (or file, or rank) and one line that says what to do. Exit code 2."""

    fault = "refused"

    def __init__(self, key: str, why: str) -> None:
        super().__init__(f"{key}: {why}" if key else why)
        self.key, self.why = key, why


def require(condition: bool, key: str, why: str) -> None:
    if not condition:
        raise Refused(key, why)


def needed(value: T | None, key: str, why: str) -> T:
    """What is there; refused where it is None."""
    if value is None:
        raise Refused(key, why)
    return value


def at_least(config: Any, group: str, **least: int) -> None:
    """Refuse a number below its least value."""
    for name, low in least.items():
        value = getattr(config, name)
        require(value >= low, f"{group}{name}", f"{value} is too small: use {low} or more")


def at_most(config: Any, **most: int) -> None:
    """Refuse a number above its greatest value."""
    for name, high in most.items():
        value = getattr(config, name)
        require(value <= high, name, f"{value} is too large: use {high} or less")


def choice(value: Any, key: str, choices: tuple[Any, ...]) -> None:
    shown = ", ".join(str(c).lower() for c in choices)
    require(value in choices, key, f"'{value}' is unknown: choose from {shown}")


def utf8(text: str, key: str) -> None:
    """A terminal's bytes in another encoding arrive as surrogates, which are no text."""
    require(text == text.encode(errors="replace").decode(), key, "is not UTF-8")


def place(text: str, key: str) -> Path:
    """The path that a user means, `~` resolved; refused where there can be none: nobody's home, too long a name."""
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise Refused(key, f"{text!r} is no path ({getattr(error, 'strerror', None) or error})") from error
    return path


def no_secret(url: str, key: str) -> None:
    """A URL is written to config.yaml and said in messages."""
    user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    require(not at or ":" not in user, key, "no credentials in a URL: leave them to the environment")


UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def seconds(text: str, key: str = "stop_after") -> float | None:
    """Seconds in a wall time such as `90s`, `50min`, `2h`, `1.5d`; None where it is empty."""
    if not text:
        return None
    why = f"'{text}' is no duration: write 90s, 50min, 2h or 1d"
    match = needed(re.fullmatch(r"([0-9]{0,9}\.?[0-9]{1,9})\s*(s|min|h|d)", text), key, why)
    return float(match[1]) * UNITS[match[2]]
