"""The command line of train_tiny.py: flags and their defaults, the presets, the sizes that depend on the data."""
from dataclasses import dataclass, replace

import opdlm
from data.corpus import Corpus
from model import dist, hub
from model import reveal as rules
from model.loss import VOCAB
from model.masks import ALIGN
from model.muon import RATES, SHAPES
from report.cli import option


@dataclass
class Options:
    data: str | None = option(None, "tinystories, tinystories-full, toy, a UTF-8 text; none: tinystories, toy offline")
    val_data: str | None = option(None, "held-out text; none: every 20th story of --data")
    init: str = option("scratch", "scratch: pretrain an AR model; FOLDER or hf:NAME[@REVISION]: take that checkpoint")
    out: str = option("out/tiny", "folder for checkpoints, log, summary and pictures")
    stage: str = option("convert", "convert; policy: learn, for the student in --out, which masks come off", ("convert",
                        "policy"))
    preset: str | None = option(None, "paper: all the paper's choices; mdlm: masked diffusion of whole texts "
                                "(2406.07524); else a method's dials, without --warm_steps; flags given beside it win",
                                ("paper", "mdlm", *opdlm.METHODS))
    block: int = option(4, "tokens denoised together (paper: 4); 0: all of a text")
    align: str = option("ar", "ar: logits at i-1 are about token i, as the AR's; paper: those at i, by which a "
                        "student learns far more slowly (README)", tuple(ALIGN))
    context: str = option("causal", "finished text sees itself: causal, or in blocks (paper): 0.78 and 0.73 nats*",
                          ("causal", "block"))
    reveal: str = option("leftmost:0.98", "which masks come off (paper: threshold:0.9); written by leftmost 2.23, by "
                         f"threshold 2.81 nats*. {rules.ABOUT}")
    confidence: str | None = option(None, "p of a slot (paper: drawn); none: the rule's. "
                                    f"{rules.said(rules.CONFIDENCE)}", tuple(rules.CONFIDENCE))
    text: str = option("student", "who wrote the text to learn from (paper: student)", tuple(opdlm.TEXTS))
    states: str = option("visited", "half-written states to learn on (paper: visited): visited 2.23, random 2.32, "
                         "prefix 2.12 nats*", tuple(opdlm.STATES))
    target: str = option("teacher", "under a mask: the teacher's view (paper), or the text", tuple(opdlm.TARGETS))
    weight: str = option("first", "of losses: mean over the row (paper), a block's first masked slot counting 8 times, "
                         "or 1/t (BD3LM, SDAR): 0.73, 0.78, 0.57 nats*, at 1 token a forward 0.48, 0.32, 0.39",
                         tuple(opdlm.WEIGHTS))
    clean_weight: float = option(0.0, "of the same loss of the student as an AR model, which --verifier=self relies on")
    kl: str | None = option(None, "plain: target and logits whole; full: the same in chunks; topk:K: the K likeliest "
                            f"tokens and one bucket; none: full from a vocabulary of {VOCAB} on, else plain")
    teacher_dtype: str = option("float32", "numbers that the frozen teacher is made of", ("float32", "bfloat16"))
    checkpointing: bool = option(False, "run blocks twice rather than keep what their backward pass needs: less memory")
    updates: int = option(1, "updates per rollout (paper: 16): by 1 1.88, by 4 2.23, by 16 2.93 nats*")
    ramp: int = option(0, "updates over which the response grows to its full length (paper: 160, its "
                       "release 1600)")
    optimizer: str = option("muon", "muon on the blocks' matrices, or adamw on all (paper)", ("muon", "adamw"))
    lr_schedule: str = option("linear", "of distillation's rate: linear to 0, trapezoid, that in its second half "
                           "only, cosine to a tenth (paper), constant", tuple(SHAPES))
    pretrain_steps: int | None = option(None, "updates of AR pretraining; none: 480 on toy, 640 on text, 0 with --init")
    rows: int | None = option(None, "windows of one update of AR pretraining; none: 32 on toy, 16 on text")
    distill_steps: int | None = option(None, "updates of distillation; none: 580 on toy, 246 on text")
    warm_steps: int | None = option(None, "the first of these learn on training stories, the left part of each block "
                                    "shown (paper: 0); none: 540 on toy, 230 on text. All 0.78, half 1.83, none 2.23 "
                                    "nats* (of text at 1.5 tokens a forward, story world: experiments/ablations.py)")
    batch: int = option(16, "rows of one distillation update, in all processes (paper: 8)")
    passes: int = option(1, "parts of an update that go through the network one after the other: less memory")
    lr: float | None = option(None, "peak rate of distillation; none: 0.02 (muon), 0.001 (adamw), with --init a tenth")
    layers: int = option(4, "blocks of the network")
    width: int | None = option(None, "channels, a multiple of 64; none: 128 on toy, 192 on text")
    length: int | None = option(None, "positions of the network, tokens; none: 96 on toy, 256 on text")
    longest_prompt: int = option(16, "tokens; a batch goes on from prompts of 1 to so many (mdlm: 1, from nothing)")
    vocab: int = option(2048, "ids of the BPE that is learned from a text")
    seed: int = option(0, "of everything that is drawn")
    alpha: float = option(1.0, "of --stage=policy: how much speed counts beside quality (paper: 10 to 0)")
    expert: str | None = option(None, "of --stage=policy: a rule that a third of the updates imitate; none: the "
                                "student's own; of whole texts leftmost:0.95, which goes on to write along")
    judge: str | None = option(None, "of --stage=policy, on text: the AR model that says what it is worth; none: the "
                               "run's own ar folder")
    policy_updates: int | None = option(None, "of --stage=policy, a third of them imitating, a third at alpha 10; 8 "
                                        "texts of each of 8 prompts, of whole ones 4; none: 450, of whole texts 330")
    device: str = option("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"))
    compile: bool = option(False, "torch.compile the blocks")
    every: int = option(40, "updates between two saves, and between two looks at the held-out text")
    watch_prompt: str | None = option(None, "a text to go on from at each of these looks, for people to read")
    resume: bool = option(False, "go on to --distill_steps from where the run in --out stopped")


