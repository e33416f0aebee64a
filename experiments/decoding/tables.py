"""What experiments/decoding.py says of its looks: quality at equal cost, areas, the points that have no parameter.

Looks are numbers by name, "RULE SPEC" or one of the points.
"""
import math
import statistics

from experiments.common.results import at_cost, cell

POINTS = {"ar": "AR", "self": "verified by itself", "teacher": "verified by the teacher"}


def aup(points: list[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (d3LLM, 2601.07568): the area under accuracy, in percent, over tokens per forward, of
    the points not more than 5 below the slowest; accuracy below the `best`, AR's, counts exp(-3 (1 - accuracy / best))
    of itself. From 0 to the slowest point it is that point's."""
    points = sorted(points)
    points = [(x, y) for x, y in points if y >= points[0][1] - 5]
    weighed = [(x, y * min(math.exp(-3 * (1 - y / max(best, 1))), 1)) for x, y in points]
    area = points[0][0] * points[0][1]
    return area + sum((b - a) * (y + z) / 2 for (a, y), (b, z) in zip(weighed, weighed[1:]))


def by_block(results: dict) -> dict[int, list[dict]]:
    """The looks of all seeds, each with how many times as fast it was as AR, in the same turns."""
    seen = {}
    for run in results["runs"]:
        ar = run["looks"]["ar"]["seconds"]
        seen.setdefault(run["block"], []).append({
            name: look | {"faster": statistics.median(b / a for a, b in zip(look["seconds"], ar))}
            for name, look in run["looks"].items()})
    return seen


def ways(look: dict) -> dict[str, list[str]]:
    """The names of its numbers by the rule they belong to."""
    found = {}
    for name in (name for name in look if name not in POINTS):
        found.setdefault(name.rpartition(" ")[0], []).append(name)
    return found


def reaches(seen: list[dict], names: list[str], cost: float) -> bool:
    """Whether some look of each seed writes slower and some faster."""
    costs = [[look[name]["tok_per_fwd"] for name in names] for look in seen]
    return all(min(some) <= cost <= max(some) for some in costs)


def table(results: dict) -> str:
    """Markdown: a row a block and rule, at equal cost; AR and verified text are points."""
    shown = [(number, cost) for number in ("valid", "gen_nats") for cost in (1.5, 2)] + [
        ("distinct2", 1.5), ("faster", 1.5)]
    lines = ["| block | rule | `valid` at 1.5 | at 2 | `gen_nats` at 1.5 | at 2 | `distinct2` at 1.5 | times as "
             "fast as AR at 1.5 | AUP |", "|" + "---|" * 9]
    for block, seen in by_block(results).items():
        for way, names in ways(seen[0]).items():
            cells = [cell([at_cost(look, number, cost, tuple(names)) for look in seen]) if reaches(seen, names, cost)
                     else "-" for number, cost in shown]
            areas = [aup([(look[n]["tok_per_fwd"], 100 * look[n]["valid"]) for n in names],
                         100 * look["ar"]["valid"]) for look in seen]
            lines.append(f"| {block} | {way} | {' | '.join(cells)} | {cell(areas, 0)} |")
    return "\n".join(lines)


def points(results: dict) -> str:
    """Markdown: AR and verified text, which have no parameter."""
    numbers = ("tok_per_fwd", "positions_per_tok", "valid", "gen_nats", "distinct2")
    lines = [f"| block | | {' | '.join(f'`{n}`' for n in numbers)} | times as fast as AR, alone |", "|" + "---|" * 8]
    for block, seen in by_block(results).items():
        for name in (name for name in POINTS if name in seen[0]):
            cells = [cell([look[name][number] for look in seen]) for number in numbers]
            cells.append(cell([look[name]["faster"] for look in seen], 2))
            lines.append(f"| {block} | {POINTS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """`valid` against tokens a forward, and against speed: a picture a block, a line a rule, and the points."""
    blocks = by_block(results)
    figure.set_size_inches(4.5 * len(blocks), 9)
    for line, (across, label) in zip(figure.subplots(2, len(blocks), sharey=True, squeeze=False), (
            ("tok_per_fwd", "tokens a forward"), ("faster", "times as fast as AR, alone"))):
        for axes, (block, seen) in zip(line, blocks.items()):
            def mean(name, number, seen=seen):
                return statistics.mean(look[name][number] for look in seen)
            for way, names in ways(seen[0]).items():
                axes.plot([mean(n, across) for n in names], [mean(n, "valid") for n in names], marker=".", label=way)
            for name in (name for name in POINTS if name in seen[0]):
                axes.plot(mean(name, across), mean(name, "valid"), "*", ms=12, label=POINTS[name])
            axes.set(xlabel=label, title=f"block {block}" if across == "tok_per_fwd" else "")
            axes.grid(alpha=0.3)
        line[0].set_ylabel("valid")
    figure.axes[-1].legend(fontsize=7)
