"""The command line: flags give the dataclass that they were written from; a mistake is one helpful line."""
import os
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import pytest

from training import cli
from training.flags import expand_home


@dataclass
class Options:
    # Training
    batch: int = 16             # stories per step
    lr: float = 3e-4            # learning rate of AdamW
    prompt: str = ""            # beginning of the story
    resume: bool = False        # continue where the run stopped
    length: int | None = None   # tokens; default: the context
    verifier: str | None = "self"   # checks the drafts
    compile: bool | None = None     # default: on a GPU only
    # Teacher
    source: Literal["student", "teacher", "data"] = "student"   # who writes the text
    top: Literal[16, 64] = 16   # teacher tokens, the # of each position
    kl: Literal["full", "top k"] | None = None      # divergence; default: full
    tag: str = "run  # 1"       # name of the run
    pretrain_steps: int = 2000  # steps
    warm_steps: int = 0  # steps before the others
    temperature: float = 1.0    # 0: the most likely token


@dataclass
class Pair:
    low: int = 0    # lower end
    high: int = 1   # upper end

    def __post_init__(self):
        if self.low > self.high:
            raise ValueError(f"--low={self.low} is above --high={self.high}")


@dataclass
class WithPreset:
    preset: str = "ours"    # named settings
    a: int = 1              # a number
    b: int = 2              # another number


@dataclass
class WithoutComment:
    batch: int = 16             # rows
    lr: float = 1.0


CASES = [
    Options(),
    Options(batch=-3, lr=-1e-9, prompt="--lr=1 'twice' = \n$", resume=True, length=7, verifier=None),
    Options(compile=False, source="data", top=64, kl="top k", tag="#", pretrain_steps=0, temperature=-1.0,
            prompt="-", verifier=""),
]


def refused(argv, capsys, cls=Options) -> str:
    """The message of a mistake: exit code 2, nothing on stdout, exactly one line on stderr."""
    with pytest.raises(SystemExit) as exit:
        cli.parse(cls, argv, "")
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and err.endswith("\n")
    return err


def as_words(options, glue: str) -> list[str]:
    """The command line of these options: --name=value or --name value.

    It needs --name=value for numbers like -1e-9 (-3 and -1.0 do not), and for texts like a flag of its own.
    """
    words = []
    for name, value in asdict(options).items():
        text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        needs_equals = text.startswith("-") and not re.fullmatch(r"-|-\d+|-\d*\.\d+", text)
        words += [f"--{name}={text}"] if glue == "=" or needs_equals else [f"--{name}", text]
    return words


# values ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("glue", ["=", " "])
@pytest.mark.parametrize("options", CASES)
def test_what_is_written_is_read_back(options, glue):
    words = as_words(options, glue)
    assert cli.parse(Options, words, "") == options
    assert cli.parse(Options, [word.replace("_steps", "-steps") for word in words], "") == options


def test_no_words_are_the_defaults_and_the_last_of_two_wins(monkeypatch):
    assert cli.parse(Options, [], "") == Options()
    words = ["--batch=1", "--resume=false", "--batch", "2", "--resume"]
    assert cli.parse(Options, words, "") == Options(2, resume=True)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--batch=5"])
    assert cli.parse(Options, None, "") == Options(5)


def test_values_have_the_type_of_their_field():
    parsed = cli.parse(Options, ["--top=64", "--lr=2", "--length=3", "--tag=3", "--compile=true"], "")
    values = (parsed.top, parsed.lr, parsed.length, parsed.tag, parsed.compile)
    assert [type(value) for value in values] == [int, float, int, str, bool]


def test_none_is_a_value_where_the_type_allows_it(capsys):
    for name in ("length", "verifier", "compile", "kl"):
        assert getattr(cli.parse(Options, [f"--{name}=none"], ""), name) is None
    assert cli.parse(Options, ["--prompt=none"], "").prompt == "none"
    assert "expected an integer, got 'none'" in refused(["--batch=none"], capsys)


