"""From nothing, or a checkpoint, to a converted, compared and sampled diffusion language model, in one command.

    python train_tiny.py                                   TinyStories; without a network, the embedded story world
    python train_tiny.py --data=toy                        the story world: every story can be checked by rule
    python train_tiny.py --data=stories.txt                any UTF-8 text, stories apart by <|endoftext|>
    python train_tiny.py --preset=paper                    the paper's choices instead of ours

In order: data, AR pretraining, conversion, on-policy self-distillation, evaluation. What is left behind in --out: ar/ and opdlm/
(checkpoints), log.jsonl, summary.json, curves.png, states.png.
"""
import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import opdlm
from data import tinystories, tokenizer, toy
from model import hub
from model import reveal as rules
from model.dist import Log, device_named, facts, load_state, save_state, writable
from model.gpt import GPT, GPTConfig
from model.masks import ALIGN, AR, Layout
from model.muon import Muon
from report import cli, curves, measure, trace
from report.cli import option


@dataclass
class Options:
    data: str | None = option(None, "tinystories, tinystories-full, toy, or a UTF-8 text file; none: tinystories, or toy offline")
    val_data: str | None = option(None, "held-out text file; none: every 20th story of --data")
    init: str = option("scratch", "scratch: pretrain an AR model; FOLDER: take the AR checkpoint there")
    out: str = option("out/tiny", "folder for checkpoints, log, summary and pictures")
    preset: str | None = option(None, "paper: all the paper's choices; flags given beside it win", ("paper",))
    block: int = option(4, "tokens denoised together (paper: 4)")
    align: str = option("ar", "ar: logits at i-1 are about token i, as the AR's; paper: logits at i", tuple(ALIGN))
    context: str = option("causal", "how finished text attends to itself: causal, or block, both ways within blocks (paper)",
                          ("causal", "block"))
    reveal: str = option("leftmost:0.9", "which masks come off: static:COUNT, threshold:P (paper: 0.9), leftmost:P")
    confidence: str = option("largest", "of a slot: largest probability, or that of the drawn token, redrawn each step (paper)",
                             tuple(rules.CONFIDENCE))
    text: str = option("student", "who wrote the text to learn from (paper: student)", tuple(opdlm.TEXTS))
    states: str = option("visited", "half-written states to learn on (paper: visited)", tuple(opdlm.STATES))
    target: str = option("teacher", "what should stand under a mask: the teacher's distribution (paper), or the text", tuple(opdlm.TARGETS))
    weight: str = option("mean", "of a masked token's loss: the row's mean (paper), or 1/t (BD3LM, SDAR)", tuple(opdlm.WEIGHTS))
    updates: int = option(1, "updates per rollout (paper: 16)")
    ramp: int = option(0, "updates over which the response grows to its full length (paper: 1600)")
    schedule: str = option("linear", "of the learning rate: linear to 0 over the second half, or cosine to a tenth (paper)",
                           ("linear", "cosine"))
    optimizer: str = option("muon", "muon on the blocks' matrices, or adamw everywhere (paper)", ("muon", "adamw"))
    pretrain_steps: int | None = option(None, "updates of AR pretraining; none: 240 on toy, 600 on text, 0 with --init")
    distill_steps: int | None = option(None, "updates of distillation; none: 80 on toy, 120 on text")
    batch: int = option(32, "rows of one distillation update")
    lr: float | None = option(None, "peak learning rate of distillation; none: 0.01 with muon, 0.001 with adamw")
    layers: int | None = option(None, "blocks of the network; none: 4 on toy, 6 on text")
    width: int | None = option(None, "channels; none: 128 on toy, 192 on text")
    length: int | None = option(None, "positions of the network, tokens; none: 96 on toy, 256 on text")
    vocab: int = option(2048, "ids of the BPE learned from a text")
    seed: int = option(0, "of everything that is drawn")
    device: str = option("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"))
    compile: bool = option(False, "torch.compile the blocks")
    resume: bool = option(False, "go on to --distill_steps from where the run in --out stopped")


# The paper's choices (arXiv 2606.06712, sections 4 and B). Its release differs from it in places: the length ramp there is a cosine
# over 100 rollouts, ours too, where the paper says linear over 10; it leaves the end-of-text itself out of the loss, we keep it in;
# at 4B and 8B it sums the KL over the teacher's 16 likeliest tokens, here it is the full one. Learning rates are for its sizes,
# 1e-5, and are not part of the preset.
PAPER = {"block": 4, "align": "paper", "context": "block", "reveal": "threshold:0.9", "confidence": "drawn", "text": "student",
         "states": "visited", "target": "teacher", "weight": "mean", "updates": 16, "ramp": 1600, "schedule": "cosine",
         "optimizer": "adamw"}
