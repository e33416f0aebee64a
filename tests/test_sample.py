import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import opdlm
import sample
from data import tokenizer
from decoding import reveal
from decoding.denoiser import Denoiser
from model import checkpoint
from model.gpt import GPT, GPTConfig
from model.masks import AR, Layout
from report import generate
from training import cli
from unmasking import policy

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


def test_a_checkpoint_says_how_it_decodes_and_flags_win(tmp_path, capsys):
    net = network(1)
    make_checkpoint(tmp_path)
    decoding = {"reveal": "leftmost:0.9", "mode": "speculative", "temperature": 0}
    checkpoint.save(tmp_path / "opdlm", net, TOK, LAYOUT, **decoding)
    short = "--length=12"
    by_default = said(capsys, tmp_path, short)
    cold = "--temperature=0"
    named = said(capsys, tmp_path, short, "--mode=speculative", "--verifier=self", cold)
    assert by_default[0] == named[0] and numbers(by_default[1]) == numbers(named[1])
    teacher_text = said(capsys, tmp_path, short, "--mode=ar", cold)[0]
    assert said(capsys, tmp_path, short, "--verifier=teacher")[0] == teacher_text
    blocks = said(capsys, tmp_path, short, "--mode=diffusion", cold)
    assert said(capsys, tmp_path, short, "--reveal=leftmost:0.9")[0] == blocks[0]
    warm = said(capsys, tmp_path, short, "--temperature=1")
    assert warm[0] != by_default[0]


@pytest.mark.parametrize("key, value", [
    ("mode", "fast"), ("mode", ["speculative"]), ("temperature", -1), ("temperature", "0"),
    ("temperature", True)])
