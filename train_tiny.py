"""Train, convert, compare and sample a diffusion language model in one command.

    python train_tiny.py                      TinyStories (without a network: the synthetic story world)
    python train_tiny.py --data=toy           the story world, whose stories a program can check
    python train_tiny.py --data=stories.txt   your own UTF-8 text, <|endoftext|> between texts
    python train_tiny.py --init=hf:gpt2 --data=stories.txt      convert a checkpoint, no pretraining
    python train_tiny.py --preset=paper       the paper's choices instead of ours

Phases: data, AR pretraining, evaluation, with --source=student a warm start on training text (off-policy),
on-policy distillation, evaluation, report.
Results in --out: ar/, opdlm/, best/ (checkpoints), log.jsonl, summary.json, curves.png, states.png.
"""
import copy
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import opdlm
from data import tokenizer
from data.corpus import Corpus, open_corpus
from decoding import reveal
from decoding.sampling import SamplingConfig
from model import checkpoint, lora
from model.gpt import GPT, GPTConfig, checkpointed
from model.masks import AR, Layout
from report import metrics, trace
from report.compare import Evaluator, affordable_size, sample_prompt_ids
from report.generate import PROMPT_LENGTHS, can_verify_itself
from training import cli, dist
from training.chunked_kl import LARGE_VOCAB, chunked_kl
from training.flags import Range, check_ranges, check_utf8, expand_home
from training.lock import FolderLock
from training.log import Log
from training.optim import LEARNING_RATES, Muon, SkipNonFinite, length_schedule, lr_schedule, make_optimizer
from training.resume import RunState, SigtermFlag, Terminated, check_results, latest_state

STATE = "state.safetensors"     # in --out: everything that --resume needs
CHECKPOINTS = ("ar", "opdlm", "best")       # the other results in --out
FILES = ("log.jsonl", "summary.json", "curves.png", "states.png", STATE)


Source = Literal["student", "student-ar", "teacher", "data"]
Weight = Literal["mean", "first", "1/t"]
Target = Literal["teacher", "sampled", "onehot"]
CleanText = Literal["own", "data"]
Preset = Literal["paper", "mdlm", "opdlm", "opdlm-off", "kd", "sft", "sdar"]


