"""How many drafts are accepted: while the student learns, by the block it drafts, and by what it learns from.

    python -m experiments.verified              the story world, three seeds: about an hour on two cores
    python -m experiments.verified --quick      the plumbing, a minute
    python -m experiments.verified --name=verified_text --data=FILE.txt --val_data=FILE.txt

Leaves experiments/NAME/results.json (every seed, every number, the commit) and curves.png.
"""
import statistics
import sys
from dataclasses import dataclass, replace

from experiments import changes
from experiments.job import Job, tiny, without_paths
from experiments.pool import run_all
from experiments.results import by_row, cell, finish, head
from report import cli
from report.cli import option

LOOKS = tuple(f"verifier={verifier}{cold}" for verifier in ("self", "teacher") for cold in ("", " temperature=0"))
STORIES = {"text": "data", "states": "prefix", "target": "teacher", "weight": "first"}
ROWS = {                                # flags, and a change of the recipe
    **{f"block {block}": (STORIES | {"block": block}, None) for block in (4, 8, 16)},
    "mean weight": (STORIES | {"weight": "mean"}, None),
    "all masked": (STORIES | {"weight": "mean"}, changes.all_masked),
    "all masked, clean 0.5": (STORIES | {"weight": "mean", "clean_weight": 0.5}, changes.all_masked),
    "clean 0.5": (STORIES | {"clean_weight": 0.5}, None),
    "one-hot": (STORIES | {"target": "onehot"}, None)}


@dataclass
class Options:
    name: str = option("verified", "of the results: experiments/NAME")
    data: str = option("toy", "--data of train_tiny.py")
    val_data: str | None = option(None, "--val_data of train_tiny.py")
    rows: str = option(";".join(ROWS), "which, apart by semicolons")
    quick: bool = option(False, "tiny models, four updates: whether it runs at all")
    seeds: int = option(3, "teachers, and conversions of each")
    updates: int = option(320, "of 16 rows, of every row; looked at after all, half, a quarter, an eighth")
    stories: int = option(64, "that a look is made of")

    def __post_init__(self):
        if not set(self.rows.split(";")) <= set(ROWS):
            raise ValueError(f"--rows={self.rows}: wanted are some of {';'.join(ROWS)}")


def job_of(name: str, seed: int, options: Options) -> Job:
    text = {} if options.data == "toy" else {"data": options.data, "val_data": options.val_data}
    (flags, change), last = ROWS[name], options.updates
    points = tuple(sorted({last >> k for k in range(4) if last >> k}))
    job = Job(f"{options.name}, {name}", seed, flags | text | {"lr": 0.01}, points, LOOKS, change,
              stories=options.stories)
    return tiny(job) if options.quick else job


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4)
    results = head(f"verified --name={options.name}", options)
    runs = run_all([job_of(name, seed, options) for name in options.rows.split(";") for seed in range(options.seeds)])
    for run in runs:
        _, _, run["settings"]["name"] = run["settings"]["name"].partition(", ")
    results["runs"] = without_paths(runs)
    finish(options.name, results, draw, options.quick)
    print(table(results))


def table(results: dict) -> str:
    """Markdown: a row a way to convert; tokens a forward after the last update, the positions that a token took, and
    what became of the AR model."""
    names = dict(zip(LOOKS, ("itself", "itself, greedy", "the teacher", "the teacher, greedy")))
    heads = [*(f"`tok_per_fwd`, verified by {name}" for name in names.values()), "`positions_per_tok`, by itself",
             "by the teacher", "`val_nats` as an AR model, less the teacher's"]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, runs in by_row(results["runs"]).items():
        last = [run["points"][-1] for run in runs]
        cells = [cell([p[look]["tok_per_fwd"] for p in last], 2) for look in names]
        cells += [cell([p[look]["positions_per_tok"] for p in last], 1) for look in LOOKS[::2]]
        lost = cell([p["ar_nats"] - run["teacher"]["val_nats"] for p, run in zip(last, runs)])
        lines.append(f"| {name} | {' | '.join(cells)} | {lost} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """Tokens a forward against the tokens learned from, a line a row, a band of its seeds."""
    for axes, look in zip(figure.subplots(1, 2), ("verifier=self", "verifier=teacher")):
        for name, runs in by_row(results["runs"]).items():
            points = list(zip(*(run["points"] for run in runs)))
            x = [statistics.mean(p["tokens"] for p in some) for some in points]
            y = [[p[look]["tok_per_fwd"] for p in some] for some in points]
            axes.plot(x, [statistics.mean(some) for some in y], marker=".", label=name)
            axes.fill_between(x, list(map(min, y)), list(map(max, y)), alpha=0.15)
        axes.set(xscale="log", xlabel="response tokens trained on", title=look.replace("verifier=", "verified by "))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("tokens a forward")
    figure.axes[0].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
