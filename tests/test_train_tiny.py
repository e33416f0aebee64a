"""The whole command, as small as it can be, and what must survive it."""

import hashlib
import json
import math
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opdlm
import sample
import train_tiny
from data import corpus, tokenizer
from data.corpus import story_world_corpus, windows
from data.tinystories import NoNetwork, stories
from decoding.sampling import SamplingConfig
from model import checkpoint
from model.masks import AR
from report import compare, metrics, trace
from tests.model import test_llama
from training import cli
from training.log import Log

ROOT = Path(__file__).parents[1]
SMALL = [
    "--data=toy",
    "--pretrain_steps=2",
    "--warm_steps=1",
    "--layers=1",
    "--width=64",
    "--batch=2",
    "--eval_every=2",
    "--device=cpu",
]


@pytest.fixture(autouse=True)
def little(monkeypatch, tmp_path):
    """A small world, few stories to be judged by; and nothing lands in the checkout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_tiny, "open_corpus", lambda *_: story_world_corpus(stories=200, held_out=20))
    monkeypatch.setattr(metrics, "matmul_rate", lambda _: 1.0)  # a second, each time


def train(*flags):
    return cli.run(train_tiny.main, [*SMALL, *flags])


def steps(out, phase):
    return [
        r
        for r in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        if r.get("phase") == phase
    ]


def contents(folder):
    files = (p for p in Path(folder).rglob("*") if p.is_file())
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_end_to_end(capsys):
    assert train("--distill_steps=3", "--out=run") == 0
    said = capsys.readouterr().out
    assert {p.name for p in Path("run").iterdir()} == {
        "ar",
        "opdlm",
        "best",
        "log.jsonl",
        "summary.json",
        "curves.png",
        "states.png",
        "state.safetensors",
        "before-state.safetensors",
    }
    numbers = json.loads(Path("run/summary.json").read_text())
    for name in ("ar", "before", "after"):
        assert set(compare.TABLE_METRICS) <= set(numbers[name])
        assert all(map(math.isfinite, numbers[name].values()))
        assert f"{numbers[name]['val_nats']:.3f}" in said and f"\n{name}: " in said
    assert numbers["ar"]["tok_per_fwd"] == 1.0
    header = json.loads(Path("run/log.jsonl").read_text().splitlines()[0])
    assert {"config", "commit", "torch", "device", "parameters", "matmul_flops"} <= set(header)
    line = (
        r"distil +3/3 \| kl \d\.\d+ nats \| masked 0\.\d+ \| len \d+ \| text .* nats \| .*k tok/s \| \d+ ms"
    )
    assert re.search(line, said)
    assert "\033" not in said


@pytest.mark.parametrize("updates, again", [(2, [4, 5, 6]), (3, [5, 6])])
def test_killed_and_resumed_is_uninterrupted(monkeypatch, updates, again):
    """Saves fall between rollouts: after steps 1, 3 and 5, or 1 and 4, since the first step is on a story."""
    assert train("--distill_steps=6", f"--updates_per_rollout={updates}", "--out=whole") == 0
    real = Log.step

    def dies(self, record, *rest):
        real(self, record, *rest)
        if record["phase"] == "distil" and record["step"] == 5:
            raise RuntimeError("killed")

    monkeypatch.setattr(Log, "step", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train("--distill_steps=6", f"--updates_per_rollout={updates}", "--out=parts")
    monkeypatch.setattr(Log, "step", real)
    assert train("--distill_steps=6", f"--updates_per_rollout={updates}", "--out=parts", "--resume") == 0
    whole = {r["step"]: r["loss"] for r in steps("whole", "distil")}
    parts = [(r["step"], r["loss"]) for r in steps("parts", "distil")]
    assert [step for step, _ in parts] == [1, 2, 3, 4, 5, *again]
    assert all(loss == whole[step] for step, loss in parts)
    assert (
        Path("whole/opdlm/model.safetensors").read_bytes()
        == Path("parts/opdlm/model.safetensors").read_bytes()
    )
    whole, parts = (json.loads(Path(out, "summary.json").read_text())["after"] for out in ("whole", "parts"))
    for name, key in (
        ("loss_positions", "loss_positions"),
        ("rollout_positions", "positions"),
        ("train_flops", "flops"),
    ):
        assert whole[name] == parts[name] == sum(r[key] for r in steps("whole", "distil")) > 0


def test_same_seed_same_losses_to_the_last_bit():
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert train("--distill_steps=2", f"--out={out}", f"--seed={seed}") == 0
    a, b, c = ([r["loss"] for phase in ("pretrain", "distil") for r in steps(out, phase)] for out in "abc")
    assert a == b and all(x != y for x, y in zip(a, c))


def test_the_ar_model_is_used_again(capsys):
    assert train("--distill_steps=1", "--out=run") == 0
    before = contents("run/ar")
    assert "using the AR model in" not in capsys.readouterr().out
    assert train("--distill_steps=1", "--out=run", "--block=2") == 0
    assert "using the AR model in" in capsys.readouterr().out and contents("run/ar") == before
    assert train("--distill_steps=1", "--out=run", "--seed=9") == 0  # other settings: a new one
    assert "using the AR model in" not in capsys.readouterr().out and contents("run/ar") != before


def test_a_run_that_never_comes_to_its_own_text_says_so(capsys):
    said = []
    for flags in (
        ["--warm_steps=1"],
        ["--warm_steps=2"],
        ["--warm_steps=2", "--source=data", "--states=prefix"],
    ):
        assert train("--distill_steps=2", "--out=run", *flags) == 0
        said.append(
            "all 2 updates learn from training text, none from the student's text" in capsys.readouterr().out
        )
    assert said == [False, True, False]


def test_init_takes_a_checkpoint(capsys):
    assert train("--distill_steps=1", "--out=run") == 0
    assert train("--distill_steps=1", "--out=next", "--init=run/ar") == 0
    first, second = (
        json.loads(Path(out, "summary.json").read_text())["ar"]["val_nats"] for out in ("run", "next")
    )
    assert first == second and not steps("next", "pretrain")
    assert train("--distill_steps=1", "--out=run", "--init=run/ar") == 0  # whose teacher it is indeed


def test_a_prompt_that_is_watched(capsys):
    """Its lines show what sample.py writes with the same seed: first the AR model, last the student. Watching
    changes no loss."""
    assert train("--distill_steps=5", "--updates_per_rollout=2", "--seed=3", "--out=alone") == 0
    capsys.readouterr()
    assert (
        train(
            "--distill_steps=5", "--updates_per_rollout=2", "--seed=3", "--out=run", "--sample_prompt=One day"
        )
        == 0
    )
    lines = re.findall(
        r"^(\S+) +(\d+) tokens in +(\d+) forwards \| (One day.*)$", capsys.readouterr().out, re.M
    )
    assert [r["loss"] for r in steps("run", "distil")] == [r["loss"] for r in steps("alone", "distil")]
    seen = steps("run", "watch")
    assert len(lines) == len(seen) == len(steps("run", "eval")) and not steps("alone", "watch")
    assert [r["of"] for r in seen] == ["ar"] + ["student"] * (len(seen) - 1) and len(
        {line[3] for line in lines}
    ) > 2
    for (_, count, forwards, text), record in zip(lines, seen):
        story = trace.Trace(
            **{name: record[name] for name in ("pieces", "revealed_at", "prompt", "forwards", "block")}
        )
        assert (len(story.pieces), story.forwards, trace.coloured(story, False)) == (
            int(count),
            int(forwards),
            text,
        )
    for mode, line in (("ar", lines[0]), ("diffusion", lines[-1])):
        flags = [
            "--ckpt=run",
            f"--mode={mode}",
            "--prompt=One day",
            "--length=32",
            "--seed=3",
            "--device=cpu",
        ]
        assert cli.run(sample.main, flags) == 0
        assert capsys.readouterr().out.startswith(line[3] + "\n\n")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "real"])
def test_init_takes_another_family(kind, monkeypatch, request):
    """The data is read with the checkpoint's tokenizer; what is left behind is of its family."""
    world, lines = story_world_corpus(stories=40, held_out=4), ["--distill_steps=2", "--length=60"]
    if kind == "real":
        init = request.getfixturevalue("stories260k")
    else:
        init = "net"
        net = test_llama.llama(world.tokenizer.vocab_size, 64, family=kind).float()
        checkpoint.save(init, net, world.tokenizer)
    monkeypatch.setattr(
        train_tiny, "open_corpus", lambda *given: story_world_corpus(given[3], stories=40, held_out=4)
    )
    assert train(*lines, f"--init={init}", "--out=run") == 0
    (teacher, _), (student, layout) = checkpoint.load(init), checkpoint.load("run/opdlm")
    assert student.config == teacher.config and layout.block == 4 and not steps("run", "pretrain")
    assert not torch.equal(student.wte.weight, teacher.wte.weight)
    assert tokenizer.load("run/opdlm").to_json() == tokenizer.load(init).to_json()
    numbers = json.loads(Path("run/summary.json").read_text())
    assert all(map(math.isfinite, numbers["after"].values()))
    config = json.loads(Path("run/log.jsonl").read_text().splitlines()[0])["config"]
    assert (config["length"], config["width"], config["layers"]) == (
        60,
        teacher.config.width,
        teacher.config.layers,
    )


