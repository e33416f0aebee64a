"""Does a light model save anything inside blocks? A converted student, and a shallower one of the same teacher.

    python -m experiments.shallow               the story world, blocks of 8 and 16, three seeds
    python -m experiments.shallow --quick       the plumbing, a minute

The heavy student begins as its teacher, of 6 blocks; the light one as an AR model of 2 that was trained likewise. Both
learn from stories what that teacher says. Schedules go by the masked share of a block. Each model that is in use reads
the finished text too, and what that costs is counted. Leaves experiments/shallow/results.json (every seed, every
number, the commit) and curves.png.
"""
import copy
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context

import numpy as np
import torch

from data import toy
from data.tinystories import stories
from experiments.conversion import opened, teacher_of
from experiments.job import WORK, Job
from experiments.pool import prepare
from experiments.results import cell, finish, head, kept
from experiments.students import student
from model import reveal, schedule
from model.masks import Layout
from report import cli, measure
from report.cli import option

HEAVY, LIGHT = 6, 2                                 # blocks
PLANS = {"heavy": "mask:1-0=H", "light": "mask:1-0=L", "light first": "mask:1-0.5=L,0.5-0=H",
         "light last": "mask:1-0.5=H,0.5-0=L", "light first and last": "mask:1-0.75=L,0.75-0.25=H,0.25-0=L"}
LEVELS, SHOWN, BLOCKS = (0, 0.3, 0.5, 0.7, 0.9, 0.98, 1), 0.9, (8, 16)      # of leftmost; that of the table


@dataclass
class Options:
    quick: bool = option(False, "tiny models, four updates: whether it runs at all")
    seeds: int = option(3, "teachers, and both students of each")
    updates: int = option(320, "of 16 rows, of every student")
    stories: int = option(256, "that a look is made of")


def job_of(layers: int, block: int, seed: int, options: Options) -> Job:
    """Whose teacher has so many blocks."""
    flags = {"text": "data", "states": "prefix", "target": "teacher", "weight": "first", "lr": 0.01, "block": block}
    small = dict(pretrain_steps=20, width=64, rows=4) if options.quick else {}
    return Job(f"{layers} blocks, block {block}", seed, flags, (options.updates,), stories=options.stories,
               pretrain={"layers": layers, **small}, folder=f"{'quick/' * options.quick}shallow-{layers}")


def become(small, net) -> None:
    """`net` is a copy of `small` from here on."""
    for name in ("wte", "wpe", "h", "ln_f", "config"):
        setattr(net, name, copy.deepcopy(getattr(small, name)))
    net.init_mask().requires_grad_(True)


def students(block: int, seed: int, options: Options) -> tuple[dict, torch.nn.Module, Job]:
    """H and L, their teacher, and how it all came about."""
    job = job_of(HEAVY, block, seed, options)
    small = teacher_of(job_of(LIGHT, block, seed, options))
    light = replace(job, name=f"light, block {block}", start=partial(become, small))
    nets = {"H": student(job), "L": student(light)}
    return {name: net for name, (net, _) in nets.items()}, teacher_of(job), job


def looks(options: Options, block: int, seed: int) -> dict[str, dict]:
    """What is said of each plan's texts, at each level."""
    nets, teacher, job = students(block, seed, options)
    _, corpus = opened(job)
    context, starts = teacher.config.context, stories(corpus.val, corpus.tokenizer.eot)
    held = measure.held_out(corpus.val, starts, options.stories, context)
    return {f"{plan} {level}": look(nets, teacher, corpus.tokenizer, held, PLANS[plan], level, block, seed)
            for plan, level in product(PLANS, LEVELS)}


def look(nets: dict, teacher, tok, held: list, plan: str, level: float, block: int, seed: int) -> dict:
    """Also FLOPs of a kept token of the blocks, by every position that either model was given."""
    context, used = teacher.config.context, []

    def both(heavy, layout):
        used.append(schedule.Scheduled(nets, layout, schedule.parse(plan)))
        return used[-1]
    writer = measure.by_rule(nets["H"], Layout(block, 1, 1), reveal.parse(f"leftmost:{level}"), denoiser=both)
    texts, seconds = measure.generate(writer, held, tok.eot, context, seed)
    count = sum(int(text.kept.sum()) for text, _ in texts)
    positions = {name: sum(int(some.denoisers[name].positions.sum()) for some in used) / count
                 for name in used[0].denoisers}
    return measure.generated(teacher, texts, seconds, tok, toy.check) | {"positions": positions, "flops": sum(
        n * measure.body_flops(nets[name].config, context / 2) for name, n in positions.items())}


def look_at(options: Options, work: tuple[int, int]) -> dict:
    """The looks of a block and seed; taken before, with these settings: read."""
    torch.set_num_threads(1)
    file = WORK / job_of(HEAVY, 8, 0, options).folder / "looks-{}-{}.json".format(*work)
    settings = {"updates": options.updates, "stories": options.stories}
    return kept(file, settings, partial(looks, options, *work))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, stories=16)
    results, work = head("shallow", options), [(block, seed) for block in BLOCKS for seed in range(options.seeds)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare, [job_of(layers, 8, seed, options) for seed in range(options.seeds)
                                for layers in (HEAVY, LIGHT)]))
        seen = pool.map(partial(look_at, options), work)
        results["runs"] = [{"block": block, "seed": seed, "looks": look} for (block, seed), look in zip(work, seen)]
    finish("shallow", results, draw, options.quick)
    print(table(results))


def of_block(results: dict, block: int) -> list[dict]:
    """The looks of all seeds."""
    return [run["looks"] for run in results["runs"] if run["block"] == block]


def heavy_at(seen: dict, flops: float, number: str) -> float:
    """The heavy student's number where it spends as much, between two of its levels by a straight line; nan, where it
    always spends more."""
    points = sorted((seen[f"heavy {level}"]["flops"], seen[f"heavy {level}"][number]) for level in LEVELS)
    return float(np.interp(flops, *zip(*points), left=np.nan))


def table(results: dict) -> str:
    """Markdown: a row a block and plan, at the level shown."""
    lines = ["| block, schedule | `valid` | heavy's at these FLOPs | `gen_nats` | heavy's at these FLOPs | "
             "FLOPs / heavy's |", "|" + "---|" * 6]
    for block, plan in product(BLOCKS, PLANS):
        seen, name = of_block(results, block), f"{plan} {SHOWN}"
        cells = []
        for number in ("valid", "gen_nats"):
            cells.append(cell([one[name][number] for one in seen]))
            cells.append(cell([heavy_at(one, one[name]["flops"], number) for one in seen]))
        cells.append(cell([one[name]["flops"] / one[f"heavy {SHOWN}"]["flops"] for one in seen], 2))
        lines.append(f"| {block}, {plan} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """`valid` against FLOPs a token, a line a plan over its levels."""
    for axes, block in zip(figure.subplots(1, 2, sharey=True), BLOCKS):
        for plan in PLANS:
            mean = [[statistics.mean(one[f"{plan} {level}"][number] for one in of_block(results, block))
                     for level in LEVELS] for number in ("flops", "valid")]
            axes.plot(*mean, marker=".", label=plan)
        axes.set(xlabel="FLOPs of the blocks, a token", title=f"block {block}", xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("valid")
    figure.axes[0].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
