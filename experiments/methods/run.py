"""What conversion costs, method by method: quality against training tokens, over seeds, under both
alignments.

    python -m experiments.methods.run               block 4, three seeds: three to four hours on two cores
    python -m experiments.methods.run --quick       does it run at all? a minute
    python -m experiments.methods.run --data=FILE.txt --val_data=FILE.txt --rows=opdlm,sft,sdar,warm_start \
        --aligns=ar --rates=0.005,0.02 --updates=120 --long=480 --length=128 --levels=0,0.3,0.6,1 --stories=64

Every row runs at each learning rate of one grid with seed 0, and with the other seeds at its best rate: the
one that comes within 0.1 nats of the teacher with the fewest tokens, in text generated at 1 token per forward
pass, or at 1.5. Writes experiments/methods/results/VARIANT.json and .png, VARIANT being story_world or, with
--data, tinystories.
"""
import sys
from dataclasses import dataclass, replace

import opdlm
from experiments.common import changes
from experiments.common.conversion import convert_all
from experiments.common.job import Job, quick_job, without_paths
from experiments.common.results import run_info, save_results, variant_of
from experiments.methods.tables import COSTS, best_rates, plot, short_table, table
from training import cli

DIALS = ("source", "states", "target", "weight")
ROWS = {name: dict(zip(DIALS, dials)) for name, dials in opdlm.METHODS.items()}
ROWS["prefix"] = dict(zip(DIALS, ("student", "prefix", "teacher", "mean")))
ROWS["warm_start"] = dict(zip(DIALS, ("data", "prefix", "teacher", "first")))     # what --warm_steps does
ROWS["warm_start_x4"] = ROWS["warm_start"]      # each text in all 4 states that show a prefix of its blocks
PUBLISHED = ROWS["sdar"] | {"align": "paper", "context": "block"}       # SDAR-style, as its paper has it


@dataclass
class Options:
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    rows: str = ",".join(ROWS)  # methods, separated by commas
    aligns: str = "ar,paper"  # alignments of these, separated by commas
    rates: str = "0.0025,0.005,0.01,0.02"  # learning rates of the grid
    levels: str = "0,0.7,0.9,0.98,1"  # of leftmost, with which text is generated at each evaluation
    stories: int = 128  # texts generated with each of them
    length: int | None = None  # --length of train_tiny.py
    quick: bool = False  # tiny models, four updates, one rate: does it run at all?
    seeds: int = 3  # teachers, and conversions of each
    updates: int = 480  # updates of 16 rows; half as many with align=paper
    long: int = 2400  # updates of the SDAR-style row as published

    def __post_init__(self):
        unknown = set(self.rows.split(",")) - set(ROWS)
        if unknown:
            raise ValueError(
                f"--rows={self.rows}: unknown {', '.join(sorted(unknown))}; use some of {','.join(ROWS)}"
            )


def flags_of_rows(options: Options) -> dict[str, dict]:
    """The flags of every row, without its learning rate."""
    data_flags = {}
    if options.data != "toy":
        data_flags |= {"data": options.data, "val_data": options.val_data}
    if options.length:
        data_flags["length"] = options.length
    rows = {}
    for align in options.aligns.split(","):
        for name in options.rows.split(","):
            if (name, align) == ("warm_start_x4", "paper"):
                continue
            updates_per_rollout = 1 if ROWS[name]["source"] == "data" else 4
            flags = {"align": align, "updates_per_rollout": updates_per_rollout}
            rows[f"{name}, {align}"] = ROWS[name] | flags | data_flags
    rows["sdar, published"] = PUBLISHED | data_flags
    return rows


def job_of(name: str, flags: dict, rate: float, seed: int, options: Options) -> Job:
    """A conversion, evaluated after all its updates, after half of them, a quarter, and so on."""
    last = options.updates
    if "published" in name:
        last = options.long
    elif "x4" in name:
        last = options.updates * 2
    elif "paper" in name:
        last = options.updates // 2
    first = max(options.updates // 16, 1)
    steps = {last >> k for k in range(7) if last >> k >= first}
    job = Job(
        name=f"{name}, lr {rate}",
        seed=seed,
        flags=flags | {"lr": rate},
        eval_steps=tuple(sorted(steps)),
        samplers=tuple(f"reveal=leftmost:{level}" for level in options.levels.split(",")),
        stories=options.stories,
        folder=variant_of(options.data),
    )
    if "x4" in name:
        job = replace(job, recipes=changes.every_prefix, copies=4)
    return quick_job(job) if options.quick else job


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, long=8, rates="0.01")
    results = run_info("methods", options)
    rows = flags_of_rows(options)
    grid = [float(rate) for rate in options.rates.split(",")]
    runs = convert_all(
        [job_of(name, flags, rate, 0, options) for name, flags in rows.items() for rate in grid]
    )

    best = set()
    for cost in COSTS:
        best |= set(best_rates(runs, cost).items())
    jobs = []
    for seed in range(1, options.seeds):
        for name, rate in sorted(best):
            jobs.append(job_of(name, rows[name], rate, seed, options))
    runs += convert_all(jobs) if jobs else []
    results["runs"] = without_paths(runs)
    save_results("methods", variant_of(options.data), results, plot, options.quick)
    print(table(results) if options.data == "toy" else short_table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
