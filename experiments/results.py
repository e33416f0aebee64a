"""What the experiments make of their conversions: targets reached, cells of tables, files and pictures."""
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent


def reached(points: list[dict], gap: Callable, bound: float, axis: str = "tokens") -> tuple[float, bool]:
    """(what it took until gap(point) <= bound, True), between two points by a straight line over the logarithm; or
    (what was spent in all, False): a lower bound."""
    before = None
    for point in points:
        if gap(point) <= bound:
            if before is None:
                return point[axis], True
            part = (gap(before) - bound) / (gap(before) - gap(point))
            return math.exp((1 - part) * math.log(before[axis]) + part * math.log(point[axis])), True
        before = point
    return points[-1][axis], False


def cell(values: list[float], digits: int = 3) -> str:
    """Mean (smallest to largest)."""
    spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def tokens_cell(found: list[tuple[float, bool]]) -> str:
    """The same of tokens, in thousands; a row of which some seed never came so far is a lower bound."""
    some, every = [n / 1000 for n, _ in found], all(ok for _, ok in found)
    spread = f" ({min(some):.0f} to {max(some):.0f})" if len(some) > 1 and every else ""
    return f"{'' if every else '> '}{statistics.mean(some):.0f}k{spread}"


def finish(name: str, results: dict, draw: Callable, quick: bool) -> None:
    """experiments/NAME/results.json, whole or not at all, and curves.png; of a quick run in out/ instead."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder = Path("out/experiments/quick", name) if quick else HERE / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json.new").write_text(json.dumps(results, indent=1))
    os.replace(folder / "results.json.new", folder / "results.json")
    figure = plt.figure(figsize=(10, 5.6), dpi=130)
    draw(results, figure)
    figure.savefig(folder / "curves.png", bbox_inches="tight")
    plt.close(figure)


def by_row(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs of one name, over their seeds, in the order in which the names came."""
    rows = {}
    for run in runs:
        rows.setdefault(run["name"], []).append(run)
    return rows


def at_cost(point: dict, number: str, cost: float, rule: str = "leftmost") -> float:
    """A number of text written at `cost` tokens a forward: between the two levels of the rule that lie around it."""
    looks = sorted(((look["tok_per_fwd"], look[number]) for name, look in point.items() if f"reveal={rule}" in name))
    if cost <= looks[0][0] or cost >= looks[-1][0]:
        return looks[0 if cost <= looks[0][0] else -1][1]
    (x0, y0), (x1, y1) = next(pair for pair in zip(looks, looks[1:]) if pair[0][0] <= cost < pair[1][0])
    return y0 + (y1 - y0) * (cost - x0) / (x1 - x0)


def gap(run: dict, number: str, cost: float) -> Callable:
    """How much worse a point of the run is than its teacher: nats per generated token above it, or `valid` below."""
    sign = -1 if number == "valid" else 1
    return lambda point: sign * (at_cost(point, number, cost) - run["teacher"][number])
