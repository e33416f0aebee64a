"""Runs conversions: trains a student at a constant learning rate and evaluates it while it learns.

Evaluated is a running mean of the student's weights over about the last tenth of its updates (a power mean,
Karras et al., 2312.02696). So the tokens needed for a quality can be read off one run, without a decaying
learning rate. A finished conversion is in out/experiments and is not run again; an unfinished one starts from
its beginning.
"""
import copy
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

import torch

import opdlm
import train_tiny
from data.corpus import open_corpus
from data.tinystories import Corpus, stories
from experiments.common.evaluation import evaluate, evaluate_teacher
from experiments.common.job import WORK, Job, config_of
from model import checkpoint
from report import metrics
from report.compare import write_json
from training.log import Log
from training.optim import lr_schedule, make_optimizer
from training.resume import check_writable

cached_corpus = cache(open_corpus)      # once per process


def open_job(job: Job) -> tuple[train_tiny.Config, Corpus]:
    """The job's configuration with every default filled in, and its corpus."""
    config = config_of(job)
    corpus = job.corpus() if job.corpus else cached_corpus(config.data, config.val_data, config.vocab)
    return train_tiny.resolve_options(config, corpus), corpus


def first_stories(corpus: Corpus, count: int | None) -> Corpus:
    """The corpus with its first `count` training stories; with all of them if `count` is None."""
    if count is None:
        return corpus
    if not 0 < count < len(corpus.starts):
        raise ValueError(f"train_stories={count}: expected 1 to {len(corpus.starts) - 1}")
    end = corpus.starts[count] + 1                               # with the end-of-text after the last one
    return Corpus(corpus.train[:end], corpus.val, corpus.tokenizer, corpus.name)


def load_teacher(job: Job) -> torch.nn.Module:
    """The AR model of the job's seed; pretrained first, if out/ does not have it."""
    torch.set_num_threads(1)
    config, corpus = open_job(job)
    config = replace(config, out=str(WORK / job.folder / f"ar-{corpus.name}-{job.seed}"))
    with redirect_stdout(io.StringIO()):
        net, is_trained = train_tiny.ar_model(config, corpus, torch.device("cpu"))
        if not is_trained:
            log = Log(check_writable(Path(config.out)) / "log.jsonl", {}, False)
            train_tiny.pretrain(net, corpus, config, log)
            settings = train_tiny.pretrain_settings(config, corpus)
            checkpoint.save(Path(config.out, "ar"), net, corpus.tokenizer, trained=settings)
    return net.requires_grad_(False)


