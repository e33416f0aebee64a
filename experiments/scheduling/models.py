"""The models of experiments/scheduling.py: of whole texts with 3 blocks and with 1, and a judge with 4.

The first half of the training stories is for the two, which see the same rows in the same order, the other half for the
judge. What is trained lies in out/ and is not trained again, unless it was trained otherwise.
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
from model import checkpoint
from report.compare import write_json
from training.log import Log
from training.optim import length_schedule, lr_schedule, make_optimizer
from training.resume import check_writable

LAYERS = {"H": 3, "L": 1, "judge": 4}          # 6 and 2 do about as well in the story world: nothing to be saved


@cache
def corpus_of(data: str, val_data: str | None) -> Corpus:
    return open_corpus(data, val_data, train_tiny.Config().vocab)


def half(corpus: Corpus, second: bool) -> Corpus:
    """The first half of the training stories, or the second."""
    middle = int(corpus.starts[len(corpus.starts) // 2])
    return replace(corpus, train=corpus.train[middle:] if second else corpus.train[:middle + 1])


def model(name: str, seed: int, options) -> torch.nn.Module:
    """H, L or the judge of a seed; trained, if it is not there with these settings."""
    torch.set_num_threads(1)
    folder, flags = folder_of(options) / f"{name}-{seed}", trained(options)
    said = folder / "job.json"
    if not said.exists() or json.loads(said.read_text()) != flags:
        corpus = half(corpus_of(options.data, options.val_data), name == "judge")
        options = train_tiny.resolve_options(train_tiny.Config(**flags | {"layers": LAYERS[name]}, seed=seed), corpus)
        ar, _ = train_tiny.ar_model(replace(options, out=str(folder)), corpus, torch.device("cpu"))
        with redirect_stdout(io.StringIO()):
            log = Log(check_writable(folder.with_name(folder.name + "-log")) / "log.jsonl", {}, False)
            train_tiny.pretrain(ar, corpus, options, log)
            net, layout = (ar, None) if name == "judge" else whole_text(ar, corpus, options, log)
        checkpoint.save(folder, net, corpus.tokenizer, layout)
        write_json(said, flags)
    return checkpoint.load(folder)[0].requires_grad_(False)


def trained(options) -> dict:
    """Flags of train_tiny.py of all three."""
    return {**train_tiny.MDLM, **options.flags, "layers": LAYERS}


def whole_text(ar, corpus: Corpus, options, log) -> tuple:
    """The model of whole texts that an AR model becomes, and how it is wired."""
    net, recipe = copy.deepcopy(ar).init_mask(), train_tiny.make_recipe(options, corpus.tokenizer.eot)
    optimizer = make_optimizer(options.optimizer, net, options.lr)
    data = partial(train_tiny.get_batch, corpus, length=options.length, seed=options.seed, device="cpu")
    length = length_schedule(options.block, options.length, options.length_ramp)
    set_lr = lr_schedule(optimizer, options.lr_schedule, options.distill_steps)
    set_lr(0)
    for record in opdlm.train(net, ar, data, recipe, optimizer, length, range(options.distill_steps)):
        log.write({"phase": "distil", **record})
        set_lr(record["step"])
    return net, recipe.layout


def models(options, seed: int) -> dict:
    return {name: model(name, seed, options) for name in LAYERS}


def folder_of(options) -> Path:
    return WORK / ("quick" if options.quick else "") / options.name
