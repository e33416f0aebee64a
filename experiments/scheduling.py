"""Model scheduling (arXiv 2604.02340): at which denoising steps may a light model stand in for a heavy one?

    python -m experiments.scheduling            the story world, three seeds
    python -m experiments.scheduling --quick    the plumbing, a minute
    python -m experiments.scheduling --name=scheduling_text --data=FILE.txt --val_data=FILE.txt

Measures what the light model costs at each masked share (report/importance.py), derives schedules from that, and judges
what they write by an AR model that is larger and has read other stories. Leaves experiments/NAME/results.json (every
seed, every number, the commit) and curves.png, and importance.json beside the light model, which --schedule=auto reads.
"""
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from experiments.pair import measured, sampled
from experiments.placements import at, placements, predicted, segments, spearman
from experiments.results import cell, finish, head
from model.schedule import derived
from report import cli
from report.cli import option

SHARES = (0.125, 0.375, 0.5, 0.75)      # of light steps, beside 0, a quarter and 1


@dataclass
class Options:
    name: str = option("scheduling", "of the results: experiments/NAME")
    data: str = option("toy", "--data of train_tiny.py")
    val_data: str | None = option(None, "--val_data of train_tiny.py")
    quick: bool = option(False, "tiny models, few samples: whether it runs at all")
    seeds: int = option(3, "heavy, light and judge of each")
    pretrain: int = option(480, "AR updates that each begins with")
    updates: int = option(4000, "of 16 rows, of heavy and light")
    samples: int = option(512, "texts of each placement; of each of the search's schedules a quarter")
    steps: int = option(32, "of a text, ancestral; four times as many for a quarter of the samples")

    @property
    def flags(self) -> dict:
        """Of train_tiny.py."""
        text = {"data": self.data} | ({"val_data": self.val_data} if self.val_data else {})
        return {**text, "pretrain_steps": self.pretrain, "distill_steps": self.updates, "lr": 0.01} | (
            {"width": 64, "rows": 4, "batch": 4} if self.quick else {})


def looks(options: Options, seed: int, kl: list[float]) -> list[tuple]:
    """All that is sampled: name, schedule, steps, samples."""
    many, few, steps = options.samples, max(options.samples // 4, 1), options.steps
    ends = {"heavy": lambda n: at(n, []), "light": lambda n: at(n, range(n))}
    found = [(name, plan(n), n, count) for name, plan in ends.items() for n, count in ((steps, many), (4 * steps, few))]
    found += [(name, plan, n, count) for n, count in ((steps, many), (4 * steps, few))
              for name, plan in placements(n, 0.25, kl, seed).items()]
    found += [(f"derived {share}", derived(kl, steps, share), steps, many) for share in SHARES]
    return found + [(f"segments {name}", plan, steps, few) for name, plan in segments(steps).items()]


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, pretrain=10, updates=6, samples=4, steps=8)
    results, begun = head(f"scheduling --name={options.name}", options) | {"runs": []}, time.perf_counter()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for seed, curves in enumerate(pool.map(partial(measured, options), range(options.seeds))):
            todo = looks(options, seed, curves["kl"])[:: 9 if options.quick else 1]
            made = [pool.submit(sampled, options, seed, *look) for look in todo]
            numbers = [future.result() for future in made]
            results["runs"].append({"seed": seed, "curves": curves, "looks": [
                {"name": name, "T": n, "samples": count, **said} for (name, _, n, count), said in zip(todo, numbers)]})
            print(f"seed {seed}: {(time.perf_counter() - begun) / 60:.0f} min", flush=True)
    finish(options.name, results, draw, options.quick)
    print("quick" if options.quick else "\n".join([table(results), *claims(results)]))


def by_name(run: dict, steps: int) -> dict[str, dict]:
    """The looks of a seed at this T."""
    return {look["name"]: look for look in run["looks"] if look["T"] == steps}


def table(results: dict) -> str:
    """Markdown: a row a placement, a quarter of the steps light, and the shares; T the least."""
    steps = results["options"]["steps"]
    lines = ["| light steps | `gen_nats`, judge | of the gap lost | `entropy` / heavy's | `distinct2` / heavy's | "
             "FLOPs saved, blocks | with the head |", "|" + "---|" * 7]
    seen = [by_name(run, steps) for run in results["runs"]]
    for name in (name for name in seen[0] if not name.startswith("segments")):
        cells = [cell([look[name]["gen_nats"] for look in seen]), cell([lost(look, name) for look in seen], 2)]
        cells += [cell([look[name][x] / look["heavy"][x] for look in seen]) for x in ("entropy", "distinct2")]
        cells += [f"{100 * seen[0][name]['saved'][part]:.2f} %" for part in ("blocks", "with head")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


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
    low = min(value / error for run in runs for name in ("ce", "kl")
              for value, error in zip(run["curves"][name], run["curves"][f"{name}_error"]))
    peaks = [max(zip(run["curves"]["kl"], run["curves"]["t"]))[1] for run in runs]
    return [f"the mean of CE over the gap of the bounds: {cell(ratio)}",
            f"the lowest point of a curve, in standard errors: {low:.1f}",
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


if __name__ == "__main__":
    sys.exit(cli.run(main))
