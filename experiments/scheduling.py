"""Model scheduling (arXiv 2604.02340): at which denoising steps may a light model stand in for a heavy one?

    python -m experiments.scheduling            the story world, three seeds
    python -m experiments.scheduling --quick    the plumbing, a minute
    python -m experiments.scheduling --name=scheduling_text --data=FILE.txt --val_data=FILE.txt

Measures what the light model costs at each masked share (report/importance.py), derives schedules from that, and judges
what they write by an AR model that is larger and has read other stories. Leaves experiments/NAME/results.json (every
seed, every number, the commit) and curves.png, and importance.json beside the light model, which --schedule=auto reads.
"""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from experiments.pair import measured, sampled, seconds
from experiments.placements import at, placements, segments
from experiments.results import finish, head
from experiments.savings import claims, draw, table
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
    samples: int = option(512, "texts of each placement; of each of the search's schedules half as many")
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
    return found + [(f"segments {name}", plan, steps, 2 * few) for name, plan in segments(steps).items()]


def timed(options: Options, seed: int, kl: list[float]) -> dict:
    """Seconds of 128 texts, in turns: all heavy, the paper's placement, the derived one, all light."""
    plans = placements(options.steps, 0.25, kl, seed)
    plans = {"heavy": at(options.steps, []), **{name: plans[name] for name in ("sandwich (paper)", "derived")},
             "light": at(options.steps, range(options.steps))}
    return seconds(options, seed, plans, options.steps, min(options.samples, 128), 5)


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
    for run in results["runs"]:
        run["seconds"] = timed(options, run["seed"], run["curves"]["kl"])
    finish(options.name, results, draw, options.quick)
    print("quick" if options.quick else "\n".join([table(results), *claims(results)]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