def test_a_checkpoint_with_an_unknown_way_to_decode_is_one_sentence(tmp_path, capsys, key, value):
    checkpoint.save(tmp_path, network(1), TOK, LAYOUT, **{key: value})
    assert cli.run(sample.main, [f"--ckpt={tmp_path}", "--length=3"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/config.json: expected")
    assert key in error and repr(value) in error


def test_verified_text_is_the_verifier_s(run, capsys):
    """At temperature 0: the text of the run's AR model, of the student itself, or of a named AR model."""
    cold = ["--temperature=0", "--length=12"]
    text, last = said(capsys, run, "--mode=verified", *cold)
    assert text == said(capsys, run, "--mode=ar", *cold)[0] and numbers(last)[1] <= 5 / 2
    own = said(capsys, run, "--mode=verified", "--verifier=self", *cold)[0]
    assert own == said(capsys, run / "opdlm", "--mode=ar", *cold)[0] != text
    assert said(capsys, run / "opdlm", "--mode=verified", f"--verifier={run}/ar", *cold)[0] == text


def test_a_verifier_alone_asks_for_speculative_decoding(run, capsys):
    """The run's own mode is diffusion."""
    cold = ("--temperature=0",)
    speculative = said(capsys, run, "--mode=speculative", "--verifier=self", *cold)
    assert said(capsys, run, "--verifier=self", *cold)[0] == speculative[0]
    assert said(capsys, run, *cold)[0] != speculative[0]


@pytest.mark.parametrize("flag, message", [
    ("--mode=ar", "--verifier=self has no effect with --mode=ar"),
    ("--mode=diffusion", "--verifier=self has no effect with --mode=diffusion"),
    ("--reveal=static:1", "--verifier=self is for speculative decoding, and --reveal=static:1 for diffusion"),
    ("--confidence=drawn", "and --confidence=drawn for diffusion: give one of them"),
])
def test_a_verifier_means_nothing_without_drafts(run, capsys, flag, message):
    with pytest.raises(SystemExit) as left:
        sys.exit(cli.run(sample.main, [f"--ckpt={run}", "--device=cpu", "--verifier=self", flag]))
    assert left.value.code == 2
    assert message in capsys.readouterr().err


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
    "--n=0": "--n=0: expected an integer of at least 1",
    "--length=0": "--length=0: expected an integer of at least 1",
    "--block=0": "--block=0: expected an integer of at least 1",
    "--export={run}": "exists already: give the name of a new folder",
    "--dtype=bfloat16": "--dtype is the number format of --export",
    "--temperature=-1": "a temperature of at least 0",
    "--mode=fast": "--mode: expected diffusion or ar or speculative or verified or none, got 'fast'",
    "--sead=1": "did you mean --seed?",
    "--fps=0": "--fps=0: expected a number from 0.1 to 1000",
    "--fps=-8": "--fps=-8: expected a number from 0.1 to 1000",
    "--fps=1e9": "--fps=1e+09: expected a number from 0.1 to 1000",
    "--fps=fast": "--fps: expected a number, got 'fast'",
    "--picture=text.pdf": "--picture=text.pdf: expected a file name that ends in .png or .html",
    "--picture=html": "--picture=html: expected a file name that ends in",
    "--picture=": "--picture=: expected a file name that ends in",
    "--picture={run}/ar/config.json/x.png": "config.json/x.png cannot be written (",
    "--picture={run}/folder.png": "folder.png cannot be written (it is a folder)",
    "--picture=/dev/null/x.html": "--picture=/dev/null/x.html cannot be written (",
    "--export={run}/ar/config.json": "exists already: give the name of a new folder",
    "--export={run}/ar/config.json/x": "--export={run}/ar/config.json/x cannot be written (",
    "--export={run}/opdlm": "exists already: give the name of a new folder",
    "--export={run}/opdlm/new": "is inside the checkpoint",
    "--export={run}/opdlm/../opdlm/a/new": "is inside the checkpoint",
    "--export={run}/link": "exists already: give the name of a new folder",
    "--export=hf:me/model": "expected a folder of this computer",
    "--export=": "--export=: expected a name, got an empty text",
    "--ckpt=": "--ckpt=: expected a name, got an empty text",
    "--reveal=": "--reveal=: expected a name, got an empty text",
    "--verifier=": "--verifier=: expected a name, got an empty text",
    "--ckpt=~/nowhere": "{home}/nowhere is not a checkpoint",
    "--seed=-1": "--seed=-1: expected an integer from 0 to 9223372036854775807",
    "--seed=9223372036854775808": "--seed: expected an integer of at most 9223372036854775807",
    "--seed=18446744073709551616": "--seed: expected an integer of at most 9223372036854775807",
    "--seed=1e3": "--seed: expected an integer, got '1e3'",
    "--top_k=99999999999999999999": "--top_k: expected an integer of at most 9223372036854775807",
    "--top_k=0": "a top_k of at least 1, got 0",
    "--top_k=-5": "a top_k of at least 1, got -5",
    "--top_p=0": "a top_p above 0 and at most 1, got 0.0",
    "--top_p=nan": "--top_p: expected a number or none, got 'nan'",
    "--n=99999999999999999999": "--n: expected an integer of at most 9223372036854775807",
    "--n=-3": "--n=-3: expected an integer of at least 1",
    "--length=9223372036854775807": "exceed the model's context",
    "--length=99999999999999999999": "--length: expected an integer of at most 9223372036854775807",
    "--block=25": "--block=25 exceeds the model's context of 24",
    "--block=9223372036854775807": "--block=9223372036854775807 exceeds the model's context of 24",
    "--reveal=static:99999999999999999999": "static:COUNT takes a number of at most 2147483647",
    "--reveal=ancestral:99999999999999999999": "ancestral:STEPS takes a number of at most 16777216",
    "--temperature=inf": "--temperature: expected a number or none, got 'inf'",
    "--temperature=nan": "--temperature: expected a number or none, got 'nan'",
    "--temperature=1e400": "--temperature: expected a number or none, got '1e400'",
    "--temperature=1e39": "expected a temperature of at most 1e+30",
    "--prompt=caf\udce9": "--prompt='caf\\udce9': expected text in UTF-8, got other bytes",
}


@pytest.mark.parametrize("flag", REFUSED)
def test_a_mistake_is_one_sentence(run, capsys, flag):
    (run / "folder.png").mkdir(exist_ok=True)
    (run / "link").unlink(missing_ok=True)
    (run / "link").symlink_to(run / "nowhere")
    before = sorted(run.rglob("*"))
    code = left([f"--ckpt={run}", "--device=cpu", flag.format(run=run)])
    out, err = capsys.readouterr()
    message = REFUSED[flag].format(run=run, home=Path.home())
    assert code == 2 and not out and message in err and err.count("\n") == 1
    assert sorted(run.rglob("*")) == before


@pytest.mark.parametrize("spec, message", [
    ("best", "there is no reveal rule 'best': use one of"),
    ("static:0", "static:COUNT takes a number of at least 1"),
    ("static:x", "expected an integer, got 'x'"),
    ("", "there is no reveal rule ''"),
    ("policy:nowhere", "nowhere"),
])
def test_a_bad_rule_of_a_checkpoint_names_its_file(run, capsys, spec, message):
    path = run / "opdlm/config.json"
    content = path.read_text()
    path.write_text(content.replace("leftmost:0.9", spec))
    code = left([f"--ckpt={run}", "--device=cpu", "--length=2"])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1
    assert f"reveal in {path}: {message}" in err
    assert left([f"--ckpt={run}", "--device=cpu", "--length=2", "--reveal=static:1"]) == 0
    path.write_text(content)


@pytest.mark.parametrize(
    "flag, wrong",
    [
        (f"--block={sample.MAX_SELF_BLOCK + 1}", "are too long for --verifier=self"),
        ("--block=300", "are too long for --verifier=self"),
        ("--block=513", "--block=513 exceeds the model's context of 512"),
    ],
)
def test_a_block_that_cannot_be_verified_is_refused(tmp_path, capsys, flag, wrong):
    """Its forward passes would have the square of as many masks."""
    net = GPT(GPTConfig(TOK.vocab_size, 512, 1, 2, 16)).init_weights(torch.Generator().manual_seed(0))
    checkpoint.save(tmp_path, net, TOK, LAYOUT)
    flags = [f"--ckpt={tmp_path}", "--device=cpu", "--mode=speculative", "--verifier=self", "--length=2"]
    assert left([*flags, flag]) == 2
    out, err = capsys.readouterr()
    assert not out and wrong in err and err.count("\n") == 1
    assert left([*flags, f"--block={sample.MAX_SELF_BLOCK}"]) == 0


def test_the_largest_numbers_mean_no_limit(run, capsys):
    flags = ["--length=6", "--seed=9223372036854775807"]
    plain = said(capsys, run, *flags)[0]
    assert said(capsys, run, *flags, "--top_k=9223372036854775807")[0] == plain
    once = numbers(said(capsys, run, *flags, "--reveal=static:2147483647")[1])
    assert once == numbers(said(capsys, run, *flags, "--reveal=static:4")[1])


def test_a_temperature_too_small_for_float32_is_zero(run, capsys):
    for mode in ("diffusion", "ar", "speculative"):
        cold = said(capsys, run, f"--mode={mode}", "--temperature=0", "--length=9")[0]
        for temperature in ("1e-7", "1e-38", "1e-40", "1e-300"):
            found = said(capsys, run, f"--mode={mode}", f"--temperature={temperature}", "--length=9")[0]
            assert found == cold
        assert said(capsys, run, f"--mode={mode}", "--temperature=1e-5", "--length=9")[0] == cold


# numbers that are not finite -------------------------------------------------------------------------


def spoil(folder, name, value, source):
    """A copy of the run in which one tensor of the model `source` has this value somewhere, or is scaled."""
    checkpoint.save(folder / "ar", network(0), TOK)
    checkpoint.save(folder / "opdlm", network(1), TOK, LAYOUT, reveal="leftmost:0.9")
    net, layout = checkpoint.load(folder / source)
    with torch.no_grad():
        tensor = net.state_dict()[name]
        if value > 1e30 and value != float("inf"):
            tensor.mul_(value)
        else:
            tensor.view(-1)[3] = value
    checkpoint.save(folder / source, net, TOK, layout)
    return folder


MODES = {
    "ar": ["--mode=ar"],
    "opdlm": ["--reveal=leftmost:0.9"],
    "self": ["--mode=speculative", "--verifier=self"],
    "teacher": ["--mode=speculative"],
    "verifier": ["--mode=speculative"],
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "name, value", [("h.0.ln_1.weight", "nan"), ("wte.weight", "inf"), ("ln_f.bias", "-inf")]
)
def test_a_weight_that_is_not_finite_is_named(tmp_path, capsys, mode, name, value):
    source = "ar" if mode in ("ar", "verifier") else "opdlm"
    folder = spoil(tmp_path, name, float(value), source)
    assert left([f"--ckpt={folder}", "--device=cpu", *MODES[mode]]) == 2
    out, err = capsys.readouterr()
    assert f"{folder / source}: the tensor {name} has 1 numbers that are not finite" in err
    assert not out and err.count("\n") == 1


def test_a_mask_vector_or_a_light_model_that_is_not_finite_is_named(run, tmp_path, capsys):
    folder = spoil(tmp_path, "mask_vector", float("nan"), "opdlm")
    for flags in ([f"--ckpt={folder}"], [f"--ckpt={run}", f"--light={folder}", "--schedule=L4"]):
        assert left([*flags, "--device=cpu"]) == 2
        out, err = capsys.readouterr()
        assert not out and f"{folder / 'opdlm'}: the tensor mask_vector has" in err and err.count("\n") == 1


@pytest.mark.parametrize("temperature", ["0", "1"])
@pytest.mark.parametrize("mode", MODES)
def test_activations_that_overflow_are_no_text(tmp_path, capsys, mode, temperature):
    """All weights are finite."""
    source = "ar" if mode in ("ar", "verifier") else "opdlm"
    folder = spoil(tmp_path, "h.0.attn.c_attn.weight", 1e38, source)
    flags = [f"--ckpt={folder}", "--device=cpu", f"--temperature={temperature}", *MODES[mode]]
    assert left(flags) == 2
    out, err = capsys.readouterr()
    assert "the model's numbers are not finite" in err and str(folder) in err
    assert not out and err.count("\n") == 1


def test_a_policy_that_is_not_finite_is_named(run, tmp_path, capsys):
    net = policy.Policy(policy.PolicyConfig(4)).init_weights(torch.Generator().manual_seed(0))
    policy.save_policy(tmp_path, net)
    assert left([f"--ckpt={run}", "--device=cpu", f"--reveal=policy:{tmp_path}"]) == 0
    capsys.readouterr()
    with torch.no_grad():
        net.head.bias.fill_(float("nan"))
    policy.save_policy(tmp_path, net)
    assert left([f"--ckpt={run}", "--device=cpu", f"--reveal=policy:{tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert not out and f"{tmp_path}: the tensor head.bias has 1 numbers that are not finite" in err


# many texts, prompts, files --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ar", "diffusion", "speculative"])
def test_many_texts_are_generated_in_batches(run, capsys, monkeypatch, mode):
    """They are the same texts, and the last line counts all of them."""
    flags = ["--n=7", "--length=9", f"--mode={mode}", "--prompt=One day"]
    flags += ["--verifier=self"] * (mode == "speculative")
    together, last = said(capsys, run, *flags)
    assert numbers(last)[3] == 7
    sizes = []
    real_uniforms = opdlm.uniforms

    def noting(seed, stream, rows, shape):
        sizes.append(len(rows))
        return real_uniforms(seed, stream, rows, shape)

    monkeypatch.setattr(opdlm, "uniforms", noting)
    for most, expected in [(3, [3, 3, 1]), (1, [1] * 7), (7, [7])]:
        num_masks = 16 if mode == "speculative" else 0
        monkeypatch.setattr(generate, "MAX_POSITIONS", most * (3 + 9 + num_masks))
        text, batched_last = said(capsys, run, *flags)
        assert text == together
        assert numbers(batched_last) == (*numbers(last)[:3], most)
        assert sizes == expected
        sizes.clear()
    monkeypatch.setattr(generate, "MAX_POSITIONS", 1)
    assert said(capsys, run, *flags)[0] == together


def test_a_million_texts_begin_at_once(run, monkeypatch):
    """Memory and time up to the first text do not depend on --n."""
    printed = []

    def stop(text, **_):
        printed.append(text)
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "print", stop, raising=False)
    for n in (10 ** 6, 2 ** 63 - 1):
        assert left([f"--ckpt={run}", "--device=cpu", "--mode=ar", "--length=2", f"--n={n}"]) == 130
    assert len(printed) == 2 and printed[0] == printed[1]


@pytest.mark.parametrize("prompt", ["--help me", "-x", "--well-known day", "-1", "-- a"])
def test_a_prompt_may_begin_with_hyphens(run, capsys, prompt):
    text = said(capsys, run, f"--prompt={prompt}", "--length=4")[0]
    assert text.startswith(prompt) and said(capsys, run, "--prompt", prompt, "--length=4")[0] == text


def test_the_last_of_two_prompts_wins(run, capsys):
    text = said(capsys, run, "--prompt=One", "--prompt", "-a", "--prompt=One day", "--length=4")[0]
    assert text == said(capsys, run, "--prompt=One day", "--length=4")[0]


def test_a_prompt_never_becomes_a_special_id(run, capsys):
    """<|endoftext|> in it is ordinary text, of several tokens."""
    for prompt in (tokenizer.EOT, f"One{tokenizer.EOT} day", "<mask>", "[MASK]"):
        ids = TOK.encode(prompt)
        assert TOK.eot not in ids and len(ids) > 1 and TOK.decode(ids) == prompt
        text, last = said(capsys, run, f"--prompt={prompt}", "--mode=ar", "--length=1")
        assert text.startswith(prompt) and float(numbers(last)[2]) == 1 + len(ids)


@pytest.mark.parametrize("special", [True, False])
def test_a_prompt_never_becomes_a_special_id_of_a_hub_tokenizer(tmp_path, capsys, special):
    """Whether or not the file marks its end of text as special."""
    tok = Tokenizer(models.BPE({chr(33 + i): i for i in range(90)}, []))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_tokens([AddedToken("<end>", special=special)])
    net = GPT(GPTConfig(91, CONTEXT, 1, 2, 16)).init_weights(torch.Generator().manual_seed(0))
    checkpoint.save(tmp_path, net, tokenizer.HubTokenizer(tok, 90))
    text, last = said(capsys, tmp_path, "--mode=ar", "--length=1", "--prompt=a<end>b")
    assert text.startswith("a<end>b") and numbers(last)[2] == 8


def test_a_prompt_with_a_mask_is_refused(tmp_path, capsys, monkeypatch):
    """Some tokenizers have a token for it, which a text can spell."""
    real_encode = tokenizer.Tokenizer.encode
    for i in (TOK.eot, network(0).mask_id):

        def encode(tok, text, special=i):
            return [*real_encode(tok, text), special]

        monkeypatch.setattr(tokenizer.Tokenizer, "encode", encode)
        checkpoint.save(tmp_path / "net", network(0), TOK)
        assert left([f"--ckpt={tmp_path}/net", "--mode=ar", "--device=cpu", "--prompt=One<mask>"]) == 2
        out, err = capsys.readouterr()
        assert not out and "--prompt='One<mask>': this model's tokenizer reads a part of it" in err


def test_the_home_folder_is_known_after_an_equals_sign(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "link").symlink_to(run)
    text = said(capsys, run)[0]
    assert said(capsys, "~/link", "--picture=~/new/x.html")[0] == text
    assert (tmp_path / "new/x.html").is_file()
    assert left(["--ckpt=~/link/opdlm", "--export=~/copy"]) == 0
    assert (tmp_path / "copy/config.json").is_file()
    capsys.readouterr()
    assert said(capsys, "~/copy")[0] == said(capsys, run / "opdlm")[0]
    for verifier in ("~/link/ar", "self"):
        said(capsys, "~/link", "--mode=speculative", f"--verifier={verifier}")
    assert said(capsys, "~/link", "--prompt=~/x")[0].startswith("~/x")


def test_an_export_is_not_inside_its_checkpoint_but_may_be_beside_it(run, capsys):
    assert left([f"--ckpt={run}", f"--export={run}/opdlm-2"]) == 0
    assert sorted(path.name for path in (run / "opdlm-2").iterdir())
    capsys.readouterr()
    assert said(capsys, run / "opdlm-2")[0] == said(capsys, run)[0]


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of Unix")
@pytest.mark.parametrize(
    "flags, status", [("", 0), ("--help", 0), ("--n=0", 2), ("--watch --picture=x.png", 0)]
)
def test_as_a_command_with_a_closed_stdout(run, tmp_path, flags, status):
    program = Path(sample.__file__).resolve()
    command = f"{sys.executable} {program} --ckpt={run} --device=cpu --length=4 {flags} >&-"
    done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == status and done.stderr.count("\n") == (status == 2)
    assert (tmp_path / "x.png").is_file() == ("picture" in flags)


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