def test_text_and_export_of_a_run(capsys, tmp_path):
    assert train("--distill_steps=1", "--out=run") == 0
    for mode, folder in (("ar", "ar"), ("diffusion", "opdlm")):
        assert cli.run(sample.main, ["--ckpt=run", f"--mode={mode}", f"--export={mode}"]) == 0
        assert contents(mode) == contents(f"run/{folder}")


@pytest.mark.parametrize(
    "flags",
    [
        ["--preset=paper", "--updates_per_rollout=2"],
        ["--preset=mdlm"],
        ["--max_prompt=3"],
        ["--block=3", "--context=block"],
        ["--block=80"],
        ["--source=data", "--states=random", "--target=onehot", "--weight=1/t", "--align=paper"],
        ["--source=teacher", "--states=prefix", "--temperature=0.5"],
        ["--reveal=static:2", "--block=1"],
    ],
)
def test_the_dials_reach_the_method(flags, monkeypatch):
    seen = []
    real = opdlm.train
    monkeypatch.setattr(opdlm, "train", lambda *a: seen.append(a[3]) or real(*a))
    assert train("--distill_steps=2", "--out=run", *flags) == 0
    recipe, given = seen[1], dict(flag[2:].split("=") for flag in flags)
    if "preset" in given:
        given = {**{k: str(v) for k, v in train_tiny.PRESETS[given["preset"]].items()}, **given}
    assert recipe.layout.block == (int(given.get("block", 4)) or 96)
    assert recipe.layout.logit_shift == (given.get("align") != "paper")
    assert recipe.layout.context_block == (recipe.layout.block if given.get("context") == "block" else 1)
    assert recipe.source is opdlm.SOURCES[given.get("source", "student")]
    assert recipe.states is opdlm.STATES[given.get("states", "visited")]
    assert recipe.target is opdlm.TARGETS[given.get("target", "teacher")]
    assert recipe.weight is opdlm.WEIGHTS[given.get("weight", "first")]
    assert recipe.updates_per_rollout == int(given.get("updates_per_rollout", 1))
    assert recipe.max_prompt == int(given.get("max_prompt", 16))
    assert recipe.sampling == SamplingConfig(float(given.get("temperature", 1)), top_k=given.get("top_k"))


