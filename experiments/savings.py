"""What experiments/scheduling.py says of its looks: what a placement loses and saves, and if the curves foretold it."""
import statistics

from experiments.pair import LAYERS
from experiments.placements import predicted, spearman
from experiments.results import cell
from model.schedule import derived


def by_name(run: dict, steps: int) -> dict[str, dict]:
    """The looks of a seed at this T."""
    return {look["name"]: look for look in run["looks"] if look["T"] == steps}


def table(results: dict) -> str:
    """Markdown: a row a placement, a quarter of the steps light, and the shares; T the least."""
    steps = results["options"]["steps"]
    lines = ["| light steps | `gen_nats`, judge | of the gap lost | `entropy` / heavy's | `distinct2` / heavy's | "
             "FLOPs saved, blocks | with the head | of the passes made | time saved |", "|" + "---|" * 9]
    seen = [by_name(run, steps) for run in results["runs"]]
    for name in (name for name in seen[0] if not name.startswith("segments")):
        cells = [cell([look[name]["gen_nats"] for look in seen]), cell([lost(look, name) for look in seen], 2)]
        cells += [cell([look[name][x] / look["heavy"][x] for look in seen]) for x in ("entropy", "distinct2")]
        cells += [f"{100 * seen[0][name]['saved'][part]:.2f} %" for part in ("blocks", "with head")]
        cells.append(cell([100 * (1 - work(look, name) / work(look, "heavy")) for look in seen], 1) + " %")
        clock = [statistics.median(1 - a / b for a, b in zip(run["seconds"][name], run["seconds"]["heavy"]))
                 for run in results["runs"] if name in run["seconds"]]
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


def ranks(run: dict) -> tuple[list[float], list[float]]:
    """Predicted and measured, over the schedules of the search."""
    found = [look for look in run["looks"] if look["name"].startswith("segments")]
    return [predicted(look["steps"], run["curves"]) for look in found], [look["gen_nats"] for look in found]


def claims(results: dict) -> list[str]:
    """What the curves promise, and what came of it."""
    runs = results["runs"]
    ratio = [statistics.mean(run["curves"]["ce"]) / run["curves"]["gap"]["nats"] for run in runs]
    heights = [value / error for run in runs for name in ("ce", "kl")
               for value, error in zip(run["curves"][name], run["curves"][f"{name}_error"])]
    peaks = [max(zip(run["curves"]["kl"], run["curves"]["t"]))[1] for run in runs]
    return [f"the mean of CE over the gap of the bounds: {cell(ratio)}",
            f"the lowest point of a curve, in standard errors: {min(heights):.1f}; below -2: "
            f"{sum(x < -2 for x in heights)} of {len(heights)}",
            f"KL is largest at t = {cell(peaks, 2)}",
            f"Spearman's correlation of predicted and measured: {cell([spearman(*ranks(run)) for run in runs], 2)}"]


def draw(results: dict, figure) -> None:
    """For a lecture: what a light step costs over t, the derived schedule under it; quality against FLOPs."""
    runs, steps = results["runs"], results["options"]["steps"]
    left, right = figure.subplots(1, 2)
    for run in runs:
        curves, color = run["curves"], f"C{run['seed']}"
        for name, style in (("ce", ":"), ("kl", "-")):
            left.errorbar(curves["t"], curves[name], curves[f"{name}_error"], color=color, linestyle=style,
                          label=f"{name.upper()}, seed {run['seed']}")
        light = [1 - k / steps for k, name in enumerate(derived(curves["kl"], steps, 0.25).steps()) if name == "L"]
        left.plot(light, [-0.004 * (1 + run["seed"])] * len(light), "|", color=color)
    left.invert_xaxis()
    left.set(xlabel="t, share masked: from all to none", ylabel="nats a masked token, light above heavy")
    left.legend(fontsize=7)
    seen = [by_name(run, steps) for run in runs]
    for name in (name for name in seen[0] if not name.startswith("segments")):
        x = 100 * (1 - seen[0][name]["saved"]["blocks"])
        right.plot(x, statistics.mean(look[name]["gen_nats"] for look in seen), ".")
        right.annotate(name, (x, statistics.mean(look[name]["gen_nats"] for look in seen)), fontsize=6)
    right.set(xlabel="FLOPs of the blocks, % of heavy", ylabel="gen_nats under the judge")
    right.grid(alpha=0.3)
