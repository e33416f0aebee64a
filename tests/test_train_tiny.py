"""The whole command, as small as it can be, and what must survive it."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
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
from model import checkpoint, lora
from model.masks import AR, Layout
from report import compare, metrics, trace
from tests.model import test_llama
from training import cli, resume
from training.chunked_kl import chunked_kl
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
    for name in ("ar", "before", "after", "speculative"):
        assert set(compare.TABLE_METRICS) - {"recovery"} <= set(numbers[name])
        assert all(map(math.isfinite, numbers[name].values()))
        assert f"{numbers[name]['val_nats']:.3f}" in said and f"\n{name}: " in said
    assert numbers["ar"]["tok_per_fwd"] == 1.0 < numbers["speculative"]["tok_per_fwd"]
    header = json.loads(Path("run/log.jsonl").read_text().splitlines()[0])
    assert {"config", "commit", "torch", "device", "parameters", "matmul_flops"} <= set(header)
    line = (
        r"distil +3/3 \| kl \d\.\d+ nats \| masked 0\.\d+ \| len \d+ \| text .* nats \| .*k tok/s \| \d+ ms"
    )
    assert re.search(line, said)
    assert "\033" not in said


def test_what_a_run_trains_is_what_its_table_and_its_checkpoint_say(capsys):
    """At temperature 0 speculative text is the student's own AR text: the two columns of one model agree."""
    flags = ["--source=student-ar", "--temperature=0", "--clean_weight=1", "--max_response=20", "--out=run"]
    assert train("--distill_steps=3", *flags) == 0
    capsys.readouterr()
    numbers = json.loads(Path("run/summary.json").read_text())
    assert numbers["ar"]["agreement"] == 1                       # greedy text of the teacher itself
    own_steps = [step for step in steps("run", "distil") if step["source"] == "student-ar"]
    assert own_steps and all(step["len"] <= 20 and step["masked"] == 1 for step in own_steps)
    config = json.loads(Path("run/opdlm/config.json").read_text())
    assert (config["mode"], config["temperature"]) == ("speculative", 0)
    shared = ["--ckpt=run", "--device=cpu", "--length=20", "--prompt=One"]
    assert cli.run(sample.main, shared) == 0
    text, cost = capsys.readouterr().out.split("\n\n")
    assert cli.run(sample.main, [*shared, "--ckpt=run/opdlm", "--mode=ar", "--temperature=0"]) == 0
    ar_text, ar_cost = capsys.readouterr().out.split("\n\n")
    assert text == ar_text and cost != ar_cost and "| 1.00 tokens/forward" in ar_cost


def test_a_conversion_goes_on_from_a_student(finished_run):
    """Its AR model is the student's own, and before the first update it is the student."""
    shutil.copytree(finished_run, "run")
    assert train("--init=run/opdlm", "--distill_steps=1", "--out=next") == 0
    first, second = (json.loads(Path(out, "summary.json").read_text()) for out in ("run", "next"))
    for column, same_column, name in (("speculative", "ar", "val_nats"), ("after", "before", "val_nats"),
                                      ("after", "before", "tok_per_fwd")):
        assert second[same_column][name] == pytest.approx(first[column][name], rel=1e-6)
    assert second["after"]["val_nats"] != second["before"]["val_nats"]
    assert not Path("next/ar").exists()


def test_a_student_that_is_no_ar_model_has_no_speculative_column():
    assert train("--distill_steps=1", "--align=paper", "--context=block", "--out=run") == 0
    assert set(json.loads(Path("run/summary.json").read_text())) == {"ar", "before", "after"}


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


def test_a_prompt_is_continued_at_the_temperature_of_the_run(capsys):
    flags = ["--temperature=0", "--sample_prompt=One day", "--seed=3"]
    assert train("--distill_steps=1", "--out=run", *flags) == 0
    lines = re.findall(r"^\S+ +\d+ tokens in +\d+ forwards \| (One day.*)$", capsys.readouterr().out, re.M)
    sampled = []
    for mode in ("ar", "diffusion"):
        shared = ["--ckpt=run", f"--mode={mode}", "--device=cpu", "--length=32", "--prompt=One day"]
        assert cli.run(sample.main, [*shared, "--temperature=0"]) == 0
        sampled.append(capsys.readouterr().out.split("\n\n")[0])
    assert [lines[0], lines[-1]] == sampled


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


