"""What the experiments make of their conversions: targets reached, cells of tables, files and pictures."""
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

import opdlm
from report import metrics
from report.compare import write_json

HERE = Path(__file__).parent


def flops(config, record: dict, recipe: opdlm.Recipe) -> float:
    """All of an update's arithmetic: every position of its rollout, the teacher if it is asked, the two streams."""
    asked = recipe.target is not opdlm.one_hot
    body, head = metrics.body_flops(config, record["len"] / 2), metrics.head_flops(config)
    return (body * (record["positions"] + (asked + 6) * record["tokens"])
            + head * (record["positions"] + (asked + 3) * record["loss_positions"]))


def reached(points: list[dict], gap: Callable, bound: float, axis: str = "tokens") -> tuple[float, bool]:
    """(what it took until gap(point) <= bound, True), between two points by a straight line over the logarithm, at
    the first point at most; or (what was spent in all, False): a lower bound."""
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


def times(ours: list, theirs: list) -> str:
    """Their tokens over ours; where ours never came so far there is none, where theirs did not it is a lower bound."""
    if not all(ok for _, ok in ours):
        return "not reached"
    values = [b / a for (a, _), (b, _) in zip(ours, theirs)]
    return ("" if all(ok for _, ok in theirs) else "> ") + cell(values, 1)


def rounded(value):
    """With six digits a number: a results file is read by people too."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def kept(file: Path, settings: dict, make: Callable) -> dict:
    """What make() gives; made before with these settings: read."""
    if file.exists() and (found := json.loads(file.read_text())).get("settings") == settings:
        return found["made"]
    made = make()
    write_json(file, {"settings": settings, "made": made})
    return made


def head(command: str, options) -> dict:
    """What a results file begins with: to be taken before the work, which a commit may overtake. No paths."""
    said = {name: value for name, value in asdict(options).items() if "data" not in name}
    here = metrics.facts(torch.device("cpu"))
    return {"command": f"python -m experiments.{command}", "options": said, **here, "threads": 1}


def finish(name: str, results: dict, draw: Callable, quick: bool) -> None:
    """experiments/NAME/results.json, whole or not at all, and curves.png; of a quick run in out/ instead."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    folder = Path("out/experiments/quick", name) if quick else HERE / name
    write_json(folder / "results.json", rounded(results))
    figure = plt.figure(figsize=(10, 5.6), dpi=130)
    draw(results, figure)
    figure.savefig(folder / "curves.png", bbox_inches="tight")
    plt.close(figure)


def by_row(runs: list[dict]) -> dict[str, list[dict]]:
    """Runs of one name, over their seeds, in the order in which the names came."""
    rows = {}
    for run in runs:
        rows.setdefault(run["settings"]["name"], []).append(run)
    return rows


def at_cost(point: dict, number: str, cost: float, looks: tuple) -> float:
    """A number of text written at `cost` tokens a forward: between the two of the `looks` that lie around it, by a
    straight line; or of the nearest, if all are on one side."""
    found = sorted((point[look]["tok_per_fwd"], point[look][number]) for look in looks)
    if cost <= found[0][0] or cost >= found[-1][0]:
        return found[0 if cost <= found[0][0] else -1][1]
    (x0, y0), (x1, y1) = next(pair for pair in zip(found, found[1:]) if pair[0][0] <= cost < pair[1][0])
    return y0 + (y1 - y0) * (cost - x0) / (x1 - x0)


def gap(run: dict, number: str, cost: float, looks: tuple) -> Callable:
    """How much worse a point of the run is than its teacher: nats per generated token above it, or `valid` below."""
    sign = -1 if number == "valid" else 1
    return lambda point: sign * (at_cost(point, number, cost, looks) - run["teacher"][number])
