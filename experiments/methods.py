"""What conversion costs, method by method: quality against training tokens, over seeds, under both alignments.

    python -m experiments.methods               the story world, block 4, three seeds: three to four hours on two cores
    python -m experiments.methods --quick       the plumbing, a minute
    python -m experiments.methods --name=methods_text --data=FILE.txt --val_data=FILE.txt --rows=opdlm,sft,sdar,ours \
        --aligns=ar --rates=0.005,0.02 --updates=120 --long=480 --length=128 --levels=0,0.3,0.6,1 --stories=64

Every row runs at each learning rate of one grid, seed 0, and with the other seeds at its best: that which comes within
0.1 nats of the teacher soonest, in text written at 1 token a forward, or at 1.5. Leaves
experiments/NAME/results.json (every seed, every point, the commit) and curves.png.
"""
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import opdlm
from experiments import changes
from experiments.job import Job, tiny, without_paths
from experiments.pool import run_all
from experiments.results import at_cost, cell, finish, gap, head, reached, times, tokens_cell
from report import cli
from report.cli import option

DIALS = ("text", "states", "target", "weight")
ROWS = {name: dict(zip(DIALS, dials)) for name, dials in opdlm.METHODS.items()} | {
    "prefix": dict(zip(DIALS, ("student", "prefix", "teacher", "mean"))),
    "ours": dict(zip(DIALS, ("data", "prefix", "teacher", "first")))}
ROWS["ours x4"] = ROWS["ours"]      # each text in all states that show a left part of its blocks, 4 of them
PUBLISHED = ROWS["sdar"] | {"align": "paper", "context": "block"}       # SDAR-style, as its paper has it
COSTS, NATS = (1, 1.5), (0.25, 0.1, 0.05)   # tokens a forward at which text is compared; nats above the teacher's
COST = COSTS[-1]        # of the picture
SPENT = {"tokens": "response tokens trained on", "places": "positions that entered a loss",
         "flops": "FLOPs, rollouts and teacher counted"}