def test_an_adapter_is_trained_by_its_own_pass_unless_activations_are_recomputed():
    """A cache cannot be written twice, as --checkpointing would."""
    plain = train_tiny.make_recipe(train_tiny.Config(), eot=0)
    adapter = train_tiny.make_recipe(train_tiny.Config(lora=2), eot=0)
    recomputed = train_tiny.make_recipe(train_tiny.Config(lora=2, checkpointing=True), eot=0)
    assert plain.logits is recomputed.logits is opdlm.student_logits
    assert adapter.logits is lora.student_logits


@pytest.mark.parametrize("flags", [[], ["--init=finished/ar", "--checkpointing", "--teacher_dtype=bfloat16"]])
def test_an_adapter_is_trained_saved_resumed_and_sampled(flags, finished_run, capsys):
    """The AR model is not changed; the files of the student and of the state hold the adapter alone."""
    shutil.copytree(finished_run, "finished")
    folder = "finished/ar" if flags else "whole/ar"
    flags = ["--lora=2", "--eval_texts=2", "--lr=0.01", "--lr_schedule=constant", *flags]
    assert train(*flags, "--distill_steps=4", "--out=whole") == 0
    assert train(*flags, "--distill_steps=2", "--out=parts") == 0
    student = "opdlm/adapter_model.safetensors"
    whole = Path("whole", student).read_bytes()
    assert Path("parts", student).read_bytes() != whole
    assert train(*flags, "--distill_steps=4", "--out=parts", "--resume") == 0
    assert Path("parts", student).read_bytes() == whole

    teacher, _ = checkpoint.load(folder)
    net, layout = checkpoint.load("whole/opdlm")
    tokens = torch.arange(40)[None]
    assert layout == Layout(4, 1, 1) and torch.equal(net(tokens), teacher(tokens))
    masks = torch.full_like(tokens, net.mask_id)
    assert not torch.allclose(net(masks), teacher(masks), atol=1e-3)
    size = Path(folder, "model.safetensors").stat().st_size
    for file in (student, "state.safetensors"):
        assert Path("whole", file).stat().st_size < size / 5
    numbers = json.loads(Path("whole/summary.json").read_text())
    assert numbers["speculative"]["val_nats"] == numbers["ar"]["val_nats"]
    assert numbers["after"]["val_nats"] != numbers["before"]["val_nats"]

    capsys.readouterr()
    words = ["--prompt=One day", "--length=8", "--device=cpu", "--temperature=0"]
    assert cli.run(sample.main, ["--ckpt=whole", "--export=new"]) == 0
    said = []
    for ckpt in ("whole", "new"):
        capsys.readouterr()
        assert cli.run(sample.main, [f"--ckpt={ckpt}", "--mode=speculative", "--verifier=self", *words]) == 0
        said.append(capsys.readouterr().out.split("\n\n")[0])
    assert cli.run(sample.main, [f"--ckpt={folder}", "--mode=ar", *words]) == 0
    said.append(capsys.readouterr().out.split("\n\n")[0])
    if "--teacher_dtype=bfloat16" not in flags:
        assert len(set(said)) == 1
    assert said[0] == said[1] and said[0].startswith("One day")


def test_the_size_of_an_evaluation(finished_run):
    """What is pretrained here has the sizes that were published; a checkpoint's fits the run."""
    def size(name, *flags):
        config = cli.parse(train_tiny.Config, flags, train_tiny.__doc__, train_tiny.PRESETS)
        named = replace(story_world_corpus(stories=20, held_out=2), name=name)
        config = train_tiny.resolve_options(config, named)
        return config.eval_texts, config.eval_tokens

    init = f"--init={finished_run}/ar"
    assert size("toy") == (512, 96) == size("toy", init)
    assert size("tinystories") == (128, 256)
    assert size("stories", init, "--distill_steps=3", "--batch=2") == (4, 32)
    assert size("stories", init, "--distill_steps=10000", "--batch=16") == (128, 96)
    assert size("stories", init, "--eval_texts=5", "--eval_tokens=9") == (5, 9)
    assert size("stories", "--eval_texts=5", "--eval_tokens=9") == (5, 9)
    texts, tokens = size("stories", init)
    assert 4 < texts < 128 and tokens == 96


