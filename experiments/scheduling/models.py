"""The models: a heavy (H) and a light (L) full-sequence diffusion model, and a larger AR model as the
evaluator.

H and L learn from the first half of the training stories, the same rows in the same order; the evaluator
learns from the other half. A trained model is in out/ and is not trained again, unless its settings have
changed.
"""
import copy
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

import opdlm
import train_tiny
from data.corpus import open_corpus
from data.tinystories import Corpus
from experiments.common.job import WORK
from experiments.common.results import variant_of
from experiments.scheduling.tables import LAYERS
from model import checkpoint
from report.compare import write_json
from training.log import Log
from training.optim import length_schedule, lr_schedule, make_optimizer
from training.resume import check_writable


@cache
def load_corpus(data: str, val_data: str | None) -> Corpus:
    return open_corpus(data, val_data, train_tiny.Config().vocab)


def half_of(corpus: Corpus, second: bool) -> Corpus:
    """The corpus with the first half of its training stories, or the second."""
    middle = int(corpus.starts[len(corpus.starts) // 2])
    train = corpus.train[middle:] if second else corpus.train[:middle + 1]
    return replace(corpus, train=train)


def work_folder(options) -> Path:
    return WORK / ("quick" if options.quick else "") / f"scheduling-{variant_of(options.data)}"


def settings_of(options) -> dict:
    """Flags of train_tiny.py for all three models, and their numbers of layers."""
    return {**train_tiny.MDLM, **options.flags, "layers": LAYERS}


def load_model(name: str, seed: int, options) -> torch.nn.Module:
    """H, L or the evaluator of a seed; trained first, if out/ does not have it with these settings."""
    torch.set_num_threads(1)
    folder = work_folder(options) / f"{name}-{seed}"
    settings = settings_of(options)
    settings_file = folder / "job.json"
    if not settings_file.exists() or json.loads(settings_file.read_text()) != settings:
        with redirect_stdout(io.StringIO()):
            train_model(name, seed, options, settings, folder)
        write_json(settings_file, settings)
    return checkpoint.load(folder)[0].requires_grad_(False)


def train_model(name: str, seed: int, options, settings: dict, folder: Path) -> None:
    """Pretrains an AR model; makes H and L full-sequence diffusion models of it."""
    is_evaluator = name == "evaluator"
    corpus = half_of(load_corpus(options.data, options.val_data), second=is_evaluator)
    flags = settings | {"layers": LAYERS[name], "seed": seed, "out": str(folder)}
    config = train_tiny.resolve_options(train_tiny.Config(**flags), corpus)
    net, _ = train_tiny.ar_model(config, corpus, torch.device("cpu"))
    log = Log(check_writable(folder.with_name(folder.name + "-log")) / "log.jsonl", {}, False)
    train_tiny.pretrain(net, corpus, config, log)
    layout = None
    if not is_evaluator:
        net, layout = train_full_sequence(net, corpus, config, log)
    checkpoint.save(folder, net, corpus.tokenizer, layout)


def train_full_sequence(ar, corpus: Corpus, config, log) -> tuple:
    """The full-sequence diffusion model that an AR model becomes, and its Layout."""
    net = copy.deepcopy(ar).init_mask()
    recipe = train_tiny.make_recipe(config, corpus.tokenizer.eot)
    optimizer = make_optimizer(config.optimizer, net, config.lr)
    data = partial(train_tiny.get_batch, corpus, length=config.length, seed=config.seed, device="cpu")
    length = length_schedule(config.block, config.length, config.length_ramp)
    set_lr = lr_schedule(optimizer, config.lr_schedule, config.distill_steps)
    set_lr(0)
    for record in opdlm.train(net, ar, data, recipe, optimizer, length, range(config.distill_steps)):
        log.write({"phase": "distil", **record})
        set_lr(record["step"])
    return net, recipe.layout


def load_models(options, seed: int) -> dict[str, torch.nn.Module]:
    return {name: load_model(name, seed, options) for name in LAYERS}
