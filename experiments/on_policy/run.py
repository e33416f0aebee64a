"""Where a student's own text pays: conversions that have only a few stories, or only prompts.

    python -m experiments.on_policy.run             three seeds: about three hours on two cores
    python -m experiments.on_policy.run --quick     does it run at all? a minute

The teacher has learned from all stories of the story world; the conversion has the first 16, 64 or 256 of
them, or all. Learning rates are chosen with seed 0 on development stories, which no other number is of: with
64 stories, for rows that learn from stories also with all. Writes experiments/on_policy/results/scarce.json
and .png.
"""
import sys
from dataclasses import dataclass, replace
from functools import partial

from experiments.common import changes
from experiments.common.conversion import convert_all
from experiments.common.job import Job, quick_job
from experiments.common.results import run_info, save_results
from experiments.on_policy.tables import BY_MEAN, COST, FEW, SAMPLERS, best_rates, plot, table
from training import cli

# flags of train_tiny.py
DATA = {"source": "data", "states": "prefix", "target": "teacher", "weight": "first"}
OWN_TEXT = DATA | {"source": "student", "states": "visited"}
ROWS = {
    "SDAR": {"source": "data", "states": "random", "target": "onehot", "weight": "1/t"},
    "stories": DATA,
    "teacher's text": DATA | {"source": "teacher"},
    "own text": OWN_TEXT,
    BY_MEAN: OWN_TEXT,
}
NO_PROMPTS = "own text, no prompts"         # texts that begin with the end-of-text token alone
ONE_PER_PASS = "own text, one per pass"     # the student writes one token per forward pass, from the left
WARM_START = "own text, warm start"         # the first quarter of the updates learns from the stories
DEVELOPMENT = 512      # number of the first development story


@dataclass
class Options:
    rates: str = "0.005,0.01,0.02,0.04"  # learning rates of the grid
    counts: str = "16,64,256,all"  # stories that a conversion has
    updates: int = 320  # updates of 16 rows
    stories: int = 256  # held-out stories that an evaluation continues
    seeds: int = 3  # teachers, and conversions of each
    workers: int = 2  # conversions at a time, each on one core
    quick: bool = False  # tiny models, four updates, one rate: does it run at all?


def job_of(row: str, count: int | None, rate: float, seed: int, options: Options) -> Job:
    """A conversion that has the first `count` stories."""
    variants = {
        NO_PROMPTS: OWN_TEXT | {"max_prompt": 1},
        ONE_PER_PASS: OWN_TEXT | {"reveal": "leftmost:1"},
        WARM_START: OWN_TEXT,
    }
    flags = (ROWS | variants)[row]
    job = Job(
        name=f"{row}, {count or 'all'} stories, lr {rate}",
        seed=seed,
        flags=flags | {"lr": rate},
        eval_steps=(options.updates,),
        samplers=SAMPLERS,
        stories=options.stories,
        train_stories=count,
        mean_writes=row == BY_MEAN,
        recipes=partial(changes.stories_first, 0.25) if row == WARM_START else None,
        folder="on_policy",
    )
    return quick_job(job) if options.quick else job


def trial_of(row: str, count: int | None, rate: float, options: Options) -> Job:
    """A conversion of seed 0, evaluated on development stories."""
    job = job_of(row, count, rate, 0, options)
    return replace(
        job,
        name=f"trial, {job.name}",
        eval_steps=job.eval_steps[-1:],
        samplers=(f"cost={COST}",),
        stories=min(128, job.stories),
        first_story=DEVELOPMENT,
    )


def trials(options: Options) -> list[Job]:
    """The grid of learning rates."""
    jobs = []
    for rate in map(float, options.rates.split(",")):
        for row, flags in ROWS.items():
            jobs.append(trial_of(row, FEW, rate, options))
            if flags["source"] == "data":
                jobs.append(trial_of(row, None, rate, options))
    return jobs


def untrained_job(seed: int, options: Options) -> Job:
    """The student before its first update: the control of every number."""
    job = job_of("own text", FEW, 0.01, seed, options)
    return replace(job, name="untrained", eval_steps=(0, 1))


def jobs_of(options: Options, rates: dict[tuple[str, bool], float]) -> list[Job]:
    """The conversions of the table. `rates` is by row and whether it has all stories."""
    jobs = []
    for seed in range(options.seeds):
        jobs.append(untrained_job(seed, options))
        own_rate = rates["own text", False]
        jobs.append(job_of(NO_PROMPTS, None, own_rate, seed, options))
        jobs.append(job_of(ONE_PER_PASS, FEW, own_rate, seed, options))
        jobs.append(job_of(WARM_START, FEW, own_rate, seed, options))
        for count in options.counts.split(","):
            number = None if count == "all" else int(count)
            for row in ROWS:
                rate = rates.get((row, number is None), rates[row, False])
                jobs.append(job_of(row, number, rate, seed, options))
    return jobs


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, rates="0.01", counts="16,all", seeds=1, updates=4, stories=16)
    results = run_info("on_policy", options)
    results["trials"] = convert_all(trials(options), options.workers)
    rates = best_rates(results["trials"])
    results["runs"] = convert_all(jobs_of(options, rates), options.workers)
    save_results("on_policy", "scarce", results, plot, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
