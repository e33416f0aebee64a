"""The command line: what is written in an instance is read back, and a mistake is one sentence that helps."""
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field, make_dataclass
from pathlib import Path

import pytest

from training import cli


@dataclass
class Options:
    batch: int = cli.option(16, "stories a step")
    lr: float = cli.option(3e-4, "learning rate of AdamW")
    prompt: str = cli.option("", "what the story begins with")
    resume: bool = cli.option(False, "go on where the run stopped")
    length: int | None = cli.option(None, "tokens; none: as long as the context")
    verifier: str | None = cli.option("self", "who verifies")
    compile: bool | None = cli.option(None, "none: on a GPU only")
    text: str = cli.option("student", "whose text", choices=("student", "teacher", "data"))
    top: int = cli.option(16, "teacher tokens kept", choices=(16, 64))
    pretrain_steps: int = cli.option(2000, "steps")
    temperature: float = field(default=1.0)


CASES = [Options(), Options(batch=-3, lr=-1e-9, prompt="--lr=1 'twice' = \n$", resume=True, length=7, verifier=None),
         Options(compile=False, text="data", top=64, pretrain_steps=0, temperature=-1.0, prompt="-", verifier="")]


def refused(argv, capsys, cls=Options) -> str:
    """The sentence with which parse leaves."""
    with pytest.raises(SystemExit) as left:
        cli.parse(cls, argv, "")
    out, err = capsys.readouterr()
    assert (left.value.code, out, err.count("\n")) == (2, "", 1) and err.startswith("error: ")
    return err


def written(options, glue: str) -> list[str]:
    """Options as somebody would type them, name=value or name value."""
    words = []
    for name, value in asdict(options).items():
        text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
        words += [f"--{name}={text}"] if glue == "=" or text.startswith("--") else [f"--{name}", text]
    return words


@pytest.mark.parametrize("glue", ["=", " "])
@pytest.mark.parametrize("options", CASES)
def test_what_is_written_is_read_back(options, glue):
    assert cli.parse(Options, written(options, glue), "") == options
    assert cli.parse(Options, [word.replace("_steps", "-steps") for word in written(options, glue)], "") == options


def test_no_words_are_the_defaults_and_the_last_of_two_wins(monkeypatch):
    assert cli.parse(Options, [], "") == Options()
    words = ["--batch=1", "--resume=false", "--batch", "2", "--resume"]
    assert cli.parse(Options, words, "") == Options(2, resume=True)
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", "--batch=5"])
    assert cli.parse(Options, None, "") == Options(5)


def test_a_preset_gives_way_to_what_is_written():
    cls = make_dataclass("Preset", [("preset", str, cli.option("ours", "")), ("a", int, cli.option(1, "")),
                                    ("b", int, cli.option(2, ""))])
    presets = {"ours": {}, "paper": {"a": 10, "b": 20}}
    assert cli.parse(cls, ["--b=3", "--preset=paper"], "", presets) == cls("paper", 10, 3)
    assert cli.parse(cls, ["--b=2", "--preset=paper"], "", presets) == cls("paper", 10, 2), "a default, but written"
    assert cli.parse(cls, ["--b=3"], "", presets) == cls("ours", 1, 3)


def test_every_default_that_help_shows_is_the_default(capsys):
    with pytest.raises(SystemExit) as left:
        cli.parse(Options, ["--batch=2", "--help"], "Trains a model.\n\n    python train.py\n")
    text = capsys.readouterr().out
    assert left.value.code == 0 and text.startswith("Trains a model.\n\n    python train.py\n")
    shown = dict(re.findall(r"(?m)^  --(\w+) [^(]*\([^)]*default '?([^)']*)'?\)", text))
    assert cli.parse(Options, [f"--{name}={default}" for name, default in shown.items()], "") == Options()
    assert shown.keys() == asdict(Options()).keys()
    folded = " ".join(text.split())
    assert all(f.metadata.get("help", "") in folded for f in Options.__dataclass_fields__.values())
    assert "student or teacher or data" in folded and "begins with (a text; default '')" in folded


