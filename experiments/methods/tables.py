"""What experiments/methods.py says of its runs: tokens until a student writes nearly as its teacher does; ratios."""
import statistics
from collections.abc import Callable

from experiments.common.results import at_cost, cell, gap, reached, times, tokens_cell

COSTS, NATS = (1, 1.5), (0.25, 0.1, 0.05)   # tokens a forward at which text is compared; nats above the teacher's
COST = COSTS[-1]        # of the picture
SPENT = {"tokens": "response tokens trained on", "loss_positions": "positions that entered a loss",
         "flops": "FLOPs, rollouts and teacher counted"}


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


def short(results: dict) -> str:
    """Markdown, of a text that the AR model knows less well: to come within half and a quarter of a nat at 1 token a
    forward, and what is left at the end."""
    lines = ["| method, alignment | rate | within 0.5 | within 0.25 | tokens in all | `gen_nats` above the teacher's | "
             "`val_nats` above |", "|" + "---|" * 7]
    for name, runs in rows_of(results, 1).items():
        ends = [over(run, "gen_nats", 1)(run["points"][-1]) for run in runs]
        cells = [str(runs[0]["settings"]["flags"]["lr"])]
        cells += [tokens_cell([reached(run["points"], over(run, "gen_nats", 1), bound) for run in runs])
                  for bound in (0.5, 0.25)]
        cells += [f"{statistics.mean(run['points'][-1]['tokens'] for run in runs) / 1000:.0f}k", cell(ends, 2)]
        cells.append(cell([run["points"][-1]["val_nats"] - run["teacher"]["val_nats"] for run in runs]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
