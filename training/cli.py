"""The command line. A program's configuration is a dataclass: its fields are the flags, and the comment after a field
is its help.

    batch: int = 16             # rows per update

gives --batch=32 and --batch 32. A comment on a line of its own begins a group of flags. `parse` builds an argparse
parser from the dataclass; `sys.exit(run(main))` turns mistakes of the user into one sentence and exit code 2.
"""
import argparse
import dataclasses
import difflib
import inspect
import math
import os
import re
import shlex
import sys
import types
import typing

FIELD = re.compile(r"^    (\w+):.*?  # (.*)$")
GROUP = re.compile(r"^    # (.*)$")
EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
METAVAR = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT"}


@dataclasses.dataclass
class Flag:
    """One flag, as its field declares it."""
    name: str
    kind: type                  # int, float, bool or str
    choices: tuple | None       # the only values allowed
    optional: bool              # whether the value "none" is allowed
    default: object
    help: str
    group: str

    def convert(self, text: str):
        """The value of `text`. argparse.ArgumentTypeError if it has none."""
        if self.optional and text == "none":
            return None
        try:
            value = BOOLEANS[text] if self.kind is bool else self.kind(text)
        except (ValueError, KeyError):
            raise self.error(text) from None
        if self.choices and value not in self.choices:
            raise self.error(text)
        if self.kind is float and not math.isfinite(value):
            raise self.error(text)
        return value

    def error(self, text: str) -> argparse.ArgumentTypeError:
        expected = " or ".join(map(str, self.choices)) if self.choices else EXPECTED[self.kind]
        example = self.default if self.default is not None else METAVAR[self.kind]
        return argparse.ArgumentTypeError(f"expected {expected}, got {text!r} (e.g. --{self.name}={shown(example)})")

    def line(self) -> str:
        """Its line of --help."""
        values = "|".join(map(str, self.choices)) if self.choices else METAVAR[self.kind]
        usage = f"--{self.name}" if self.kind is bool else f"--{self.name}={values}"
        default = f" (default: {shown(self.default)})" if self.default not in (None, False, "") else ""
        return f"  {usage:<27} {self.help}{default}"


BOOLEANS = {"true": True, "false": False}


def shown(value) -> str:
    """A value as one would type it in a shell."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return shlex.quote(text)


def flags_of(cls) -> dict[str, Flag]:
    """The flags of a dataclass, by name."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    comments, groups, group = {}, {}, ""
    for line in inspect.getsource(cls).splitlines():
        if found := GROUP.match(line):
            group = found[1]
        elif found := FIELD.match(line):
            comments[found[1]] = found[2]
            groups[found[1]] = group
    flags = {}
    for name, field in fields.items():
        kind, choices, optional = read_hint(hints[name])
        flags[name] = Flag(name, kind, choices, optional, field.default, comments[name], groups[name])
    return flags


def read_hint(hint) -> tuple[type, tuple | None, bool]:
    """A field's type as (kind, choices, whether it may be None)."""
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    if optional:
        hint, = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices, optional
    return hint, None, optional


def parse(cls, argv: list[str] | None, prog_doc: str | None, presets: dict | None = None):
    """An instance of the dataclass `cls` with the flags of argv set; --help exits with 0, a mistake with 2.

    `presets[NAME]` is what --preset=NAME sets, except where argv says otherwise.
    """
    try:
        given = read_flags(flags_of(cls), list(sys.argv[1:] if argv is None else argv), prog_doc)
        preset = (presets or {}).get(given.get("preset"), {})
        return cls(**{**preset, **given})
    except ValueError as error:                  # also those of cls.__post_init__, about flags that do not go together
        sys.exit(complain(error))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message.removeprefix("argument "))


def read_flags(flags: dict[str, Flag], argv: list[str], prog_doc: str | None) -> dict:
    """The flags that argv sets, by field name."""
    if "--help" in argv or "-h" in argv:
        print(help_text(flags, prog_doc))
        sys.exit(0)
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in flags.values():
        if flag.kind is bool:
            parser.add_argument(f"--{flag.name}", type=flag.convert, nargs="?", const=True)
        else:
            parser.add_argument(f"--{flag.name}", type=flag.convert)
    known, unknown = parser.parse_known_args([with_underscores(word) for word in argv])
    for word in unknown:
        if not word.startswith("-"):
            raise ValueError(f"{word!r} does not belong to a flag: use --name=value, with quotes around a value that "
                             "has spaces")
        name = word.lstrip("-").partition("=")[0]
        nearest = difflib.get_close_matches(name, [*flags, "help"], n=1, cutoff=0)[0]
        raise ValueError(f"unknown flag --{name}; did you mean --{nearest}? (--help lists all flags)")
    return vars(known)


def with_underscores(word: str) -> str:
    """--max-prompt=3 as --max_prompt=3; other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def help_text(flags: dict[str, Flag], prog_doc: str | None) -> str:
    """The program's docstring, then a line per flag."""
    lines = [(prog_doc or "").strip()]
    group = None
    for flag in flags.values():
        if flag.group != group:
            group = flag.group
            lines += ["", f"{group or 'Flags'}:"]
        lines.append(flag.line())
    return "\n".join(lines)


def run(main, argv: list[str] | None = None) -> int:
    """The exit code of main(argv): a ValueError or OSError is a mistake of the user, one sentence and 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")     # for characters that the terminal cannot show
    try:
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        finally:
            sys.stdout.flush()                   # notices here, not at exit, that a reader (| head) has gone
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # or the interpreter complains at exit
        return 141
    except KeyboardInterrupt:
        print("interrupted from the keyboard", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:                   # python -X dev keeps the traceback, for a ValueError that is a bug
            raise
        return complain(error)


def complain(error: Exception) -> int:
    """Print the error as one line on stderr; the exit code of wrong use, 2."""
    message = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
    print("error:", " ".join(message.split()) or type(error).__name__, file=sys.stderr)
    return 2