def test_hyphens_and_underscores_in_a_name_are_the_same():
    for name in ("--pretrain_steps", "--pretrain-steps"):
        for words in ([f"{name}=3"], [name, "3"]):
            assert cli.parse(Options, words, "") == Options(pretrain_steps=3)
    assert cli.parse(Options, ["--prompt=a-b_c"], "").prompt == "a-b_c"


@pytest.mark.parametrize("text", ["--help me", "-x", "-", "-5", "--well-known story", "--sead=1", "-h!", "",
                                  "--- a ---", "-- a", "--lr", "--help", "-h", "--batch=2"])
def test_a_text_may_begin_with_hyphens(text, capsys):
    """Only a flag of the program, and only without the equals sign, is a flag."""
    assert cli.parse(Options, [f"--prompt={text}"], "") == Options(prompt=text)
    assert cli.parse(Options, [f"--prompt={text}", "--resume"], "") == Options(prompt=text, resume=True)
    if text in ("--help", "-h"):
        assert "--prompt=TEXT" in help_of(Options, ["--prompt", text], "", capsys)
    elif text in ("--lr", "--batch=2"):
        assert "--prompt: expected a text, got no value" in refused(["--prompt", text], capsys)
    else:
        assert cli.parse(Options, ["--prompt", text], "") == Options(prompt=text)
        assert cli.parse(Options, ["--prompt", text, "--lr", "2"], "") == Options(prompt=text, lr=2.0)
        assert cli.parse(Options, ["--lr=2", "--tag", text], "") == Options(tag=text, lr=2.0)


def test_the_last_of_two_texts_wins():
    assert cli.parse(Options, ["--prompt", "-a", "--prompt", "--b c", "--prompt="], "") == Options(prompt="")


@pytest.mark.parametrize("number", [2 ** 63, 2 ** 64, 99999999999999999999, -2 ** 63 - 1])
def test_an_integer_has_64_bits(number, capsys):
    for flag in ("--batch", "--length"):
        message = refused([f"{flag}={number}"], capsys)
        assert f"{flag}: expected an integer of at most 9223372036854775807, got '{number}'" in message
    assert cli.parse(Options, [f"--batch={2 ** 63 - 1}"], "").batch == 2 ** 63 - 1


def test_the_home_folder_is_known_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    options = Options(prompt="~/x", tag="~", verifier=None)
    options = expand_home(options, "tag", "verifier")
    assert options == Options(prompt="~/x", tag="/home/me", verifier=None)
    for name in ("hf:a/b", "a~", "./~", "a/~/b"):
        options = Options(tag=name)
        assert expand_home(options, "tag").tag == name
    with pytest.raises(ValueError, match="--tag=: expected a name, got an empty text"):
        expand_home(Options(tag=""), "tag")


def test_flags_override_a_preset():
    presets = {"ours": {}, "paper": {"a": 10, "b": 20}}
    parsed = cli.parse(WithPreset, ["--b=3", "--preset=paper"], "", presets)
    assert parsed == WithPreset("paper", 10, 3)
    parsed = cli.parse(WithPreset, ["--b=2", "--preset=paper"], "", presets)
    assert parsed == WithPreset("paper", 10, 2), "it is the default, but was given"
    assert cli.parse(WithPreset, ["--b=3"], "", presets) == WithPreset("ours", 1, 3)


# help -----------------------------------------------------------------------------------------------------