def test_the_optimizer_and_rate_of_a_run(finished_run):
    """An adapter has AdamW and a rate of its own; a checkpoint a tenth of a new network's."""
    def chosen(*flags):
        config = cli.parse(train_tiny.Config, flags, train_tiny.__doc__, train_tiny.PRESETS)
        corpus = replace(story_world_corpus(stories=20, held_out=2), name="stories")
        config = train_tiny.resolve_options(config, corpus)
        return config.optimizer, config.lr

    init = f"--init={finished_run}/ar"
    assert chosen() == ("muon", 0.01) and chosen("--optimizer=adamw") == ("adamw", 0.001)
    assert chosen(init) == ("muon", 0.001)
    assert chosen(init, "--lora=2") == chosen("--lora=2") == ("adamw", 0.003)
    assert chosen(init, "--lora=2", "--optimizer=muon") == ("muon", 0.001)
    assert chosen("--lora=2", "--lr=0.5") == ("adamw", 0.5)


def test_text_and_export_of_a_run(capsys, tmp_path):
    assert train("--distill_steps=1", "--out=run") == 0
    for mode, folder in (("ar", "ar"), ("diffusion", "opdlm")):
        assert cli.run(sample.main, ["--ckpt=run", f"--mode={mode}", f"--export={mode}"]) == 0
        original = contents(f"run/{folder}")
        exported = contents(mode)
        added = {str(path) for path in exported.keys() - original.keys()}
        code = {"modeling_opdlm.py"} if mode == "diffusion" else set()
        assert added == {"tokenizer.json", "tokenizer_config.json", *code}       # for `transformers`
        changed = {str(path) for path in original if original[path] != exported[path]}
        assert changed == ({"config.json"} if code else set())                   # it names the code


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
        ["--source=student-ar", "--states=all", "--target=sampled", "--temperature=0.5"],
        ["--source=student-ar"],
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
    by_source = train_tiny.BY_SOURCE["student-ar" if given.get("source") == "student-ar" else "student"]
    target = given.get("target", by_source["target"])
    assert recipe.target is opdlm.TARGETS[target.replace("sampled", "teacher")]
    assert recipe.sampled_target == (target == "sampled")
    assert recipe.weight is opdlm.WEIGHTS[given.get("weight", by_source["weight"])]
    assert recipe.clean_weight == by_source["clean_weight"]
    assert recipe.clean_source == (opdlm.data_text if by_source["clean_text"] == "data" else None)
    each = by_source.get("updates_per_rollout", 1)
    assert recipe.updates_per_rollout == int(given.get("updates_per_rollout", each))
    assert recipe.max_prompt == int(given.get("max_prompt", 16))
    temperature = float(given.get("temperature", by_source["temperature"]))
    assert recipe.sampling == SamplingConfig(temperature, top_k=given.get("top_k"))


def test_the_source_depends_on_the_corpus_and_the_rest_on_the_source():
    """Text is for the student as an AR model, if it is one; else the student writes by its reveal rule."""
    student_ar = train_tiny.BY_SOURCE["student-ar"]
    story_world = story_world_corpus(stories=20, held_out=2)
    text = replace(story_world, name="text")

    def defaults(corpus=text, **flags):
        config = train_tiny.resolve_options(train_tiny.Config(**flags), corpus)
        found = {name: getattr(config, name) for name in student_ar}
        train_tiny.make_recipe(config, eot=0)                    # refuses what does not go together
        return config.source, found

    assert train_tiny.BY_SOURCE["student"] == {
        "temperature": 0.7, "target": "teacher", "weight": "first", "clean_weight": 0, "clean_text": "own",
        "batch": 16}
    assert student_ar == {
        "temperature": 0, "target": "sampled", "weight": "mean", "clean_weight": 2, "clean_text": "data",
        "batch": 8, "distill_steps": 480, "warm_steps": 0, "updates_per_rollout": 8}
    names = ("distill_steps", "warm_steps", "updates_per_rollout")
    by_corpus = {name: {key: sizes[key] for key in names} for name, sizes in train_tiny.SIZES.items()}
    student = train_tiny.BY_SOURCE["student"] | by_corpus["text"]
    assert defaults() == ("student-ar", student_ar)
    assert defaults(story_world) == ("student", student | by_corpus["toy"])
    assert defaults(source="student") == ("student", student)
    assert defaults(story_world, source="student-ar") == ("student-ar", student_ar)
    for flags in ({"align": "paper"}, {"context": "block"}, {"block": 0}, {"block": 1}):
        assert defaults(**flags) == ("student", student)
    without_clean_loss = student_ar | {"clean_weight": 0.0, "clean_text": "own"}
    assert defaults(lora=2) == defaults(clean_weight=0.0) == ("student-ar", without_clean_loss)
    assert defaults(temperature=0.5, weight="first") == (
        "student-ar", student_ar | {"temperature": 0.5, "weight": "first"})