# All of the paper's choices (arXiv 2606.06712, sections 4 and B) but the learning rate, 1e-5, which is for its sizes.
# Where its release differs: the length ramp is a cosine, as here, over 100 rollouts, the paper says linear over 10; the
# release leaves the end-of-text itself out of the loss, the paper and we do not; at 4B and 8B it sums the KL over the
# teacher's 16 likeliest tokens, the paper and we over all; its sampler and its trainer part a text into other blocks.
PAPER = {"block": 4, "align": "paper", "context": "block", "reveal": "threshold:0.9", "confidence": "drawn", "batch": 8,
         "text": "student", "states": "visited", "target": "teacher", "weight": "mean", "updates": 16, "ramp": 160,
         "warm_steps": 0, "optimizer": "adamw", "lr_schedule": "cosine"}
MDLM = {"block": 0, "align": "paper", "context": "block", "reveal": "ancestral:128", "text": "data", "states": "random",
        "target": "onehot", "weight": "1/t", "warm_steps": 0, "every": 1000, "longest_prompt": 1}
PRESETS = {"paper": PAPER, "mdlm": MDLM} | {
    name: dict(zip(("text", "states", "target", "weight"), dials)) | {"warm_steps": 0}
    for name, dials in opdlm.METHODS.items()}
SIZES = {
    "toy": dict(pretrain_steps=480, rows=32, distill_steps=580, warm_steps=540, width=128, length=96),
    "text": dict(pretrain_steps=640, rows=16, distill_steps=246, warm_steps=230, width=192, length=256)}


def settled(options: Options, corpus: Corpus) -> Options:
    """The options with the open ones filled in, checked against each other."""
    sizes = SIZES["toy" if corpus.name == "toy" else "text"] | {"data": corpus.name, "lr": RATES[options.optimizer]}
    if options.init != "scratch":
        options = replace(options, **hub.fitted(options.init, options.length, sizes["length"]))
        sizes["lr"] = RATES[options.optimizer] / 10             # what was trained elsewhere bears less: README, Limits
    options = replace(options, **{name: value for name, value in sizes.items() if getattr(options, name) is None})
    options = replace(options, block=options.block or options.length)
    room = options.length - options.longest_prompt
    if not (1 <= options.block <= room or options.block == options.length and room > 0):
        raise ValueError(f"--block={options.block} has no room behind a prompt of {options.longest_prompt} in "
                         f"{options.length} positions: take 1 to {room}, or 0 for all of a text")
    least = (options.longest_prompt, options.layers, options.batch, options.passes, options.updates, options.every,
             options.distill_steps)
    if options.init == "scratch" and options.width % 64 or min(least) < 1:
        raise ValueError("--width is a multiple of 64; --longest_prompt, --layers, --batch, --passes, --updates, "
                         "--every and --distill_steps are at least 1")
    if options.batch % (options.passes * dist.count()) or options.rows % dist.count():
        raise ValueError(f"--batch={options.batch}, --rows={options.rows} can't be parted evenly in {dist.count()} "
                         f"processes and --passes={options.passes}: make --batch a multiple of both, --rows of the one")
    return options