def help_of(cls, argv, doc, capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        cli.parse(cls, argv, doc)
    out, err = capsys.readouterr()
    assert (exit.value.code, err) == (0, "")
    return out


def test_every_default_that_help_shows_is_the_default(capsys):
    text = help_of(Options, ["--batch=2", "--help"], "Trains a model.\n\n    python train.py\n", capsys)
    assert text.startswith("Trains a model.\n\n    python train.py\n")
    shown = dict(re.findall(r"(?m)^  --(\w+)\b.* \(default: '?(.*?)'?\)$", text))
    assert cli.parse(Options, [f"--{name}={default}" for name, default in shown.items()], "") == Options()
    not_shown = {f.name for f in fields(Options) if f.default in (None, "") or f.default is False}
    assert shown.keys() == {f.name for f in fields(Options)} - not_shown


def test_help_is_one_line_per_flag_under_the_headings_of_groups(capsys):
    text = help_of(Options, ["-h"], None, capsys)
    assert text.splitlines() == """

Training:
  --batch=INT                 stories per step (default: 16)
  --lr=NUMBER                 learning rate of AdamW (default: 0.0003)
  --prompt=TEXT               beginning of the story
  --resume                    continue where the run stopped
  --length=INT                tokens; default: the context
  --verifier=TEXT             checks the drafts (default: self)
  --compile                   default: on a GPU only

Teacher:
  --source=student|teacher|data who writes the text (default: student)
  --top=16|64                 teacher tokens, the # of each position (default: 16)
  --kl=full|top k             divergence; default: full
  --tag=TEXT                  name of the run (default: 'run  # 1')
  --pretrain_steps=INT        steps (default: 2000)
  --warm_steps=INT            steps before the others (default: 0)
  --temperature=NUMBER        0: the most likely token (default: 1.0)
""".splitlines()


def test_help_of_a_dataclass_without_groups(capsys):
    assert help_of(Pair, ["--help"], "A pair.", capsys).splitlines()[:3] == ["A pair.", "", "Flags:"]


def test_a_field_without_a_comment_is_a_bug_of_the_program():
    for argv in ([], ["--help"]):
        with pytest.raises(AssertionError, match="WithoutComment.lr needs a comment on its line"):
            cli.parse(WithoutComment, argv, "")


# mistakes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("word, nearest", [
    ("--batch_size", "--batch"), ("--bat", "--batch"), ("--pretrain-step=3", "--pretrain_steps"),
    ("--temprature", "--temperature"), ("-batch", "--batch"), ("--hlep", "--help"), ("--", "--")])
def test_an_unknown_flag_names_the_nearest(word, nearest, capsys):
    message = refused([word], capsys)
    assert f"unknown flag {word.partition('=')[0]};" in message and f"did you mean {nearest}" in message


@pytest.mark.parametrize("words, parts", [
    (["--batch=many"], ["--batch:", "expected an integer", "got 'many'", "--batch=16"]),
    (["--batch="], ["--batch:", "expected an integer", "got ''"]),
    (["--batch", "1.5"], ["--batch:", "expected an integer", "got '1.5'"]),
    (["--lr=many"], ["--lr:", "expected a number", "got 'many'", "--lr=0.0003"]),
    (["--lr=nan"], ["--lr:", "expected a number", "got 'nan'"]),
    (["--lr=inf"], ["--lr:", "expected a number", "got 'inf'"]),
    (["--lr=-inf"], ["--lr:", "expected a number", "got '-inf'"]),
    (["--resume=1"], ["--resume:", "expected true or false", "got '1'"]),
    (["--resume", "yes"], ["--resume:", "expected true or false", "got 'yes'"]),
    (["--length=x"], ["--length:", "expected an integer or none", "got 'x'", "--length=8"]),
    (["--source=studnt"], ["--source:", "expected student or teacher or data", "got 'studnt'"]),
    (["--top=17"], ["--top:", "expected 16 or 64", "got '17'", "--top=16"]),
    (["--top=x"], ["--top:", "expected 16 or 64", "got 'x'"]),
    (["--kl=f"], ["--kl:", "expected full or top k or none", "got 'f'", "--kl=full"]),
    (["--batch"], ["--batch:", "expected an integer", "got no value", "--batch=16"]),
    (["--batch", "--lr=1"], ["--batch:", "expected an integer", "got no value"]),
    (["--prompt"], ["--prompt:", "expected a text", "got no value", "--prompt=TEXT"]),
    (["--lr", "-1e-9"], ["--lr:", "expected a number", "got no value", "--lr=0.0003"]),
    (["--prompt", "Once", "upon"], ["'upon'", "does not belong to a flag", "quotes"]),
    (["story.txt"], ["'story.txt'", "does not belong to a flag", "--name=value"]),
])
def test_a_mistake_says_what_was_expected_and_what_came(words, parts, capsys):
    message = refused(words, capsys)
    assert all(part in message for part in parts), message


