import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch

import opdlm
import sample
from data import tokenizer
from decoding import reveal
from decoding.denoiser import Denoiser
from model import checkpoint
from model.gpt import GPT, GPTConfig
from model.masks import AR, Layout
from training import cli

TOK = tokenizer.word_level(["One", " day", " a", " ball", "."])
CONTEXT, LAYOUT = 24, Layout(4, 1, 1)
COST = re.compile(
    r"^(\d+) tokens \| ([\d.]+) tokens/forward \| ([\d.]+) positions/token \| \d+ tokens/s "
    r"\(batch (\d+), cpu, 1 threads\)$"
)


def network(seed, ends=-1.0):
    """Loud and random; `ends` 1: says nothing but end-of-text, -1: never says it."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(TOK.vocab_size, CONTEXT, 2, 2, 16)).init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
        net.ln_f.bias[0], net.ln_f.weight[0] = 9.0, 0.0
        net.wte.weight[:, 0] = 0.0
        net.wte.weight[TOK.eot, 0] = 9.0 * ends
    return net


def make_checkpoint(folder, ends=-1.0):
    checkpoint.save(folder / "ar", network(0, ends), TOK)
    checkpoint.save(
        folder / "opdlm", network(1, ends), TOK, LAYOUT, reveal="leftmost:0.9", confidence="largest"
    )
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder, with a model that never stops."""
    return make_checkpoint(tmp_path_factory.mktemp("run"))


def said(capsys, folder, *flags):
    """(text, last line) of a command that succeeds."""
    assert cli.run(sample.main, [f"--ckpt={folder}", "--device=cpu", *flags]) == 0
    out, err = capsys.readouterr()
    assert not err
    text, _, last = out.rstrip("\n").rpartition("\n")
    return text + "\n", last


def left(flags):
    """The exit code, whether the command line is refused or what it asks for."""
    try:
        return cli.run(sample.main, flags)
    except SystemExit as code:
        return code.code


def numbers(last):
    tokens, per_forward, per_token, batch = COST.match(last).groups()
    return int(tokens), float(per_forward), float(per_token), int(batch)


@pytest.mark.parametrize("flags", [[], ["--mode=ar"]], ids=["diffusion", "ar"])
def test_the_last_line_counts_the_tokens(run, tmp_path, capsys, flags):
    for n, length in ((1, 1), (3, 7)):
        last = said(capsys, run, "--prompt=One day", f"--n={n}", f"--length={length}", *flags)[1]
        assert numbers(last)[0] == n * length and numbers(last)[3] == n
    assert (
        numbers(said(capsys, run, "--prompt=One day", *flags)[1])[0] == CONTEXT - 3
    )  # all the room there is
    last = said(capsys, make_checkpoint(tmp_path, ends=1.0), "--n=3", *flags)[1]
    assert numbers(last)[0] == 3  # each text is its end-of-text, and that is counted


def test_the_last_line_counts_all_forwards(run, capsys):
    """AR: one pass per token, every position but the last token's once. Blocks of 4, one per step: at most
    one a token; at once: one a block."""
    tokens, per_forward, per_token, _ = numbers(
        said(capsys, run, "--mode=ar", "--length=8", "--prompt=One day")[1]
    )
    assert (tokens, per_forward, per_token) == (8, 1.0, round((3 + 7) / 8, 2))
    assert numbers(said(capsys, run, "--reveal=static:1", "--length=8")[1])[1] >= 1.0
    assert numbers(said(capsys, run, "--reveal=static:4", "--length=8")[1])[1] == 4.0


def test_the_text_is_the_prompt_and_the_rollout_s(run, capsys):
    """Written out by hand from the weights, with the rule and confidence that the checkpoint names."""
    net, ids = network(1), [TOK.eot, *TOK.encode("One day")]
    u = opdlm.uniforms(5, 0, range(1), (len(ids) + 9, 1))
    text = opdlm.rollout(
        Denoiser(net, LAYOUT), torch.tensor([ids]), 9, reveal.parse("leftmost:0.9"), u, TOK.eot
    )
    wanted = sample.trace.visible(TOK.decode(text.tokens[0][1:].tolist()))
    assert said(capsys, run, "--prompt=One day", "--length=9", "--seed=5")[0] == wanted + "\n\n"


