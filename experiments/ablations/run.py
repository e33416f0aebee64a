"""What each choice of the conversion is worth: one thing changed at a time, same teachers, same number of updates.

    python -m experiments.ablations.run             the story world, three seeds: an hour and a half on two cores
    python -m experiments.ablations.run --quick     the plumbing, a minute

Text is compared at equal cost, 1.5 and 2 tokens a forward, by the rule a row is sampled with: leftmost, but where the
row says otherwise. What learns from the student's own text does so at a rate of 0.005, at which methods.py found OPDLM
best at 1.5 tokens a forward; what learns from stories at 0.02, as it found ours. Leaves
experiments/ablations/results.json (every seed, every number, the commit) and curves.png.
"""
import statistics
import sys
from dataclasses import dataclass, replace
from itertools import product

from experiments.ablations.rows import ROWS
from experiments.common.job import Job, tiny
from experiments.common.pool import run_all
from experiments.common.results import at_cost, by_row, cell, finish, head
from training import cli


@dataclass
class Options:
    quick: bool = False  # tiny models, four updates: whether it runs at all
    seeds: int = 3  # teachers, and conversions of each
    updates: int = 160  # updates of 16 rows, of every row


def jobs_of(options: Options) -> list[Job]:
    """One a conversion and seed, with the looks of all rows that are made of it."""
    looks = {}
    for name, row in ROWS.items():
        looks.setdefault(row.job or name, {}).update(dict.fromkeys(row.by))
    first = {row.job or name: row for name, row in reversed(ROWS.items())}
    jobs = [Job(name, seed, first[name].flags, (options.updates,), tuple(looks[name]), first[name].recipes,
                first[name].start, stories=128) for seed in range(options.seeds) for name in looks]
    return [tiny(job) for job in jobs] if options.quick else jobs


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4)
    results = head("ablations", options)
    results["runs"] = run_all(jobs_of(options))
    finish("ablations", results, draw, options.quick)
    print(table(results))
    for name, cost in product(("stories", "visited"), (1.5, 2)):
        for block in (8, 16):
            print(f"{name}, block {block}, at {cost}: {cell(share_lost(results, f'{name}, block {block}', cost), 2)}")


COLUMNS = (("gen_nats", 1), ("gen_nats", 1.5), ("gen_nats", 2), ("valid", 1), ("valid", 1.5), ("distinct2", 1.5))


def table(results: dict) -> str:
    """Markdown: a row a choice; numbers at equal cost, and how much more nats at 1.5 than the row that it changes."""
    lines = ["| | " + " | ".join(f"`{number}` at {cost}" for number, cost in COLUMNS) + " | less the base's |",
             "|---|" + "---|" * (len(COLUMNS) + 1)]
    for name in ROWS:
        base = "stories, block 4" if name.startswith("stories") else "visited, block 4"
        cells = [cell(numbers(results, name, number, cost), 2) for number, cost in COLUMNS]
        more = zip(numbers(results, name, "gen_nats", 1.5), numbers(results, base, "gen_nats", 1.5))
        lines.append(f"| {name} | {' | '.join(cells)} | {'' if name == base else cell([a - b for a, b in more], 2)} |")
    return "\n".join(lines)


def numbers(results: dict, name: str, number: str, cost: float) -> list[float]:
    """Of a row, by seed, after the last update."""
    row = ROWS[name]
    return [at_cost(run["points"][-1], number, cost, row.by) for run in by_row(results["runs"])[row.job or name]]


def share_lost(results: dict, name: str, cost: float) -> list[float]:
    """By seed, the nats that a row of some block lies above the teacher, over those of the paper's preset there."""
    theirs = f"paper's preset, {name.partition(', ')[2]}"
    teacher = [run["teacher"]["gen_nats"] for run in by_row(results["runs"])["stories, block 4"]]
    ours, theirs = (numbers(results, row, "gen_nats", cost) for row in (name, theirs))
    return [(a - t) / (b - t) for a, b, t in zip(ours, theirs, teacher)]


def draw(results: dict, figure) -> None:
    """What is lost against the teacher, by block: ours and the paper's preset."""
    teacher = [run["teacher"]["gen_nats"] for run in by_row(results["runs"])["stories, block 4"]]
    for axes, cost in zip(figure.subplots(1, 2, sharey=True), (1.5, 2)):
        for kind in ("visited", "random", "prefix", "stories", "paper's preset"):
            rows = [(f"{kind}, block {block}", block) for block in (4, 8, 16)]
            lost = [[x - t for x, t in zip(numbers(results, name, "gen_nats", cost), teacher)] for name, _ in rows]
            axes.errorbar([block for _, block in rows], [statistics.mean(x) for x in lost],
                          [[statistics.mean(x) - min(x) for x in lost], [max(x) - statistics.mean(x) for x in lost]],
                          marker="o", capsize=3, label=kind)
        axes.set(xlabel="block", title=f"{cost} tokens a forward", xscale="log", xticks=[4, 8, 16],
                 xticklabels=["4", "8", "16"], yscale="log")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.axes[0].set_ylabel("nats per generated token above the teacher's")


if __name__ == "__main__":
    sys.exit(cli.run(main))
