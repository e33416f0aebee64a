"""The values of flags, beyond their types: ranges of numbers, paths that begin with ~, text in UTF-8."""
import os
from dataclasses import replace
from typing import NamedTuple


class Range(NamedTuple):
    """Numbers from `low` to `high`; `above` excludes `low`. Integers if `low` is one."""
    low: int | float
    high: int | float | None = None
    above: bool = False

    def __contains__(self, value) -> bool:
        if not value >= self.low or (self.above and value == self.low):      # `not >=` also refuses NaN
            return False
        return self.high is None or value <= self.high

    def __str__(self) -> str:
        kind = "an integer" if isinstance(self.low, int) else "a number"
        if self.above:
            at_most = "" if self.high is None else f" and at most {self.high:g}"
            return f"{kind} above {self.low:g}{at_most}"
        if self.high is None:
            return f"{kind} of at least {self.low:g}"
        return f"{kind} from {self.low} to {self.high}"


def check_ranges(config, ranges: dict[str, Range]) -> None:
    """ValueError for the first field of `config` that is outside of its range. None is always allowed."""
    for name, allowed in ranges.items():
        value = getattr(config, name)
        if value is not None and value not in allowed:
            got = f"{value:g}" if isinstance(value, float) else value
            raise ValueError(f"--{name}={got}: expected {allowed}")


def expand_home(config, *names: str):
    """The configuration with ~ at the beginning of these fields replaced.

    ValueError if one of them is empty, or if ~ is followed by the name of an unknown user.

    A shell replaces it in --out ~/run, but not in --out=~/run.
    """
    paths = {}
    for name in names:
        value = getattr(config, name)
        if value == "":
            raise ValueError(f"--{name}=: expected a name, got an empty text; leave the flag out to have its "
                             "default")
        if value is None:
            continue
        paths[name] = os.path.expanduser(value)
        if paths[name].startswith("~"):
            user = value.split("/")[0]
            raise ValueError(f"--{name}={value}: the home folder of {user} is not known; write ./{value} for "
                             "a folder of that name")
    return replace(config, **paths)


def check_utf8(name: str, text: str | None) -> None:
    """ValueError if a text of the command line had bytes that are not UTF-8: Python reads surrogates then."""
    if text is not None and any(0xD800 <= ord(character) < 0xE000 for character in text):
        raise ValueError(f"--{name}={text!r}: expected text in UTF-8, got other bytes; set the terminal to "
                         "UTF-8")