def test_a_message_in_full(capsys):
    message = refused(["--batch=3.5"], capsys)
    assert message == "error: --batch: expected an integer, got '3.5' (e.g. --batch=16)\n"


def test_flags_that_do_not_go_together_are_refused_by_the_dataclass(capsys):
    assert "--low=2 is above --high=1" in refused(["--low=2"], capsys, Pair)


# exit codes -----------------------------------------------------------------------------------------------

def fails(error):
    def main(argv):
        raise error
    return main


def test_run_distinguishes_mistakes_of_the_user_from_bugs(capsys):
    for error, message in [(ValueError("no\n  such\nthing"), "no such thing"), (ValueError(), "ValueError"),
                           (OSError("no network"), "no network"),
                           (OSError(2, "Not there", "x.txt"), "x.txt: Not there")]:
        assert cli.run(fails(error), []) == 2
        assert capsys.readouterr() == ("", f"error: {message}\n")
    assert cli.run(fails(KeyboardInterrupt()), []) == 130
    assert capsys.readouterr().err.startswith("interrupted")
    for error in AssertionError(), RuntimeError(), KeyError("x"), SystemExit(7):
        with pytest.raises(type(error)):
            cli.run(fails(error), [])
    assert cli.run(lambda argv: None, []) == 0 and cli.run(lambda argv: len(argv), ["a", "b", "c"]) == 3


def main_of(code: str) -> str:
    """A program whose main function is `code`."""
    return f"import sys\nfrom training import cli\ndef main(argv):\n    {code}\nsys.exit(cli.run(main))"


def python(code: str, *flags: str, encoding: str = "", **options) -> subprocess.Popen:
    """A program of its own, whose main function is `code`, with a buffered stdout in this encoding."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": encoding}
    words = [sys.executable, *flags, "-c", main_of(code)]
    return subprocess.Popen(words, cwd=Path(__file__).parents[2], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
@pytest.mark.parametrize("code", ["[print(i, flush=True) for i in iter(int, 1)]",
                                  "sys.stdin.read(); print('late')"])
def test_a_reader_that_exits_is_no_error(code):
    program = python(code, stdin=subprocess.PIPE)
    program.stdout.close()
    program.stdin.close()
    assert (program.stderr.read(), program.wait(20)) == ("", 141)
    program.stderr.close()


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix")
@pytest.mark.parametrize("closed, code, status", [
    (">&-", "print('x')", 0), (">&-", "print(sys.stdout.isatty())", 0),
    ("2>&-", "print('x', file=sys.stderr)", 0), (">&- 2>&-", "raise ValueError('x')", 2),
    (">&-", "raise ValueError('x')", 2), (">&-", "return 3", 3)])
def test_closed_streams_are_no_error(closed, code, status):
    """A program that is started without a stdout or stderr does its work."""
    words = [sys.executable, "-c", main_of(code)]
    done = subprocess.run(f"{shlex.join(words)} {closed}", shell=True, cwd=Path(__file__).parents[2],
                          capture_output=True, text=True)
    said = "error: x\n" if status == 2 and closed == ">&-" else ""
    assert (done.returncode, done.stderr) == (status, said)


def test_a_terminal_without_a_character_and_a_developer_with_a_bug():
    out, err = python("print('\\u25a2')", encoding="ascii").communicate(timeout=20)
    assert (out, err) == ("?\n", "")
    assert "Traceback" not in python("raise ValueError('x')").communicate(timeout=20)[1]
    assert "Traceback" in python("raise ValueError('x')", "-X", "dev").communicate(timeout=20)[1]
