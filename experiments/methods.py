"""What conversion costs, method by method: quality against training tokens, over seeds, under both alignments.

    python -m experiments.methods               the story world, block 4, three seeds: about two hours on two idle cores
    python -m experiments.methods --quick       the plumbing, a minute
    python -m experiments.methods --name=methods_text --data=FILE.txt --val_data=FILE.txt --rows=opdlm,sft,sdar

Every row runs at each learning rate of one grid, seed 0, and with the other seeds at its best. Leaves
experiments/NAME/results.json (every seed, every point, the commit) and curves.png.
"""
import statistics
import sys
from dataclasses import dataclass, replace

import torch

import opdlm
from experiments import changes
from experiments.job import Job
from experiments.pool import run_all
from experiments.results import at_cost, by_row, cell, finish, gap, reached, tokens_cell
from model.dist import facts
from report import cli
from report.cli import option

DIALS = ("text", "states", "target", "weight")
ROWS = {name: dict(zip(DIALS, dials)) for name, dials in opdlm.METHODS.items()} | {
    "prefix": dict(zip(DIALS, ("student", "prefix", "teacher", "mean"))),
    "ours": dict(zip(DIALS, ("data", "prefix", "teacher", "first")))}
ROWS["ours x4"] = ROWS["ours"]      # each text in all states that show a left part of its blocks, 4 of them
PUBLISHED = ROWS["sdar"] | {"align": "paper", "context": "block"}       # SDAR-style, as its paper has it
RATES = (0.005, 0.01, 0.02)     # of one grid
LOOKS = tuple(f"reveal=leftmost:{level}" for level in (0, 0.7, 0.9, 0.98, 1))
COST, NATS = 1.5, (0.25, 0.1, 0.05)     # tokens a forward at which text is compared; how near to the teacher's nats
SPENT = {"tokens": "response tokens trained on", "places": "positions that entered a loss",
         "flops": "FLOPs, rollouts and teacher counted"}


@dataclass
class Options:
    name: str = option("methods", "of the results: experiments/NAME")
    data: str = option("toy", "--data of train_tiny.py")
    val_data: str | None = option(None, "--val_data of train_tiny.py")
    rows: str = option(",".join(ROWS), "methods, apart by commas")
    quick: bool = option(False, "tiny models, four updates: whether it runs at all")
    seeds: int = option(3, "teachers, and conversions of each")
    updates: int = option(480, "updates of 16 rows; half as many with align=paper, which would need far more")
    long: int = option(2400, "updates of the SDAR-style row as published")

    def __post_init__(self):
        if not set(self.rows.split(",")) <= set(ROWS):
            raise ValueError(f"--rows={self.rows}: wanted are some of {','.join(ROWS)}")


def jobs_of(options: Options) -> dict[str, dict]:
    """Flags of every row, before its learning rate."""
    wanted = {name: ROWS[name] for name in options.rows.split(",")}
    text = {} if options.data == "toy" else {"data": options.data, "val_data": options.val_data}
    rows = {f"{name}, {align}": dials | {"align": align, "updates": 4 if dials["text"] != "data" else 1} | text
            for align in ("ar", "paper") for name, dials in wanted.items() if (name, align) != ("ours x4", "paper")}
    return rows | {"sdar, published": PUBLISHED | text}