def test_a_loss_in_chunks_has_the_whole_distribution_as_its_target(monkeypatch):
    text = replace(story_world_corpus(stories=20, held_out=2), name="text")

    def target(**flags):
        config = train_tiny.resolve_options(train_tiny.Config(**flags), text)
        train_tiny.make_recipe(config, eot=0)
        return config.target

    assert target() == target(kl="plain") == "sampled"
    assert target(kl="full") == target(kl="topk:3") == target(kl="full", source="student-ar") == "teacher"
    monkeypatch.setattr(train_tiny, "LARGE_VOCAB", 100)
    assert target() == "teacher" and target(target="sampled") == "sampled"


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
        (["--init=paper"], "is a student already (block 4)"),
        (["--init=run"], "of a run: ar or opdlm"),
        (["--init=other"], "run/ar is not the AR model of --init=other"),
        (["--init=bare"], "and so is tokenizer.json: ids cannot be turned into text"),
        (["--init=run/ar", "--length=97"], "--length=97 is more than the 96 positions of --init=run/ar"),
        (["--max_prompt=0"], "--max_prompt"),
        (["--max_response=3"], "--max_response=3: expected --block to --length, here 4 to 96"),
        (["--max_response=97"], "--max_response=97: expected --block to --length, here 4 to 96"),
        (["--block=0", "--max_response=20"], "--max_response=20: expected --block to --length, here 96 to"),
        (["--clean_text=data"], "--clean_text=data is the text of the loss of --clean_weight: give that too"),
        (["--max_prompt=96"], "does not fit after a prompt of up to 96 tokens in --length=96"),
        (["--align=left"], "--align"),
        (["--width=33"], "--width"),
        (["--out=occupied/run"], "cannot be written"),
        (["--resume", "--out=empty"], "nothing to resume"),
        (["--batch=0"], "--batch=0: expected an integer from 1 to 1000000"),
        (["--width=0"], "--width=0: expected an integer from 64 to 64000"),
        (["--width=-64"], "--width=-64: expected an integer from 64 to 64000"),
        (["--layers=1000000000"], "--layers=1000000000: expected an integer from 1 to 1000"),
        (["--vocab=1"], "--vocab=1: expected an integer from 257 to"),
        (["--pretrain_batch=0"], "--pretrain_batch=0: expected an integer from 1 to"),
        (["--pretrain_steps=-1"], "--pretrain_steps=-1: expected an integer from 0 to"),
        (["--warm_steps=-3"], "--warm_steps=-3: expected an integer from 0 to"),
        (["--distill_steps=9999999999"], "=9999999999: expected an integer from 1 to 1000000000"),
        (["--eval_every=0"], "--eval_every=0: expected an integer from 1 to"),
        (["--lora=0"], "--lora=0: expected an integer from 1 to 10000"),
        (["--lora=2", "--context=block"], "--lora needs --align=ar --context=causal"),
        (["--lora=2", "--align=paper"], "--lora needs --align=ar --context=causal"),
        (["--lora=2", "--clean_weight=0.5"], "--clean_weight has no effect with --lora"),
        (["--lora=2", "--compile"], "--compile has not been tried with --lora"),
        (["--resume", "--lora=2"], "--lora was None and is 2"),
        (["--eval_tokens=8"], "--eval_tokens=8: expected an integer from 9 to"),
        (["--eval_tokens=97"], "--eval_tokens=97: expected at most --length, here 96"),
        (["--grad_accum=-1"], "--grad_accum=-1: expected an integer from 1 to"),
        (["--updates_per_rollout=0"], "--updates_per_rollout=0: expected an integer from 1 to"),
        (["--length_ramp=-1"], "--length_ramp=-1: expected an integer from 0 to"),
        (["--lr=-1"], "--lr=-1: expected a number above 0"),
        (["--lr=0"], "--lr=0: expected a number above 0"),
        (["--clean_weight=-1"], "--clean_weight=-1: expected a number of at least 0"),
        (["--seed=-1"], "--seed=-1: expected an integer from 0 to 9223372036854775807"),
        (["--seed=9223372036854775808"], "9223372036854775807"),
        (["--out="], "--out=: expected a name, got an empty text"),
        (["--length=8", "--max_prompt=1"], "--length=8: expected an integer from 9 to"),
        (["--length=2", "--max_prompt=1", "--block=1"], "--length=2: expected an integer from 9 to"),
        (["--length=12", "--max_prompt=9"], "--block=4 does not fit after a prompt of up to 9 tokens"),
        (["--resume", "--width=128"], "cannot resume the run in"),
        (["--resume", "--optimizer=adamw"], "--optimizer was muon and is adamw"),
        (["--resume", "--pretrain_steps=3", "--seed=1"],
         "--pretrain_steps was 2 and is 3, --seed was 0 and is 1. Use what it was started with"),
        (["--resume", "--init=other"], "run/ar is not the AR model of --init=other"),
        (["--out=occupied"], "occupied cannot be written (File exists)"),
        (["--out=mine"], "best has files but no config.json"),
        (["--out=links"], "broken does not exist or cannot be written"),
        (["--kl=top"], "--kl: expected plain, full or topk:K with K at least 1, got 'top'"),
        (["--teacher_dtype=int8"], "--teacher_dtype"),
        (["--sample_prompt=caf\udce9"], "--sample_prompt='caf\\udce9': expected text in UTF-8, got other"),
    ],
)
def test_bad_input_is_one_sentence_and_costs_nothing(flags, said, capsys, finished_run):
    Path("occupied").write_text("a file")
    shutil.copytree(finished_run, "run")
    Path("bare").mkdir()
    shutil.copy("run/ar/config.json", "bare")
    shutil.copytree("run/ar", "other")
    shutil.copytree("run/opdlm", "paper")
    settings = json.loads(Path("paper/config.json").read_text())
    settings["student"] = {"block": 4, "context_block": 4, "logit_shift": 0}
    Path("paper/config.json").write_text(json.dumps(settings))
    Path("mine/best").mkdir(parents=True)
    Path("mine/best/notes.txt").write_text("")
    Path("links").mkdir()
    Path("links/log.jsonl").symlink_to(Path("broken/log.jsonl").absolute())
    before, _ = contents("."), capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sys.exit(train("--distill_steps=1", "--out=run", *flags))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1 and "Traceback" not in error
    assert contents(".") == before and not Path("empty").exists()


