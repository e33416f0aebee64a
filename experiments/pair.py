"""The models of experiments/scheduling.py: of whole texts with 3 blocks and with 1, and a judge with 4.

The first half of the training stories is for the two, which see the same rows in the same order, the other half for the
judge. What is trained lies in out/ and is not trained again, unless it was trained otherwise.
"""
import copy
import io
import json
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import train_tiny
from data.corpus import open_corpus
from data.tinystories import Corpus
from experiments.job import WORK
from model import hub
from model.dist import Log
from model.muon import optimizer_named
from model.state import writable
from report.publish import write_json

LAYERS = {"H": 3, "L": 1, "judge": 4}          # 6 and 2 do about as well in the story world: nothing to be saved


@cache
def corpus_of(data: str, val_data: str | None) -> Corpus:
    return open_corpus(data, val_data, train_tiny.Options().vocab)


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
        options = train_tiny.settled(train_tiny.Options(**flags | {"layers": LAYERS[name]}, seed=seed), corpus)
        ar, _ = train_tiny.ar_model(replace(options, out=str(folder)), corpus, torch.device("cpu"))
        with redirect_stdout(io.StringIO()):
            log = Log(writable(folder.with_name(folder.name + "-log")) / "log.jsonl", {}, False)
            train_tiny.pretrain(ar, corpus, options, log)
            net, layout = (ar, None) if name == "judge" else whole_text(ar, corpus, options, log)
        hub.save(folder, net, corpus.tokenizer, layout)
        write_json(said, flags)
    return hub.load(folder)[0].requires_grad_(False)


def trained(options) -> dict:
    """Flags of train_tiny.py of all three."""
    return {**train_tiny.MDLM, **options.flags, "layers": LAYERS}


def whole_text(ar, corpus: Corpus, options, log) -> tuple:
    """The model of whole texts that an AR model becomes, and how it is wired."""
    net, recipe = copy.deepcopy(ar).init_mask(), train_tiny.recipe_of(options, corpus.tokenizer.eot)
    optimizer = optimizer_named(options.optimizer, net, options.lr)
    for record in train_tiny.distil(net, ar, corpus, recipe, options, optimizer):
        log.write({"phase": "distil", **record})
    return net, recipe.layout


def models(options, seed: int) -> dict:
    return {name: model(name, seed, options) for name in LAYERS}


def folder_of(options) -> Path:
    return WORK / ("quick" if options.quick else "") / options.name
