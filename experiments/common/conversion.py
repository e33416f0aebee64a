"""One conversion, watched while it learns: what the experiments here are made of. A row is flags of train_tiny.py.

Every row trains at a constant rate and is judged by a running mean of its weights, over about the last tenth of its
updates (a power mean, Karras et al., 2312.02696): tokens to reach a quality can be read off one run. A finished
conversion lies in out/experiments and is not run again; an unfinished one starts again.
"""
import copy
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

import opdlm
import train_tiny
from data.corpus import open_corpus
from data.tinystories import Corpus, stories
from experiments.common.job import WORK, Job, options_of
from experiments.common.looks import ar_numbers, judge
from experiments.common.results import flops
from model import checkpoint
from report import metrics
from report.compare import write_json
from training.log import Log
from training.optim import lr_schedule, make_optimizer
from training.resume import check_writable

corpus_of = cache(open_corpus)      # once a process


def opened(job: Job) -> tuple[train_tiny.Config, Corpus]:
    options = options_of(job)
    corpus = corpus_of(options.data, options.val_data, options.vocab)
    return train_tiny.resolve_options(options, corpus), corpus


def teacher_of(job: Job) -> torch.nn.Module:
    """The AR model of a seed, trained if it is not there."""
    torch.set_num_threads(1)
    options, corpus = opened(job)
    options = replace(options, out=str(WORK / job.folder / f"ar-{corpus.name}-{job.seed}"))
    with redirect_stdout(io.StringIO()):
        net, is_trained = train_tiny.ar_model(options, corpus, torch.device("cpu"))
        if not is_trained:
            train_tiny.pretrain(net, corpus, options, Log(check_writable(Path(options.out)) / "log.jsonl", {}, False))
            checkpoint.save(Path(options.out, "ar"), net, corpus.tokenizer,
                            trained=train_tiny.pretrain_settings(options, corpus))
    return net.requires_grad_(False)


def updates(student, teacher, corpus, recipes: list, options) -> Iterator[dict]:
    """Each update's record, the recipes taken in turn, rollout by rollout."""
    optimizer = make_optimizer(options.optimizer, student, options.lr)
    rate, each = lr_schedule(optimizer, "constant", options.distill_steps), recipes[0].updates_per_rollout
    data = partial(train_tiny.get_batch, corpus, length=options.length, seed=options.seed, device="cpu")
    rate(0)
    for first in range(0, options.distill_steps, each):
        recipe, steps = recipes[first // each % len(recipes)], range(first, min(first + each, options.distill_steps))
        for record in opdlm.train(student, teacher, data, recipe, optimizer, lambda step: options.length, steps):
            yield record
            rate(record["step"])


def recipes_of(job: Job, recipe: opdlm.Recipe, options) -> list[opdlm.Recipe]:
    """Those that rollouts take in turn."""
    return job.recipes(recipe, -(-options.distill_steps // recipe.updates_per_rollout)) if job.recipes else [recipe]


@torch.no_grad()
def take_in(mean, net, step: int, power: int = 9) -> None:
    """Move the mean of the weights on, after the `step`-th update."""
    share = 1 - (1 - 1 / step) ** (power + 1)
    torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), share)


def run(job: Job) -> dict:
    """The conversion: its points, each with what it took to come there. Finished before, with these settings: read."""
    if job.file.exists() and (found := json.loads(job.file.read_text()))["settings"] == job.settings:
        return found
    torch.set_num_threads(1)
    options, corpus = opened(job)
    teacher, recipe = teacher_of(job), train_tiny.make_recipe(options, corpus.tokenizer.eot)
    held = metrics.held_out(corpus.val, stories(corpus.val, recipe.eot), job.stories, options.length)
    student = copy.deepcopy(teacher).init_mask().requires_grad_(True)
    if job.start:
        job.start(student)
    mean, recipes = copy.deepcopy(student), recipes_of(job, recipe, options)
    spent = dict.fromkeys(("tokens", "loss_positions", "positions", "flops"), 0)
    points = [{"step": 0, **spent, **judge(mean, teacher, job, corpus, held, options)}] if 0 in job.points else []
    for record in updates(student, teacher, corpus, recipes, options):
        take_in(mean, student, record["step"])
        now = {**record, "flops": flops(student.config, record, recipe), "tokens": record["tokens"] / job.copies}
        spent = {name: spent[name] + now[name] for name in spent}
        if record["step"] in job.points:
            points.append({"step": record["step"], **spent, **judge(mean, teacher, job, corpus, held, options)})
    result = {"settings": job.settings, "points": points, "teacher": ar_numbers(teacher, job, corpus, held, options)}
    write_json(job.file, result)
    return result
