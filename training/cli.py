"""The command line, from a dataclass: its fields are the flags, and the comment after a field is the help.

    # Optimization              a comment on a line of its own starts a group of flags
    batch: int = 16             # rows per update

gives --batch=32 and --batch 32. A type is int, float, bool, str, a Literal, or one of these | None; None is
written `none`. Hyphens in the name of a flag count as underscores.

Integers have 64 bits. Narrower ranges are in training/flags.py.

A program calls `parse` in its main function and ends with `sys.exit(run(main))`. A mistake of the user then
prints one line on stderr, and the exit code is 2.
"""
import argparse
import dataclasses
import difflib
import inspect
import io
import math
import os
import shlex
import sys
import textwrap
import tokenize
import types
import typing

EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
METAVAR = {int: "INT", float: "NUMBER", bool: "true|false", str: "TEXT"}
EXAMPLE = {int: 8, float: 0.5, bool: True, str: "TEXT"}
BOOLEANS = {"true": True, "false": False}
MAX_INT = 2 ** 63 - 1           # tensors hold no larger integer
NO_VALUE = object()             # stands for the value of --name without one


# 1. from the dataclass to its flags ---------------------------------------------------------------

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
            raise argparse.ArgumentTypeError(self.mistake(repr(text))) from None
        if self.kind is int and abs(value) > MAX_INT:
            raise argparse.ArgumentTypeError(f"expected an integer of at most {MAX_INT}, got {text!r}")
        is_choice = not self.choices or value in self.choices
        is_finite = self.kind is not float or math.isfinite(value)
        if not (is_choice and is_finite):
            raise argparse.ArgumentTypeError(self.mistake(repr(text)))
        return value

    def mistake(self, got: str) -> str:
        """What was expected, what came, and an example."""
        expected = " or ".join(map(str, self.choices)) if self.choices else EXPECTED[self.kind]
        if self.optional:
            expected += " or none"
        example = self.default
        if example in (None, ""):
            example = self.choices[0] if self.choices else EXAMPLE[self.kind]
        return f"expected {expected}, got {got} (e.g. --{self.name}={shown(example)})"

    def help_line(self) -> str:
        values = "|".join(map(str, self.choices)) if self.choices else METAVAR[self.kind]
        usage = f"--{self.name}" if self.kind is bool else f"--{self.name}={values}"
        has_default = self.default not in (None, "") and self.default is not False
        default = f" (default: {shown(self.default)})" if has_default else ""
        return f"  {usage:<27} {self.help}{default}"


def shown(value) -> str:
    """A value as one would type it in a shell."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return shlex.quote(text)


def flags_of(cls) -> dict[str, Flag]:
    """The flags of a dataclass, by name."""
    hints = typing.get_type_hints(cls)
    comments, groups = read_comments(cls)
    flags = {}
    for field in dataclasses.fields(cls):
        name = field.name
        assert comments.get(name), f"{cls.__name__}.{name} needs a comment on its line: the help of --{name}"
        kind, choices, optional = read_hint(hints[name])
        flags[name] = Flag(name, kind, choices, optional, field.default, comments[name], groups[name])
    return flags


def read_comments(cls) -> tuple[dict[str, str], dict[str, str]]:
    """(comment, group) of each field of a dataclass, by name, from its source code."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments = {}
    groups = {}
    group = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        comment = token.string.removeprefix("#").strip()
        code = token.line[:token.start[1]].strip()
        if code:
            name = code.partition(":")[0]
            comments[name] = comment
            groups[name] = group
        else:
            group = comment
    return comments, groups


def read_hint(hint) -> tuple[type, tuple | None, bool]:
    """A field's type as (kind, choices, whether it may be None)."""
    optional = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    if optional:
        hint, = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices, optional
    return hint, None, optional


# 2. from the command line to the dataclass --------------------------------------------------------

