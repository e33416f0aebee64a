"""What is measured: calls that do one update or generate one batch of text, by the project's own code.

A call returns a record: what it has processed, and FLOPs where they are defined. The networks have GPT-2's
initial weights, and the texts are random tokens without an end-of-text.

Shapes: B rows, T positions, P prompt, R response.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import numpy as np
import torch

import opdlm
import train_tiny
from data.tinystories import Corpus
from decoding import reveal
from decoding.sampling import SamplingConfig
from experiments.common.timing import greedy_ar
from model.gpt import GPT, GPTConfig
from report import generate, metrics
from training import dist
from training.optim import SkipNonFinite, make_optimizer

NO_EOT = -1             # an id that no network generates
PROMPT = 16             # tokens
TEXTS = 64              # of the random corpus
LEARNING_RATE = 1e-6    # so small that all updates of the student begin with about the same weights
RULES = ("static:2", "static:4")        # beside the default rule: tokens per step that are known beforehand
GREEDY = SamplingConfig(temperature=0)


@dataclass(frozen=True)
class Size:
    """What the measured calls work on."""
    network: GPTConfig
    batch: int              # rows of an update, and of the rollout measured beside it
    decoding: tuple         # batches of generated texts
    response: int           # tokens generated per row
    matmul: int             # rows of the square matrices whose product is the measure of MFU


# 1. networks and texts ------------------------------------------------------------------------------------

def random_network(size: Size, device: torch.device) -> GPT:
    generator = torch.Generator().manual_seed(0)
    return GPT(size.network).init_weights(generator).to(device)


def random_corpus(network: GPTConfig) -> Corpus:
    """Texts of random tokens. Each fills one window of the AR pretraining."""
    bos = network.vocab - 1
    numbers = np.random.default_rng(0)
    texts = numbers.integers(bos, size=(TEXTS, network.context + 1), dtype=np.uint16)
    texts[:, 0] = bos
    stream = np.append(texts.flatten(), np.uint16(bos))
    tokenizer = SimpleNamespace(bos=bos, eot=bos)
    return Corpus(stream, stream, tokenizer, "random")


def config_of(size: Size, device: torch.device, compiled: bool = False) -> train_tiny.Config:
    """The configuration of train_tiny.py, with its defaults for a large vocabulary on this device."""
    return train_tiny.Config(
        pretrain_steps=2,                                        # the second is measured
        pretrain_batch=size.batch,
        batch=size.batch,
        layers=size.network.layers,
        width=size.network.width,
        length=size.network.context,
        optimizer="muon",
        lr=LEARNING_RATE,
        temperature=0.0,
        kl="full",
        compile=compiled,
        teacher_dtype="bfloat16" if device.type == "cuda" else "float32",
    )


def student_of(size: Size, config: train_tiny.Config, device: torch.device) -> torch.nn.Module:
    """A student, ready to train: on a GPU its forward passes compute in bf16."""
    return train_tiny.make_student(random_network(size, device), config)


# 2. training ----------------------------------------------------------------------------------------------
# Each function makes what a call needs, and returns the call.

class LastRecord:
    """A log that keeps the last record only."""

    def step(self, record: dict, total: int, line: str) -> None:
        self.record = record


def pretraining(size: Size, device: torch.device, compiled: bool) -> Callable:
    """An AR update. Its record has `seconds` of its own, since the call is an update longer.

    Each call has a new optimizer; the first of the two updates makes its state.
    """
    corpus = random_corpus(size.network)
    config = config_of(size, device, compiled)
    net = dist.shard_and_compile(random_network(size, device), compiled)

    def update() -> dict:
        log = LastRecord()
        train_tiny.pretrain(net, corpus, config, log)
        tokens = config.pretrain_batch * config.length
        return checked({**log.record, "tokens": tokens})
    return update


def distillation(size: Size, device: torch.device, compiled: bool) -> Callable:
    """An update of the student on training text: everything of a distillation but the rollout."""
    records, _ = distil(size, device, compiled)

    def update() -> dict:
        record = next(records)
        record["flops"] = metrics.distill_flops(size.network, record)
        return checked(record)
    return update


def optimizer_step(size: Size, device: torch.device, compiled: bool) -> Callable:
    """The optimizer's part of either update."""
    records, optimizer = distil(size, device, compiled)
    next(records)                                                # leaves its gradients

    def step() -> dict:
        optimizer.step()
        return {}
    return step