def test_the_width_of_help_loses_no_word(capsys):
    words = " ".join(f"word{i}-{i}" for i in range(60))
    with pytest.raises(SystemExit):
        cli.parse(make_dataclass("Long", [("a", int, cli.option(1, words))]), ["-h"], None)
    text = capsys.readouterr().out
    assert words in " ".join(text.split()) and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("word, nearest", [
    ("--batch_size", "--batch"), ("--bat", "--batch"), ("--pretrain-step=3", "--pretrain_steps"), ("--", "--"),
    ("--temprature", "--temperature"), ("-batch", "--batch"), ("--hlep", "--help")])
def test_an_unknown_flag_names_the_nearest(word, nearest, capsys):
    said = refused([word], capsys)
    assert f"{word.partition('=')[0]} is no flag" in said and f"did you mean {nearest}" in said


@pytest.mark.parametrize("words, parts", [
    (["--batch=many"], ["--batch", "'many'", "a whole number", "--batch=16"]),
    (["--batch="], ["--batch", "''", "a whole number"]),
    (["--batch", "1.5"], ["--batch", "'1.5'", "a whole number"]),
    (["--lr=nan"], ["--lr", "'nan'", "a number"]),
    (["--resume=1"], ["--resume", "'1'", "true or false"]),
    (["--length=x"], ["--length", "'x'", "a whole number or none"]),
    (["--text=studnt"], ["--text", "'studnt'", "student or teacher or data"]),
    (["--top=17"], ["--top", "'17'", "16 or 64"]),
    (["--batch"], ["--batch has no value", "a whole number"]),
    (["--batch", "--lr=1"], ["--batch has no value", "a whole number"]),
    (["--prompt", "Once", "upon"], ["'upon'", "no flag", "quotes"]),
    (["--resume", "yes"], ["'yes'", "no flag"]),
])
def test_a_mistake_says_what_came_and_what_was_wanted(words, parts, capsys):
    said = refused(words, capsys)
    assert all(part in said for part in parts), said


def test_flags_that_do_not_go_together_are_refused_by_the_dataclass(capsys):
    @dataclass
    class Pair:
        low: int = cli.option(0, "")
        high: int = cli.option(1, "")

        def __post_init__(self):
            if self.low > self.high:
                raise ValueError(f"--low={self.low} is above --high={self.high}")
    assert "--low=2 is above --high=1" in refused(["--low=2"], capsys, Pair)


def fails(error):
    def main(argv):
        raise error
    return main


def test_run_tells_the_users_mistakes_from_ours(capsys):
    for error, said in [(ValueError("no\n  such\nthing"), "no such thing"), (ValueError(), "ValueError"),
                        (OSError("no network"), "no network"), (OSError(2, "Not there", "x.txt"), "x.txt: Not there")]:
        assert cli.run(fails(error), []) == 2
        assert capsys.readouterr() == ("", f"error: {said}\n")
    assert cli.run(fails(KeyboardInterrupt()), []) == 130 and capsys.readouterr().err.startswith("stopped")
    for error in AssertionError(), RuntimeError(), KeyError("x"), SystemExit(7):
        with pytest.raises(type(error)):
            cli.run(fails(error), [])
    assert cli.run(lambda argv: None, []) == 0 and cli.run(lambda argv: len(argv), ["a", "b", "c"]) == 3


def python(code: str, *flags: str, encoding: str = "", **more) -> subprocess.Popen:
    """A program of its own, whose main is code, with a buffered stdout in the encoding."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": encoding}
    main = f"import sys\nfrom report import cli\ndef main(argv):\n    {code}\nsys.exit(cli.run(main))"
    return subprocess.Popen([sys.executable, *flags, "-c", main], cwd=Path(__file__).parents[2], env=environment,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


@pytest.mark.skipif(sys.platform == "win32", reason="a closed pipe is another error there")
@pytest.mark.parametrize("code", ["[print(i, flush=True) for i in iter(int, 1)]", "sys.stdin.read(); print('late')"])
def test_a_reader_who_leaves_is_no_error(code):
    program = python(code, stdin=subprocess.PIPE)
    program.stdout.close()
    program.stdin.close()
    assert (program.stderr.read(), program.wait(20)) == ("", 141)
    program.stderr.close()


def test_a_terminal_without_the_sign_and_a_developer_with_a_bug():
    out, err = python("print('\\u25a2')", encoding="ascii").communicate(timeout=20)
    assert (out, err) == ("?\n", "")
    assert "Traceback" not in python("raise ValueError('x')").communicate(timeout=20)[1]
    assert "Traceback" in python("raise ValueError('x')", "-X", "dev").communicate(timeout=20)[1]
