"""Does a light model save anything inside blocks? A converted student, and a shallower one of the same teacher.

    python -m experiments.shallow               the story world, blocks of 8 and 16, three seeds
    python -m experiments.shallow --quick       the plumbing, a minute

The heavy student has the teacher's 6 blocks, the light one its first and last; both learn from stories, as in
train_tiny.py's --warm_steps. Schedules go by the masked share of a block. Each model that is in use reads the finished
text too, and what that costs is counted. Leaves experiments/shallow/results.json (every seed, every number, the commit)
and curves.png.
"""
import copy
import json
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

import train_tiny
from data import toy
from data.tinystories import stories
from experiments.ablations import STORIES
from experiments.conversion import opened, take_in, teacher_of, updates
from experiments.job import WORK, Job
from experiments.pool import prepare
from experiments.results import cell, finish, head
from model import hub, reveal, schedule
from model.masks import Layout
from report import cli, measure
from report.cli import option
from report.publish import write_json

LAYERS = {"H": 6, "L": 2}
PLANS = {"heavy": "mask:1-0=H", "light": "mask:1-0=L", "light first": "mask:1-0.5=L,0.5-0=H",
         "light last": "mask:1-0.5=H,0.5-0=L", "light first and last": "mask:1-0.75=L,0.75-0.25=H,0.25-0=L"}
LEVELS, SHOWN = (0.5, 0.7, 0.9, 0.98, 1), 0.9       # of --reveal=leftmost; that of the table


@dataclass
class Options:
    quick: bool = option(False, "tiny models, four updates: whether it runs at all")
    seeds: int = option(3, "teachers, and both students of each")
    updates: int = option(320, "of 16 rows, of every student")
    stories: int = option(256, "that a look is made of; their speed is that of the first 16, one at a time")


def job_of(block: int, seed: int, options: Options) -> Job:
    small = dict(pretrain_steps=20, width=64, rows=4) if options.quick else {}
    return Job("shallow", seed, STORIES | {"block": block}, (options.updates,), stories=options.stories,
               pretrain={"layers": LAYERS["H"], **small}, folder="quick/shallow" if options.quick else "shallow")


def student(name: str, job: Job, block: int) -> torch.nn.Module:
    """H or L of a block, trained if it is not there."""
    folder = WORK / job.folder / f"{name}-{block}-{job.seed}"
    if not (folder / "config.json").exists():
        (options, corpus), teacher = opened(job), teacher_of(job)
        recipe = train_tiny.recipe_of(options, corpus.tokenizer.eot)
        net = cut(copy.deepcopy(teacher), LAYERS[name]).init_mask().requires_grad_(True)
        mean = copy.deepcopy(net)
        for record in updates(net, teacher, corpus, [recipe], options):
            take_in(mean, net, record["step"])
        hub.save(folder, mean, corpus.tokenizer, recipe.layout)
    return hub.load(folder)[0].requires_grad_(False)


def cut(net, layers: int):
    """Its first blocks and its last."""
    net.h = torch.nn.ModuleList([*net.h[:layers - 1], net.h[-1]])
    net.config = replace(net.config, layers=layers)
    return net


def looks(options: Options, work: tuple[int, int]) -> dict:
    """Of a block and seed: what is said of each plan's texts at each level."""
    block, seed = work
    job = job_of(block, seed, options)
    file = WORK / job.folder / f"looks-{block}-{seed}.json"
    if not file.exists():
        teacher, nets = teacher_of(job), {name: student(name, job, block) for name in LAYERS}
        _, corpus = opened(job)
        starts = stories(corpus.val, corpus.tokenizer.eot)
        held = measure.held_out(corpus.val, starts, job.stories, teacher.config.context)
        write_json(file, {f"{plan} {level}": look(nets, teacher, corpus, held, plan, level, block, seed)
                          for plan in PLANS for level in LEVELS})
    return {"block": block, "seed": seed, "looks": json.loads(Path(file).read_text())}


def look(nets: dict, teacher, corpus, held: list, plan: str, level: float, block: int, seed: int) -> dict:
    """Also `flops`, of the blocks and a kept token, by every position that either model was given."""
    layout, rule, used = Layout(block, 1, 1), reveal.parse(f"leftmost:{level}"), []
    eot, context = corpus.tokenizer.eot, teacher.config.context

    def both(heavy, layout):
        used.append(schedule.Scheduled(nets, layout, schedule.parse(PLANS[plan])))
        return used[-1]
    writer = measure.by_rule(nets["H"], layout, rule, denoiser=both)
    texts, seconds = measure.generate(writer, held, eot, context, seed)
    spent = sum(int(one.positions.sum()) * measure.body_flops(nets[name].config, context / 2)
                for some in used for name, one in some.denoisers.items())
    alone, alone_seconds = measure.generate(writer, held[:16], eot, context, seed, batch=1)
    return measure.generated(teacher, texts, seconds, corpus.tokenizer, toy.check) | {
        "flops": spent / sum(int(text.kept.sum()) for text, _ in texts),
        "tok_s": sum(int(text.kept.sum()) for text, _ in alone) / alone_seconds}


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, stories=16)
    results, work = head("shallow", options), list(product((8, 16), range(options.seeds)))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare, [job_of(8, seed, options) for seed in range(options.seeds)]))
        results["runs"] = list(pool.map(partial(looks, options), work))
    finish("shallow", results, draw, options.quick)
    print(table(results))


def of_block(results: dict, block: int) -> list[dict]:
    """The looks of all seeds."""
    return [run["looks"] for run in results["runs"] if run["block"] == block]


def heavy_at(seen: dict, flops: float, number: str) -> float:
    """The heavy student's number where it spends as much, between two of its levels by a straight line."""
    points = sorted((seen[f"heavy {level}"]["flops"], seen[f"heavy {level}"][number]) for level in LEVELS)
    return float(np.interp(flops, *zip(*points)))


def table(results: dict) -> str:
    """Markdown: a row a block and plan, at the level shown."""
    lines = ["| block, schedule | `valid` | heavy's at these FLOPs | `gen_nats` | heavy's at these FLOPs | "
             "FLOPs / heavy's | time / heavy's |", "|" + "---|" * 7]
    for block, plan in product((8, 16), PLANS):
        seen, name = of_block(results, block), f"{plan} {SHOWN}"
        cells = []
        for number in ("valid", "gen_nats"):
            cells.append(cell([one[name][number] for one in seen]))
            cells.append(cell([heavy_at(one, one[name]["flops"], number) for one in seen]))
        cells += [cell([one[name][number] / one[f"heavy {SHOWN}"][number] for one in seen], 2) for number in ("flops",)]
        cells += [cell([one[f"heavy {SHOWN}"]["tok_s"] / one[name]["tok_s"] for one in seen], 2)]
        lines.append(f"| {block}, {plan} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """`valid` against FLOPs a token, a line a plan over its levels."""
    for axes, block in zip(figure.subplots(1, 2, sharey=True), (8, 16)):
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
