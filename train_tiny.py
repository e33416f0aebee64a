"""From nothing, or a checkpoint, to a converted, compared and sampled diffusion language model, in one command.

    python train_tiny.py                                TinyStories; without a network, the embedded story world
    python train_tiny.py --data=toy                     the story world: every story can be checked by rule
    python train_tiny.py --data=stories.txt             any UTF-8 text, stories apart by <|endoftext|>
    python train_tiny.py --preset=paper                 the paper's choices instead of ours
    python train_tiny.py --preset=mdlm                  a model that denoises whole texts, from all masks to none

In order: data, the AR model, the conversion, the comparison. Left behind in --out: ar/ and opdlm/ (checkpoints),
log.jsonl, summary.json, curves.png, states.png.
"""
import copy
import time
import zlib
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import opdlm
from data import tokenizer
from data.corpus import Corpus, open_corpus, windows
from model import dist, hub
from model import reveal as rules
from model.gpt import GPT, GPTConfig, checkpointed
from model.loss import VOCAB, lean
from model.masks import ALIGN, AR, Layout
from model.muon import RATES, SHAPES, Muon, optimizer_named, ramp, schedule
from model.state import begin_states, found, load_state, save_state, writable
from report import cli, measure, trace
from report.cli import option
from report.publish import Comparison, watched


@dataclass
class Options:
    data: str | None = option(None, "tinystories, tinystories-full, toy, a UTF-8 text; none: tinystories, toy offline")
    val_data: str | None = option(None, "held-out text; none: every 20th story of --data")
    init: str = option("scratch", "scratch: pretrain an AR model; FOLDER or hf:NAME[@REVISION]: take that checkpoint")
    out: str = option("out/tiny", "folder for checkpoints, log, summary and pictures")
    preset: str | None = option(None, "paper: all the paper's choices; mdlm: masked diffusion of whole texts "
                                "(2406.07524); flags given beside it win", ("paper", "mdlm"))
    block: int = option(4, "tokens denoised together (paper: 4); 0: all of a text")
    align: str = option("ar", "ar: logits at i-1 are about token i, as the AR's; paper: those at i", tuple(ALIGN))
    context: str = option("causal", "finished text sees itself: causal, or in blocks (paper)", ("causal", "block"))
    reveal: str = option("leftmost:0.98", f"which masks come off (paper: threshold:0.9). {rules.ABOUT}")
    confidence: str | None = option(None, "p of a slot (paper: drawn); none: the rule's. "
                                    f"{rules.said(rules.CONFIDENCE)}", tuple(rules.CONFIDENCE))
    text: str = option("student", "who wrote the text to learn from (paper: student)", tuple(opdlm.TEXTS))
    states: str = option("visited", "half-written states to learn on (paper: visited)", tuple(opdlm.STATES))
    target: str = option("teacher", "under a mask: the teacher's view (paper), or the text", tuple(opdlm.TARGETS))
    weight: str = option("first", "of losses: mean over the row (paper), a block's first masked slot counting 8 times, "
                         "or 1/t (BD3LM, SDAR)", tuple(opdlm.WEIGHTS))
    clean_weight: float = option(0.0, "of the same loss of the student as an AR model, which --verifier=self relies on")
    kl: str | None = option(None, "plain: target and logits whole; full: the same in chunks; topk:K: the K likeliest "
                            f"tokens and one bucket; none: full from a vocabulary of {VOCAB} on, else plain")
    teacher: str = option("float32", "numbers that the frozen teacher is made of", ("float32", "bfloat16"))
    checkpointing: bool = option(False, "run blocks twice rather than keep what their backward pass needs: less memory")
    updates: int = option(4, "updates per rollout (paper: 16)")
    ramp: int = option(0, "updates over which the response grows to its full length (paper: 1600)")
    optimizer: str = option("muon", "muon on the blocks' matrices, or adamw on all (paper)", ("muon", "adamw"))
    schedule: str = option("linear", "of distillation's rate: linear to 0, or cosine to a tenth (paper)", tuple(SHAPES))
    pretrain_steps: int | None = option(None, "updates of AR pretraining; none: 480 on toy, 640 on text, 0 with --init")
    rows: int | None = option(None, "windows of one update of AR pretraining; none: 32 on toy, 16 on text")
    distill_steps: int | None = option(None, "updates of distillation; none: 580 on toy, 246 on text")
    warm_steps: int | None = option(None, "the first of these learn on training stories, the left part of each block "
                                    "shown (paper: 0); none: 540 on toy, 230 on text")
    batch: int = option(16, "rows of one distillation update, in all processes (paper: 8)")
    passes: int = option(1, "parts of an update that go through the network one after the other: less memory")
    lr: float | None = option(None, "peak rate of distillation; none: 0.02 (muon), 0.001 (adamw), with --init a tenth")
    layers: int = option(4, "blocks of the network")
    width: int | None = option(None, "channels, a multiple of 64; none: 128 on toy, 192 on text")
    length: int | None = option(None, "positions of the network, tokens; none: 96 on toy, 256 on text")
    vocab: int = option(2048, "ids of the BPE that is learned from a text")
    seed: int = option(0, "of everything that is drawn")
    device: str = option("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"))
    compile: bool = option(False, "torch.compile the blocks")
    every: int = option(40, "updates between two saves, and between two looks at the held-out text")
    watch_prompt: str | None = option(None, "a text to go on from at each of these looks, for people to read")
    resume: bool = option(False, "go on to --distill_steps from where the run in --out stopped")


