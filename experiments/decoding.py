"""Quality against speed: every reveal rule over its parameter, by block, with AR and verified text as points beside it.

    python -m experiments.decoding              the story world, blocks 4, 8, 16, three seeds: about an hour and a half
    python -m experiments.decoding --quick      the plumbing, a minute

Two students of each block: one has learnt states that show a left part, the other any part, since most rules show
tokens right of a mask. A look that is there is not taken again; speeds are taken at the end, in turns, by one process.
Leaves experiments/decoding/results.json (every seed, every point, the commit) and curves.png.
"""
import math
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch

from data import toy
from data.tinystories import stories
from experiments import speed
from experiments.conversion import opened, teacher_of
from experiments.job import WORK, Job, tiny
from experiments.pool import prepare
from experiments.results import at_cost, cell, finish, head, kept
from experiments.students import student
from model import reveal
from model.masks import AR
from report import cli, measure
from report.cli import option

KINDS = {"left": "prefix", "any": "random"}     # which parts of a block a student has learnt with: --states
LEVELS = (0.3, 0.5, 0.7, 0.9, 0.98, 0.995, 1)
WAYS = {                                # of rules by name: the student, specs, and the confidence that they go by
    "leftmost": ("left", [f"leftmost:{level}" for level in LEVELS], None),
    "leftmost, any": ("any", [f"leftmost:{level}" for level in LEVELS], None),
    "threshold": ("any", [f"threshold:{level}" for level in LEVELS], None),
    "factor": ("any", [f"factor:{bound}" for bound in (0.02, 0.1, 0.5, 1)], None),
    "eb": ("any", [f"eb:{bound}" for bound in (0, 0.02, 0.1, 0.5)], None),
    **{f"static, {name}": ("any", [f"static:{n}" for n in (1, 2, 4)], name)
       for name in ("largest", "margin", "entropy")},
    "random": ("any", [f"random:{n}" for n in (1, 2, 4)], None)}
POINTS = {"ar": "AR", "self": "verified by itself", "teacher": "verified by the teacher"}
TURNS, CONTEXT = 3, 96              # CONTEXT: of the story world's networks, tokens


@dataclass
class Options:
    quick: bool = option(False, "tiny students, few looks: whether it runs at all")
    seeds: int = option(3, "students of each block and kind")
    updates: int = option(320, "of 16 rows, of every student")
    stories: int = option(256, "that a look is made of; their speed is that of the first 8, one at a time")


def job_of(kind: str, block: int, seed: int, options: Options) -> Job:
    flags = {"text": "data", "states": KINDS[kind], "target": "teacher", "weight": "first", "lr": 0.01, "block": block}
    job = Job(f"decoding, {kind}, block {block}", seed, flags, (options.updates,), stories=options.stories)
    return replace(tiny(job), stories=options.stories) if options.quick else job


def writers(block: int, seed: int, options: Options) -> tuple[dict[str, measure.Writer], torch.nn.Module]:
    """Ways to write by name, and the teacher."""
    jobs = {kind: job_of(kind, block, seed, options) for kind in KINDS}
    nets, teacher = {kind: student(job) for kind, job in jobs.items()}, teacher_of(jobs["left"])
    found = {"ar": measure.by_rule(teacher, AR, reveal.parse("static:1")),
             "self": measure.by_verifier(*nets["left"]), "teacher": measure.by_verifier(*nets["left"], teacher)}
    for way, (kind, specs, confidence) in WAYS.items():
        found |= {f"{way} {spec}": measure.by_rule(*nets[kind], reveal.parse(spec, confidence)) for spec in specs}
    return dict(list(found.items())[::6]) if options.quick else found, teacher


def told(block: int, seed: int, options: Options) -> tuple:
    """Held-out stories to go on from, the tokenizer."""
    _, corpus = opened(job_of("left", block, seed, options))
    starts = stories(corpus.val, corpus.tokenizer.eot)
    return measure.held_out(corpus.val, starts, options.stories, CONTEXT), corpus.tokenizer


def qualities(options: Options, block: int, seed: int) -> dict[str, dict]:
    """Numbers by name."""
    (made, teacher), (held, tok) = writers(block, seed, options), told(block, seed, options)
    length = teacher.config.context
    return {name: measure.generated(teacher, *measure.generate(writer, held, tok.eot, length, seed), tok, toy.check)
            for name, writer in made.items()}


def speeds(options: Options, block: int, seed: int) -> dict[str, list[float]]:
    """Seconds a token by name, of 8 texts one at a time, a number a turn."""
    (made, teacher), (held, tok) = writers(block, seed, options), told(block, seed, options)
    length = teacher.config.context

    def alone(writer):
        texts, seconds = measure.generate(writer, held[:8], tok.eot, length, seed, batch=1)
        return seconds / sum(int(text.kept.sum()) for text, _ in texts)

    def plain(_):                                                           # a loop that does nothing else
        prompts = [story[None, :1 + k] for k, story in enumerate(held[:8])]
        return sum(speed.timed(partial(speed.ar, teacher, row, length - 8)) for row in prompts) / (8 * (length - 8))
    turns = [{name: (plain if name == "ar" else alone)(writer) for name, writer in made.items()} for _ in range(TURNS)]
    return {name: [turn[name] for turn in turns] for name in made}


