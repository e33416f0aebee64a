"""The command line: a program's options are one dataclass, and its fields are the flags.

`batch: int = option(16, "stories a step")` is --batch=32 and --batch 32; `parse` makes the dataclass of the words, and
`sys.exit(run(main))` makes a sentence of the user's mistakes and leaves ours their traceback.
"""
from __future__ import annotations

import dataclasses
import difflib
import math
import os
import shlex
import sys
import textwrap
import typing

NONE = type(None)
WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NONE: "none"}
READ = {bool: {"true": True, "false": False}.__getitem__, NONE: {"none": None}.__getitem__}


def option(default, help: str, choices: tuple | None = None):
    """A dataclass field that is a flag: its default, a line for --help with the unit, and the values it may have."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def parse(cls, argv: list[str] | None, prog_doc: str | None, presets: dict | None = None):
    """An instance of cls with the flags of argv set; --help leaves with 0, a mistake with one sentence and 2.

    `presets[NAME]` is what --preset=NAME sets, where argv does not say otherwise.
    """
    try:
        given = _values(cls, list(sys.argv[1:] if argv is None else argv), prog_doc)
        return cls(**{**(presets or {}).get(given.get("preset"), {}), **given})
    except ValueError as error:                  # also those of cls.__post_init__, about flags that don't go together
        sys.exit(_complain(error))


def run(main, argv: list[str] | None = None) -> int:
    """main(argv)'s exit code: a ValueError or OSError is the user's, one sentence and 2; any other error is ours."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")     # a character the terminal hasn't got is no reason to fail
    try:
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        finally:
            sys.stdout.flush()                   # a reader who has left (| head) is noticed here, not at the very end
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # or the interpreter complains as it exits
        return 141
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:                   # python -X dev keeps the traceback, for a ValueError that is a bug
            raise
        return _complain(error)


def _values(cls, words: list[str], prog_doc: str | None) -> dict:
    """The flags that were given, by field name; of a flag given twice the last."""
    flags, hints, values = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls), {}
    assert all(f.default is not dataclasses.MISSING for f in flags.values()), "a flag without a default: give it one"
    while words:
        word, equals, text = words.pop(0).partition("=")
        name = word.lstrip("-").replace("-", "_")
        if word in ("--help", "-h"):
            print(_help(flags, hints, prog_doc))
            sys.exit(0)
        if not word.startswith("-"):
            raise ValueError(f"{word!r} belongs to no flag: write --name=value, and quotes around a value with blanks")
        if name not in flags or not word.startswith("--"):
            near = difflib.get_close_matches(name, [*flags, "help"], n=1, cutoff=0)[0]
            raise ValueError(f"{word} is no flag: did you mean --{near}? (--help lists them all)")
        values[name] = _value(flags[name], hints[name], text if equals else _next(name, hints[name], words))
    return values


def _next(name: str, hint, words: list[str]) -> str:
    """The word after --name, which is its value; a bool may do without."""
    if bool in _kinds(hint) and words[:1] not in (["true"], ["false"], ["none"]):
        return "true"
    if not words or words[0].startswith("--"):
        raise ValueError(f"--{name} has no value: {_wanted(hint)} was wanted, as --{name}=VALUE")
    return words.pop(0)


def _value(field, hint, text: str):
    """What text stands for, in the first of hint's types that has such a value."""
    choices = field.metadata.get("choices")
    for kind in _kinds(hint):
        try:
            value = READ.get(kind, kind)(text)
        except (KeyError, ValueError):
            continue
        if (choices is None or value in choices) and (kind is not float or math.isfinite(value)):
            return value
    wanted, example = _wanted(hint, choices), f"--{field.name}={_shown(field.default)}"
    raise ValueError(f"--{field.name} is {text!r}: {wanted} was wanted, for example {example}")


def _kinds(hint) -> list:
    """The types in an annotation, None first, so that the word none is None also in `str | None`."""
    return sorted(typing.get_args(hint) or (hint,), key=lambda kind: kind is not NONE)


def _wanted(hint, choices: tuple | None = None) -> str:
    return " or ".join(map(_shown, choices) if choices else [WANTED[kind] for kind in reversed(_kinds(hint))])


def _shown(value) -> str:
    """value as one would type it in a shell."""
    return str(value).lower() if value is None or isinstance(value, bool) else shlex.quote(str(value))


def _help(flags: dict, hints: dict, prog_doc: str | None) -> str:
    """prog_doc, then for each flag what it means, what it wants and its default."""
    lines = [(prog_doc or "").strip(), "", "flags (--name=value or --name value; - and _ are the same):"]
    for name, field in flags.items():
        wanted = _wanted(hints[name], field.metadata.get("choices"))
        what = f"{field.metadata.get('help', '')} ({wanted}; default {_shown(field.default)})".strip()
        lines += textwrap.wrap(f"{'--' + name:<20} {what}", 100, initial_indent="  ", subsequent_indent=" " * 23,
                               break_on_hyphens=False)
    return "\n".join(lines).strip()


def _complain(error: Exception) -> int:
    """error as one line on stderr; 2, the exit code of wrong use."""
    said = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
    print("error:", " ".join(said.split()) or type(error).__name__, file=sys.stderr)
    return 2