# All of the paper's choices (arXiv 2606.06712, sections 4 and B) but the learning rate, 1e-5, which is for its sizes.
# Where its release differs: the length ramp is a cosine over 100 rollouts, as here, the paper says linear over 10; the
# release leaves the end-of-text itself out of the loss, the paper and we do not; at 4B and 8B it sums the KL over the
# teacher's 16 likeliest tokens, the paper and we over all; its sampler and its trainer part a text into other blocks.
PAPER = {"block": 4, "align": "paper", "context": "block", "reveal": "threshold:0.9", "confidence": "drawn", "batch": 8,
         "text": "student", "states": "visited", "target": "teacher", "weight": "mean", "updates": 16, "ramp": 1600,
         "warm_steps": 0, "optimizer": "adamw", "schedule": "cosine"}
MDLM = {"block": 0, "align": "paper", "context": "block", "reveal": "ancestral:128", "text": "data", "states": "random",
        "target": "onehot", "weight": "1/t", "warm_steps": 0, "every": 1000}
SIZES = {
    "toy": dict(pretrain_steps=480, rows=32, distill_steps=580, warm_steps=540, width=128, length=96),
    "text": dict(pretrain_steps=640, rows=16, distill_steps=246, warm_steps=230, width=192, length=256)}
STATE = "state.safetensors"     # what a conversion needs to go on


def settled(options: Options, corpus: Corpus) -> Options:
    """The options with the open ones filled in, checked against each other."""
    sizes = SIZES["toy" if corpus.name == "toy" else "text"] | {"data": corpus.name, "lr": RATES[options.optimizer]}
    if options.init != "scratch":
        options = replace(options, **hub.fitted(options.init, options.length, sizes["length"]))
        sizes["lr"] = RATES[options.optimizer] / 10             # what was trained elsewhere bears less: README, Limits
    options = replace(options, **{name: value for name, value in sizes.items() if getattr(options, name) is None})
    options = replace(options, block=options.block or options.length)
    if not (1 <= options.block <= options.length - 16 or options.block == options.length):
        raise ValueError(f"--block={options.block} has no room behind a prompt of 16 in {options.length} positions: "
                         f"take 1 to {options.length - 16}, or 0 for all of a text")
    least = (options.layers, options.batch, options.passes, options.updates, options.every, options.distill_steps)
    if options.init == "scratch" and options.width % 64 or min(least) < 1:
        raise ValueError("--width is a multiple of 64; --layers, --batch, --passes, --updates, --every and "
                         "--distill_steps are at least 1")
    if options.batch % (options.passes * dist.count()) or options.rows % dist.count():
        raise ValueError(f"--batch={options.batch}, --rows={options.rows} can't be parted evenly in {dist.count()} "
                         f"processes and --passes={options.passes}: make --batch a multiple of both, --rows of the one")
    return options


# 1. the AR model ------------------------------------------------------------------------------------------------------