def parse(cls, argv: list[str] | None, prog_doc: str | None, presets: dict | None = None):
    """An instance of the dataclass `cls` with the flags of argv set; --help exits with 0, a mistake with 2.

    `presets[NAME]` has the fields that --preset=NAME sets; flags in argv override them. If argv is None,
    sys.argv is used.
    """
    flags = flags_of(cls)
    words = list(sys.argv[1:] if argv is None else argv)
    words = join_texts(flags, words)
    if "--help" in words or "-h" in words:
        print(help_text(flags, prog_doc))
        sys.exit(0)
    try:
        given = read_flags(flags, words)
        preset = (presets or {}).get(given.get("preset"), {})
        return cls(**{**preset, **given})
    except ValueError as error:                                  # cls.__post_init__ may raise them too
        sys.exit(complain(error))


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message.removeprefix("argument "))


def read_flags(flags: dict[str, Flag], argv: list[str]) -> dict:
    """The flags that argv sets, by field name. ValueError for a mistake."""
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for flag in flags.values():
        const = True if flag.kind is bool else NO_VALUE          # the value of --name without a value
        parser.add_argument(f"--{flag.name}", type=flag.convert, nargs="?", const=const)
    words = [with_underscores(word) for word in argv]
    known, unknown = parser.parse_known_args(words)
    given = vars(known)
    for name, value in given.items():
        if value is NO_VALUE:
            raise ValueError(f"--{name}: " + flags[name].mistake("no value"))
    if unknown:
        typed = argv[words.index(unknown[0])]
        raise ValueError(explain_unknown(typed, flags))
    return given


def join_texts(flags: dict[str, Flag], argv: list[str]) -> list[str]:
    """argv with --name=value instead of --name value, if the value is a text.

    A text may begin with hyphens (--prompt "--help me"). Only a flag of this program is not taken as one.
    """
    words = []
    for word in argv:
        last = words[-1] if words else ""
        last_flag = flags.get(with_underscores(last)[2:]) if last.startswith("--") else None
        takes_text = last_flag is not None and last_flag.kind is str
        if takes_text and not is_flag(flags, word):
            words[-1] = f"{last}={word}"
        else:
            words.append(word)
    return words


def is_flag(flags: dict[str, Flag], word: str) -> bool:
    """Whether a word of the command line is --help or one of the flags, with a value or without."""
    if word in ("--help", "-h"):
        return True
    name = with_underscores(word).partition("=")[0]
    return name.startswith("--") and name[2:] in flags


def with_underscores(word: str) -> str:
    """--max-prompt=3 as --max_prompt=3; other words as they are."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def explain_unknown(word: str, flags: dict[str, Flag]) -> str:
    """The message for a word of the command line that is not a flag."""
    if not word.startswith("-"):
        return (f"{word!r} does not belong to a flag: use --name=value, with quotes around a value that has "
                "spaces")
    typed = word.partition("=")[0]
    name = typed.lstrip("-").replace("-", "_")
    nearest = difflib.get_close_matches(name, [*flags, "help"], n=1, cutoff=0)[0]
    return f"unknown flag {typed}; did you mean --{nearest}? (--help lists all flags)"


def help_text(flags: dict[str, Flag], prog_doc: str | None) -> str:
    """The program's docstring, then one line per flag, under the headings of their groups."""
    lines = [(prog_doc or "").strip()]
    group = None
    for flag in flags.values():
        if flag.group != group:
            group = flag.group
            lines += ["", f"{group or 'Flags'}:"]
        lines.append(flag.help_line())
    return "\n".join(lines)


# 3. exit codes ------------------------------------------------------------------------------------

def run(main, argv: list[str] | None = None) -> int:
    """The exit code of main(argv). ValueError and OSError are mistakes of the user: one line, and 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the program was started with a closed stream
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # for characters that the terminal cannot show
    try:
        try:
            return main(sys.argv[1:] if argv is None else argv) or 0
        finally:
            sys.stdout.flush()  # raises here, not at exit, if the reader of a pipe is gone
    except BrokenPipeError:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # else the interpreter complains at its exit
        return 141
    except KeyboardInterrupt:
        print("interrupted from the keyboard", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:                                   # python -X dev: the traceback, to find a bug
            raise
        return complain(error)


def complain(error: Exception) -> int:
    """Print the error as one line on stderr; returns the exit code of wrong use, 2."""
    message = str(error)
    if getattr(error, "filename", None):
        message = f"{error.filename}: {error.strerror}"
    message = " ".join(message.split())
    print("error:", message or type(error).__name__, file=sys.stderr)
    return 2
