"""What experiments/scheduling.py says of its looks: what a placement loses and saves, and if the curves foretold it."""
import math
import statistics

from decoding.scheduling import derive_schedule
from experiments.common.results import cell
from experiments.scheduling.models import LAYERS
from experiments.scheduling.placements import predicted, spearman


def by_name(run: dict, steps: int) -> dict[str, dict]:
    """The looks of a seed at this T."""
    return {look["name"]: look for look in run["looks"] if look["T"] == steps}


def with_errors(looks: list[dict]) -> list[dict]:
    """Each look with the standard error of its `gen_nats` less heavy's, of as many texts and steps, which are drawn by
    the same numbers; without the texts themselves."""
    heavy = {look["T"]: look["each"] for look in looks if look["name"] == "heavy"}
    return [{**{name: value for name, value in look.items() if name != "each"},
             "error": paired_error(look["each"], heavy[look["T"]]) if look["T"] in heavy else None} for look in looks]


def paired_error(ours: list, theirs: list) -> float:
    """Of the difference of two means of nats a token, from nats and tokens of each text, pair by pair."""
    n, parts = len(ours), []
    for some in (ours, theirs[:len(ours)]):
        nats, tokens = (sum(x) / n for x in zip(*some))
        parts.append([(a - nats / tokens * b) / tokens for a, b in some])
    return statistics.stdev([a - b for a, b in zip(*parts)]) / n ** 0.5 if n > 1 else 0.0


def table(results: dict, steps: int) -> str:
    """Markdown: at T = steps, a row a placement, a quarter of the steps light, and the shares."""
    lines = ["| light steps | `gen_nats`, judge | of the gap lost | `valid` | `entropy` / heavy's | `distinct2` / "
             "heavy's | FLOPs saved, blocks | with the head | of the passes made | time saved |", "|" + "---|" * 10]
    seen = [by_name(run, steps) for run in results["runs"]]
    for name in (name for name in seen[0] if not name.startswith("segments")):
        cells = [cell([look[name]["gen_nats"] for look in seen]), loss(seen, name)]
        cells.append(cell([look[name]["valid"] for look in seen], 2) if "valid" in seen[0][name] else "-")
        cells += [cell([look[name][x] / look["heavy"][x] for look in seen]) for x in ("entropy", "distinct2")]
        cells += [f"{100 * seen[0][name]['saved'][part]:.2f} %" for part in ("blocks", "with head")]
        cells.append(cell([100 * (1 - work(look, name) / work(look, "heavy")) for look in seen], 1) + " %")
        clock = [statistics.median(1 - a / b for a, b in zip(run["seconds"][name], run["seconds"]["heavy"]))
                 for run in results["runs"] if name in run["seconds"] and steps == results["options"]["steps"]]
        cells.append(cell([100 * x for x in clock], 1) + " %" if clock else "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def work(look: dict, name: str) -> float:
    """What the blocks of both models did, by positions times blocks: passes that nothing could change are not made."""
    return sum(LAYERS[letter] * did["positions"] for letter, did in look[name]["work"].items())


def lost(look: dict, name: str) -> float:
    """Of the nats that lie between the heavy and the light model's texts, the share that a schedule loses."""
    heavy, light = look["heavy"]["gen_nats"], look["light"]["gen_nats"]
    return (look[name]["gen_nats"] - heavy) / (light - heavy)


def loss(seen: list[dict], name: str) -> str:
    """The share of the gap by seed, and its standard error, the root of the mean square over seeds."""
    errors = [look[name]["error"] / (look["light"]["gen_nats"] - look["heavy"]["gen_nats"]) for look in seen]
    return f"{cell([lost(look, name) for look in seen], 2)} +- {statistics.mean(x * x for x in errors) ** 0.5:.2f}"


def ranks(run: dict) -> tuple[list[float], list[float]]:
    """Predicted and measured, over the schedules of the search."""
    found = [look for look in run["looks"] if look["name"].startswith("segments")]
    return [predicted(look["steps"], run["curves"]) for look in found], [look["gen_nats"] for look in found]


def claims(results: dict) -> list[str]:
    """What the curves promise, and what came of it."""
    runs = results["runs"]
    ratio = [statistics.mean(run["curves"]["ce"][:-1]) / run["curves"]["gap"]["nats"] for run in runs]
    error = [ratio_error(run["curves"]) for run in runs]
    heights = [value / error for run in runs for name in ("ce", "kl")
               for value, error in zip(run["curves"][name], run["curves"][f"{name}_error"])]
    peaks = [max(zip(run["curves"]["kl"], run["curves"]["t"]))[1] for run in runs]
    return [f"the mean of CE over the gap of the bounds: {cell(ratio)}, standard errors {cell(error)}",
            f"the lowest point of a curve, in standard errors: {min(heights):.1f}; below -2: "
            f"{sum(x < -2 for x in heights)} of {len(heights)}",
            f"KL is largest at t = {cell(peaks, 2)}",
            f"Spearman's correlation of predicted and measured: {cell([spearman(*ranks(run)) for run in runs], 2)}"]


def ratio_error(curves: dict) -> float:
    """Of the mean of CE over the gap."""
    mean, n, gap = statistics.mean(curves["ce"][:-1]), len(curves["ce"]) - 1, curves["gap"]
    error = math.hypot(*curves["ce_error"][:-1]) / n
    return mean / gap["nats"] * math.hypot(error / mean, gap["error"] / gap["nats"])


def draw(results: dict, figure) -> None:
    """For a lecture: what a light step costs over t, the derived schedule under it; quality against FLOPs."""
    runs, steps = results["runs"], results["options"]["steps"]
    left, right = figure.subplots(1, 2)
    for run in runs:
        curves, color = run["curves"], f"C{run['seed']}"
        for name, style in (("ce", ":"), ("kl", "-")):
            left.errorbar(curves["t"], curves[name], curves[f"{name}_error"], color=color, linestyle=style,
                          label=f"{name.upper()}, seed {run['seed']}")
        light = [1 - k / steps for k, name in enumerate(derive_schedule(curves, steps, 0.25).steps()) if name == "L"]
        left.plot(light, [-0.004 * (1 + run["seed"])] * len(light), "|", color=color)
    left.invert_xaxis()
    left.set(xlabel="t, share masked: from all to none", ylabel="nats a masked token, light above heavy")
    left.legend(fontsize=7)
    seen = [by_name(run, steps) for run in runs]
    placed = {name: statistics.mean(look[name]["gen_nats"] for look in seen) for name in seen[0]
              if not name.startswith("segments")}
    for k, (name, y) in enumerate(sorted(placed.items(), key=lambda item: item[1])):     # names left and right in turn
        x = 100 * (1 - seen[0][name]["saved"]["blocks"])
        right.plot(x, y, ".", color=f"C{k}")
        right.annotate(f" {name} ", (x, y), ha="left" if k % 2 else "right", va="center", fontsize=6)
    right.set(xlabel="FLOPs of the blocks, % of heavy", ylabel="gen_nats under the judge")
    right.grid(alpha=0.3)