SAVE_EVERY, LOOK_EVERY = 20, 20     # updates
SIZES = {"toy": {"pretrain_steps": 240, "distill_steps": 80, "layers": 4, "width": 128, "length": 96},
         "text": {"pretrain_steps": 600, "distill_steps": 120, "layers": 6, "width": 192, "length": 256}}


def settled(options: Options, corpus) -> Options:
    """The options with their open ones filled in."""
    sizes = {**SIZES["toy" if corpus.name == "toy" else "text"], "data": options.data or corpus.name}
    if options.init != "scratch":
        config = hub.read_config(options.init)
        sizes |= {"pretrain_steps": 0, "layers": config["layers"], "width": config["width"], "length": config["context"]}
    options = replace(options, **{name: value for name, value in sizes.items() if getattr(options, name) is None})
    if options.block > options.length - 16:
        raise ValueError(f"--block={options.block} does not fit behind a prompt of 16 in {options.length} positions: shorten it")
    return options


# 1. data --------------------------------------------------------------------------------------------------------------

def open_data(options: Options) -> tinystories.Corpus:
    """The corpus; without --data the real text, or, where there is no network, the embedded world."""
    own = None if options.init == "scratch" else tokenizer.load(options.init)
    folder = Path("out/data")
    if options.data == "toy":
        return toy_corpus(own)
    try:
        return tinystories.load(options.data or "tinystories", options.val_data, options.vocab, folder, own)
    except tinystories.NoNetwork:
        if options.data:
            raise
        print("no network, so no TinyStories: taking the embedded story world (--data=toy)")
        return toy_corpus(own)


def toy_corpus(own=None, stories: int = 30_000) -> tinystories.Corpus:
    """Stories 0, 1, 2, ... of the world to train on, and others held out."""
    words = own or tokenizer.word_level([w for word in toy.words() for w in {word, " " + word if word.isalpha() else word}])
    def stream(seeds):
        ids = words.encode_batch([toy.story(seed) for seed in seeds])
        return np.array([i for story in ids for i in (words.eot, *story)] + [words.eot], dtype=np.uint16)
    return tinystories.Corpus(stream(range(stories)), stream(range(10 ** 9, 10 ** 9 + 1000)), words, "toy")


def windows(stream: np.ndarray, starts: np.ndarray, numbers, length: int, seed: int) -> torch.Tensor:
    """(B, length): for each number, a window of the stream that begins with a story drawn by (seed, number)."""
    fit = starts[:max(1, np.searchsorted(starts, len(stream) - length, "right"))]
    picks = opdlm.uniforms(seed, 4, numbers, (1,))[:, 0].double().numpy() * len(fit)
    rows = [stream[fit[int(pick)]:][:length] for pick in picks]
    return measure.padded([torch.from_numpy(row.astype(np.int64)) for row in rows], int(stream[0]))


# 2. the AR model ------------------------------------------------------------------------------------------------------