def job_of(name: str, flags: dict, rate: float, seed: int, options: Options) -> Job:
    """Looked at after 2400, 1200, ... updates as published, half as many as --updates with align=paper, else those."""
    part = 2 if "x4" in name else 0.5 if "paper" in name else 1
    last = options.long if "published" in name else int(options.updates * part)
    points = tuple(sorted({last >> k for k in range(7) if last >> k >= max(options.updates // 16, 1)}))
    job = Job(f"{name}, lr {rate}", seed, flags | {"lr": rate}, points, LOOKS, stories=128)
    if "x4" in name:
        job = replace(job, recipes=changes.every_prefix, copies=4)
    return quick(job) if options.quick else job


def quick(job: Job) -> Job:
    return replace(job, folder="quick", stories=16, pretrain=dict(pretrain_steps=20, layers=1, width=64, rows=4))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, long=8)
    rows = jobs_of(options)
    tried = {(name, rate): job_of(name, flags, rate, 0, options) for name, flags in rows.items() for rate in RATES}
    trials = dict(zip(tried, run_all(list(tried.values()))))
    rates = {name: min(RATES, key=lambda rate: at_cost(trials[name, rate]["points"][-1], "gen_nats", COST, LOOKS))
             for name in rows}
    others = [job_of(name, flags, rates[name], seed, options)
              for seed in range(1, options.seeds) for name, flags in rows.items()]
    runs = [trials[name, rates[name]] for name in rows] + run_all(others)
    for run in [*trials.values(), *runs]:
        run["settings"]["name"], _, _ = run["settings"]["name"].partition(", lr")
        run["settings"]["flags"] = {k: v for k, v in run["settings"]["flags"].items() if "data" not in k}   # no paths
    results = {"command": f"python -m experiments.methods --name={options.name}", **facts(torch.device("cpu")),
               "rates": rates, "trials": list(trials.values()), "runs": runs}
    finish(options.name, results, draw, options.quick)
    print(table(results), *(f"{name}: {value}" for name, value in ratios(results, 0.1).items()), sep="\n")


def table(results: dict) -> str:
    """Markdown: a row a method; tokens to come near to the teacher, and where the last point is."""
    numbers = [n for n in ("gen_nats", "valid") if n in results["runs"][0]["teacher"]]
    bounds = [*(("gen_nats", n) for n in NATS), ("valid", 0.05)]
    bounds, last = [b for b in bounds if b[0] in numbers], [(n, cost) for cost in (COST, 1) for n in numbers]
    lines = ["| method, alignment | rate | " + " | ".join([f"`{n}` within {b}" for n, b in bounds] + [
             f"`{n}` at {cost}" for n, cost in last]) + " |", "|---|---|" + "---|" * len(bounds + last)]
    for name, runs in by_row(results["runs"]).items():
        spent = [tokens_cell([reached(r["points"], gap(r, n, COST, LOOKS), b) for r in runs]) for n, b in bounds]
        cells = [cell([at_cost(r["points"][-1], n, cost, LOOKS) for r in runs]) for n, cost in last]
        lines.append(f"| {name} | {results['rates'][name]} | {' | '.join(spent + cells)} |")
    return "\n".join(lines)


def ratios(results: dict, bound: float) -> dict[str, str]:
    """How many times the tokens the second row of each pair needs, seed by seed."""
    rows = by_row(results["runs"])
    off = min((name for name in rows if name.endswith(", ar") and name not in ("opdlm, ar", "ours, ar")),
              key=lambda name: statistics.mean(at_cost(r["points"][-1], "gen_nats", COST, LOOKS) for r in rows[name]))
    pairs = {"whole recipe": ("ours, ar", "sdar, published"), "alignment alone": ("opdlm, ar", "opdlm, paper"),
             "on-policy alone": ("opdlm, ar", off)}
    return {f"{what}: {b} / {a}": times([reached(r["points"], gap(r, "gen_nats", COST, LOOKS), bound) for r in rows[a]],
                                        [reached(r["points"], gap(r, "gen_nats", COST, LOOKS), bound) for r in rows[b]])
            for what, (a, b) in pairs.items() if {a, b} <= set(rows)}


def times(ours: list, theirs: list) -> str:
    """Their tokens over ours; where ours never came so far there is none, where theirs did not it is a lower bound."""
    if not all(ok for _, ok in ours):
        return "not reached"
    values = [b / a for (a, _), (b, _) in zip(ours, theirs)]
    return ("" if all(ok for _, ok in theirs) else "> ") + cell(values, 1)


def draw(results: dict, figure) -> None:
    """gen_nats above the teacher's, 1.5 tokens a forward, against what was spent: a line a row, a band of its seeds."""
    figure.set_size_inches(14, 8.5)
    for line, align in zip(figure.subplots(2, 3, sharex="col", sharey=True), ("ar", "paper")):
        rows = {name: runs for name, runs in by_row(results["runs"]).items()
                if name.endswith(align) or align == "paper" and "published" in name}
        for axes, (spent, label) in zip(line, SPENT.items()):
            for name, runs in rows.items():
                gaps = [[max(gap(r, "gen_nats", COST, LOOKS)(p), 1e-3) for p in r["points"]] for r in runs]
                x = [statistics.mean(p[spent] for p in points) for points in zip(*(r["points"] for r in runs))]
                axes.plot(x, [statistics.mean(y) for y in zip(*gaps)], marker=".", label=name)
                axes.fill_between(x, [min(y) for y in zip(*gaps)], [max(y) for y in zip(*gaps)], alpha=0.15)
            axes.set(xscale="log", yscale="log", xlabel=label if align == "paper" else "")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("nats per generated token above the teacher's")
        line[-1].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