@dataclass
class Config:
    # Data and output
    data: str | None = None     # tinystories, tinystories-full, toy, file or folder; default: tinystories
    val_data: str | None = None     # held-out text file; default: every 20th text of --data
    vocab: int = 2048           # ids of the BPE learned from a text
    init: str = "scratch"       # scratch: pretrain an AR model; FOLDER or hf:NAME[@REVISION]: load it
    out: str = "out/tiny"       # folder for checkpoints, log, summary and pictures
    resume: bool = False        # continue the run in --out, up to --distill_steps
    preset: Preset | None = None    # named settings (docs/method.md); flags given beside it win
    # Method
    block: int = 4              # tokens denoised together; 0: the whole text
    align: Literal["ar", "paper"] = "ar"    # the logits that predict token i: at i - 1 (ar) or at i (paper)
    context: Literal["causal", "block"] = "causal"      # how finished text attends to itself
    reveal: str = "leftmost:0.98"   # reveal rule, NAME:ARGUMENT (docs/decoding.md)
    confidence: Literal["largest", "drawn", "margin", "entropy"] | None = None  # default: the rule's own
    source: Source | None = None    # whose text is learned from; default: student on toy, student-ar on text
    temperature: float | None = None    # of text that is generated; default: 0.7, student-ar 0
    top_k: int | None = None    # generated text is sampled from the k most likely tokens
    top_p: float | None = None  # generated text is sampled from the fewest tokens with this total probability
    states: Literal["visited", "random", "prefix", "all"] = "visited"  # masked states to learn on
    target: Target | None = None    # what is learned; default: teacher, student-ar sampled (docs/method.md)
    lora: int | None = None     # train an adapter of this rank on the frozen AR model (docs/lora.md)
    weight: Weight | None = None    # of masked positions in the loss; default: first, student-ar mean
    clean_weight: float | None = None   # of the student's loss as an AR model; default: 0, student-ar 2
    clean_text: CleanText | None = None     # that it reads; default: own (of the update), student-ar data
    warm_steps: int | None = None   # first updates, on data; default: 180 on toy, 80 on text, student-ar 0
    updates_per_rollout: int | None = None  # of the same text; default: 1 on toy, 4 on text, student-ar 8
    max_prompt: int = 16        # prompts have 1 to this many tokens
    max_response: int | None = None     # tokens of a text to learn from, after its prompt; default: --length
    # Optimization
    pretrain_steps: int | None = None   # AR updates; default: 480 on toy, 640 on text, 0 with --init
    pretrain_batch: int | None = None   # windows per AR update; default: 32 on toy, 16 on text
    distill_steps: int | None = None    # of distillation; default: 560 on toy, 240 on text, student-ar 480
    batch: int | None = None    # rows per distillation update, over all processes; default: 16, student-ar 8
    grad_accum: int = 1         # gradient accumulation steps per update
    optimizer: Literal["muon", "adamw"] | None = None   # default: muon (for matrices); --lora: adamw
    lr: float | None = None     # peak; default: 0.01 (muon), 0.001 (adamw), --init a tenth, --lora 0.003
    lr_schedule: Literal["linear", "trapezoid", "cosine", "constant"] = "linear"    # of distillation
    length_ramp: int = 0        # updates over which responses grow to full length
    # Model
    layers: int = 4             # transformer blocks
    width: int | None = None    # channels, a multiple of 64; default: 128 on toy, 192 on text
    length: int | None = None   # context, tokens; default: 96 on toy, 256 on text
    # Machine
    seed: int = 0               # random seed of everything
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"      # auto: cuda, else mps, else cpu
    compile: bool = False       # torch.compile the transformer blocks
    checkpointing: bool = False     # recompute activations in the backward pass: less memory
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"   # number format of the frozen teacher
    kl: str | None = None       # plain, full or topk:K; default: full from 16,384 ids on (docs/scaling.md)
    # Evaluation
    eval_every: int = 40        # updates between evaluations, each of which also saves
    eval_texts: int | None = None   # of the closing table; default: 512 on toy, else 128 (with --init fewer)
    eval_tokens: int | None = None  # longest of these texts; default: --length, with --init at most 128
    sample_prompt: str | None = None    # text to continue at each evaluation, for people to read


# The paper's choices (arXiv 2606.06712, sections 4 and B), except its learning rate 1e-5, which suits larger
# models. docs/differences.md lists where the paper and its release differ.
PAPER = {
    "block": 4, "align": "paper", "context": "block", "reveal": "threshold:0.9", "confidence": "drawn",
    "source": "student", "temperature": 1.0, "states": "visited", "target": "teacher", "weight": "mean",
    "warm_steps": 0,
    "updates_per_rollout": 16, "length_ramp": 160, "batch": 8, "optimizer": "adamw", "lr_schedule": "cosine",
}
# Masked diffusion of whole texts (arXiv 2406.07524).
MDLM = {
    "block": 0, "align": "paper", "context": "block", "reveal": "ancestral:128",
    "source": "data", "states": "random", "target": "onehot", "weight": "1/t", "warm_steps": 0,
    "temperature": 1.0, "eval_every": 1000, "max_prompt": 1,
}
DIALS = ("source", "states", "target", "weight")
PRESETS = {"paper": PAPER, "mdlm": MDLM}
for _name, _dials in opdlm.METHODS.items():
    PRESETS[_name] = dict(zip(DIALS, _dials)) | {"warm_steps": 0}

SIZES = {       # defaults that depend on the data
    "toy": {"source": "student", "pretrain_steps": 480, "pretrain_batch": 32, "distill_steps": 560,
            "warm_steps": 180, "updates_per_rollout": 1, "width": 128, "length": 96, "eval_texts": 512},
    "text": {"source": "student-ar", "pretrain_steps": 640, "pretrain_batch": 16, "distill_steps": 240,
             "warm_steps": 80, "updates_per_rollout": 4, "width": 192, "length": 256, "eval_texts": 128},
}

