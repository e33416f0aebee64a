"""What a learned unmasking policy is worth, beside every heuristic, in blocks and over whole texts
(2512.09106).

    python -m experiments.unmasking.run --world=blocks      the story world, blocks of 8: an hour on two cores
    python -m experiments.unmasking.run --world=whole       the same, where the block is the text: two hours
    python -m experiments.unmasking.run --quick             does it run at all? a minute

A policy learns from prompts of training stories. Of the held-out stories some are for choosing, among
heuristics and among a policy's temperatures; the numbers are of the others. Text is greedy, as it is in
training: what differs is which masks are revealed, and when. One policy of each seed imitates a heuristic,
the best for an alpha (worlds.py); from there rewards alone make one that is fast, and from that one of each
alpha. Writes experiments/unmasking/results/WORLD.json, WORLD.png and WORLD_story.png.
"""
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Literal

import torch

from experiments.common.conversion import load_student
from experiments.common.results import output_folder, run_info, save_results
from experiments.unmasking import policies
from experiments.unmasking.comparison import areas, best_rule, gains, rules_to_test
from experiments.unmasking.tables import gains_table, plot, table
from experiments.unmasking.worlds import WORLDS, heuristics, imitable_in, job_of
from training import cli

SHOWN_ALPHA = 1     # its policies are also evaluated with scaled rates, blind, and timed


@dataclass
class Options:
    world: Literal["blocks", "whole"] = "blocks"  # students with blocks of 8, or with whole texts as blocks
    quick: bool = False  # a tiny student, two updates: does it run at all?
    seeds: int = 3  # policies of each alpha
    dev: int = 256  # stories that choices are made on
    test: int = 512  # stories that numbers are of


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, dev=8, test=8)
    world = options.world
    results = run_info("unmasking", options) | {"world": world, "shown_alpha": SHOWN_ALPHA}
    torch.set_num_threads(1)
    load_student(job_of(world, options.quick))      # converted here, before two processes need it at once
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        rules = list(heuristics(world))[:: 9 if options.quick else 1]
        on_dev = list(pool.map(partial(policies.evaluate_heuristic, options, "dev"), rules))
        results["heuristics"] = [{"rule": rule, "dev": dev} for rule, dev in zip(rules, on_dev)]
        tested = rules_to_test(results)
        names = [rule["rule"] for rule in tested]
        on_test = pool.map(partial(policies.evaluate_heuristic, options, "test"), names)
        for rule, numbers in zip(tested, on_test):
            rule["test"] = numbers

        expert = best_rule(results, WORLDS[world].begin, imitable_in(world))
        seeds = range(options.seeds)
        imitating = list(pool.map(partial(policies.imitating_policy, options, expert), seeds))
        results["fast_phase_seconds"] = list(
            pool.map(partial(policies.fast_phase_seconds, options, expert), seeds)
        )
        alphas = sorted(WORLDS[world].alphas, key=lambda alpha: alpha != SHOWN_ALPHA)
        work = [(alpha, seed) for seed in seeds for alpha in alphas]
        if options.quick:
            work = work[:2]
        rewarded = list(pool.map(partial(policies.rewarded_policy, options, expert, SHOWN_ALPHA), work))
        results["policies"] = imitating + rewarded
        compared = ("reward", "additive") if world == "blocks" else ()
        results["collapse"] = list(pool.map(partial(policies.reward_comparison, options, expert), compared))
    results["areas"] = areas(results)
    results["gains"] = gains(results)
    results["costs"] = policies.measure_costs(options, results, expert)
    results["disagreements"] = policies.find_disagreements(options, results, expert)
    policies.draw_story(options, results, output_folder("unmasking", options.quick) / f"{world}_story.png")
    save_results("unmasking", world, without_single_texts(results), plot, options.quick)
    print(table(results), gains_table(results), sep="\n\n")


def without_single_texts(results):
    """The results without the numbers of single texts, which stay in out/."""
    if isinstance(results, dict):
        kept = {name: value for name, value in results.items() if name not in ("valid_each", "nfe_each")}
        return {name: without_single_texts(value) for name, value in kept.items()}
    if isinstance(results, list):
        return [without_single_texts(value) for value in results]
    return results


if __name__ == "__main__":
    sys.exit(cli.run(main))