def ar_model(options: Options, corpus: Corpus, device) -> tuple[GPT, dict | None]:
    """The teacher: that of --init, or one that a former run with the same settings left in --out; or a new network, and
    the settings under which it is still to be trained."""
    if options.init != "scratch":
        return hub.load(options.init)[0].to(device), None
    names = ("data", "pretrain_steps", "rows", "layers", "width", "length", "seed")
    settings = {name: getattr(options, name) for name in names} | {
        "tokens": len(corpus.train), "tokenizer": zlib.crc32(corpus.tokenizer.to_json().encode())}
    folder = Path(options.out, "ar")
    if (folder / "config.json").exists() and hub.read_config(folder).get("trained") == settings:
        print(f"the AR model in {folder} was trained with these settings: it is used again")
        return hub.load(folder)[0].to(device), None
    config = GPTConfig(corpus.tokenizer.vocab_size, options.length, options.layers, options.width // 64, options.width)
    return GPT(config).init_weights(torch.Generator().manual_seed(options.seed)).to(device), settings


def pretrain(net: GPT, corpus: Corpus, options: Options, log: dist.Log) -> None:
    """Next-token prediction, in full. A window holds several stories: each sees itself alone, from position 0."""
    T, eot, rows = options.length, corpus.tokenizer.eot, options.rows
    device, optimizer = net.wte.weight.device, dist.Careful(Muon(net))
    rate = schedule(optimizer, "trapezoid", options.pretrain_steps)
    for step in range(options.pretrain_steps):
        begun = time.perf_counter()
        rate(step)
        window = draw(corpus, dist.share(range(step * rows, (step + 1) * rows)), T + 1, options.seed, device)
        tokens, following = window[:, :-1], window[:, 1:]                               # (B, T)
        mask, position = apart(tokens, eot)
        loss = F.cross_entropy(net(tokens, mask, position), following.flatten(), reduction="sum") / (rows * T)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss, keys = sum(dist.from_all(loss.item())), position.float().mean().item() + 1
        work = 3 * rows * T * (measure.body_flops(net.config, keys) + measure.head_flops(net.config))
        seconds, done = time.perf_counter() - begun, {"phase": "pretrain", "step": step + 1}
        log.step({**done, "tokens": (step + 1) * rows * T, "loss": loss, "seconds": seconds, "flops": work},
                 options.pretrain_steps,
                 f"loss {loss:.3f} nats | {rows * T / seconds / 1e3:.1f}k tok/s | {seconds * 1e3:.0f} ms")


def apart(tokens: Tensor, eot: int) -> tuple[Tensor, Tensor]:
    """Mask (B, 1, T, T) and positions (B, T) that keep a window's stories apart; each begins with an end-of-text."""
    place = torch.arange(tokens.size(1), device=tokens.device)
    begin = torch.where(tokens == eot, place, 0).cummax(1).values                       # (B, T) where its story begins
    mask = (begin[:, :, None] == begin[:, None, :]) & (place[:, None] >= place)
    return mask[:, None], place - begin


def draw(corpus: Corpus, numbers: range, length: int, seed: int, device) -> Tensor:
    """(B, length): the windows of training text that belong to these row numbers."""
    u = opdlm.uniforms(seed, opdlm.DATA, numbers, (1,))[:, 0].numpy()
    return torch.from_numpy(windows(corpus.train, corpus.starts, u, length)).to(device)


# 2. the conversion ----------------------------------------------------------------------------------------------------

def recipe_of(options: Options, eot: int, show=repr, vocab: int = 0) -> opdlm.Recipe:
    """The dials as values."""
    layout = Layout.of(options.block, options.align, options.context)
    dials = (opdlm.TEXTS[options.text], opdlm.STATES[options.states], opdlm.TARGETS[options.target],
             opdlm.WEIGHTS[options.weight])
    made = opdlm.Recipe(*dials, layout, eot, rules.parse(options.reveal, options.confidence), batch=options.batch,
                        share=dist.share, passes=options.passes, updates=options.updates, seed=options.seed,
                        clean=options.clean_weight, show=show)
    return replace(made, **lean(options.kl, options.target, vocab))


def distil(student, teacher, corpus: Corpus, recipe: opdlm.Recipe, options: Options, optimizer, done: int = 0):
    """Drive `opdlm.train` from step `done` on: data, lengths, learning rate. Yields each step's record."""
    rate, total = schedule(optimizer, options.schedule, options.distill_steps), options.distill_steps
    data = partial(draw, corpus, length=options.length, seed=options.seed, device=student.wte.weight.device)
    length = ramp(options.block, options.length, options.ramp)
    # a student that can't write yet learns little from its own text: first a stretch of distillation on stories
    warm, turn = replace(recipe, text=opdlm.data_text, states=opdlm.prefix, updates=1), min(options.warm_steps, total)
    rate(done)
    begun = time.perf_counter()
    for dials, steps in (warm, range(done, turn)), (recipe, range(max(done, turn), total)):
        for record in dist.merged(opdlm.train(student, teacher, data, dials, optimizer, length, steps), options.passes):
            record["seconds"] = time.perf_counter() - begun
            yield {**record, "flops": measure.distill_flops(student.config, record)}
            begun = time.perf_counter()
            rate(record["step"])


def convert(student, teacher, corpus, recipe, options: Options, optimizer, log: dist.Log, glance, save) -> int:
    """`distil` with its log, a `glance` at held-out text now and then, and what is saved: the state to resume from, and
    the student that this text was likeliest to. The tokens trained on."""
    state, settings = Path(options.out, STATE), {**asdict(options), "resume": None, "processes": dist.count()}
    noted = load_state(state, student, optimizer, settings) if options.resume else begin_states(state, settings)
    each, total, stop, tokens = recipe.updates, options.distill_steps, dist.Stop(), noted["tokens"]
    for record in distil(student, teacher, corpus, recipe, options, optimizer, noted["step"]):
        step, tokens, seconds = record["step"], tokens + record["tokens"], record["seconds"]
        log.step({"phase": "distil", **record, "tokens": tokens}, total,
                 f"kl {record['kl']:.3f} nats | masked {record['masked']:.2f} | len {record['len']:.0f} | "
                 f"gen {record['gen_nats']:.2f} nats | {record['tokens'] / seconds / 1e3:.1f}k tok/s | "
                 f"{seconds * 1e3:.0f} ms")
        own = step - options.warm_steps
        amid, due = own > 0 and own % each, own % (-(-options.every // each) * each) == 0
        if step == total or not amid and (stop or due):                                 # never amid a rollout's updates
            noted |= {"step": step, "tokens": tokens}
            if not stop and (nats := glance(student, recipe.layout, tokens)) < noted["best"]:
                noted["best"] = nats
                save("best")
            save_state(state, student, optimizer, noted)
            if stop:
                dist.end(143)
    stop.over()
    return tokens


# 3. all together ------------------------------------------------------------------------------------------------------

def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__, {"paper": PAPER, "mdlm": MDLM})
    recipe_of(options, 0)                                             # refuses what can't be, before any work is done
    device = dist.start(options.device)
    own = None if options.init == "scratch" else tokenizer.load(hub.ar_folder(options.init))
    corpus = open_corpus(options.data, options.val_data, options.vocab, own)
    options = settled(options, corpus)
    prompt = watched(options.watch_prompt, corpus.tokenizer, options.length)
    out = writable(Path(options.out))
    if options.resume and not found(out / STATE):
        raise ValueError(f"there is nothing to resume in {out}: it has no {STATE}; run without --resume")
    tok = corpus.tokenizer
    recipe = recipe_of(options, tok.eot, partial(trace.show, tok), tok.vocab_size)
    teacher, untrained = ar_model(options, corpus, device)
    checkpointed(teacher, options.checkpointing)                      # and so its copies
    header = {"config": asdict(options), **dist.facts(device), "matmul_flops": measure.matmul_rate(device),
              "parameters": sum(p.numel() for p in teacher.parameters())}
    log = dist.Log(out / "log.jsonl", header, options.resume)
    if untrained:
        net = dist.place(copy.deepcopy(teacher), options.compile)
        pretrain(net, corpus, options, log)
        teacher.load_state_dict(dist.whole_state(net))
        hub.save(out / "ar", teacher, tok, trained=untrained)
    student = dist.place(copy.deepcopy(teacher).init_mask(), options.compile)
    optimizer = dist.Careful(optimizer_named(options.optimizer, student, options.lr), options.passes)
    teacher = dist.compiled(teacher.requires_grad_(False).to(getattr(torch, options.teacher)), options.compile)
    compared = Comparison(teacher, corpus, options.length, options.seed, log, prompt)
    compared.look("ar", teacher, AR, rules.parse("static:1"), options.pretrain_steps * options.rows * options.length)
    compared.look("before", student, recipe.layout, recipe.rule, 0)

    def save(name):
        hub.save(out / name, student, tok, recipe.layout, reveal=str(recipe.rule),
                 confidence=recipe.rule.confidence.__name__)

    glance = partial(compared.glance, rule=recipe.rule)
    tokens = convert(student, teacher, corpus, recipe, options, optimizer, log, glance, save)
    save("opdlm")
    compared.look("after", student, recipe.layout, recipe.rule, tokens)
    if dist.first():
        compared.publish(out)


if __name__ == "__main__":
    dist.end(cli.run(main))