@dataclass
class Options:
    name: str = option("methods", "of the results: experiments/NAME")
    data: str = option("toy", "--data of train_tiny.py")
    val_data: str | None = option(None, "--val_data of train_tiny.py")
    rows: str = option(",".join(ROWS), "methods, apart by commas")
    aligns: str = option("ar,paper", "alignments of these, apart by commas")
    rates: str = option("0.0025,0.005,0.01,0.02", "learning rates of one grid")
    levels: str = option("0,0.7,0.9,0.98,1", "of leftmost, by which each point's text is written")
    stories: int = option(128, "texts that each of them writes")
    length: int | None = option(None, "--length of train_tiny.py")
    quick: bool = option(False, "tiny models, four updates, one rate: whether it runs at all")
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
    text |= {"length": options.length} if options.length else {}
    rows = {f"{name}, {align}": dials | {"align": align, "updates": 4 if dials["text"] != "data" else 1} | text
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
    print(table(results), *(f"at {cost}, {what} = {x}" for cost in COSTS
                            for what, x in ratios(results, NATS[1], cost).items()), sep="\n")


def over(run: dict, number: str, cost: float) -> Callable:
    """How much worse than its teacher a point of the run is, in text written at that cost."""
    return gap(run, number, cost, run["settings"]["looks"])


def named(run: dict) -> str:
    """Its row."""
    return run["settings"]["name"].partition(", lr")[0]


def rates(runs: list[dict], cost: float) -> dict[str, float]:
    """The rate of each row that comes within 0.1 nats soonest, seed 0; if none does, that which comes nearest."""
    def score(run):
        found, there = reached(run["points"], worse := over(run, "gen_nats", cost), 0.1)
        return (0, found) if there else (1, worse(run["points"][-1]))
    tried = [run for run in runs if run["settings"]["seed"] == 0]
    return {name: min((run for run in tried if named(run) == name), key=score)["settings"]["flags"]["lr"]
            for name in dict.fromkeys(map(named, tried))}


def rows_of(results: dict, cost: float) -> dict[str, list[dict]]:
    """The runs of each row, a seed each, at its rate."""
    return {name: [run for run in results["runs"] if named(run) == name and run["settings"]["flags"]["lr"] == rate]
            for name, rate in rates(results["runs"], cost).items()}


def table(results: dict) -> str:
    """Markdown: a row a method; thousands of tokens to come near to the teacher in text written at 1 and at 1.5 tokens
    a forward, each at its rate, and what the last point writes at 1.5."""
    known = [n for n in ("gen_nats", "valid") if n in results["runs"][0]["teacher"]]
    bounds = [("gen_nats", n, COSTS[0]) for n in NATS] + [("gen_nats", NATS[1], COST)]
    bounds += [("valid", 0.05, cost) for cost in COSTS if "valid" in known]
    lines = ["| method, alignment | rates | " + " | ".join(f"`{n}` within {b} at {cost}" for n, b, cost in bounds)
             + "".join(f" | `{n}` at the end" for n in known) + " |", "|" + "---|" * (2 + len(bounds + known))]
    at_rate = {cost: rows_of(results, cost) for cost in COSTS}
    for name in at_rate[COST]:
        runs = {cost: rows[name] for cost, rows in at_rate.items()}
        rates = ", ".join(f"{some[0]['settings']['flags']['lr']}" for some in runs.values())
        cells = [tokens_cell([reached(r["points"], over(r, n, cost), b) for r in runs[cost]])
                 for n, b, cost in bounds]
        cells += [cell([at_cost(r["points"][-1], n, COST, r["settings"]["looks"]) for r in runs[COST]]) for n in known]
        lines.append(f"| {name} | {rates} | {' | '.join(cells)} |")
    return "\n".join(lines)


PAIRS = {"whole recipe": ("ours, ar", "sdar, published"), "alignment alone": ("opdlm, ar", "opdlm, paper"),
         "the same of texts in 4 states": ("ours x4, ar", "sdar, published"),
         "alignment and context": ("sdar, ar", "sdar, published")}


def ratios(results: dict, bound: float, cost: float, spent: str = "tokens") -> dict[str, str]:
    """How many times what the first row of each pair needs to come within `bound` nats the second does, by seed."""
    rows = {name: [reached(r["points"], over(r, "gen_nats", cost), bound, spent) for r in runs]
            for name, runs in rows_of(results, cost).items()}
    off = [name for name in ("opdlm-off, ar", "kd, ar", "sft, ar", "sdar, ar") if name in rows]
    best = min(off, key=lambda name: sum(n for n, _ in rows[name]), default="")
    pairs = PAIRS | {"on-policy alone": ("opdlm, ar", best)}
    return {f"{what}: {b} / {a}": times(rows[a], rows[b]) for what, (a, b) in pairs.items() if {a, b} <= set(rows)}


def draw(results: dict, figure) -> None:
    """gen_nats above the teacher's, 1.5 tokens a forward, against what was spent: a line a row, a band of its seeds."""
    figure.set_size_inches(14, 8.5)
    aligns = [align for align in ("ar", "paper") if any(named(run).endswith(align) for run in results["runs"])]
    for line, align in zip(figure.subplots(len(aligns), 3, sharex="col", sharey=True, squeeze=False), aligns):
        rows = {name: runs for name, runs in rows_of(results, COST).items()
                if name.endswith(align) or align == aligns[-1] and "published" in name}
        for axes, (spent, label) in zip(line, SPENT.items()):
            for name, runs in rows.items():
                gaps = [[max(over(r, "gen_nats", COST)(p), 1e-3) for p in r["points"]] for r in runs]
                x = [statistics.mean(p[spent] for p in points) for points in zip(*(r["points"] for r in runs))]
                axes.plot(x, [statistics.mean(y) for y in zip(*gaps)], marker=".", label=name)
                axes.fill_between(x, [min(y) for y in zip(*gaps)], [max(y) for y in zip(*gaps)], alpha=0.15)
            axes.set(xscale="log", yscale="log", xlabel=label if align == aligns[-1] else "")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("nats per generated token above the teacher's")
        line[-1].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