# Defaults that depend on the source. student-ar is for speculative decoding, where the student verifies its
# own drafts. Greedy text is the easiest to draft. A draft is accepted if it is the token that the AR model
# samples, so that token is the target. And the student must stay a good AR model.
BY_SOURCE = {
    "student": {"temperature": 0.7, "target": "teacher", "weight": "first", "clean_weight": 0.0,
                "clean_text": "own", "batch": 16},
    "student-ar": {"temperature": 0.0, "target": "sampled", "weight": "mean", "clean_weight": 2.0,
                   "clean_text": "data", "batch": 8, "distill_steps": 480, "warm_steps": 0,
                   "updates_per_rollout": 8},
}

LORA_RATE = 0.003       # peak learning rate of an adapter, with adamw
STEPS = 10**9           # far above any run
ROWS = 10**6
RANGES = {      # values allowed; --block depends on the length, and --width is a multiple of 64
    "vocab": Range(257, 10**6),         # 256 bytes and the end-of-text
    "clean_weight": Range(0.0),
    "lora": Range(1, 10**4),
    "warm_steps": Range(0, STEPS),
    "updates_per_rollout": Range(1, ROWS),
    "max_prompt": Range(1, ROWS),
    "max_response": Range(1, ROWS),
    "pretrain_steps": Range(0, STEPS),
    "pretrain_batch": Range(1, ROWS),
    "distill_steps": Range(1, STEPS),
    "batch": Range(1, ROWS),
    "grad_accum": Range(1, ROWS),
    "lr": Range(0.0, above=True),
    "length_ramp": Range(0, STEPS),
    "layers": Range(1, 1000),
    "width": Range(64, 64 * 1000),
    "length": Range(PROMPT_LENGTHS + 1, 10**6),     # evaluation: its longest prompt, and a token
    "seed": Range(0, 2**63 - 1),
    "eval_every": Range(1, STEPS),
    "eval_texts": Range(1, ROWS),
    "eval_tokens": Range(PROMPT_LENGTHS + 1, 10**6),
}


# 1. the AR model ----------------------------------------------------------------------------------------

def ar_model(config: Config, corpus: Corpus, device, saved_phase: str | None = None) -> tuple[GPT, bool]:
    """The teacher, and whether it is trained: the model of --init, that of a former run, or a new network.

    `saved_phase` is that of a run to resume: in pretrain the AR model is continued, in distil it must exist.
    """
    if config.init != "scratch":
        dtype = torch.float32
        if config.lora:                                          # no copy of these weights is trained
            dtype = getattr(torch, config.teacher_dtype)
        net, _ = checkpoint.load(config.init, dtype)
        return net.to(device), True
    folder = Path(config.out, "ar")
    changes = ["it does not exist"]
    if (folder / "config.json").exists():
        trained = checkpoint.read_config(folder).get("trained") or {}
        changes = changed_pretraining(trained, pretrain_settings(config, corpus))
    if not changes and saved_phase != "pretrain":
        print(f"using the AR model in {folder}, which was trained with these settings")
        net, _ = checkpoint.load(folder)
        return net.to(device), True
    if saved_phase == "distil":
        raise ValueError(f"cannot resume without {folder}, the AR model of the run: {', '.join(changes)}. "
                         "Restore it from a copy, or start without --resume")
    heads = config.width // 64
    sizes = GPTConfig(corpus.tokenizer.vocab_size, config.length, config.layers, heads, config.width)
    generator = torch.Generator().manual_seed(config.seed)
    return GPT(sizes).init_weights(generator).to(device), False


RENAMED = {"rows": "pretrain_batch"}    # in the config.json of older checkpoints
PRETRAIN_FLAGS = ("pretrain_steps", "pretrain_batch", "layers", "width", "length", "seed")


def pretrain_settings(config: Config, corpus: Corpus) -> dict:
    """Everything that a pretrained AR model depends on: saved with it, compared before it is used again."""
    settings = {name: getattr(config, name) for name in ("data", *PRETRAIN_FLAGS)}
    settings["tokens"] = len(corpus.train)
    settings["corpus"] = zlib.crc32(corpus.train)
    settings["tokenizer"] = zlib.crc32(corpus.tokenizer.to_json().encode())
    return settings