def test_the_same_seed_is_the_same_text(run, capsys):
    first = said(capsys, run, "--seed=3")[0]
    assert said(capsys, run, "--seed=3")[0] == first and said(capsys, run, "--seed=4")[0] != first


@pytest.mark.parametrize("mode", ["ar", "diffusion", "verified"])
def test_text_i_does_not_depend_on_n(run, capsys, mode):
    many = said(capsys, run, "--n=3", f"--mode={mode}", "--length=9")[0]
    assert many.startswith(said(capsys, run, "--n=1", f"--mode={mode}", "--length=9")[0])
    assert many.startswith(said(capsys, run, "--n=2", f"--mode={mode}", "--length=9")[0])


def test_an_empty_prompt_is_the_end_of_text_alone(run, capsys):
    assert said(capsys, run, "--prompt=", "--length=6")[0] == said(capsys, run, "--length=6")[0]
    assert numbers(said(capsys, run)[1])[0] == CONTEXT - 1


def test_modes_read_their_own_model(run, capsys):
    """Of a run's folder; a checkpoint's own folder is itself."""
    ar, student = said(capsys, run, "--mode=ar")[0], said(capsys, run)[0]
    assert ar != student
    assert said(capsys, run / "ar", "--mode=ar")[0] == ar and said(capsys, run / "opdlm")[0] == student


def test_verified_text_is_the_verifier_s(run, capsys):
    """At temperature 0: the text of the run's AR model, of the student itself, or of a named AR model."""
    cold = ["--temperature=0", "--length=12"]
    text, last = said(capsys, run, "--mode=verified", *cold)
    assert text == said(capsys, run, "--mode=ar", *cold)[0] and numbers(last)[1] <= 5 / 2
    own = said(capsys, run, "--mode=verified", "--verifier=self", *cold)[0]
    assert own == said(capsys, run / "opdlm", "--mode=ar", *cold)[0] != text
    assert said(capsys, run / "opdlm", "--mode=verified", f"--verifier={run}/ar", *cold)[0] == text


@pytest.mark.parametrize(
    "flags, wrong",
    [
        (["--ckpt={run}/opdlm"], "has no ar/ with its teacher: use --verifier=FOLDER or --verifier=self"),
        (["--verifier={run}/opdlm"], "an AR model with the student's tokenizer"),
        (["--verifier={other}/ar"], "an AR model with the student's tokenizer"),
        (["--verifier={other}/words"], "an AR model with the student's tokenizer"),
        (["--ckpt={other}/init"], "its AR model is the checkpoint given to --init"),
        (["--ckpt={other}", "--verifier=self"], "convert it with --align=ar --context=causal"),
        (["--ckpt={run}/ar"], "is an AR model"),
    ],
)
def test_a_verifier_that_cannot_be_is_one_sentence(run, tmp_path, capsys, flags, wrong):
    checkpoint.save(tmp_path / "ar", GPT(GPTConfig(TOK.vocab_size - 1, CONTEXT, 1, 2, 16)), TOK)
    checkpoint.save(tmp_path / "opdlm", network(1), TOK, Layout(4, 4, 0))
    checkpoint.save(tmp_path / "init/opdlm", network(1), TOK, Layout(4, 1, 1))
    checkpoint.save(tmp_path / "words", network(1), tokenizer.word_level(["One", " day", " a", " bell", "."]))
    given = [flag.format(run=run, other=tmp_path) for flag in flags]
    assert cli.run(sample.main, [f"--ckpt={run}", "--device=cpu", "--mode=verified", *given]) == 2
    out, err = capsys.readouterr()
    assert not out and wrong in err and err.count("\n") == 1