# resuming: what must be the same ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a run of one update."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_tiny, "open_corpus", lambda *_: story_world_corpus(stories=200, held_out=20))
        patch.setattr(metrics, "matmul_rate", lambda _: 1.0)
        patch.chdir(folder)
        assert train("--distill_steps=1", "--out=run") == 0
    return folder / "run"


def refused_resume(capsys, *flags):
    """The sentence with which --resume is refused; nothing is written."""
    before, _ = contents("run"), capsys.readouterr()
    assert train("--distill_steps=2", "--out=run", "--resume", *flags) == 2
    assert contents("run") == before
    return capsys.readouterr().err


def edit_progress(change):
    """Changes what the state of run/ says of its progress."""
    path = Path("run/state.safetensors")
    tensors, progress = resume.read_state(path)
    change(progress)
    resume.write_state(path, tensors, json.dumps(progress))


def test_resume_with_other_data_is_refused(capsys, monkeypatch, finished_run):
    shutil.copytree(finished_run, "run")
    worlds = {
        "training text (--data)": story_world_corpus(stories=201, held_out=20),
        "held-out text (--val_data)": story_world_corpus(stories=200, held_out=21),
    }
    for missing in (False, True):
        if missing:
            shutil.rmtree("run/ar")
        for name, world in worlds.items():
            monkeypatch.setattr(train_tiny, "open_corpus", lambda *_, world=world: world)
            assert f"the {name} has changed" in refused_resume(capsys)
    world = story_world_corpus(stories=200, held_out=20)
    real = world.tokenizer.to_json()
    monkeypatch.setattr(type(world.tokenizer), "to_json", lambda _: real + " ")
    monkeypatch.setattr(train_tiny, "open_corpus", lambda *_: world)
    assert "the tokenizer (--vocab, or that of --init) has changed" in refused_resume(capsys)


