"""What conversion costs, method by method: quality against training tokens, over seeds, under both alignments.

    python -m experiments.methods.run               the story world, block 4, three seeds: three to four hours on two cores
    python -m experiments.methods.run --quick       the plumbing, a minute
    python -m experiments.methods.run --name=methods_text --data=FILE.txt --val_data=FILE.txt --rows=opdlm,sft,sdar,ours \
        --aligns=ar --rates=0.005,0.02 --updates=120 --long=480 --length=128 --levels=0,0.3,0.6,1 --stories=64

Every row runs at each learning rate of one grid, seed 0, and with the other seeds at its best: that which comes within
0.1 nats of the teacher soonest, in text written at 1 token a forward, or at 1.5. Leaves
experiments/NAME/results.json (every seed, every point, the commit) and curves.png.
"""
import sys
from dataclasses import dataclass, replace

import opdlm
from experiments.common import changes
from experiments.common.job import Job, tiny, without_paths
from experiments.common.pool import run_all
from experiments.common.results import finish, head
from experiments.methods.tables import COSTS, NATS, draw, rates, ratios, short, table
from training import cli

DIALS = ("source", "states", "target", "weight")
ROWS = {name: dict(zip(DIALS, dials)) for name, dials in opdlm.METHODS.items()} | {
    "prefix": dict(zip(DIALS, ("student", "prefix", "teacher", "mean"))),
    "ours": dict(zip(DIALS, ("data", "prefix", "teacher", "first")))}
ROWS["ours x4"] = ROWS["ours"]      # each text in all states that show a left part of its blocks, 4 of them
PUBLISHED = ROWS["sdar"] | {"align": "paper", "context": "block"}       # SDAR-style, as its paper has it


@dataclass
class Options:
    name: str = "methods"  # of the results: experiments/NAME
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    rows: str = ','.join(ROWS)  # methods, apart by commas
    aligns: str = "ar,paper"  # alignments of these, apart by commas
    rates: str = "0.0025,0.005,0.01,0.02"  # learning rates of one grid
    levels: str = "0,0.7,0.9,0.98,1"  # of leftmost, by which each point's text is written
    stories: int = 128  # texts that each of them writes
    length: int | None = None  # --length of train_tiny.py
    quick: bool = False  # tiny models, four updates, one rate: whether it runs at all
    seeds: int = 3  # teachers, and conversions of each
    updates: int = 480  # updates of 16 rows; half as many with align=paper, which would need far more
    long: int = 2400  # updates of the SDAR-style row as published

    def __post_init__(self):
        if not set(self.rows.split(",")) <= set(ROWS):
            raise ValueError(f"--rows={self.rows}: wanted are some of {','.join(ROWS)}")


def jobs_of(options: Options) -> dict[str, dict]:
    """Flags of every row, before its learning rate."""
    wanted = {name: ROWS[name] for name in options.rows.split(",")}
    text = {} if options.data == "toy" else {"data": options.data, "val_data": options.val_data}
    text |= {"length": options.length} if options.length else {}
    rows = {f"{name}, {align}": dials | {"align": align, "updates_per_rollout": 4 if dials["source"] != "data" else 1} | text
            for align in options.aligns.split(",") for name, dials in wanted.items()
            if (name, align) != ("ours x4", "paper")}
    return rows | {"sdar, published": PUBLISHED | text}


def job_of(name: str, flags: dict, rate: float, seed: int, options: Options) -> Job:
    """Looked at after 2400, 1200, ... updates as published, half as many as --updates with align=paper, else those."""
    part = 2 if "x4" in name else 0.5 if "paper" in name else 1
    last = options.long if "published" in name else int(options.updates * part)
    points = tuple(sorted({last >> k for k in range(7) if last >> k >= max(options.updates // 16, 1)}))
    looks = tuple(f"reveal=leftmost:{level}" for level in options.levels.split(","))
    job = Job(f"{name}, lr {rate}", seed, flags | {"lr": rate}, points, looks, stories=options.stories,
              folder="full" if options.data == "toy" else options.name)
    if "x4" in name:
        job = replace(job, recipes=changes.every_prefix, copies=4)
    return tiny(job) if options.quick else job


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, long=8, rates="0.01")
    rows, results = jobs_of(options), head(f"methods --name={options.name}", options)
    grid = list(map(float, options.rates.split(",")))
    runs = run_all([job_of(name, flags, rate, 0, options) for name, flags in rows.items() for rate in grid])
    best = {(name, rate) for cost in COSTS for name, rate in rates(runs, cost).items()}
    runs += run_all([job_of(name, rows[name], rate, seed, options)
                     for seed in range(1, options.seeds) for name, rate in sorted(best)])
    results["runs"] = without_paths(runs)
    finish(options.name, results, draw, options.quick)
    said, bound = (table, NATS[1]) if options.data == "toy" else (short, 0.5)
    print(said(results), *(f"at {cost}, {what} = {x}" for cost in COSTS
                           for what, x in ratios(results, bound, cost).items()), sep="\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
