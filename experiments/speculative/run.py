"""Speculative decoding: how many drafts are accepted while the student learns, by block size and by what it
learns.

    python -m experiments.speculative.run              three seeds: about an hour on two cores
    python -m experiments.speculative.run --quick      does it run at all? a minute
    python -m experiments.speculative.run --data=FILE.txt --val_data=FILE.txt --length=128 --lr=0.005 \
        --rows="block 4, clean 0.5"

At the end one process measures seconds per token, beside AR with its cache. Writes
experiments/speculative/results/VARIANT.json and .png, VARIANT being story_world or, with --data, tinystories.
"""
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context

from data.tinystories import stories
from experiments.common import changes
from experiments.common.conversion import convert_all, load_student, load_teacher, open_job
from experiments.common.job import Job, quick_job, without_paths
from experiments.common.results import run_info, save_results, variant_of
from experiments.common.timing import seconds_per_token
from experiments.speculative.tables import SAMPLERS, plot, speed_table, table
from report import generate, metrics
from training import cli

PREFIXES = {"source": "data", "states": "prefix", "target": "teacher", "weight": "first"}
DRAFTS = PREFIXES | {"weight": "mean"}      # with all of a block masked: drafts start from this state
ROWS = {                                    # flags of train_tiny.py, and a change of the recipe
    "block 4": (DRAFTS | {"block": 4}, changes.all_masked),
    "block 8": (DRAFTS | {"block": 8}, changes.all_masked),
    "block 16": (DRAFTS | {"block": 16}, changes.all_masked),
    "block 4, clean 0.5": (DRAFTS | {"block": 4, "clean_weight": 0.5}, changes.all_masked),
    "block 8, clean 0.5": (DRAFTS | {"block": 8, "clean_weight": 0.5}, changes.all_masked),
    "block 4, one-hot": (DRAFTS | {"target": "onehot"}, changes.all_masked),
    "block 4, prefixes": (PREFIXES, None),
}
TIMED = ("block 4, clean 0.5", "block 8, clean 0.5")
TURNS = 5


@dataclass
class Options:
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    rows: str = ";".join(ROWS)  # conversions, separated by semicolons
    quick: bool = False  # tiny models, four updates: does it run at all?
    seeds: int = 3  # teachers, and conversions of each
    updates: int = 320  # of 16 rows; evaluated before the first and after 1/8, 1/4, 1/2 and all of them
    stories: int = 64  # per evaluation
    length: int | None = None  # --length of train_tiny.py
    lr: float = 0.01  # --lr of train_tiny.py

    def __post_init__(self):
        unknown = set(self.rows.split(";")) - set(ROWS)
        if unknown:
            raise ValueError(
                f"--rows={self.rows}: unknown {'; '.join(sorted(unknown))}; use some of {';'.join(ROWS)}"
            )


def job_of(name: str, seed: int, options: Options) -> Job:
    row_flags, change = ROWS[name]
    flags = dict(row_flags)
    if options.data != "toy":
        flags |= {"data": options.data, "val_data": options.val_data}
    if options.length:
        flags["length"] = options.length
    flags["lr"] = options.lr
    last = options.updates
    steps = {last >> k for k in range(4) if last >> k}
    job = Job(
        name=f"speculative, {name}",
        seed=seed,
        flags=flags,
        eval_steps=(0, *sorted(steps)),
        samplers=SAMPLERS,
        recipes=change,
        stories=options.stories,
        folder=variant_of(options.data),
    )
    return quick_job(job) if options.quick else job


def row_of(name: str) -> str:
    """The row of a job's name."""
    return name.partition(", ")[2]


def speeds(job: Job) -> dict[str, list[float]]:
    """Seconds per token of 8 texts, one number per turn: by itself, by the teacher, and AR."""
    net, layout = load_student(job)
    teacher = load_teacher(job)
    _, corpus = open_job(job)
    eot = corpus.tokenizer.eot
    held = metrics.held_out(corpus.val, stories(corpus.val, eot), 8, teacher.config.context)
    generators = {
        "self": generate.speculative_generator(net, layout),
        "teacher": generate.speculative_generator(net, layout, teacher),
    }
    return seconds_per_token(generators, teacher, held, eot, job.seed, TURNS)


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4)
    results = run_info("speculative", options)
    names = options.rows.split(";")
    runs = convert_all([job_of(name, seed, options) for name in names for seed in range(options.seeds)])
    for run in runs:
        run["settings"]["name"] = row_of(run["settings"]["name"])
    results["runs"] = without_paths(runs)

    timed = [job_of(name, seed, options) for name in TIMED if name in names for seed in range(options.seeds)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(load_student, timed))
    results["speeds"] = [{"name": row_of(job.name), "seconds": speeds(job)} for job in timed]
    save_results("speculative", variant_of(options.data), results, plot, options.quick)
    print(table(results), speed_table(results), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
