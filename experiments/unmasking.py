"""What a learned unmasking policy is worth: beside every heuristic, in blocks and over whole texts (2512.09106).

    python -m experiments.unmasking             the story world, three policies of each kind: 2 to 3 hours on two cores
    python -m experiments.unmasking --quick     the plumbing, a minute

A policy learns from prompts of training stories. Of held-out stories some are for choosing, among heuristics and among
a policy's temperatures, the others for what is said here. Text is greedy, as it is in training: what differs is which
masks come off, and when. One policy of each world and seed imitates the heuristic that is best at the alpha shown; from
there rewards alone make one of each alpha. Leaves experiments/unmasking/results.json (every seed, every number, the
commit), curves.png and story.png.
"""
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from experiments.gains import gains, table, table_of_gains, volumes
from experiments.hull import best_rule, shown
from experiments.policies import additive, grown, imitated, look_at
from experiments.pool import prepare
from experiments.results import finish, head
from experiments.students import student
from experiments.unmasked import costs, draw, story
from experiments.worlds import WORLDS, heuristics, imitable_in, job_of
from report import cli
from report.cli import option

SHOWN = 1           # the alpha whose best heuristic is imitated, and whose policy is scaled, blinded, timed


@dataclass
class Options:
    quick: bool = option(False, "tiny students, two updates: whether it runs at all")
    seeds: int = option(3, "policies of each world and alpha")
    dev: int = option(256, "stories that choices are made on")
    test: int = option(384, "stories that numbers are of")


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, dev=8, test=8)
    results, every = head("unmasking", options) | {"shown": SHOWN}, 9 if options.quick else 1
    worlds, seeds = list(reversed(WORLDS)), range(options.seeds)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare, [job_of(worlds[0], options.quick)]))
        list(pool.map(student, [job_of(name, options.quick) for name in worlds]))
        work = [(name, rule) for name in worlds for rule in list(heuristics(name))[::every]]
        seen = list(pool.map(partial(look_at, options, "dev"), work))
        results["heuristics"] = [{"world": name, "rule": rule, "dev": dev} for (name, rule), dev in zip(work, seen)]
        chosen = shown(results)
        for rule, test in zip(chosen, pool.map(partial(look_at, options, "test"), [(r["world"], r["rule"])
                                                                                   for r in chosen])):
            rule["test"] = test
        experts = {name: best_rule(results, name, SHOWN, imitable_in(name)) for name in worlds}
        first = list(pool.map(partial(imitated, options), [(name, experts[name], seed) for name in worlds
                                                           for seed in seeds]))
        tries = [(name, experts[name], alpha, seed) for name in worlds for seed in seeds
                 for alpha in sorted(WORLDS[name].alphas, key=lambda alpha: alpha != SHOWN)]
        results["policies"] = first + list(pool.map(partial(grown, options, SHOWN), tries[::3 if options.quick else 1]))
        results["collapse"] = list(pool.map(partial(additive, options, experts["blocks"]), ("reward", "additive")))
    results |= {"volumes": volumes(results), "gains": gains(results)}
    results["costs"] = {name: costs(options, results, name, experts[name]) for name in worlds}
    story(options, results)
    finish("unmasking", without_texts(results), draw, options.quick)
    print(table(results), table_of_gains(results), sep="\n\n")


def without_texts(results: dict) -> dict:
    """What single texts were worth is in out/."""
    if isinstance(results, dict):
        return {name: without_texts(value) for name, value in results.items() if name not in ("right", "steps")}
    return [without_texts(value) for value in results] if isinstance(results, list) else results


if __name__ == "__main__":
    sys.exit(cli.run(main))
