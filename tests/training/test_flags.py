"""Numbers outside of their range are refused in one sentence; ~ is the home folder."""
import math
from dataclasses import dataclass

import pytest

from training.flags import Range, check_ranges, check_utf8, expand_home


@dataclass
class Config:
    steps: int = 1
    lr: float | None = None
    weight: float = 0.0
    share: float | None = None


RANGES = {"steps": Range(1, 100), "lr": Range(0.0, above=True), "weight": Range(0.0),
          "share": Range(0.0, 1.0, above=True)}


@pytest.mark.parametrize("values, message", [
    ({"steps": 0}, "--steps=0: expected an integer from 1 to 100"),
    ({"steps": -64}, "--steps=-64: expected an integer from 1 to 100"),
    ({"steps": 10**30}, f"--steps={10**30}: expected an integer from 1 to 100"),
    ({"lr": -1.0}, "--lr=-1: expected a number above 0"),
    ({"lr": 0.0}, "--lr=0: expected a number above 0"),
    ({"weight": -1e-9}, "--weight=-1e-09: expected a number of at least 0"),
    ({"share": 0.0}, "--share=0: expected a number above 0 and at most 1"),
    ({"share": 1.5}, "--share=1.5: expected a number above 0 and at most 1"),
    ({"weight": math.nan}, "--weight=nan: expected a number of at least 0"),
])
def test_a_number_outside_of_its_range(values, message):
    with pytest.raises(ValueError) as caught:
        check_ranges(Config(**values), RANGES)
    assert str(caught.value) == message


def test_the_ends_of_a_range_and_none_are_allowed():
    allowed = (
        {}, {"steps": 100}, {"lr": 1e-300}, {"lr": 1e300}, {"weight": 0.0}, {"share": 1.0}, {"lr": None})
    for values in allowed:
        check_ranges(Config(**values), RANGES)


@dataclass
class Paths:
    out: str = "~/run"
    data: str | None = None
    init: str = "hf:gpt2"
    text: str = "~"


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home(Paths(), "out", "data", "init") == Paths("/home/me/run")
    assert expand_home(Paths("a/~/b", data="~"), "out", "data") == Paths("a/~/b", data="/home/me")
    with pytest.raises(ValueError, match="--out=: expected a name"):
        expand_home(Paths(""), "out")


def test_the_home_of_an_unknown_user_is_no_folder_of_that_name():
    with pytest.raises(ValueError) as caught:
        expand_home(Paths("~no-such-user/run"), "out")
    assert str(caught.value) == ("--out=~no-such-user/run: the home folder of ~no-such-user is not known; "
                                 "write ./~no-such-user/run for a folder of that name")
    assert expand_home(Paths("./~no-such-user/run"), "out").out == "./~no-such-user/run"


def test_text_is_utf8():
    for text in ("", "café", "\U0001f600", None):
        check_utf8("prompt", text)
    with pytest.raises(ValueError) as caught:
        check_utf8("prompt", "caf\udce9")
    assert str(caught.value) == ("--prompt='caf\\udce9': expected text in UTF-8, got other bytes; set the "
                                 "terminal to UTF-8")