def test_what_saves_memory_changes_no_loss():
    """But for bf16, which rounds the teacher."""
    ways = {"plain": [], "lean": ["--kl=full", "--checkpointing"], "bf16": ["--teacher_dtype=bfloat16"]}
    for out, flags in ways.items():
        assert train("--distill_steps=2", f"--out={out}", *flags) == 0
    losses = {out: [r["loss"] for phase in ("pretrain", "distil") for r in steps(out, phase)] for out in ways}
    assert losses["lean"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["bf16"] == pytest.approx(losses["plain"], rel=0.05) and losses["bf16"] != losses["plain"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--blok=3"], "did you mean --block"),
        (["--block=90"], "--block=90 does not fit after a prompt of up to 16 tokens"),
        (["--block=-1"], "--block=-1 does not fit"),
        (["--states=visited", "--source=data"], "needs source=student"),
        (["--reveal=best"], "no reveal rule 'best'"),
        (["--init=nowhere"], "nowhere is not a checkpoint"),
        (["--init=run/opdlm"], "is a student already (block 4)"),
        (["--init=run"], "of a run: ar or opdlm"),
        (["--init=other"], "run/ar is not the AR model of --init=other"),
        (["--init=bare"], "tokenizer.json: without one ids are no text"),
        (["--init=run/ar", "--length=97"], "--length=97 is more than the 96 positions of --init=run/ar"),
        (["--max_prompt=0"], "--max_prompt"),
        (["--max_prompt=96"], "does not fit after a prompt of up to 96 tokens in --length=96"),
        (["--align=left"], "--align"),
        (["--width=33"], "--width"),
        (["--out=occupied/run"], "cannot be written"),
        (["--resume", "--out=empty"], "nothing to resume"),
        (["--batch=0"], "--batch=0: must be at least 1"),
        (["--kl=top"], "--kl=top is not known"),
        (["--teacher_dtype=int8"], "--teacher_dtype"),
    ],
)
def test_bad_input_is_one_sentence_and_costs_nothing(flags, said, capsys):
    Path("occupied").write_text("a file")
    assert train("--distill_steps=1", "--out=run") == 0
    Path("bare").mkdir()
    shutil.copy("run/ar/config.json", "bare")
    shutil.copytree("run/ar", "other")
    before, _ = contents("run"), capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sys.exit(train("--distill_steps=1", "--out=run", *flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1 and "Traceback" not in error
    assert contents("run") == before


def test_ctrl_c_is_130(tmp_path):
    code = (
        "import signal, sys; from training import cli; import train_tiny; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(cli.run(train_tiny.main))"
    )
    flags = ["--data=toy", "--pretrain_steps=100000", f"--out={tmp_path}"]
    run = subprocess.Popen(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    run.stdout.readline()  # it trains
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130 and "Traceback" not in error


def test_packing_does_not_matter(tiny):
    """Stories in one window are to the model what each is alone."""
    net, eot = tiny(), 10
    tokens = torch.tensor([[eot, 1, 2, 3, eot, 4, 5, 6, 7, eot, 8, 9]])
    mask, position = train_tiny.separate_texts(tokens, eot)
    together = net(tokens, mask, position)
    alone = torch.cat([net(part) for part in (tokens[:, :4], tokens[:, 4:9], tokens[:, 9:])])
    assert torch.allclose(together, alone, atol=1e-10, rtol=0)


def test_without_a_network_the_story_world_unless_real_text_was_asked_for(monkeypatch, capsys):
    def unreachable(*_):
        raise NoNetwork("no network")

    monkeypatch.setattr(corpus.tinystories, "load", unreachable)
    assert corpus.open_corpus(None, None, 2048).name == "toy"
    assert capsys.readouterr().out.count("\n") == 1
    with pytest.raises(NoNetwork):
        corpus.open_corpus("tinystories", None, 2048)


def test_windows_begin_with_a_story_and_follow_the_stream():
    world = story_world_corpus(stories=50, held_out=1)
    starts = stories(world.train, world.tokenizer.eot)
    got = windows(world.train, starts, torch.linspace(0, 0.999, 40).numpy(), 80)
    stream = world.train.astype("int64")
    for row in got:
        assert row[0] == world.tokenizer.eot
        assert any((stream[start : start + 80] == row[: len(stream) - start]).all() for start in starts)
    assert len({tuple(row) for row in got}) > 20


def test_the_world_s_words_are_tokens_and_the_same_ones_in_every_process():
    code = ("from data.corpus import story_world_corpus; "
            "print(story_world_corpus(stories=1, held_out=1).tokenizer.to_json())")
    made = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in "12"
    }
    assert len(made) == 1
    world = story_world_corpus(stories=20, held_out=1)
    lengths = [len(world.tokenizer.pieces([i])[0]) for i in world.train if i != world.tokenizer.eot]
    assert min(lengths) >= 1 and sum(lengths) / len(lengths) > 3  # words, not bytes


def test_the_untrained_student_under_the_ar_layout_is_the_teacher(tiny):
    net = tiny(vocab=30).float()
    texts = [torch.randint(0, 29, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9, 14)]
    want = [
        sum(-net(t[None, :-1]).log_softmax(-1)[i, t[i + 1]].item() for i in range(len(t) - 1)) for t in texts
    ]
    assert metrics.story_nats(net, texts, AR, 29).tolist() == pytest.approx(want, rel=1e-4)