def test_resume_never_trains_another_ar_model(capsys, finished_run):
    shutil.copytree(finished_run, "run")
    shutil.rmtree("run/ar")
    message = refused_resume(capsys)
    assert "cannot resume without run/ar, the AR model of the run: it does not exist" in message
    assert train("--distill_steps=1", "--out=other", "--seed=1") == 0
    shutil.copytree("other/ar", "run/ar")
    assert "the AR model of the run: seed was 1 and is 0" in refused_resume(capsys)
    shutil.copy(finished_run / "ar/config.json", "run/ar")       # with the weights of the other one
    assert "the AR model (--init, or ar/ in --out) has changed" in refused_resume(capsys)


def test_resume_with_another_checkpoint_is_refused(capsys, finished_run):
    shutil.copytree(finished_run / "ar", "first")
    shutil.copytree(finished_run / "ar", "copy")
    assert train("--distill_steps=1", "--out=run", "--init=first") == 0
    assert train("--distill_steps=1", "--out=other", "--seed=1") == 0
    assert "the AR model (--init, or ar/ in --out) has changed" in refused_resume(capsys, "--init=other/ar")
    assert train("--distill_steps=2", "--out=run", "--init=copy", "--resume", "--seed=3") == 0


def test_an_older_state_can_be_resumed(capsys, finished_run):
    """It has no fingerprints, and neither has the AR model; its flags are compared."""
    shutil.copytree(finished_run, "run")

    def make_old(progress):
        for name in ("phase", "pretrain_step", "fingerprints"):
            del progress[name]
    edit_progress(make_old)
    config = json.loads(Path("run/ar/config.json").read_text())
    del config["trained"]["corpus"]
    config["trained"]["rows"] = config["trained"].pop("pretrain_batch")
    Path("run/ar/config.json").write_text(json.dumps(config))
    assert "--layers was 1 and is 2" in refused_resume(capsys, "--layers=2")
    assert train("--distill_steps=2", "--out=run", "--resume", "--lr=0.03", "--eval_every=1") == 0
    said = capsys.readouterr().out
    assert "resuming from step 1;" in said and "lr was 0.01 and is 0.03" in said


# pretraining is saved too -----------------------------------------------------------------------------

LONG = ("--pretrain_steps=7", "--distill_steps=1", "--eval_every=3")


def stop_pretraining(monkeypatch, step, stop):
    """Calls `stop` after this step of the pretraining."""
    real = Log.step

    def step_and_stop(self, record, *rest):
        real(self, record, *rest)
        if (record["phase"], record["step"]) == ("pretrain", step):
            stop()
    monkeypatch.setattr(Log, "step", step_and_stop)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("stop, code, step, saved", [
    (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, 4, 4),
    (lambda: os.kill(os.getpid(), signal.SIGTERM), 143, 7, 7),
    (interrupt, 130, 5, 3),
])
def test_pretraining_is_saved_and_resumed_to_the_last_bit(stop, code, step, saved, monkeypatch, capfd):
    assert train(*LONG, "--out=whole") == 0
    with monkeypatch.context() as patch:
        stop_pretraining(patch, step, stop)
        assert train(*LONG, "--out=run") == code
    assert not Path("run/ar").exists() and not Path("run/run.lock").exists()
    assert "the run stops at its next save point" in capfd.readouterr().err or code == 130
    assert "--pretrain_steps was 7 and is 8" in refused_resume(capfd, *LONG, "--pretrain_steps=8")
    assert train(*LONG, "--out=run", "--resume") == 0
    assert f"resuming from step {saved} of the AR pretraining; settings unchanged" in capfd.readouterr().out
    for name in ("ar", "opdlm"):
        assert contents(f"run/{name}") == contents(f"whole/{name}")
    losses = {record["step"]: record["loss"] for record in steps("whole", "pretrain")}
    records = steps("run", "pretrain")
    assert [record["step"] for record in records] == [*range(1, step + 1), *range(saved + 1, 8)]
    assert all(record["loss"] == losses[record["step"]] for record in records)