def changed_pretraining(trained: dict, settings: dict) -> list[str]:
    """What differs between the settings of a trained AR model and `settings`, in words."""
    trained = {RENAMED.get(name, name): value for name, value in trained.items()}
    # Older checkpoints have no checksum of the corpus. With one, the name of the file does not matter.
    not_compared = "data" if "corpus" in trained else "corpus"
    changes = []
    for name, value in settings.items():
        if name != not_compared and trained.get(name) != value:
            changes.append(f"{name} was {trained.get(name)} and is {value}")
    return changes


def pretrain(net: GPT, corpus: Corpus, config: Config, log: Log, state: RunState | None = None,
             sigterm: SigtermFlag | None = None) -> None:
    """Next-token prediction. A window holds several texts; each attends to itself alone, from position 0.

    `state`: saved every --eval_every updates, and after SIGTERM; continued if the run is resumed.
    """
    T = config.length
    B = config.pretrain_batch
    device = net.wte.weight.device
    optimizer = SkipNonFinite(Muon(net))
    set_lr = lr_schedule(optimizer, "trapezoid", config.pretrain_steps)
    first = 0
    if state:
        state.start_phase("pretrain", net, optimizer)
        first = state.progress["pretrain_step"]
    for step in range(first, config.pretrain_steps):
        began = time.perf_counter()
        set_lr(step)
        row_ids = dist.shard_rows(range(step * B, (step + 1) * B))
        window = get_batch(corpus, row_ids, T + 1, config.seed, device)
        tokens = window[:, :-1]                                  # (B, T)
        next_tokens = window[:, 1:]
        mask, position = separate_texts(tokens, corpus.tokenizer.bos)
        logits = net(tokens, mask, position)                     # (B * T, V)
        loss = F.cross_entropy(logits.float(), next_tokens.flatten(), reduction="sum") / (B * T)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        total_loss = sum(dist.gather_objects(loss.item()))
        keys = position.float().mean().item() + 1            # positions that a query attends to, on average
        flops = metrics.body_flops(net.config, keys) + metrics.head_flops(net.config)
        seconds = time.perf_counter() - began
        record = {"phase": "pretrain", "step": step + 1, "tokens": (step + 1) * B * T, "loss": total_loss,
                  "seconds": seconds, "flops": 3 * B * T * flops}
        speed = B * T / seconds / 1000
        line = f"loss {total_loss:.3f} nats | {speed:.1f}k tok/s | {seconds * 1000:.0f} ms"
        log.step(record, config.pretrain_steps, line)
        if state:
            state.progress["pretrain_step"] = step + 1
            save_pretraining(net, optimizer, config, state, sigterm)


def save_pretraining(net, optimizer, config: Config, state: RunState, sigterm: SigtermFlag) -> None:
    """Save at the last update, every --eval_every updates and after SIGTERM, which then ends the run."""
    step = state.progress["pretrain_step"]
    stop = bool(sigterm)
    if stop or step % config.eval_every == 0 or step == config.pretrain_steps:
        state.save(net, optimizer)
    if stop:
        raise Terminated


def separate_texts(tokens: Tensor, bos: int) -> tuple[Tensor, Tensor]:
    """Mask (B, 1, T, T) and positions (B, T) for windows (B, T) of texts that each begin with `bos`."""
    column = torch.arange(tokens.size(1), device=tokens.device)
    begin = torch.where(tokens == bos, column, 0).cummax(1).values   # (B, T) where the text of a token begins
    same_text = begin[:, :, None] == begin[:, None, :]
    causal = column[:, None] >= column
    return (same_text & causal)[:, None], column - begin


def get_batch(corpus: Corpus, row_ids: range | list[int], length: int, seed: int, device) -> Tensor:
    """(B, length): the windows of training text that belong to these global row numbers."""
    u = opdlm.uniforms(seed, opdlm.DATA, row_ids, (1,))[:, 0]
    return torch.from_numpy(corpus.windows(length)(u.numpy())).to(device)


# 2. conversion ------------------------------------------------------------------------------------------

