"""Does a light model save anything inside blocks? A converted student, and a shallower one of the same teacher.

    python -m experiments.shallow.run               the story world, blocks of 8 and 16, three seeds
    python -m experiments.shallow.run --quick       the plumbing, a minute

The heavy student begins as its teacher, of 3 blocks; the light one as an AR model of 1 that was trained likewise. Both
learn from stories what that teacher says. Schedules go by the masked share of a block. Each model that is in use reads
the finished text too, and what that costs is counted. Leaves experiments/shallow/results.json (every seed, every
number, the commit) and curves.png.
"""
import copy
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from multiprocessing import get_context

import torch

from data import story_world
from data.tinystories import stories
from decoding import reveal
from decoding import scheduling as schedule
from experiments.common.conversion import opened, teacher_of
from experiments.common.job import WORK, Job
from experiments.common.pool import prepare
from experiments.common.results import finish, head, kept
from experiments.common.students import in_turns, student
from experiments.shallow.tables import LEVELS, PLANS, SHOWN, draw, table
from model.masks import Layout
from report import generate, metrics
from training import cli

HEAVY, LIGHT = 3, 1                 # blocks of the network
BLOCKS, TURNS = (8, 16), 3


@dataclass
class Options:
    quick: bool = False  # tiny models, four updates: whether it runs at all
    seeds: int = 3  # teachers, and both students of each
    updates: int = 320  # of 16 rows, of every student
    stories: int = 256  # that a look is made of


def job_of(layers: int, block: int, seed: int, options: Options) -> Job:
    """Whose teacher has so many blocks."""
    flags = {"source": "data", "states": "prefix", "target": "teacher", "weight": "first", "lr": 0.01, "block": block}
    small = dict(pretrain_steps=20, width=64, pretrain_batch=4) if options.quick else {}
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
    held = metrics.held_out(corpus.val, starts, options.stories, context)
    return {f"{plan} {level}": look(nets, teacher, corpus.tokenizer, held, PLANS[plan], level, block, seed)
            for plan, level in product(PLANS, LEVELS)}


def writer(nets: dict, plan: str, level: float, block: int, used: list) -> generate.TextGenerator:
    """Text by a plan; who wrote it is added to `used`, a text each."""
    def both(heavy, layout):
        used.append(schedule.ScheduledDenoiser(nets, layout, schedule.parse_schedule(plan)))
        return used[-1]
    return generate.diffusion_generator(nets["H"], Layout(block, 1, 1), reveal.parse(f"leftmost:{level}"), denoiser=both)


def look(nets: dict, teacher, tok, held: list, plan: str, level: float, block: int, seed: int) -> dict:
    """Also FLOPs of a kept token of the blocks, by every position that either model was given."""
    context, used = teacher.config.context, []
    texts, seconds = generate.generate_texts(writer(nets, plan, level, block, used), held, tok.eot, context, seed)
    count = sum(int(text.response_mask.sum()) for text, _ in texts)
    positions = {name: sum(int(some.denoisers[name].positions.sum()) for some in used) / count
                 for name in used[0].denoisers}
    return metrics.text_metrics(teacher, texts, seconds, tok, story_world.check) | {"positions": positions, "flops": sum(
        n * metrics.body_flops(nets[name].config, context / 2) for name, n in positions.items())}


def speeds(options: Options, block: int, seed: int) -> dict[str, list[float]]:
    """Seconds a token of each plan at the level shown, 8 texts one at a time, a number a turn; "ar": the teacher's."""
    nets, teacher, job = students(block, seed, options)
    _, corpus = opened(job)
    eot = corpus.tokenizer.eot
    held = metrics.held_out(corpus.val, stories(corpus.val, eot), 8, teacher.config.context)
    writers = {name: writer(nets, plan, SHOWN, block, []) for name, plan in PLANS.items()}
    return in_turns(writers, teacher, held, eot, seed, TURNS)


def look_at(options: Options, work: tuple[int, int]) -> dict:
    """The looks of a block and seed; taken before, with these settings: read."""
    torch.set_num_threads(1)
    file = WORK / job_of(HEAVY, 8, 0, options).folder / "looks-{}-{}.json".format(*work)
    jobs = [job_of(layers, work[0], work[1], options).settings for layers in (HEAVY, LIGHT)]
    settings = {"jobs": jobs, "plans": PLANS, "levels": list(LEVELS)}
    return kept(file, settings, partial(looks, options, *work))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, stories=16)
    results, work = head("shallow", options), [(block, seed) for block in BLOCKS for seed in range(options.seeds)]
    work = work[:1] if options.quick else work
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare, [job_of(layers, 8, seed, options) for seed in range(options.seeds)
                                for layers in (HEAVY, LIGHT)]))
        seen = pool.map(partial(look_at, options), work)
        results["runs"] = [{"block": block, "seed": seed, "looks": look} for (block, seed), look in zip(work, seen)]
    for run in results["runs"]:
        run["seconds"] = speeds(options, run["block"], run["seed"])
    finish("shallow", results, draw, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
