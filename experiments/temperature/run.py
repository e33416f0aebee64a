"""The temperature of the text that a student learns from, against the temperature at which it decodes.

    python -m experiments.temperature.run           the story world, three seeds: about an hour on two cores
    python -m experiments.temperature.run --quick   does it run at all? a minute
    python -m experiments.temperature.run --data=FILE.txt --val_data=FILE.txt --length=128 --updates=160 \
        --stories=64 --rates=0.01,0.02,0.04 --rate=0.02

Speculative decoding: the student drafts a block and verifies it itself, or its teacher does. The learning
rates of the grid are tried with seed 0 on development stories, which no other number is of. Writes
experiments/temperature/results/VARIANT.json and .png, VARIANT being story_world or, with --data,
tinystories.
"""
import sys
from dataclasses import dataclass, replace

from experiments.common.conversion import convert_all
from experiments.common.job import Job, quick_job, without_paths
from experiments.common.results import run_info, save_results, variant_of
from experiments.temperature.tables import SAMPLERS, TEMPERATURES, best_rates, plot, table
from training import cli

# Drafts start with all of a block masked. The clean loss on training text keeps the student a good verifier.
DRAFTS = {"states": "all", "target": "teacher", "weight": "mean", "clean_weight": 0.5, "clean_text": "data"}
ROWS = {"stories": DRAFTS | {"source": "data"}}     # flags of train_tiny.py
for _temperature in TEMPERATURES:
    ROWS[f"teacher's text at {_temperature}"] = DRAFTS | {"source": "teacher", "temperature": _temperature}
for _temperature in TEMPERATURES:
    ROWS[f"own text at {_temperature}"] = DRAFTS | {"source": "student-ar", "temperature": _temperature}
DEVELOPMENT = 512       # number of the first development story


@dataclass
class Options:
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    rows: str = ";".join(ROWS)  # conversions, separated by semicolons
    rates: str = "0.005,0.01,0.02,0.04"  # learning rates of the grid
    rate: float | None = None  # that of all rows; default: the best of each row
    block: int = 4  # --block of train_tiny.py
    updates: int = 320  # of 16 rows
    stories: int = 128  # held-out stories that an evaluation continues
    length: int | None = None  # --length of train_tiny.py
    seeds: int = 3  # teachers, and conversions of each
    workers: int = 2  # conversions at a time, each on one core
    quick: bool = False  # tiny models, four updates: does it run at all?

    def __post_init__(self):
        unknown = set(self.rows.split(";")) - set(ROWS)
        if unknown:
            raise ValueError(
                f"--rows={self.rows}: unknown {'; '.join(sorted(unknown))}; use some of {';'.join(ROWS)}"
            )


def job_of(row: str, rate: float, seed: int, options: Options) -> Job:
    flags = ROWS[row] | {"lr": rate, "block": options.block, "updates_per_rollout": 4}
    if options.data != "toy":
        flags |= {"data": options.data, "val_data": options.val_data}
    if options.length:
        flags["length"] = options.length
    job = Job(
        name=f"{row}, block {options.block}, lr {rate}",
        seed=seed,
        flags=flags,
        eval_steps=(0, options.updates),
        samplers=SAMPLERS,
        stories=options.stories,
        folder=f"temperature_{variant_of(options.data)}",
    )
    return quick_job(job) if options.quick else job


def trial_of(row: str, rate: float, options: Options) -> Job:
    """A conversion of seed 0, evaluated on development stories at the temperatures of all rows."""
    job = job_of(row, rate, 0, options)
    return replace(
        job,
        name=f"trial, {job.name}",
        eval_steps=job.eval_steps[-1:],
        samplers=tuple(sampler for sampler in SAMPLERS if "self" in sampler),
        stories=job.stories // 2,
        first_story=DEVELOPMENT,
    )


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, rates="0.01,0.02", seeds=1, updates=4)
    results = run_info("temperature", options)
    names = options.rows.split(";")
    grid = [float(rate) for rate in options.rates.split(",")]
    trials = []
    rates = dict.fromkeys(names, grid[0])
    if len(grid) > 1:
        jobs = [trial_of(name, rate, options) for rate in grid for name in names]
        trials = convert_all(jobs, options.workers)
        rates = best_rates(trials)
    if options.rate:
        rates = dict.fromkeys(names, options.rate)
    jobs = [job_of(name, rates[name], seed, options) for seed in range(options.seeds) for name in names]
    runs = convert_all(jobs, options.workers)
    results["trials"] = without_paths(trials)
    results["runs"] = without_paths(runs)
    save_results("temperature", variant_of(options.data), results, plot, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
