"""Quality against speed: every reveal rule over its parameter, by block size, beside AR and speculative
decoding.

    python -m experiments.decoding.run              blocks 4, 8, 16, three seeds: 90 minutes on two cores
    python -m experiments.decoding.run --quick      does it run at all? a minute
    python -m experiments.decoding.run --variant=long --any_updates=1600 --blocks=4

There are two students per block size. One learned on states that show a prefix of each block, from the
teacher's distributions. The other learned on random states, since most rules reveal tokens to the right of a
mask. A teacher that reads from the left knows nothing of these, so this student's target is the text itself.
Speeds are taken at the end, in turns, by one process. Writes experiments/decoding/results/VARIANT.json and
.png.
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
from experiments.common.conversion import load_student, load_teacher, open_job, prepare_teacher
from experiments.common.job import WORK, Job, quick_job
from experiments.common.results import cached, run_info, save_results
from experiments.common.timing import seconds_per_token
from experiments.decoding.tables import plot, points_table, table
from model.masks import AR
from report import generate, metrics
from training import cli

STUDENTS = {        # --states, --target, --weight
    "left": ("prefix", "teacher", "first"),
    "any": ("random", "onehot", "1/t"),
}
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.98, 1)
RULES = {           # by name: the student, reveal rules, and the confidence that they use
    "leftmost": ("left", [f"leftmost:{level}" for level in LEVELS], None),
    "leftmost, any": ("any", [f"leftmost:{level}" for level in LEVELS], None),
    "threshold": ("any", [f"threshold:{level}" for level in LEVELS], None),
    "factor": ("any", [f"factor:{bound}" for bound in (0.02, 0.1, 0.5, 1, 2)], None),
    "eb": ("any", [f"eb:{bound}" for bound in (0, 0.02, 0.1, 0.5, 2)], None),
    "static, largest": ("any", [f"static:{n}" for n in (1, 2, 4)], "largest"),
    "static, margin": ("any", [f"static:{n}" for n in (1, 2, 4)], "margin"),
    "static, entropy": ("any", [f"static:{n}" for n in (1, 2, 4)], "entropy"),
    "random": ("any", [f"random:{n}" for n in (1, 2, 4)], None),
    "ancestral": ("any", [f"ancestral:{n}" for n in (2, 4, 8)], None),
}
TURNS = 3
CONTEXT = 96        # of the story world's networks, tokens


@dataclass
class Options:
    variant: str = "story_world"  # name of the results file
    quick: bool = False  # tiny students, few rules: does it run at all?
    seeds: int = 3  # students of each block size and kind
    blocks: str = "4,8,16"  # block sizes, separated by commas
    updates: int = 320  # of 16 rows, of the students that learn with prefixes shown
    any_updates: int = 320  # of the others
    stories: int = 256  # per evaluation; speeds are of the first 8, one at a time


def job_of(kind: str, block: int, seed: int, options: Options) -> Job:
    states, target, weight = STUDENTS[kind]
    flags = {
        "states": states,
        "target": target,
        "weight": weight,
        "source": "data",
        "lr": 0.01,
        "block": block,
    }
    updates = options.updates
    name = "decoding"
    if kind == "any":
        updates = options.any_updates
        name = f"decoding {options.variant}"
    job = Job(f"{name}, {kind}, block {block}", seed, flags, (updates,), stories=options.stories)
    return replace(quick_job(job), stories=options.stories) if options.quick else job


def make_generators(
    block: int, seed: int, options: Options
) -> tuple[dict[str, generate.TextGenerator], torch.nn.Module]:
    """Text generators by name, and the teacher."""
    jobs = {kind: job_of(kind, block, seed, options) for kind in STUDENTS}
    students = {kind: load_student(job) for kind, job in jobs.items()}       # (net, layout) of each
    teacher = load_teacher(jobs["left"])
    generators = {
        "ar": generate.diffusion_generator(teacher, AR, reveal.parse("static:1")),
        "self": generate.speculative_generator(*students["left"]),
        "teacher": generate.speculative_generator(*students["left"], teacher),
    }
    for name, (kind, specs, confidence) in RULES.items():
        for spec in specs:
            rule = reveal.parse(spec, confidence)
            generators[f"{name} {spec}"] = generate.diffusion_generator(*students[kind], rule)
    if options.quick:
        generators = dict(list(generators.items())[::6])
    return generators, teacher


def held_stories(block: int, seed: int, options: Options) -> tuple:
    """Held-out stories to continue, and the tokenizer."""
    _, corpus = open_job(job_of("left", block, seed, options))
    starts = stories(corpus.val, corpus.tokenizer.eot)
    return metrics.held_out(corpus.val, starts, options.stories, CONTEXT), corpus.tokenizer


def qualities(options: Options, block: int, seed: int) -> dict[str, dict]:
    """Metrics of generated text, by generator."""
    generators, teacher = make_generators(block, seed, options)
    held, tok = held_stories(block, seed, options)
    found = {}
    for name, generator in generators.items():
        texts, seconds = generate.generate_texts(generator, held, tok.eot, teacher.config.context, seed)
        found[name] = metrics.text_metrics(teacher, texts, seconds, tok, story_world.breaks)
    return found


def speeds(options: Options, block: int, seed: int) -> dict[str, list[float]]:
    """Seconds per token by generator, of 8 texts one at a time, one number per turn."""
    generators, teacher = make_generators(block, seed, options)
    held, tok = held_stories(block, seed, options)
    generators = {name: generator for name, generator in generators.items() if name != "ar"}
    return seconds_per_token(generators, teacher, held[:8], tok.eot, seed, TURNS)


def measure(function: Callable, options: Options, work: tuple[int, int]) -> dict:
    """qualities or speeds of a (block, seed); read from out/ if it is there."""
    torch.set_num_threads(1)
    block, seed = work
    folder = WORK / ("quick" if options.quick else f"decoding-{options.variant}")
    settings = {
        "jobs": [job_of(kind, block, seed, options).settings for kind in STUDENTS],
        "rules": [[name, *rule] for name, rule in RULES.items()],
        "turns": TURNS,
    }
    file = folder / f"{function.__name__}-{block}-{seed}.json"
    return cached(file, settings, partial(function, options, block, seed))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, any_updates=4, stories=16)
    results = run_info("decoding", options)
    blocks = [int(block) for block in options.blocks.split(",")]
    work = [(block, seed) for seed in range(options.seeds) for block in blocks]
    if options.quick:
        work = work[:1]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        one_per_seed = [job_of("left", blocks[0], seed, options) for seed in range(options.seeds)]
        list(pool.map(prepare_teacher, one_per_seed))
        quality_of = list(pool.map(partial(measure, qualities, options), work))
    results["runs"] = []
    for (block, seed), quality in zip(work, quality_of):
        seconds = measure(speeds, options, (block, seed))
        evaluations = {name: numbers | {"seconds": seconds[name]} for name, numbers in quality.items()}
        results["runs"].append({"block": block, "seed": seed, "evaluations": evaluations})
        print(f"{len(results['runs'])}/{len(work)} block {block}, seed {seed}", flush=True)
    save_results("decoding", options.variant, results, plot, options.quick)
    print(table(results), points_table(results), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