def pretrain(net: GPT, corpus, options: Options, device, log) -> None:
    """Next-token prediction, in full. A window holds several stories: each sees itself alone and counts its own positions."""
    T, eot, rows = options.length, corpus.tokenizer.eot, max(1, 8192 // options.length)
    starts, optimizer = tinystories.stories(corpus.train, eot), Muon(net)
    rate = rates(optimizer, SHAPES["linear"], options.pretrain_steps)
    for step in range(options.pretrain_steps):
        begun = time.perf_counter()
        window = windows(corpus.train, starts, range(step * rows, (step + 1) * rows), T + 1, options.seed).to(device)
        tokens, following = window[:, :-1], window[:, 1:]                               # (B, T)
        place = torch.arange(T, device=device)
        begin = torch.where(tokens == eot, place, 0).cummax(1).values                   # (B, T) where each story begins
        mask = (begin[:, :, None] == begin[:, None, :]) & (place[:, None] >= place)     # (B, T, T)
        loss = F.cross_entropy(net(tokens, mask[:, None], place - begin), following.flatten())
        rate(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seconds, count = time.perf_counter() - begun, tokens.numel()
        work = 3 * count * (measure.body_flops(net.config, (place - begin).float().mean().item() + 1)
                            + measure.head_flops(net.config))
        log.step({"phase": "pretrain", "step": step + 1, "tokens": (step + 1) * count, "loss": loss.item(),
                  "seconds": seconds, "flops": work}, options.pretrain_steps,
                 f"loss {loss.item():.3f} nats | {count / seconds / 1e3:.1f}k tok/s | {seconds * 1e3:.0f} ms")


SHAPES = {"linear": lambda done: min(1.0, 2 * (1 - done)), "cosine": lambda done: 0.55 + 0.45 * math.cos(math.pi * done)}


def rates(optimizer, shape, steps: int, warmup: int = 10):
    """A function of the step that sets the learning rates: a linear warm-up, then `shape` of the share of steps done."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    def set_rates(step):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * min(1.0, (step + 1) / warmup) * shape(step / steps)
    return set_rates


def ar_model(options: Options, corpus, device, log) -> GPT:
    """The teacher: the one of --init, the one that a former run with these settings left in --out, or a new one."""
    if options.init != "scratch":
        return hub.load(options.init)[0].to(device)
    settings = {name: getattr(options, name) for name in ("data", "pretrain_steps", "layers", "width", "length", "seed")}
    settings |= {"vocab": corpus.tokenizer.vocab_size, "tokens": len(corpus.train)}
    folder = Path(options.out, "ar")
    if (folder / "config.json").exists() and hub.read_config(folder).get("trained") == settings:
        print(f"the AR model in {folder} was trained with these settings: it is used again")
        return hub.load(folder)[0].to(device)
    config = GPTConfig(corpus.tokenizer.vocab_size, options.length, options.layers, options.width // 32, options.width)
    net = GPT(config).init_weights(torch.Generator().manual_seed(options.seed)).init_mask().to(device)
    compiled(net, options.compile)
    pretrain(net, corpus, options, device, log)
    hub.save(folder, net, corpus.tokenizer, trained=settings)
    return net


def compiled(net: GPT, wanted: bool) -> None:
    for block in net.h if wanted else ():
        block.compile()


# 3. the conversion ----------------------------------------------------------------------------------------------------

def recipe_of(options: Options, eot: int) -> opdlm.Recipe:
    """The dials as values."""
    layout = Layout.of(options.block, options.align, options.context)
    return opdlm.Recipe(
        opdlm.TEXTS[options.text], opdlm.STATES[options.states], opdlm.TARGETS[options.target], opdlm.WEIGHTS[options.weight],
        layout, eot, rules.parse(options.reveal), rules.CONFIDENCE[options.confidence],
        layout.block if options.confidence == "drawn" else 1, options.batch, options.updates, 16, options.seed)


def distil(student: GPT, teacher: GPT, corpus, recipe, options: Options, log, look) -> int:
    """Drive `opdlm.train`: data, response length, learning rate, log, the state to resume from. The tokens trained on."""
    starts, total = tinystories.stories(corpus.train, corpus.tokenizer.eot), options.distill_steps
    optimizer = Muon(student, options.lr or 0.01) if options.optimizer == "muon" else \
        torch.optim.AdamW(student.parameters(), options.lr or 1e-3, weight_decay=0.0)
    rate, state = rates(optimizer, SHAPES[options.schedule], total), Path(options.out, "state.safetensors")
    done, tokens = load_state(state, student, optimizer) if options.resume else (0, 0)

    def data(numbers):
        return windows(corpus.train, starts, numbers, options.length, options.seed).to(student.wte.weight.device)

    def length(step):
        grown = 1 - math.cos(math.pi / 2 * min(1, step / options.ramp)) if options.ramp else 1
        return max(recipe.layout.block, round(options.length * grown))

    rate(done)
    begun = time.perf_counter()
    for record in opdlm.train(student, teacher, data, recipe, optimizer, length, range(done, total)):
        step, tokens, seconds = record["step"], tokens + int(record["tokens"]), time.perf_counter() - begun
        work = measure.distill_flops(student.config, record)
        log.step({"phase": "distil", **record, "tokens": tokens, "seconds": seconds, "flops": work}, total,
                 f"kl {record['kl']:.3f} nats | masked {record['masked']:.2f} | len {record['len']:.0f} | "
                 f"gen {record['gen_nats']:.2f} nats | {record['tokens'] / seconds / 1e3:.1f}k tok/s | {seconds * 1e3:.0f} ms")
        if step % SAVE_EVERY == 0 and step % recipe.updates == 0 or step == total:
            save_state(state, student, optimizer, step, tokens)
        if step % LOOK_EVERY == 0:
            look(tokens)
        rate(step)
        begun = time.perf_counter()
    return tokens


# 4. the comparison ----------------------------------------------------------------------------------------------------

ROWS = ["val_nats", "bits_per_byte", "gen_nats", "valid", "distinct2", "entropy", "tok_per_fwd", "positions_per_tok", "tok_s"]


def evaluate(net: GPT, teacher: GPT, layout: Layout, rule, corpus, options: Options, **how) -> tuple[dict, trace.Trace]:
    """All numbers of section 8 of a model, and its first story."""
    tok, starts = corpus.tokenizer, tinystories.stories(corpus.val, corpus.tokenizer.eot)
    check, count = (toy.check, 512) if corpus.name == "toy" else (None, 128)
    stories = measure.held_out(corpus.val, starts, count, options.length)
    texts, seconds = measure.generate(net, stories, layout, rule, tok.eot, options.length, options.seed, **how)
    numbers = measure.likelihood(net, stories, layout, tok) | measure.generated(teacher, texts, seconds, tok, check)
    text, lens = texts[0]
    kept = text.kept[0].cpu()
    return numbers, trace.from_order(tok.decode(text.tokens[0, :lens[0]].tolist()), tok.pieces(text.tokens[0][kept].tolist()),
                                     text.order[0][kept].tolist(), layout.block)


def report(out: Path, numbers: dict, stories: dict) -> None:
    """The table and the stories on the terminal; summary.json, curves.png, states.png in the run's folder."""
    print(f"\n{'':18}" + "".join(f"{name:>10}" for name in numbers))
    for row in ROWS:
        if row in numbers["ar"]:
            print(f"{row:18}" + "".join(f"{column[row]:10.{0 if row == 'tok_s' else 3}f}" for column in numbers.values()))
    colour = trace.wants_colour(sys.stdout)
    for name, story in stories.items():
        print(f"\n{name}: {trace.coloured(story, colour and name != 'ar')}")
    print("\n" + (trace.legend(stories["after"].block) + "\n" if colour else "") + f"left in {out}: ar/ opdlm/ log.jsonl summary.json curves.png states.png")
    (out / "summary.json.new").write_text(json.dumps(numbers, indent=1))
    os.replace(out / "summary.json.new", out / "summary.json")
    curves.draw(out / "log.jsonl", out / "curves.png")
    trace.picture(stories["after"], out / "states.png")


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__, {"paper": PAPER})
    rules.parse(options.reveal), recipe_of(options, 0)                                 # refuse before any work is done
    device, out = device_named(options.device), writable(Path(options.out))
    corpus = open_data(options)
    options = settled(options, corpus)
    header = {"config": asdict(options), **facts(device), "matmul_flops": measure.matmul_rate(device)}
    log = Log(out / "log.jsonl", header, options.resume)
    teacher = ar_model(options, corpus, device, log)
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    recipe = recipe_of(options, corpus.tokenizer.eot)
    how = {"confidence": recipe.confidence, "redraws": recipe.redraws}
    numbers, stories = {}, {}
    numbers["ar"], stories["ar"] = evaluate(teacher, teacher, AR, rules.parse("static:1"), corpus, options)
    log.write({"phase": "eval", "of": "ar", "tokens": 0, **numbers["ar"]})
    numbers["before"], stories["before"] = evaluate(student, teacher, recipe.layout, recipe.rule, corpus, options, **how)
    log.write({"phase": "eval", "of": "student", "tokens": 0, **numbers["before"]})

    def look(tokens):
        starts = tinystories.stories(corpus.val, corpus.tokenizer.eot)
        few = measure.held_out(corpus.val, starts, 64, options.length)
        log.write({"phase": "eval", "of": "student", "tokens": tokens, **measure.likelihood(student, few, recipe.layout, corpus.tokenizer)})

    tokens = distil(student, teacher, corpus, recipe, options, log, look)
    hub.save(out / "opdlm", student, corpus.tokenizer, recipe.layout, reveal=options.reveal, confidence=options.confidence)
    numbers["after"], stories["after"] = evaluate(student, teacher, recipe.layout, recipe.rule, corpus, options, **how)
    log.write({"phase": "eval", "of": "student", "tokens": tokens, **numbers["after"]})
    numbers["after"]["train_tokens"] = tokens
    report(out, numbers, stories)


if __name__ == "__main__":
    sys.exit(cli.run(main))