def train_updates(student, teacher, corpus, recipes: list, config) -> Iterator[dict]:
    """One record per update. The recipes take turns, one per rollout."""
    optimizer = make_optimizer(config.optimizer, student, config.lr)
    set_lr = lr_schedule(optimizer, "constant", config.distill_steps)
    data = partial(train_tiny.get_batch, corpus, length=config.length, seed=config.seed, device="cpu")
    each = recipes[0].updates_per_rollout
    set_lr(0)
    for first in range(0, config.distill_steps, each):
        recipe = recipes[first // each % len(recipes)]
        steps = range(first, min(first + each, config.distill_steps))
        records = opdlm.train(student, teacher, data, recipe, optimizer, lambda step: config.length, steps)
        began = time.perf_counter()
        for record in records:
            yield record | {"seconds": time.perf_counter() - began}
            began = time.perf_counter()                          # an evaluation does not count
            set_lr(record["step"])


def recipes_of(job: Job, recipe: opdlm.Recipe, config) -> list[opdlm.Recipe]:
    """The recipes that the job's rollouts use in turn."""
    if job.recipes is None:
        return [recipe]
    rollouts = -(-config.distill_steps // recipe.updates_per_rollout)
    return job.recipes(recipe, rollouts)


@torch.no_grad()
def update_mean(mean, net, step: int, power: int = 9) -> None:
    """Moves the mean of the weights on, after update number `step` (from 1)."""
    share = 1 - (1 - 1 / step) ** (power + 1)
    torch._foreach_lerp_(list(mean.parameters()), list(net.parameters()), share)


def update_flops(config, record: dict, recipe: opdlm.Recipe) -> float:
    """FLOPs of one update: its rollout, the teacher where it is the target, both student streams."""
    teacher_passes = int(recipe.target is not opdlm.one_hot)
    body = metrics.body_flops(config, record["len"] / 2)
    head = metrics.head_flops(config)
    body_positions = record["positions"] + (teacher_passes + 6) * record["tokens"]
    head_positions = record["positions"] + (teacher_passes + 3) * record["loss_positions"]
    return body * body_positions + head * head_positions


def written_by(writer: torch.nn.Module, source: Callable) -> Callable:
    """The source of text `source`, where another net writes in the student's place."""
    def text(student, teacher, *args) -> opdlm.Rollout:
        return source(writer, teacher, *args)
    return text


def train_student(job: Job, teacher, corpus: Corpus, config) -> Iterator[tuple[int, torch.nn.Module, dict]]:
    """Converts the teacher. Yields the number of updates, the mean student and what was spent, before the
    first update and after each."""
    corpus = first_stories(corpus, job.train_stories)
    recipe = train_tiny.make_recipe(config, corpus.tokenizer.eot)
    student = copy.deepcopy(teacher).init_mask().requires_grad_(True)
    if job.prepare_student:
        job.prepare_student(student)
    mean = copy.deepcopy(student)
    if job.mean_writes:
        recipe = replace(recipe, source=written_by(mean, recipe.source))
    spent = dict.fromkeys(("tokens", "loss_positions", "positions", "flops", "seconds"), 0)
    yield 0, mean, spent
    for record in train_updates(student, teacher, corpus, recipes_of(job, recipe, config), config):
        update_mean(mean, student, record["step"])
        record["flops"] = update_flops(student.config, record, recipe)
        record["tokens"] = record["tokens"] / job.copies     # a repeated text counts once
        spent = {name: spent[name] + record[name] for name in spent}
        yield record["step"], mean, spent


def saved_result(job: Job) -> dict | None:
    """What an earlier conversion with the same settings has left in out/."""
    if not job.file.exists():
        return None
    found = json.loads(job.file.read_text())
    return found if found["settings"] == job.settings else None


def convert(job: Job) -> dict:
    """A conversion's evaluations, each with what it took to get there; read from out/ if it is there."""
    if found := saved_result(job):
        return found
    torch.set_num_threads(1)
    config, corpus = open_job(job)
    teacher = load_teacher(job)
    starts = stories(corpus.val, corpus.tokenizer.eot)[job.first_story:]
    held = metrics.held_out(corpus.val, starts, job.stories, config.length)
    points = []
    for step, mean, spent in train_student(job, teacher, corpus, config):
        if step in job.eval_steps:
            points.append({"step": step, **spent, **evaluate(mean, teacher, job, corpus, held, config)})
    result = {
        "settings": job.settings,
        "points": points,
        "teacher": evaluate_teacher(teacher, job, corpus, held, config),
    }
    write_json(job.file, result)
    return result


def load_student(job: Job) -> tuple[torch.nn.Module, object]:
    """The job's student after its last update, and its Layout; converted first, if out/ does not have it."""
    folder = job.file.with_suffix("")
    settings_file = folder / "job.json"
    if not settings_file.exists() or json.loads(settings_file.read_text()) != job.settings:
        config, corpus = open_job(job)
        teacher = load_teacher(job)
        for _, net, _ in train_student(job, teacher, corpus, config):
            mean = net                           # after the last update: the student
        layout = train_tiny.make_recipe(config, corpus.tokenizer.eot).layout
        checkpoint.save(folder, mean, corpus.tokenizer, layout)
        write_json(settings_file, job.settings)
    net, layout = checkpoint.load(folder)
    return net.requires_grad_(False), layout


def prepare_teacher(job: Job) -> None:
    """Makes sure that the teacher is in out/ before two processes need it at once."""
    load_teacher(job)


def convert_all(jobs: list[Job], workers: int = 2, convert: Callable = convert) -> list[dict]:
    """The result of every job, in order, several at a time with a core each. Prints the time left."""
    results = {}
    began = time.perf_counter()
    fresh = [job for job in jobs if not job.file.exists()]
    one_per_seed = {job.seed: job for job in jobs}.values()
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(prepare_teacher, one_per_seed))
        longest_first = sorted(jobs, key=lambda job: -max(job.eval_steps))
        waiting = {pool.submit(convert, job): job for job in longest_first}
        for count, future in enumerate(as_completed(waiting), 1):
            job = waiting[future]
            results[job.name, job.seed] = future.result()
            minutes = (time.perf_counter() - began) / 60
            done = sum((job.name, job.seed) in results for job in fresh)
            left = minutes / max(done, 1) * (len(fresh) - done)
            print(
                f"{count}/{len(jobs)} {job.name}, seed {job.seed} | {minutes:.0f} min, {left:.0f} left",
                flush=True,
            )
    return [results[job.name, job.seed] for job in jobs]