def test_a_second_model_takes_its_steps(run, tmp_path, capsys):
    """At all steps the light model's text, at none the heavy one's; auto takes the cheapest steps."""
    checkpoint.save(tmp_path / "opdlm", network(2), TOK, LAYOUT, reveal="ancestral:8")
    (tmp_path / "opdlm" / "importance.json").write_text('{"t": [0.25, 0.75], "kl": [0.0, 1.0]}')
    how = ["--reveal=ancestral:8", f"--light={tmp_path}"]
    heavy, light = (said(capsys, folder, "--reveal=ancestral:8") for folder in (run, tmp_path))
    for schedule, text in (
        ("H8", heavy),
        ("L8", light),
        ("auto:0", heavy),
        ("auto:1", light),
        ("mask:1-0=L", light),
    ):
        assert said(capsys, run, *how, f"--schedule={schedule}")[0] == text[0]
        assert said(capsys, run, *how, "--schedule=L2,H6")[0] != text[0]
    assert (
        said(capsys, run, *how, "--schedule=auto:0.25")[0] == said(capsys, run, *how, "--schedule=H6,L2")[0]
    )


@pytest.mark.parametrize(
    "flags, wrong",
    [
        (["--light={run}"], "--schedule its steps: give both"),
        (["--schedule=H4"], "--schedule its steps: give both"),
        (["--light={run}/ar", "--schedule=H4"], "has another attention pattern"),
        (["--light={other}", "--schedule=H4"], "has another tokenizer"),
        (["--light={run}", "--schedule=H4,X4"], "names a model X"),
        (
            ["--light={run}", "--schedule=H4,L4"],
            "8 steps, but --reveal=leftmost:0.9 takes up to 4 in a block of 4",
        ),
        (["--light={run}", "--schedule=auto:0.25"], "take --reveal=ancestral:STEPS"),
        (["--light={run}", "--schedule=auto:0.25", "--reveal=ancestral:8"], "it has no importance.json"),
        (["--light={run}", "--schedule=H4", "--mode=ar"], "--schedule=H4 has no effect with --mode=ar"),
    ],
)
def test_a_schedule_that_cannot_be_is_one_sentence(run, tmp_path, capsys, flags, wrong):
    other = tokenizer.word_level(["One", " day", " a", " bell", "."])
    checkpoint.save(tmp_path / "opdlm", network(2), other, LAYOUT)
    given = [flag.format(run=run, other=tmp_path) for flag in flags]
    assert left(["--device=cpu", f"--ckpt={run}", *given]) == 2
    out, err = capsys.readouterr()
    assert not out and wrong in err and err.count("\n") == 1


def test_temperature_zero_needs_no_seed(run, capsys):
    cold = said(capsys, run, "--temperature=0", "--seed=1")[0]
    assert said(capsys, run, "--temperature=0", "--seed=2")[0] == cold


def test_a_rule_of_the_command_line_comes_first(run, capsys):
    slow = said(capsys, run, "--reveal=static:1")
    assert said(capsys, run, "--reveal=leftmost:1")[0] != slow[0]
    assert numbers(said(capsys, run, "--reveal=static:2")[1])[1] > numbers(slow[1])[1]


def test_the_ar_model_is_block_1(run, capsys):
    """Whatever rule is asked for: one slot is one slot."""
    net, ids = network(0), [TOK.eot]
    u = opdlm.uniforms(0, 0, range(1), (6, 1))
    for rule in ("static:1", "threshold:0.5"):
        text = opdlm.rollout(Denoiser(net, AR), torch.tensor([ids]), 5, reveal.parse(rule), u, TOK.eot)
        wanted = sample.trace.visible(TOK.decode(text.tokens[0].tolist())) + "\n\n"
        assert said(capsys, run, "--mode=ar", "--length=5")[0] == wanted