def make_recipe(config: Config, eot: int | tuple[int, ...], show: Callable = repr,
                vocab: int = 0) -> opdlm.Recipe:
    """The configuration of a conversion, as values."""
    config = fill_by_source(config)
    recipe = opdlm.Recipe(
        source=opdlm.SOURCES[config.source],
        states=opdlm.STATES[config.states],
        target=opdlm.TARGETS["teacher" if config.target == "sampled" else config.target],
        sampled_target=config.target == "sampled",
        weight=opdlm.WEIGHTS[config.weight],
        layout=Layout.of(config.block, config.align, config.context),
        eot=eot,
        rule=reveal.parse(config.reveal, config.confidence),
        sampling=SamplingConfig(config.temperature, config.top_k, config.top_p),
        batch=config.batch,
        shard_rows=dist.shard_rows,
        grad_accum=config.grad_accum,
        updates_per_rollout=config.updates_per_rollout,
        max_prompt=config.max_prompt,
        seed=config.seed,
        clean_weight=config.clean_weight,
        clean_source=opdlm.data_text if config.clean_text == "data" else None,
        show=show,
    )
    if config.lora and not config.checkpointing:                 # a cache cannot be written twice
        recipe = replace(recipe, logits=lora.student_logits)
    return replace(recipe, **chunked_kl(config.kl, config.target, vocab))


def fill_by_source(config: Config) -> Config:
    """The configuration with the defaults that depend on --source, which is the student if not given."""
    source = config.source or "student"
    defaults = {"source": source} | BY_SOURCE.get(source, BY_SOURCE["student"])
    if config.lora or config.clean_weight == 0:                  # an adapter's AR model is frozen
        defaults |= {"clean_weight": 0.0, "clean_text": "own"}
    if config.kl not in (None, "plain"):                         # a loss in chunks has no sampled target
        defaults["target"] = "teacher"
    return replace(config, **missing_of(config, defaults))


def missing_of(config: Config, defaults: dict) -> dict:
    """The defaults of the fields that are not given."""
    return {name: value for name, value in defaults.items() if getattr(config, name) is None}


def check_lora(config: Config) -> None:
    """ValueError for settings that an adapter cannot have (model/lora.py)."""
    if config.lora is None:
        return
    if config.align != "ar" or config.context != "causal":
        raise ValueError("--lora needs --align=ar --context=causal: text is read by the frozen AR model")
    if config.clean_weight:
        raise ValueError("--clean_weight has no effect with --lora, whose AR model is frozen: leave it out")
    if config.compile:
        raise ValueError("--compile has not been tried with --lora: leave it out")


def make_student(teacher, config: Config):
    """The student at its start: a copy of the teacher, or with --lora its weights and an adapter."""
    if config.lora:
        student = lora.adapt(teacher, config.lora, config.seed)
    else:
        student = copy.deepcopy(teacher)
    if config.init == "scratch" or not checkpoint.is_student(config.init):
        student.init_mask()
    if config.lora:
        return dist.in_bf16_on_gpu(student)
    return dist.shard_and_compile(student, config.compile)


def warm_start(recipe: opdlm.Recipe) -> opdlm.Recipe:
    """The recipe of the warm start: training text, since an untrained student writes badly."""
    return replace(recipe, source=opdlm.data_text, states=opdlm.prefix_shown, updates_per_rollout=1)


