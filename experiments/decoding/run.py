"""Quality against speed: every reveal rule over its parameter, by block, with AR and verified text as points beside it.

    python -m experiments.decoding.run              the story world, blocks 4, 8, 16, three seeds: about an hour and a half
    python -m experiments.decoding.run --quick      the plumbing, a minute
    python -m experiments.decoding.run --name=decoding_long --any_updates=1600 --blocks=4

Two students of each block: one has learnt states that show a left part, the other any part, since most rules show
tokens right of a mask; of these a teacher that reads from the left knows nothing, so its target is the text itself. A
look that is there is not taken again; speeds are taken at the end, in turns, by one process. Leaves
experiments/NAME/results.json (every seed, every point, the commit) and curves.png.
"""
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch

from data import story_world
from data.tinystories import stories
from decoding import reveal
from experiments.common.conversion import opened, teacher_of
from experiments.common.job import WORK, Job, tiny
from experiments.common.pool import prepare
from experiments.common.results import finish, head, kept
from experiments.common.students import in_turns, student
from experiments.decoding.tables import draw, points, table
from model.masks import AR
from report import generate, metrics
from training import cli

KINDS = {"left": ("prefix", "teacher", "first"), "any": ("random", "onehot", "1/t")}    # --states, --target, --weight
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1)
WAYS = {                                # of rules by name: the student, specs, and the confidence that they go by
    "leftmost": ("left", [f"leftmost:{level}" for level in LEVELS], None),
    "leftmost, any": ("any", [f"leftmost:{level}" for level in LEVELS], None),
    "threshold": ("any", [f"threshold:{level}" for level in LEVELS], None),
    "factor": ("any", [f"factor:{bound}" for bound in (0.02, 0.1, 0.5, 1, 2)], None),
    "eb": ("any", [f"eb:{bound}" for bound in (0, 0.02, 0.1, 0.5, 2)], None),
    **{f"static, {name}": ("any", [f"static:{n}" for n in (1, 2, 4)], name)
       for name in ("largest", "margin", "entropy")},
    "random": ("any", [f"random:{n}" for n in (1, 2, 4)], None),
    "ancestral": ("any", [f"ancestral:{n}" for n in (2, 4, 8)], None)}
TURNS, CONTEXT = 3, 96              # CONTEXT: of the story world's networks, tokens


@dataclass
class Options:
    name: str = "decoding"  # of the results: experiments/NAME
    quick: bool = False  # tiny students, few looks: whether it runs at all
    seeds: int = 3  # students of each block and kind
    blocks: str = "4,8,16"  # which
    updates: int = 320  # of 16 rows, of the students that learn with left parts shown
    any_updates: int = 320  # of the others
    stories: int = 256  # that a look is made of; their speed is that of the first 8, one at a time


def job_of(kind: str, block: int, seed: int, options: Options) -> Job:
    flags = dict(zip(("states", "target", "weight"), KINDS[kind])) | {"source": "data", "lr": 0.01, "block": block}
    updates = {"left": options.updates, "any": options.any_updates}[kind]
    name = options.name if kind == "any" else "decoding"
    job = Job(f"{name}, {kind}, block {block}", seed, flags, (updates,), stories=options.stories)
    return replace(tiny(job), stories=options.stories) if options.quick else job


def writers(block: int, seed: int, options: Options) -> tuple[dict[str, generate.TextGenerator], torch.nn.Module]:
    """Ways to write by name, and the teacher."""
    jobs = {kind: job_of(kind, block, seed, options) for kind in KINDS}
    nets, teacher = {kind: student(job) for kind, job in jobs.items()}, teacher_of(jobs["left"])
    found = {"ar": generate.diffusion_generator(teacher, AR, reveal.parse("static:1")),
             "self": generate.speculative_generator(*nets["left"]), "teacher": generate.speculative_generator(*nets["left"], teacher)}
    for way, (kind, specs, confidence) in WAYS.items():
        found |= {f"{way} {spec}": generate.diffusion_generator(*nets[kind], reveal.parse(spec, confidence)) for spec in specs}
    return dict(list(found.items())[::6]) if options.quick else found, teacher


def told(block: int, seed: int, options: Options) -> tuple:
    """Held-out stories to go on from, the tokenizer."""
    _, corpus = opened(job_of("left", block, seed, options))
    starts = stories(corpus.val, corpus.tokenizer.eot)
    return metrics.held_out(corpus.val, starts, options.stories, CONTEXT), corpus.tokenizer


def qualities(options: Options, block: int, seed: int) -> dict[str, dict]:
    """Numbers by name."""
    (made, teacher), (held, tok) = writers(block, seed, options), told(block, seed, options)
    length = teacher.config.context
    return {name: metrics.text_metrics(teacher, *generate.generate_texts(writer, held, tok.eot, length, seed), tok, story_world.check)
            for name, writer in made.items()}


def speeds(options: Options, block: int, seed: int) -> dict[str, list[float]]:
    """Seconds a token by name, of 8 texts one at a time, a number a turn."""
    (made, teacher), (held, tok) = writers(block, seed, options), told(block, seed, options)
    return in_turns({name: made[name] for name in made if name != "ar"}, teacher, held[:8], tok.eot, seed, TURNS)


def look_at(look: Callable, options: Options, work: tuple[int, int]) -> dict:
    """The looks of a block and seed; taken before, with these settings: read."""
    torch.set_num_threads(1)
    (block, seed), folder = work, WORK / ("quick" if options.quick else options.name)
    jobs = [job_of(kind, block, seed, options).settings for kind in KINDS]
    settings = {"jobs": jobs, "ways": [[name, *way] for name, way in WAYS.items()], "turns": TURNS}
    return kept(folder / f"{look.__name__}-{block}-{seed}.json", settings, partial(look, options, block, seed))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, any_updates=4, stories=16)
    blocks = [int(block) for block in options.blocks.split(",")]
    results, work = head(f"decoding --name={options.name}", options), [(block, seed) for seed in range(options.seeds)
                                                                       for block in blocks]
    work = work[:1] if options.quick else work
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare, [job_of("left", blocks[0], seed, options) for seed in range(options.seeds)]))
        seen = list(pool.map(partial(look_at, qualities, options), work))
    results["runs"] = []
    for (block, seed), look in zip(work, seen):
        taken = look_at(speeds, options, (block, seed))
        results["runs"].append({"block": block, "seed": seed, "looks": {
            name: numbers | {"seconds": taken[name]} for name, numbers in look.items()}})
        print(f"{len(results['runs'])}/{len(work)} block {block}, seed {seed}", flush=True)
    finish(options.name, results, draw, options.quick)
    print(table(results), points(results), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
