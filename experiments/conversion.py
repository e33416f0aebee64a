"""One conversion, watched while it learns: what the experiments here are made of. A row is flags of train_tiny.py.

Every row trains at a constant rate and is judged by a running mean of its weights, over about the last tenth of its
updates (a power mean, Karras et al., 2312.02696): tokens to reach a quality can be read off one run. A finished
conversion lies in out/experiments and is not run again; an unfinished one starts again.
"""
import copy
import io
import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch

import opdlm
import train_tiny
from data import toy
from data.corpus import open_corpus
from data.tinystories import Corpus, stories
from experiments.results import flops
from model import hub
from model.dist import Log
from model.masks import AR
from model.muon import optimizer_named, schedule
from model.state import writable
from report import measure
from report.publish import write_json

WORK = Path("out/experiments")
corpus_of = cache(open_corpus)      # once a process


@dataclass(frozen=True)
class Job:
    """A conversion of the teacher of `seed`, and when and how it is looked at."""
    name: str                           # of the row
    seed: int
    flags: dict                         # of train_tiny.py
    points: tuple                       # updates after which the student is judged
    looks: tuple = ("",)                # ways to sample: flags of train_tiny.py, "block=8 reveal=static:2"
    recipes: Callable | None = None     # (recipe, rollouts) -> the recipes that rollouts take in turn
    start: Callable | None = None       # something done to the student before
    stories: int = 256                  # that a look is made of
    pretrain: dict | None = None        # flags of the teacher
    folder: str = "full"                # under out/experiments
    copies: int = 1                     # of each text in a batch, by its recipes: a text's tokens count once

    @property
    def file(self) -> Path:
        return WORK / self.folder / f"{self.name}-{self.seed}.json".replace(" ", "")

    @property
    def settings(self) -> dict:
        """What JSON can hold of it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
                if not callable(value) and name != "folder" and (name, value) != ("copies", 1)}


def options_of(job: Job, more: str = "") -> train_tiny.Options:
    """Flags as a value; `more` are those of a look."""
    given = {"data": "toy", **(job.pretrain or {}), "warm_steps": 0, "updates": 1, **job.flags, "seed": job.seed,
             "distill_steps": max(job.points)}
    given |= {name: int(value) if value.isdigit() else value for name, value in (x.split("=") for x in more.split())}
    return train_tiny.Options(**given)


def opened(job: Job) -> tuple[train_tiny.Options, Corpus]:
    options = options_of(job)
    corpus = corpus_of(options.data, options.val_data, options.vocab)
    return train_tiny.settled(options, corpus), corpus


def teacher_of(job: Job) -> torch.nn.Module:
    """The AR model of a seed, trained if it is not there."""
    torch.set_num_threads(1)
    options, corpus = opened(job)
    options = replace(options, out=str(WORK / job.folder / f"ar-{corpus.name}-{job.seed}"))
    with redirect_stdout(io.StringIO()):
        net, untrained = train_tiny.ar_model(options, corpus, torch.device("cpu"))
        if untrained:
            train_tiny.pretrain(net, corpus, options, Log(writable(Path(options.out)) / "log.jsonl", {}, False))
            hub.save(Path(options.out, "ar"), net, corpus.tokenizer, trained=untrained)
    return net.requires_grad_(False)


def updates(student, teacher, corpus, recipes: list, options) -> Iterator[dict]:
    """Each update's record, the recipes taken in turn, rollout by rollout."""
    optimizer = optimizer_named(options.optimizer, student, options.lr)
    rate, each = schedule(optimizer, "constant", options.distill_steps), recipes[0].updates
    data = partial(train_tiny.draw, corpus, length=options.length, seed=options.seed, device="cpu")
    rate(0)
    for first in range(0, options.distill_steps, each):
        recipe, steps = recipes[first // each % len(recipes)], range(first, min(first + each, options.distill_steps))
        for record in opdlm.train(student, teacher, data, recipe, optimizer, lambda step: options.length, steps):
            yield record
            rate(record["step"])


@torch.no_grad()
def take_in(mean, net, step: int, power: int = 9) -> None:
    """Move the mean of the weights on, after the `step`-th update."""
    share = 1 - (1 - 1 / step) ** (power + 1)
    torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), share)


def judge(net, teacher, job: Job, corpus, held: list, options, layout=None) -> dict:
    """The likelihood, and for each look what is written; with a `layout` under that and the rule of the AR model."""
    recipe = train_tiny.recipe_of(options, corpus.tokenizer.eot)
    check = toy.check if corpus.name == "toy" else None
    numbers = measure.likelihood(net, held, layout or recipe.layout, corpus.tokenizer)
    for look in job.looks:
        how = train_tiny.recipe_of(options_of(job, look), recipe.eot)
        writer = measure.by_rule(net, layout or how.layout, how.rule)
        made = measure.generate(writer, held, recipe.eot, options.length, job.seed)
        numbers[look] = measure.generated(teacher, *made, corpus.tokenizer, check)
    return numbers


def ar_numbers(teacher, job: Job, corpus, held: list, options) -> dict:
    """The same of the AR model."""
    numbers = judge(teacher, teacher, replace(job, flags={}, looks=("reveal=static:1",)), corpus, held, options, AR)
    return numbers | numbers.pop("reveal=static:1")


def run(job: Job) -> dict:
    """The conversion: its points, each with what it took to come there. Finished before, with these settings: read."""
    if job.file.exists() and (found := json.loads(job.file.read_text()))["settings"] == job.settings:
        return found
    torch.set_num_threads(1)
    options, corpus = opened(job)
    teacher, recipe = teacher_of(job), train_tiny.recipe_of(options, corpus.tokenizer.eot)
    held = measure.held_out(corpus.val, stories(corpus.val, recipe.eot), job.stories, options.length)
    student = copy.deepcopy(teacher).init_mask().requires_grad_(True)
    if job.start:
        job.start(student)
    mean, rollouts = copy.deepcopy(student), -(-options.distill_steps // recipe.updates)
    recipes = job.recipes(recipe, rollouts) if job.recipes else [recipe]
    spent, points = dict.fromkeys(("tokens", "places", "positions", "flops"), 0), []
    for record in updates(student, teacher, corpus, recipes, options):
        take_in(mean, student, record["step"])
        now = {**record, "flops": flops(student.config, record, recipe), "tokens": record["tokens"] / job.copies}
        spent = {name: spent[name] + now[name] for name in spent}
        if record["step"] in job.points:
            points.append({"step": record["step"], **spent, **judge(mean, teacher, job, corpus, held, options)})
    result = {"settings": job.settings, "points": points, "teacher": ar_numbers(teacher, job, corpus, held, options)}
    write_json(job.file, result)
    return result