REFUSED = {
    "--prompt=" + " a" * CONTEXT: f"the prompt has {CONTEXT + 1} tokens, including the first",
    f"--length={CONTEXT}": f"--length={CONTEXT} and a prompt of 1 tokens exceed the model's context",
    "--reveal=best": "there is no reveal rule 'best'",
    "--reveal=static:0": "static:COUNT takes a number of at least 1",
    "--ckpt=nowhere": "nowhere is not a checkpoint",
    "--ckpt={run}/ar": "ar is an AR model: use --mode=ar",
    "--n=0": "--n=0: must be at least 1",
    "--length=0": "--length=0: must be at least 1",
    "--block=0": "--block=0: must be at least 1",
    "--export={run}": "exists already: give the name of a new folder",
    "--dtype=bfloat16": "--dtype is the number format of --export",
    "--temperature=-1": "a temperature of at least 0",
    "--mode=fast": "--mode: expected diffusion or ar or speculative or verified, got 'fast'",
    "--sead=1": "did you mean --seed?",
    "--fps=0": "--fps=0: expected 0.1 to 1000",
    "--fps=-8": "--fps=-8: expected 0.1 to 1000",
    "--fps=1e9": "--fps=1e+09: expected 0.1 to 1000",
    "--fps=fast": "--fps: expected a number, got 'fast'",
    "--picture=text.pdf": "--picture=text.pdf: expected a file name that ends in .png or .html",
    "--picture=html": "--picture=html: expected a file name that ends in",
    "--picture=": "--picture=: expected a file name that ends in",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_mistake_is_one_sentence(run, capsys, flag):
    code = left([f"--ckpt={run}", "--device=cpu", flag.format(run=run)])
    out, err = capsys.readouterr()
    assert code == 2 and not out and REFUSED[flag] in err and err.count("\n") == 1


def test_a_rule_means_nothing_to_the_ar_model(run, capsys):
    with pytest.raises(SystemExit) as left:
        sample.main([f"--ckpt={run}", "--mode=ar", "--reveal=static:1"])
    assert (
        left.value.code == 2 and "--reveal=static:1 has no effect with --mode=ar" in capsys.readouterr().err
    )


def test_an_unknown_confidence_is_named(tmp_path, capsys):
    run = make_checkpoint(tmp_path)
    path = run / "opdlm" / "config.json"
    path.write_text(path.read_text().replace('"largest"', '"loudest"'))
    assert cli.run(sample.main, [f"--ckpt={run}", "--device=cpu"]) == 2
    assert (
        "expected confidence largest or drawn or margin or entropy, got 'loudest'" in capsys.readouterr().err
    )


def test_a_rule_means_nothing_to_a_verifier(run, capsys):
    with pytest.raises(SystemExit) as left:
        sample.main([f"--ckpt={run}", "--mode=verified", "--confidence=margin"])
    assert (
        left.value.code == 2
        and "--confidence=margin has no effect with --mode=speculative" in capsys.readouterr().err
    )


def test_top_k_of_one_is_greedy(run, capsys):
    cold = said(capsys, run, "--temperature=0")[0]
    assert (
        said(capsys, run, "--top_k=1")[0]
        == cold
        == said(capsys, run, "--top_p=1e-6")[0]
        != said(capsys, run)[0]
    )


def test_a_block_means_nothing_to_the_ar_model(run, capsys):
    with pytest.raises(SystemExit) as left:
        sample.main([f"--ckpt={run}", "--mode=ar", "--block=2"])
    assert left.value.code == 2 and "--block=2 has no effect with --mode=ar" in capsys.readouterr().err


@pytest.mark.parametrize("clean", [1, 4])
def test_another_block_is_the_layout_of_that_block(tmp_path, capsys, clean):
    checkpoint.save(tmp_path / "opdlm", network(1), TOK, Layout(4, clean, 1))
    text = said(capsys, tmp_path, "--block=3", "--length=9")[0]
    checkpoint.save(tmp_path / "opdlm", network(1), TOK, Layout(3, min(clean, 3), 1))
    assert text == said(capsys, tmp_path, "--length=9")[0]
    checkpoint.save(tmp_path / "opdlm", network(1), TOK, Layout(4, clean, 1))
    assert text != said(capsys, tmp_path, "--length=9")[0]


def test_a_tokenizer_with_more_ids_than_the_network_is_refused(tmp_path, capsys):
    checkpoint.save(
        tmp_path / "net", network(0), tokenizer.word_level(["One", " day", " a", " ball", ".", " more"])
    )
    assert cli.run(sample.main, [f"--ckpt={tmp_path / 'net'}", "--mode=ar", "--device=cpu"]) == 2
    assert f"ids and the network there {TOK.vocab_size}: give it its own" in capsys.readouterr().err


def test_a_text_of_nobody_s_length_has_an_end(run, monkeypatch, capsys):
    monkeypatch.setattr(sample, "MAX_TOKENS", 5)
    assert numbers(said(capsys, run)[1])[0] == 5


class Terminal:
    """Standard output, said to be a terminal."""

    def __init__(self, stream):
        self.stream = stream

    def isatty(self):
        return True

    def __getattr__(self, name):
        return getattr(self.stream, name)


def test_colours_on_a_terminal_only(run, capsys, monkeypatch):
    plain = said(capsys, run)[0]
    assert "\x1b" not in plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    text = said(capsys, run)[0]
    assert "\x1b[38;5;" in text and re.sub(r"\x1b\[[\d;]*m", "", text).startswith(plain)
    assert "\x1b" not in said(capsys, run, "--mode=ar")[0]  # a token a step: nothing to colour


def test_watching_changes_nothing_that_stays(run, capsys, monkeypatch):
    """Not on a terminal: not a byte. On one, after each text was played and cleared away, the same lines."""
    flags = ["--n=2", "--length=9", "--prompt=One day"]
    plain, shown = said(capsys, run, *flags)[0], []
    assert said(capsys, run, "--watch", *flags)[0] == plain
    monkeypatch.setattr(sample.terminal.time, "sleep", shown.append)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    coloured = said(capsys, run, *flags)[0]
    first, _, second = said(capsys, run, "--watch", "--fps=50", *flags)[0].rpartition(sample.terminal.END)
    assert coloured == first.split(sample.terminal.END)[1].split(sample.terminal.BEGIN)[0] + second
    assert first.count(sample.terminal.BEGIN) == 2 and len(shown) > 4 and set(shown) == {1 / 50}
    monkeypatch.setenv("NO_COLOR", "1")
    watched = said(capsys, run, "--watch", *flags)[0]
    assert "38;5" not in watched and watched.count(sample.terminal.BEGIN) == 2 and "▢" in watched


def test_a_picture_is_of_the_first_text(run, tmp_path, capsys):
    """The page's pieces are the text; neither kind of picture changes what is printed."""
    flags = ["--length=9", "--prompt=One day", "--seed=2"]
    plain = said(capsys, run, "--n=3", *flags)[0]
    for name in ("a.html", "new/b.HTML", "c.png"):
        assert said(capsys, run, "--n=3", *flags, f"--picture={tmp_path / name}")[0] == plain
    alone = said(capsys, run, *flags, f"--picture={tmp_path / 'alone.html'}")[0]
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert (
        html
        == (tmp_path / "new/b.HTML").read_text(encoding="utf-8")
        == (tmp_path / "alone.html").read_text("utf-8")
    )
    pieces = unescape("".join(re.findall(r"<span [^>]*data-revealed-at[^>]*>([^<]*)</span>", html)))
    assert "One day" + pieces + "\n\n" == alone and "<b>One day</b>" in html
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_for_a_picture_with_another_ending(run, monkeypatch, capsys):
    monkeypatch.setattr(sample.checkpoint, "load", lambda folder: pytest.fail("a model was read"))
    with pytest.raises(SystemExit) as left:
        sample.main([f"--ckpt={run}", "--picture=text.gif"])
    assert left.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_as_a_command(run):
    """In a pipe: text and cost on stdout, nothing on stderr, no escape codes."""
    command = [sys.executable, "sample.py", "--ckpt", str(run), "--prompt", "One day", "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=Path(sample.__file__).parent, check=True
    )
    assert done.stdout.startswith("One day") and "positions/token" in done.stdout.splitlines()[-1]
    assert not done.stderr and "\x1b" not in done.stdout
