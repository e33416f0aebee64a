"""Model scheduling (arXiv 2604.02340): at which denoising steps may a light model stand in for a heavy one?

    python -m experiments.scheduling.run            the story world, three seeds, 50 minutes on two cores
    python -m experiments.scheduling.run --quick    the plumbing, a minute
    python -m experiments.scheduling.run --name=scheduling_text --data=FILE.txt --val_data=FILE.txt --length=64 \
        --updates=4000 --lr=0.005 --samples=128

Measures what the light model costs at each masked share (decoding/scheduling.py), derives schedules from that, and judges
what they write by an AR model that is larger and has read other stories. Leaves experiments/NAME/results.json (every
seed, every number, the commit) and curves.png, and importance.json beside the light model, which --schedule=auto reads.
"""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from decoding.scheduling import derive_schedule
from experiments.common.results import finish, head
from experiments.scheduling.measure import measured, sampled, seconds
from experiments.scheduling.placements import at, placements, segments
from experiments.scheduling.tables import claims, draw, table, with_errors
from training import cli

SHARES = (0.125, 0.375, 0.5, 0.75)      # of light steps, beside 0, a quarter and 1


@dataclass
class Options:
    name: str = "scheduling"  # of the results: experiments/NAME
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    length: int | None = None  # --length of train_tiny.py
    quick: bool = False  # tiny models, few samples: whether it runs at all
    seeds: int = 3  # heavy, light and judge of each
    pretrain: int = 480  # AR updates that each begins with
    updates: int = 3000  # of 16 rows, of heavy and light
    samples: int = 512  # texts of each placement; of each of the search's schedules a quarter as many
    lr: float = 0.01  # --lr of train_tiny.py, of heavy and light
    steps: int = 32  # of a text, ancestral; and four times as many, for four placements and half the texts

    @property
    def flags(self) -> dict:
        """Of train_tiny.py."""
        text = {name: getattr(self, name) for name in ("data", "val_data", "length") if getattr(self, name)}
        return {**text, "pretrain_steps": self.pretrain, "distill_steps": self.updates, "lr": self.lr} | (
            {"width": 64, "pretrain_batch": 4, "batch": 4} if self.quick else {})


def few(steps: int, curves: dict, seed: int) -> dict:
    """All heavy, the paper's placement, the derived one, all light."""
    plans = placements(steps, 0.25, curves, seed)
    return {"heavy": at(steps, []), **{name: plans[name] for name in ("sandwich (paper)", "derived")},
            "light": at(steps, range(steps))}


def looks(options: Options, seed: int, curves: dict) -> list[tuple]:
    """All that is sampled: name, schedule, steps, samples."""
    many, steps = options.samples, options.steps
    plans = few(steps, curves, seed) | placements(steps, 0.25, curves, seed)
    plans |= {f"derived {share}": derive_schedule(curves, steps, share) for share in SHARES}
    found = [(name, plan, steps, many) for name, plan in plans.items()]
    found += [(name, plan, 4 * steps, max(many // 2, 1)) for name, plan in few(4 * steps, curves, seed).items()]
    return found + [(f"segments {name}", plan, steps, max(many // 4, 1)) for name, plan in segments(steps).items()]


def timed(options: Options, seed: int, curves: dict) -> dict:
    """Seconds of 128 texts, in turns."""
    return seconds(options, seed, few(options.steps, curves, seed), options.steps, min(options.samples, 128), 5)


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, pretrain=10, updates=6, samples=4, steps=8)
    results, begun = head(f"scheduling --name={options.name}", options) | {"runs": []}, time.perf_counter()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for seed, curves in enumerate(pool.map(partial(measured, options), range(options.seeds))):
            todo = looks(options, seed, curves)[:: 9 if options.quick else 1]
            made = [pool.submit(sampled, options, seed, *look) for look in todo]
            seen = [{"name": name, "T": n, "samples": count, **future.result()}
                    for (name, _, n, count), future in zip(todo, made)]
            results["runs"].append({"seed": seed, "curves": curves, "looks": with_errors(seen)})
            print(f"seed {seed}: {(time.perf_counter() - begun) / 60:.0f} min", flush=True)
    for run in results["runs"]:
        run["seconds"] = timed(options, run["seed"], run["curves"])
    finish(options.name, results, draw, options.quick)
    if options.quick:                           # of which most rows have not been sampled
        return print("quick")
    tables = [table(results, steps) for steps in (options.steps, 4 * options.steps)]
    print("\n\n".join([*tables, *claims(results)]))


if __name__ == "__main__":
    sys.exit(cli.run(main))