def distil(size: Size, device: torch.device, compiled: bool) -> tuple[Iterator[dict], SkipNonFinite]:
    """The records of a distillation on training text, an update each, and its optimizer."""
    config = config_of(size, device, compiled)
    teacher = random_network(size, device)
    student = train_tiny.make_student(teacher, config)
    optimizer = SkipNonFinite(make_optimizer(config.optimizer, student, config.lr))
    teacher = teacher.requires_grad_(False).to(getattr(torch, config.teacher_dtype))
    teacher = dist.compile_blocks(teacher, compiled)
    recipe = train_tiny.warm_start(train_tiny.make_recipe(config, NO_EOT))
    corpus = random_corpus(size.network)
    data = partial(train_tiny.get_batch, corpus, length=config.length, seed=config.seed, device=device)
    steps = range(train_tiny.STEPS)
    records = opdlm.train(student, teacher, data, recipe, optimizer, lambda step: config.length, steps)
    return records, optimizer


def rollout(size: Size, device: torch.device, compiled: bool) -> Callable:
    """The text that the student writes for its updates, with the default rule."""
    config = config_of(size, device, compiled)
    student = student_of(size, config, device)
    recipe = train_tiny.make_recipe(config, NO_EOT)
    prompt = prompts(size, config.batch, device)
    shape = (PROMPT + size.response, recipe.rule.numbers(config.block))
    u = opdlm.uniforms(config.seed, opdlm.ROLLOUT, range(config.batch), shape).to(device)

    def write() -> dict:
        return cost_of(recipe.source(student, None, prompt, PROMPT, size.response, u, recipe))
    return write


PIECES = {
    "AR pretraining": pretraining,
    "distillation": distillation,
    "of either, the optimizer": optimizer_step,
    "rollout": rollout,
}
NEVER_COMPILED = ("of either, the optimizer",)


def checked(record: dict) -> dict:
    """The record of an update. ValueError if its loss is not finite: the optimizer then skips its step."""
    if not math.isfinite(record["loss"]):
        raise ValueError(f"the loss of an update is {record['loss']}, so its time would be that of a skipped "
                         "step: check the number format of the device")
    return record


# 3. decoding ----------------------------------------------------------------------------------------------

def decoders(student, size: Size, config: train_tiny.Config, batch: int) -> dict[str, Callable]:
    """A call per way of decoding, each with the same network, prompts and length; all greedy."""
    device = student.wte.weight.device
    layout = train_tiny.make_recipe(config, NO_EOT).layout
    prompt = prompts(size, batch, device)

    def ar() -> dict:
        greedy_ar(student, prompt, size.response)
        return {"tokens": batch * size.response, "forwards": size.response}

    def write(generator: generate.TextGenerator) -> dict:
        return cost_of(generator(prompt, size.response, 0, range(batch), NO_EOT))

    calls = {"AR": ar}
    for rule in (config.reveal, *RULES):
        generator = generate.diffusion_generator(student, layout, reveal.parse(rule), GREEDY)
        calls[rule] = partial(write, generator)
    speculative = generate.speculative_generator(student, layout, None, GREEDY)
    calls["speculative"] = partial(write, speculative)
    return calls


def prompts(size: Size, batch: int, device: torch.device) -> torch.Tensor:
    """(B, P) random tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(size.network.vocab - 1, (batch, PROMPT), generator=generator).to(device)


def cost_of(text: opdlm.Rollout) -> dict:
    """Tokens of all rows, and forward passes of the row that needed most: those of the batch."""
    return {"tokens": int(text.response_mask.sum()), "forwards": int(text.forwards.max())}
