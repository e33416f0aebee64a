"""The models of experiments/scheduling.py, and what it asks them: of whole texts with 6 and 2 blocks, a judge with 8.

The first half of the training stories is for the two, which see the same rows in the same order, the other half for the
judge. What is trained, measured or sampled lies in out/ and is not made again.
"""
import copy
import io
import json
import time
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import opdlm
import train_tiny
from data import toy
from data.corpus import open_corpus
from data.tinystories import Corpus, stories
from experiments.job import WORK
from model import hub, reveal
from model.dist import Log
from model.masks import Layout
from model.muon import optimizer_named
from model.schedule import MEASURED, Schedule, Scheduled
from model.state import writable
from report import importance, measure
from report.publish import write_json

LAYERS = {"H": 6, "L": 2, "judge": 8}


@cache
def corpus_of(data: str, val_data: str | None) -> Corpus:
    return open_corpus(data, val_data, train_tiny.Options().vocab)


def half(corpus: Corpus, second: bool) -> Corpus:
    """The first half of the training stories, or the second."""
    middle = int(corpus.starts[len(corpus.starts) // 2])
    return replace(corpus, train=corpus.train[middle:] if second else corpus.train[:middle + 1])


def model(name: str, seed: int, flags: dict, folder: Path) -> torch.nn.Module:
    """H, L or the judge of a seed, trained with these flags of train_tiny.py if it is not in the folder."""
    torch.set_num_threads(1)
    folder = folder / f"{name}-{seed}"
    if not (folder / "config.json").exists():
        corpus = half(corpus_of(flags["data"], flags.get("val_data")), name == "judge")
        options = train_tiny.Options(**train_tiny.MDLM, **flags, layers=LAYERS[name], seed=seed)
        options = train_tiny.settled(options, corpus)
        ar, _ = train_tiny.ar_model(replace(options, out=str(folder)), corpus, torch.device("cpu"))
        with redirect_stdout(io.StringIO()):
            log = Log(writable(folder.with_name(folder.name + "-log")) / "log.jsonl", {}, False)
            train_tiny.pretrain(ar, corpus, options, log)
            net, layout = (ar, None) if name == "judge" else whole_text(ar, corpus, options, log)
        hub.save(folder, net, corpus.tokenizer, layout)
    return hub.load(folder)[0].requires_grad_(False)


def whole_text(ar, corpus: Corpus, options, log) -> tuple:
    """The model of whole texts that an AR model becomes, and how it is wired."""
    net, recipe = copy.deepcopy(ar).init_mask(), train_tiny.recipe_of(options, corpus.tokenizer.eot)
    optimizer = optimizer_named(options.optimizer, net, options.lr)
    for record in train_tiny.distil(net, ar, corpus, recipe, options, optimizer):
        log.write({"phase": "distil", **record})
    return net, recipe.layout


def models(options, seed: int) -> dict:
    return {name: model(name, seed, options.flags, folder_of(options)) for name in LAYERS}


def kept(options, name: str, make) -> dict:
    """What make() gives; made before: read."""
    file = folder_of(options) / f"{name}.json"
    if not file.exists():
        write_json(file, make())
    return json.loads(file.read_text())


def measured(options, seed: int) -> dict:
    """The curves, and the gap of the bounds that they should integrate to."""
    def make():
        nets, corpus = models(options, seed), corpus_of(options.data, options.val_data)
        eot, length = corpus.tokenizer.eot, nets["H"].config.context
        held = measure.held_out(corpus.val, stories(corpus.val, eot), 16 if options.quick else 512, length)
        both = nets["H"], nets["L"], held, length, eot
        found = {**importance.curves(*both), "gap": importance.gap(*both, draws=2 if options.quick else 16, seed=1)}
        write_json(folder_of(options) / f"L-{seed}" / MEASURED, found)
        return found
    return kept(options, f"curves-{seed}", make)


def sampled(options, seed: int, name: str, plan: Schedule, steps: int, samples: int) -> dict:
    """What is said of texts written from nothing by the plan, and what each model did for them."""
    def make():
        nets, corpus = models(options, seed), corpus_of(options.data, options.val_data)
        length, tok = nets["H"].config.context, corpus.tokenizer
        denoiser, rule = Scheduled(nets, Layout(length, length, 0), plan), reveal.parse(f"ancestral:{steps}")
        texts, work, begun = [], {}, time.perf_counter()
        for i in range(0, samples, 128):
            rows = range(i, min(i + 128, samples))
            u = opdlm.uniforms(seed, 0, rows, (length, rule.numbers(length)))
            prompt = torch.full((len(rows), 1), tok.eot)
            texts.append((opdlm.rollout(denoiser, prompt, length - 1, rule, u, tok.eot), prompt[:, 0] * 0 + 1))
            for name, one in denoiser.denoisers.items():
                work[name] = work.get(name, 0) + int(one.forwards.sum()) / samples
        check = toy.check if corpus.name == "toy" else None
        numbers = measure.generated(nets["judge"], texts, time.perf_counter() - begun, tok, check)
        return {"steps": plan.steps(), "passes": work, "saved": saved(nets, plan, length), **numbers}
    return kept(options, f"{name}-{steps}-{samples}-{seed}".replace(" ", "_"), make)


def saved(nets: dict, plan: Schedule, length: int) -> dict:
    """The share of a text's FLOPs, a pass at each step: of the blocks' (the paper's count), and with the head."""
    body, head = ({name: f(nets[name]) for name in "HL"} for f in (
        lambda net: measure.body_flops(net.config, length), lambda net: measure.head_flops(net.config)))
    light = plan.steps().count("L") / len(plan.steps())
    return {"blocks": light * (1 - body["L"] / body["H"]),
            "with head": light * (1 - (body["L"] + head["L"]) / (body["H"] + head["H"]))}


def folder_of(options) -> Path:
    """What was trained otherwise lies elsewhere."""
    return WORK / ("quick" if options.quick else "") / f"{options.name}-{options.pretrain}-{options.updates}"
