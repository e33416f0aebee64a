"""The models of experiments/scheduling.py, and what it asks them: of whole texts with 6 and 2 blocks, a judge with 8.

The first half of the training stories is for the two, which see the same rows in the same order, the other half for the
judge. What is trained, measured or sampled lies in out/ and is not made again.
"""
import copy
import io
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
from experiments.results import kept
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


def measured(options, seed: int) -> dict:
    """The curves, and the gap of the bounds that they should integrate to."""
    draws, count = (2, 16) if options.quick else (32, 512)

    def make():
        nets, corpus = models(options, seed), corpus_of(options.data, options.val_data)
        eot, length = corpus.tokenizer.eot, nets["H"].config.context
        held = measure.held_out(corpus.val, stories(corpus.val, eot), count, length)
        both = nets["H"], nets["L"], held, length, eot
        return {**importance.curves(*both), "gap": importance.gap(*both, draws=draws, seed=1)}
    found = kept(folder_of(options) / f"curves-{seed}.json", {"stories": count, "draws": draws}, make)
    write_json(folder_of(options) / f"L-{seed}" / MEASURED, found)
    return found


def written(nets: dict, plan: Schedule, steps: int, rows: range, seed: int, eot: int) -> tuple[opdlm.Text, Scheduled]:
    """Texts of the `rows` of a seed, from nothing, and what wrote them."""
    length, rule = nets["H"].config.context, reveal.parse(f"ancestral:{steps}")
    denoiser, u = Scheduled(nets, Layout(length, length, 0), plan), opdlm.uniforms(
        seed, 0, rows, (length, rule.numbers(length)))
    return opdlm.rollout(denoiser, torch.full((len(rows), 1), eot), length - 1, rule, u, eot), denoiser


def sampled(options, seed: int, name: str, plan: Schedule, steps: int, samples: int) -> dict:
    """What is said of texts written by the plan, and what each model did for one."""
    def make():
        nets, corpus = models(options, seed), corpus_of(options.data, options.val_data)
        tok, texts, work = corpus.tokenizer, [], {}
        for i in range(0, samples, 128):
            text, denoiser = written(nets, plan, steps, range(i, min(i + 128, samples)), seed, tok.eot)
            texts.append((text, torch.ones(len(text.tokens), dtype=torch.long)))
            for letter, one in denoiser.denoisers.items():
                now = {"forwards": int(one.forwards.sum()), "positions": int(one.positions.sum())}
                work[letter] = {what: work.get(letter, {}).get(what, 0) + n / samples for what, n in now.items()}
        check = toy.check if corpus.name == "toy" else None
        numbers = measure.generated(nets["judge"], texts, 1.0, tok, check)
        return {"steps": plan.steps(), "work": work, "saved": saved(nets, plan, nets["H"].config.context), **numbers}
    file = folder_of(options) / f"{name}-{steps}-{samples}-{seed}.json".replace(" ", "_")
    return kept(file, {"steps": plan.steps()}, make)


def seconds(options, seed: int, plans: dict[str, Schedule], steps: int, samples: int, turns: int) -> dict:
    """Of `samples` texts at once, by plan, a number a turn. Nothing else may run meanwhile."""
    torch.set_num_threads(1)
    nets, eot = models(options, seed), corpus_of(options.data, options.val_data).tokenizer.eot
    found = {name: [] for name in plans}
    for _ in range(turns):
        for name, plan in plans.items():
            begun = time.perf_counter()
            written(nets, plan, steps, range(samples), seed, eot)
            found[name].append(time.perf_counter() - begun)
    return found


def saved(nets: dict, plan: Schedule, length: int) -> dict:
    """The share of a text's FLOPs, a pass of all positions at each step: of the blocks' (the paper's count), and with
    the head."""
    body, head = ({name: f(nets[name]) for name in "HL"} for f in (
        lambda net: measure.body_flops(net.config, length), lambda net: measure.head_flops(net.config)))
    light = plan.steps().count("L") / len(plan.steps())
    return {"blocks": light * (1 - body["L"] / body["H"]),
            "with head": light * (1 - (body["L"] + head["L"]) / (body["H"] + head["H"]))}


def folder_of(options) -> Path:
    """What was trained otherwise lies elsewhere."""
    return WORK / ("quick" if options.quick else "") / f"{options.name}-{options.pretrain}-{options.updates}"