def test_an_interrupted_evaluation_ends_at_once_and_costs_no_pretraining(monkeypatch, capsys):
    """Ctrl-C between pretraining and the first saved student; SIGTERM after the last one."""
    def stop(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(compare.Evaluator, "evaluate", stop)
        assert train("--distill_steps=1", "--out=run") == 130
    before = contents("run/ar")
    assert train("--distill_steps=1", "--out=run", "--resume") == 0
    assert contents("run/ar") == before and len(steps("run", "pretrain")) == 2
    with monkeypatch.context() as patch:
        patch.setattr(compare.Evaluator, "publish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        assert train("--distill_steps=1", "--out=run") == 143
    assert Path("run/opdlm").is_dir() and not Path("run/run.lock").exists()


# links, and the home folder ---------------------------------------------------------------------------

def test_results_are_written_through_links_into_the_home_folder(monkeypatch, finished_run):
    disk = Path("disk").absolute()
    home = Path("home").absolute()
    (disk / "best").mkdir(parents=True)
    (home / "run").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    links = {name: disk / name for name in (*train_tiny.CHECKPOINTS, *train_tiny.FILES)}
    for name, target in links.items():
        (home / "run" / name).symlink_to(target)
    shutil.copytree(finished_run / "ar", home / "teacher")
    for flags in ([], ["--resume"]):
        assert train("--distill_steps=1", "--out=~/run", *flags) == 0
        assert all((home / "run" / name).is_symlink() for name in links)
        assert {path.name for path in disk.iterdir()} >= set(links)
        assert all((disk / name / "model.safetensors").exists() for name in train_tiny.CHECKPOINTS)
    assert train("--distill_steps=1", "--out=~/other", "--init=~/teacher") == 0
    assert (home / "other/opdlm").is_dir() and not Path("~").exists()


def test_a_run_deletes_no_folders_of_the_user(finished_run):
    shutil.copytree(finished_run, "run")
    files = [Path("run", name, "text") for name in ("notes", "run.lock.old", "state.safetensors.new")]
    for file in files:
        file.parent.mkdir()
        file.write_text("")
    assert train("--distill_steps=1", "--out=run") == 0
    assert all(file.exists() for file in files)


# updates without a masked token -----------------------------------------------------------------------

def test_a_part_without_a_masked_token_counts_nothing(monkeypatch):
    """The first update, a warm-up, has masks; the next two have none; of the last, one part of two has."""
    real = opdlm.random_mask
    calls = []

    def mask_some(order, response_mask, u, block):
        calls.append(0)
        return real(order, response_mask, u, block) & (len(calls) == 6)
    monkeypatch.setitem(opdlm.STATES, "random", mask_some)
    flags = ("--preset=sdar", "--grad_accum=2", "--distill_steps=4", "--out=run")
    assert train(*flags) == 0
    text = Path("run/log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    records = steps("run", "distil")
    assert [record["kl"] > 0 for record in records] == [True, False, False, True]
    for record in records:
        assert (record["loss_positions"] > 0) == (record["kl"] > 0)
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float))


@pytest.mark.parametrize("kl", [{}, chunked_kl("full", "teacher", 11), chunked_kl("topk:3", "teacher", 11)])
def test_a_text_without_a_masked_token_or_a_response(kl, tiny):
    net = tiny()
    layout = Layout(4, 1, 1)
    recipe = opdlm.Recipe(opdlm.data_text, lambda order, *_: order > 99, opdlm.teacher_probs,
                          opdlm.mean_of_masked, layout, eot=10)
    recipe = dataclasses.replace(recipe, **kl)
    tokens = torch.randint(0, 10, (2, 14), generator=torch.Generator().manual_seed(0))
    no_cost = torch.zeros(2, dtype=torch.long)
    for num_response in (5, 0):
        position = torch.arange(14).expand(2, 14)
        response_mask = (position >= 3) & (position < 3 + num_response)
        text = opdlm.Rollout(tokens, torch.full_like(tokens, -1), response_mask, no_cost, no_cost)
        text = opdlm.take_rows(text, slice(0, 2), 3, 4)
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        u = torch.zeros(2, text.tokens.size(1), 2)
        record = opdlm.train_step(net, net, text, 3, u, recipe, optimizer)
        assert record["kl"] == record["text_nats"] == record["loss"] == record["masked"] == 0
        assert record["tokens"] == 2 * num_response


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
