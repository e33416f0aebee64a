"""What a conversion keeps of what it does not see: a teacher of two story worlds, converted with text of one.

    python -m experiments.retention.run             three seeds: about two hours on two cores
    python -m experiments.retention.run --quick     does it run at all? a minute

The teacher has learned from both worlds (worlds.py). Rows learn from stories of the first world alone, or
from text that the student or the teacher writes, and every student is evaluated in both worlds. Writes
experiments/retention/results/worlds.json and .png.
"""
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from data.tinystories import Corpus, stories
from experiments.common.conversion import convert_all, load_teacher, open_job, saved_result, train_student
from experiments.common.evaluation import evaluate, evaluate_teacher
from experiments.common.job import Job, quick_job
from experiments.common.results import run_info, save_results
from experiments.on_policy.run import DATA, OWN_TEXT
from experiments.on_policy.run import ROWS as FEW_STORIES
from experiments.retention import worlds
from experiments.retention.tables import AR_ROW, BOTH_ROW, ONE_PER_PASS, SAMPLERS, plot, table
from report import metrics
from report.compare import write_json
from training import cli

# Blocks of one token under the AR model's mask: the loss is that of an AR model.
AR_LOSS = {"source": "data", "states": "all", "target": "onehot", "weight": "mean", "block": 1}
NO_PROMPTS = {"max_prompt": 1}      # texts begin with the end-of-text token alone
ROWS = {        # flags of train_tiny.py
    AR_ROW: AR_LOSS,
    "SDAR": FEW_STORIES["SDAR"],
    "stories": DATA,
    "own text": OWN_TEXT,
    "own text, no prompts": OWN_TEXT | NO_PROMPTS,
    "teacher's text, no prompts": DATA | NO_PROMPTS | {"source": "teacher"},
    BOTH_ROW: DATA,
}
TEACHER = {"pretrain_steps": 960, "pretrain_batch": 32, "width": 128, "length": 96}


@dataclass
class Options:
    rates: str = "0.005,0.01"  # learning rates; the page has every one
    updates: int = 320  # updates of 16 rows
    stories: int = 256  # held-out stories of each world that an evaluation continues
    seeds: int = 3  # teachers, and conversions of each
    workers: int = 2  # conversions at a time, each on one core
    quick: bool = False  # tiny models, four updates, one rate: does it run at all?


def job_of(row: str, rate: float, seed: int, options: Options) -> Job:
    writes = ROWS[row]["source"] == "student"
    job = Job(
        name=f"{row}, lr {rate}",
        seed=seed,
        flags=ROWS[row] | {"lr": rate},
        eval_steps=(options.updates,),
        corpus=worlds.both_worlds,
        samplers=(ONE_PER_PASS,) if row == AR_ROW else SAMPLERS,
        stories=options.stories,
        mean_writes=writes,
        teacher_flags=TEACHER,
        folder="retention",
    )
    if not options.quick:
        return job
    small = quick_job(job)
    return replace(small, teacher_flags=TEACHER | small.teacher_flags)


def untrained_job(seed: int, options: Options) -> Job:
    """The student before its first update: the control of every number."""
    job = job_of("stories", 0.01, seed, options)
    return replace(job, name="untrained", eval_steps=(0, 1))


def learned_worlds(job: Job) -> tuple[str, ...]:
    """The worlds whose stories, or whose prompts, a conversion has."""
    return worlds.WORLDS if job.name.startswith(BOTH_ROW) else (worlds.FIRST,)


def convert(job: Job) -> dict:
    """A conversion's evaluations by world; read from out/ if it is there."""
    if found := saved_result(job):
        return found
    torch.set_num_threads(1)
    config, both = open_job(job)
    teacher = load_teacher(job)
    text = worlds.corpus_of(*learned_worlds(job))
    points = []
    for step, mean, spent in train_student(job, teacher, text, config):
        if step in job.eval_steps:
            found = {}
            for world in worlds.WORLDS:
                corpus, held, judge = held_out_of(world, job, config)
                found[world] = evaluate(mean, teacher, job, corpus, held, config, judge=judge)
            points.append({"step": step, **spent, **found})
    of_teacher = {}
    for world in worlds.WORLDS:
        corpus, held, judge = held_out_of(world, job, config)
        of_teacher[world] = evaluate_teacher(teacher, job, corpus, held, config, judge)
    result = {"settings": job.settings, "points": points, "teacher": of_teacher}
    write_json(job.file, result)
    return result


def held_out_of(world: str, job: Job, config) -> tuple[Corpus, list[torch.Tensor], Callable]:
    """A world's corpus, its first held-out stories, and its judge."""
    corpus = worlds.corpus_of(world)
    starts = stories(corpus.val, corpus.tokenizer.bos)
    held = metrics.held_out(corpus.val, starts, job.stories, config.length)
    return corpus, held, partial(worlds.breaks, world)


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, rates="0.01", seeds=1, updates=4, stories=16)
    results = run_info("retention", options)
    jobs = []
    for seed in range(options.seeds):
        jobs.append(untrained_job(seed, options))
        for rate in map(float, options.rates.split(",")):
            jobs += [job_of(row, rate, seed, options) for row in ROWS]
    results["runs"] = convert_all(jobs, options.workers, convert)
    save_results("retention", "worlds", results, plot, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
