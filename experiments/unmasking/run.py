"""What a learned unmasking policy is worth: beside every heuristic, in blocks and over whole texts (2512.09106).

    python -m experiments.unmasking.run --world=blocks      the story world, blocks of 8, three policies a kind: an hour
    python -m experiments.unmasking.run --world=whole       the same, where the block is the text: two hours
    python -m experiments.unmasking.run --quick             the plumbing, a minute

A policy learns from prompts of training stories. Of held-out stories some are for choosing, among heuristics and among
a policy's temperatures, the others for what is said here. Text is greedy, as it is in training: what differs is which
masks come off, and when. One policy of each seed imitates a heuristic, the best at an alpha (worlds.py); from there
rewards alone make one that hurries, and from that one of each alpha. Leaves experiments/unmasking_WORLD/
results.json (every seed, every number, the commit), curves.png and story.png.
"""
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch

from experiments.common.results import finish, head
from experiments.common.students import student
from experiments.unmasking.costs import choices, costs, draw, story
from experiments.unmasking.hull import best_rule, shown
from experiments.unmasking.policies import additive, grown, hurried, imitated, look_at
from experiments.unmasking.tables import gains, table, table_of_gains, volumes
from experiments.unmasking.worlds import WORLDS, heuristics, imitable_in, job_of
from training import cli

SHOWN = 1           # the alpha whose policy is scaled, blinded, timed


@dataclass
class Options:
    world: str = "blocks"  # blocks: a student with blocks of 8; whole: one whose block is the text
    quick: bool = False  # a tiny student, two updates: whether it runs at all
    seeds: int = 3  # policies of each alpha
    dev: int = 256  # stories that choices are made on
    test: int = 512  # stories that numbers are of

    def __post_init__(self):
        if self.world not in WORLDS:
            raise ValueError(f"--world={self.world}: wanted is one of {', '.join(WORLDS)}")


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, dev=8, test=8)
    command, every, world = f"unmasking --world={options.world}", 9 if options.quick else 1, options.world
    results = head(command, options) | {"world": world, "shown": SHOWN}
    torch.set_num_threads(1)
    student(job_of(world, options.quick))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        rules, seeds = list(heuristics(world))[::every], range(options.seeds)
        results["heuristics"] = [{"rule": rule, "dev": dev} for rule, dev in zip(rules, pool.map(
            partial(look_at, options, "dev"), rules))]
        chosen = shown(results)
        for rule, test in zip(chosen, pool.map(partial(look_at, options, "test"), [rule["rule"] for rule in chosen])):
            rule["test"] = test
        expert = best_rule(results, WORLDS[world].begin, imitable_in(world))
        first = list(pool.map(partial(imitated, options, expert), seeds))
        results["hurried"] = list(pool.map(partial(hurried, options, expert), seeds))
        alphas = sorted(WORLDS[world].alphas, key=lambda alpha: alpha != SHOWN)
        tries = [(alpha, seed) for seed in seeds for alpha in alphas][:2 if options.quick else None]
        results["policies"] = first + list(pool.map(partial(grown, options, expert, SHOWN), tries))
        collapse = ("reward", "additive") if world == "blocks" else ()
        results["collapse"] = list(pool.map(partial(additive, options, expert), collapse))
    results |= {"volumes": volumes(results), "gains": gains(results), "costs": costs(options, results, expert),
                "choices": choices(options, results, expert)}
    story(options, results)
    finish(f"unmasking_{world}", without_texts(results), draw, options.quick)
    print(table(results), table_of_gains(results), sep="\n\n")


def without_texts(results: dict) -> dict:
    """What single texts were worth is in out/."""
    if isinstance(results, dict):
        return {name: without_texts(value) for name, value in results.items() if name not in ("right", "steps")}
    return [without_texts(value) for value in results] if isinstance(results, list) else results


if __name__ == "__main__":
    sys.exit(cli.run(main))
