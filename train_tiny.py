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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import opdlm
from data import tokenizer
from data.corpus import Corpus, open_corpus, windows
from model import dist, grpo, hub
from model import reveal as rules
from model.confidence import largest
from model.gpt import GPT, GPTConfig, checkpointed
from model.loss import lean
from model.masks import AR, Layout
from model.muon import Muon, optimizer_named, ramp, schedule
from model.state import begin_states, found, load_state, save_state, writable
from report import cli, measure, policy, trace
from report.options import MDLM, PAPER, PRESETS, Options, settled
from report.publish import Comparison, watched

__all__ = ["MDLM", "PAPER", "Options", "settled"]       # of the command line, which stands in report/options.py


STATE = "state.safetensors"     # what a conversion needs to go on


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
                        share=dist.share, passes=options.passes, updates=options.updates,
                        prompt=options.longest_prompt, seed=options.seed, clean_weight=options.clean_weight, show=show)
    return replace(made, **lean(options.kl, options.target, vocab))


def distil(student, teacher, corpus: Corpus, recipe: opdlm.Recipe, options: Options, optimizer, done: int = 0):
    """Drive `opdlm.train` from step `done` on: data, lengths, learning rate. Yields each step's record."""
    rate, total = schedule(optimizer, options.lr_schedule, options.distill_steps), options.distill_steps
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
    if options.text != "data" and options.warm_steps >= total and dist.first():
        print(f"--warm_steps={options.warm_steps}: all {total} updates learn from stories, none from the "
              f"{options.text}'s text")
    for record in distil(student, teacher, corpus, recipe, options, optimizer, noted["step"]):
        step, tokens, seconds = record["step"], tokens + record["tokens"], record["seconds"]
        log.step({"phase": "distil", **record, "tokens": tokens}, total,
                 f"kl {record['kl']:.3f} nats | masked {record['masked']:.2f} | len {record['len']:.0f} | "
                 f"text {record['text_nats']:.2f} nats | {record['tokens'] / seconds / 1e3:.1f}k tok/s | "
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


def unmasking(options: Options, device) -> None:
    """--stage=policy: a policy for a student that is there, that of --init or of --out, left in --out/policy."""
    run = hub.fetch(options.out if options.init == "scratch" else options.init)
    folder = run / "opdlm" if (run / "opdlm").is_dir() else run
    student, layout = hub.load(folder)
    if layout is None:
        raise ValueError(f"{folder} holds an AR model: convert it first, without --stage, or name a student")
    corpus = open_corpus(options.data, options.val_data, options.vocab, tokenizer.load(folder))
    teacher = None if corpus.name == "toy" else judge(options.judge, run).to(device)
    length = min(options.length or student.config.context, student.config.context)
    if policy.room(length) < 1:
        raise ValueError(f"--length={length}: a policy learns behind prompts of up to "
                         f"{length - policy.room(length)} tokens: give it more positions")
    whole = layout.block >= length
    expert = rules.parse(options.expert or ("leftmost:0.95" if whole else hub.read_config(folder)["reveal"]))
    if expert.rolls or expert.confidence is not largest:
        raise ValueError(f"--expert={expert} can't be imitated, since it rolls dice or goes by another confidence than "
                         "the largest probability: take leftmost:P, threshold:P, static:COUNT or factor:F")
    how = (grpo.OF_WHOLE_TEXTS if whole else grpo.IN_BLOCKS) | ({"rate": options.lr} if options.lr else {})
    settings = grpo.Settings(policy.room(length), options.alpha, expert=expert, **how)
    updates = options.policy_updates or (330 if whole else 450)
    data = partial(draw, corpus, length=length, seed=options.seed, device=device)
    policy.learn(student.to(device).requires_grad_(False), layout, teacher, corpus, data, settings,
                 (updates // 3, updates * 2 // 3, updates), options.seed, writable(Path(options.out)),
                 asdict(options), options.resume)


def judge(name: str | None, run: Path):
    """The AR model that says what text is worth: the one named, or the run's own."""
    if name is None and not (run / "ar").is_dir():
        raise ValueError(f"{run} has no ar folder, and --stage=policy asks an AR model what text is worth: name "
                         "the one that the student was made of, --judge=NAME")
    return hub.load(hub.ar_folder(name or str(run / "ar")))[0]


# 3. all together ------------------------------------------------------------------------------------------------------

def own_folder(options: Options) -> Path:
    """--out, unless an AR model lies there that is not --init's: it would be taken for this student's teacher."""
    ar = Path(options.out, "ar")
    if options.init != "scratch" and ar.is_dir() and hub.fetch(options.init).resolve() != ar.resolve():
        raise ValueError(f"{ar} is not the AR model of --init={options.init}, and would be taken for this student's "
                         "teacher: name another --out")
    return writable(Path(options.out))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__, PRESETS)
    recipe_of(options, 0)                                             # refuses what can't be, before any work is done
    device = dist.start(options.device)
    if options.stage == "policy":
        return unmasking(options, device)
    own = None if options.init == "scratch" else tokenizer.load(hub.ar_folder(options.init))
    corpus = open_corpus(options.data, options.val_data, options.vocab, own)
    options = settled(options, corpus)
    prompt = watched(options.watch_prompt, corpus.tokenizer, options.length)
    out = own_folder(options)
    if options.resume and not found(out / STATE):
        raise ValueError(f"there is nothing to resume in {out}: it has no {STATE}; run without --resume")
    tok = corpus.tokenizer
    recipe = recipe_of(options, tok.eot, partial(trace.show, tok), tok.vocab_size)
    teacher, untrained = ar_model(options, corpus, device)
    checkpointed(teacher, options.checkpointing)                      # and so its copies
    header = {"config": asdict(options), **measure.facts(device), "matmul_flops": measure.matmul_rate(device),
              "parameters": sum(p.numel() for p in teacher.parameters())}
    log = dist.Log(out / "log.jsonl", header, options.resume)
    if untrained:
        net = dist.place(copy.deepcopy(teacher), options.compile)
        pretrain(net, corpus, options, log)
        teacher.load_state_dict(dist.whole_state(net))
        hub.save(out / "ar", teacher, tok, trained=untrained)
    student = dist.place(copy.deepcopy(teacher).init_mask(), options.compile)
    optimizer = dist.Careful(optimizer_named(options.optimizer, student, options.lr), options.passes)
    teacher = dist.compiled(teacher.requires_grad_(False).to(getattr(torch, options.teacher_dtype)), options.compile)
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