def aup(points: list[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (d3LLM, 2601.07568): the area under accuracy, in percent, over tokens per forward, of
    the points not more than 5 below the slowest; accuracy below the `best`, AR's, counts exp(-3 (1 - accuracy / best))
    of itself. From 0 to the slowest point it is that point's."""
    points = sorted(points)
    points = [(x, y) for x, y in points if y >= points[0][1] - 5]
    weighed = [(x, y * min(math.exp(-3 * (1 - y / max(best, 1))), 1)) for x, y in points]
    area = points[0][0] * points[0][1]
    return area + sum((b - a) * (y + z) / 2 for (a, y), (b, z) in zip(weighed, weighed[1:]))


def look_at(look: Callable, options: Options, work: tuple[int, int]) -> dict:
    """The looks of a block and seed; taken before, with these settings: read."""
    torch.set_num_threads(1)
    (block, seed), folder = work, WORK / ("quick" if options.quick else "decoding")
    settings = {"updates": options.updates, "stories": options.stories, "turns": TURNS}
    return kept(folder / f"{look.__name__}-{block}-{seed}.json", settings, partial(look, options, block, seed))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, stories=16)
    results, work = head("decoding", options), [(block, seed) for seed in range(options.seeds) for block in (4, 8, 16)]
    work = work[:1] if options.quick else work
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare, [job_of("left", 4, seed, options) for seed in range(options.seeds)]))
        seen = list(pool.map(partial(look_at, qualities, options), work))
    results["runs"] = []
    for (block, seed), look in zip(work, seen):
        taken = look_at(speeds, options, (block, seed))
        results["runs"].append({"block": block, "seed": seed, "looks": {
            name: numbers | {"seconds": taken[name]} for name, numbers in look.items()}})
        print(f"{len(results['runs'])}/{len(work)} block {block}, seed {seed}", flush=True)
    finish("decoding", results, draw, options.quick)
    print(table(results), points(results), sep="\n\n")


def by_block(results: dict) -> dict[int, list[dict]]:
    """The looks of all seeds."""
    seen = {}
    for run in results["runs"]:
        seen.setdefault(run["block"], []).append(run["looks"])
    return seen


def ways(look: dict) -> dict[str, list[str]]:
    """The names of its numbers by the rule they belong to."""
    return {way: names for way in WAYS if (names := [name for name in look if name.rpartition(" ")[0] == way])}


def reaches(seen: list[dict], names: list[str], cost: float) -> bool:
    """Whether some look of each seed writes slower and some faster."""
    costs = [[look[name]["tok_per_fwd"] for name in names] for look in seen]
    return all(min(some) <= cost <= max(some) for some in costs)


def table(results: dict) -> str:
    """Markdown: a row a block and rule, at equal cost; AR and verified text are points."""
    lines = ["| block | rule | `valid` at 1.5 | at 2 | `gen_nats` at 1.5 | at 2 | AUP |", "|" + "---|" * 7]
    for block, seen in by_block(results).items():
        for way, names in ways(seen[0]).items():
            cells = [cell([at_cost(look, number, cost, tuple(names)) for look in seen]) if reaches(seen, names, cost)
                     else "-" for number in ("valid", "gen_nats") for cost in (1.5, 2)]
            areas = [aup([(look[n]["tok_per_fwd"], 100 * look[n]["valid"]) for n in names],
                         100 * look["ar"]["valid"]) for look in seen]
            lines.append(f"| {block} | {way} | {' | '.join(cells)} | {cell(areas, 0)} |")
    return "\n".join(lines)


def points(results: dict) -> str:
    """Markdown: AR and verified text, which have no parameter."""
    numbers = ("tok_per_fwd", "positions_per_tok", "valid", "gen_nats", "distinct2")
    lines = [f"| block | | {' | '.join(f'`{n}`' for n in numbers)} | times as fast as AR, alone |", "|" + "---|" * 8]
    for block, seen in by_block(results).items():
        for name in (name for name in POINTS if name in seen[0]):
            cells = [cell([look[name][number] for look in seen]) for number in numbers]
            turns = [[b / a for a, b in zip(look[name]["seconds"], look["ar"]["seconds"])] for look in seen]
            cells.append(cell(list(map(statistics.median, turns)), 2))
            lines.append(f"| {block} | {POINTS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """`valid` against tokens a forward, a picture a block, a line a rule, and the points."""
    blocks = by_block(results)
    for axes, (block, seen) in zip(figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0], blocks.items()):
        def mean(name, number, seen=seen):
            return statistics.mean(look[name][number] for look in seen)
        for way, names in ways(seen[0]).items():
            axes.plot([mean(n, "tok_per_fwd") for n in names], [mean(n, "valid") for n in names], marker=".", label=way)
        for name in (name for name in POINTS if name in seen[0]):
            axes.plot(mean(name, "tok_per_fwd"), mean(name, "valid"), "*", ms=12, label=POINTS[name])
        axes.set(xlabel="tokens a forward", title=f"block {block}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("valid")
    figure.axes[-1].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