class Conversion:
    """Runs the two phases of distillation: data, learning rate, log, evaluation, saving and resumption."""

    def __init__(self, student, teacher, corpus: Corpus, config: Config, optimizer, log: Log,
                 evaluator: Evaluator, save: Callable, state: RunState, sigterm: SigtermFlag):
        self.student = student
        self.teacher = teacher
        self.config = config
        self.optimizer = optimizer
        self.log = log
        self.evaluator = evaluator
        self.save = save                                         # save(name) writes the student to --out/name
        self.sigterm = sigterm
        device = student.wte.weight.device
        self.data = partial(get_batch, corpus, length=config.length, seed=config.seed, device=device)
        self.set_lr = lr_schedule(optimizer, config.lr_schedule, config.distill_steps)
        longest = config.max_response or config.length
        self.length = length_schedule(config.block, longest, config.length_ramp)
        self.state = state
        state.start_phase("distil", student, optimizer)
        self.progress = state.progress
        self.set_lr(self.progress["step"])

    def run(self, recipe: opdlm.Recipe, steps: range) -> None:
        """Distil with this recipe for those of the updates `steps` that are not done yet."""
        first = max(steps.start, self.progress["step"])
        for record in self.updates(recipe, range(first, steps.stop)):
            self.progress["step"] = record["step"]
            self.progress["tokens"] += record["tokens"]
            record["tokens"] = self.progress["tokens"]
            self.log.step(record, self.config.distill_steps, describe(record))
            if self.should_save(record["step"]):
                self.evaluate_and_save(recipe)

    def updates(self, recipe: opdlm.Recipe, steps: range) -> Iterator[dict]:
        """One record per update."""
        source = {function: name for name, function in opdlm.SOURCES.items()}[recipe.source]
        began = time.perf_counter()
        records = opdlm.train(self.student, self.teacher, self.data, recipe, self.optimizer, self.length,
                              steps)
        for record in dist.merge_records(records, recipe.grad_accum):
            record["seconds"] = time.perf_counter() - began
            record["tok_s"] = record["tokens"] / record["seconds"]
            record["flops"] = metrics.distill_flops(self.student.config, record)
            yield {"phase": "distil", "source": source, **record}
            began = time.perf_counter()
            self.set_lr(record["step"])

    def should_save(self, step: int) -> bool:
        """At the last update, every --eval_every updates and after SIGTERM, but only between two rollouts."""
        if step == self.config.distill_steps:
            return True
        each = self.config.updates_per_rollout
        period = -(-self.config.eval_every // each) * each       # --eval_every, rounded up to whole rollouts
        on_policy_steps = step - self.config.warm_steps
        if on_policy_steps > 0 and on_policy_steps % each:
            return False
        return on_policy_steps % period == 0 or bool(self.sigterm)

    def evaluate_and_save(self, recipe: opdlm.Recipe) -> None:
        """Save what --resume needs, and the student if its validation NLL is the best so far."""
        stop = bool(self.sigterm)
        if not stop:
            tokens = self.progress["tokens"]
            nats = self.evaluator.quick_eval(self.student, recipe.layout, tokens, recipe.rule)
            if nats < self.progress["best"]:
                self.progress["best"] = nats
                self.save("best")
        self.state.save(self.student, self.optimizer)
        if stop:
            raise Terminated


def describe(record: dict) -> str:
    """The log line of an update: KL, masked share, tokens per response, NLL under the target, speed."""
    return (f"kl {record['kl']:.3f} nats | masked {record['masked']:.2f} | len {record['len']:.0f} | "
            f"text {record['text_nats']:.2f} nats | {record['tok_s'] / 1000:.1f}k tok/s | "
            f"{record['seconds'] * 1000:.0f} ms")


# 3. everything together ---------------------------------------------------------------------------------

def resolve_options(config: Config, corpus: Corpus) -> Config:
    """The configuration with every default filled in, its values checked."""
    check_ranges(config, RANGES)
    defaults = dict(SIZES["toy" if corpus.name == "toy" else "text"])
    defaults["data"] = corpus.name
    if not can_verify_itself(Layout.of(config.block, config.align, config.context)):
        defaults["source"] = "student"
    if corpus.tokenizer.vocab_size >= LARGE_VOCAB:               # its loss is computed in chunks, see above
        config = replace(config, target=config.target or "teacher")
    config = fill_by_source(replace(config, source=config.source or defaults["source"]))
    config = replace(config, optimizer=config.optimizer or ("adamw" if config.lora else "muon"))
    defaults["lr"] = LEARNING_RATES[config.optimizer]
    if config.init != "scratch":
        sizes = checkpoint.sizes_from_checkpoint(config.init, config.length, defaults["length"])
        config = replace(config, **sizes)
        defaults["lr"] = LEARNING_RATES[config.optimizer] / 10          # large checkpoints need smaller rates
        if corpus.name != "toy":
            defaults |= evaluation_size(config, defaults)
    if config.lora and config.optimizer == "adamw":
        defaults["lr"] = LORA_RATE
    config = replace(config, **missing_of(config, defaults))
    config = replace(config, block=config.block or config.length)
    config = replace(config, eval_tokens=config.eval_tokens or config.length)

    check_ranges(config, {"length": RANGES["length"]})           # it may be that of --init
    if config.init == "scratch" and config.width % 64:
        raise ValueError(f"--width={config.width}: must be a multiple of 64")
    room = config.length - config.max_prompt
    is_full_sequence = config.block == config.length
    if room < 1 or not (1 <= config.block <= room or is_full_sequence):
        raise ValueError(f"--block={config.block} does not fit after a prompt of up to {config.max_prompt} "
                         f"tokens in --length={config.length}: use 1 to {room}, or 0 for the whole text")
    if config.max_response is not None and not config.block <= config.max_response <= config.length:
        raise ValueError(f"--max_response={config.max_response}: expected --block to --length, here "
                         f"{config.block} to {config.length}")
    if config.eval_tokens > config.length:
        raise ValueError(f"--eval_tokens={config.eval_tokens}: expected at most --length, here "
                         f"{config.length}")
    if config.batch % (config.grad_accum * dist.count()):
        raise ValueError(f"--batch={config.batch} must be divisible by --grad_accum={config.grad_accum} "
                         f"times the number of processes, {dist.count()}")
    if config.pretrain_batch % dist.count():
        raise ValueError(f"--pretrain_batch={config.pretrain_batch} must be divisible by the number of "
                         f"processes, {dist.count()}")
    return config


def evaluation_size(config: Config, defaults: dict) -> dict:
    """--eval_texts and --eval_tokens with --init: evaluation takes at most a tenth of the run's time.

    `config` has its length; `defaults` has the number of updates, if `config` does not say it.
    """
    updates = config.distill_steps or defaults["distill_steps"]
    block = config.block or config.length
    update_tokens = config.batch * min(config.length, config.max_response or config.length)
    texts, tokens = affordable_size(update_tokens, updates, config.eval_every, block, config.eval_tokens)
    return {"eval_texts": texts, "eval_tokens": min(tokens, config.length)}


def check_out_dir(config: Config) -> Path:
    """The folder --out. ValueError if it holds another AR model than --init, or nothing to resume from."""
    out = Path(config.out)
    ar = out / "ar"
    if config.init != "scratch" and ar.is_dir() and checkpoint.fetch(config.init).resolve() != ar.resolve():
        raise ValueError(f"{ar} is not the AR model of --init={config.init}, but would be taken for the "
                         "teacher of this student: use another --out")
    check_results(out, CHECKPOINTS, FILES)
    if config.resume and not latest_state(out / STATE):
        raise ValueError(f"nothing to resume in {out}: it has no {STATE}; run without --resume")
    return out


def open_state(config: Config, corpus: Corpus, out: Path) -> RunState:
    """The state of the run, saved or new. ValueError if a saved one is of another corpus or pretraining."""
    settings = {**asdict(config), "resume": None, "processes": dist.count()}
    state = RunState(out / STATE, settings, config.resume)
    fixed = ["optimizer", "lora"]
    if config.init == "scratch":
        fixed += PRETRAIN_FLAGS
    if state.saved_phase == "pretrain":
        fixed.append("init")
    state.check_unchanged(fixed, {
        "data": zlib.crc32(corpus.train),
        "val_data": zlib.crc32(corpus.val),
        "tokenizer": zlib.crc32(corpus.tokenizer.to_json().encode()),
    })
    return state


def header(config: Config, net, device) -> dict:
    """The first record of log.jsonl: settings, commit, versions, hardware, size."""
    return {
        "config": asdict(config),
        **metrics.facts(device),
        "matmul_flops": metrics.matmul_rate(device),
        "parameters": sum(p.numel() for p in net.parameters()),
    }


def base_name(config: Config) -> str | None:
    """The AR model of a student that is an adapter, as its config.json names it (model/checkpoint.py)."""
    if config.lora is None:
        return None
    if config.init == "scratch":
        return "../ar"
    return config.init if config.init.startswith("hf:") else str(Path(config.init).resolve())


def save_student(student, tok, recipe: opdlm.Recipe, out: Path, base: str | None, name: str) -> None:
    """Write the student to --out/name, with the way of decoding that it was trained with."""
    rule = recipe.rule
    is_speculative = recipe.source is opdlm.student_ar_text
    dist.save_checkpoint(out / name, student, tok, recipe.layout, base=base,
                         reveal=str(rule), confidence=rule.confidence.__name__,
                         mode="speculative" if is_speculative else "diffusion",
                         temperature=recipe.sampling.temperature)


def main(argv: list[str]) -> int:
    config = cli.parse(Config, argv, __doc__, PRESETS)
    config = expand_home(config, "data", "val_data", "init", "out")
    check_ranges(config, RANGES)
    check_utf8("sample_prompt", config.sample_prompt)
    make_recipe(config, eot=0)                                   # refuses settings that do not go together
    check_lora(config)
    device = dist.start(config.device)

    with SigtermFlag() as sigterm, FolderLock(config.out):
        # 1. data
        own_tokenizer = None
        if config.init != "scratch":
            own_tokenizer = tokenizer.load(checkpoint.ar_folder(config.init))
        corpus = open_corpus(config.data, config.val_data, config.vocab, own_tokenizer)
        config = resolve_options(config, corpus)
        if long_texts := corpus.windows(config.length).describe():
            dist.print0(f"{config.data}: {long_texts}")
        tok = corpus.tokenizer
        prompt = sample_prompt_ids(config.sample_prompt, tok, config.length)
        out = check_out_dir(config)
        state = open_state(config, corpus, out)
        recipe = make_recipe(config, tok.ends, partial(trace.show, tok), tok.vocab_size)

        # 2. pretrain the AR model, the teacher
        teacher, is_trained = ar_model(config, corpus, device, state.saved_phase)
        if is_trained:
            state.check_teacher(teacher)
        checkpointed(teacher, config.checkpointing)              # also holds for copies of it
        log = Log(out / "log.jsonl", header(config, teacher, device), config.resume)
        state.start()
        sigterm.saves_first = True
        if not is_trained:
            net = dist.shard_and_compile(copy.deepcopy(teacher), config.compile)
            pretrain(net, corpus, config, log, state, sigterm)
            teacher.load_state_dict(dist.full_state(net))
            dist.save_checkpoint(out / "ar", teacher, tok, trained=pretrain_settings(config, corpus))
            state.check_teacher(teacher)

        # 3. convert: the student is a copy of the teacher under another attention mask
        if config.lora:
            teacher = teacher.to(getattr(torch, config.teacher_dtype))       # the student has its weights
        student = make_student(teacher, config)
        optimizer = SkipNonFinite(make_optimizer(config.optimizer, student, config.lr), config.grad_accum)
        teacher = teacher.requires_grad_(False).to(getattr(torch, config.teacher_dtype))
        teacher = dist.compile_blocks(teacher, config.compile)

        # 4. evaluate both before distillation
        evaluator = Evaluator(teacher, corpus, config.eval_tokens, config.seed, log, prompt, recipe.sampling,
                              config.eval_texts)
        pretrain_tokens = config.pretrain_steps * config.pretrain_batch * config.length
        evaluator.evaluate("ar", teacher, AR, reveal.parse("static:1"), pretrain_tokens)
        evaluator.evaluate("before", student, recipe.layout, recipe.rule, 0)

        # 5a. warm start: off-policy, on training text
        save = partial(save_student, student, tok, recipe, out, base_name(config))
        conversion = Conversion(student, teacher, corpus, config, optimizer, log, evaluator, save, state,
                                sigterm)
        warm_steps = min(config.warm_steps, config.distill_steps)
        if warm_steps == config.distill_steps and config.source != "data":
            dist.print0(f"--warm_steps={config.warm_steps}: all {warm_steps} updates learn from training "
                        f"text, none from the {config.source}'s text")
        if warm_steps:
            dist.print0(f"warm start: {warm_steps} updates on training text")
        conversion.run(warm_start(recipe), range(0, warm_steps))

        # 5b. on-policy distillation: on text that the student writes itself
        steps = config.distill_steps - warm_steps
        dist.print0(f"distillation: {steps} updates on text of the {config.source}")
        conversion.run(recipe, range(warm_steps, config.distill_steps))
        save("opdlm")
        sigterm.saves_first = False

        # 6. evaluate and report
        train_tokens = conversion.progress["tokens"]
        evaluator.evaluate("after", student, recipe.layout, recipe.rule, train_tokens)
        if can_verify_itself(recipe.layout):
            evaluator.evaluate_speculative(student, recipe.layout, train_tokens)
        if dist.is_first():
            evaluator.publish(out)
    return sigterm.exit_code


if __name__ == "__main__":
    dist.end(cli.run(main))
