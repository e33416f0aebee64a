"""Does a small model save anything inside blocks? A converted student, and a shallower one of the same
teacher.

    python -m experiments.shallow.run               blocks of 8 and 16, three seeds: 20 minutes on two cores
    python -m experiments.shallow.run --quick       does it run at all? a minute

The heavy student begins as a copy of its teacher, which has 3 transformer blocks; the light one begins as an
AR model of 1, pretrained likewise. Both learn that teacher's distributions on training stories. Schedules go
by the masked share of a block. Each model that is in use also reads the finished text, and that is counted.
Writes experiments/shallow/results/story_world.json and .png.
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
from decoding import scheduling as model_scheduling
from experiments.common.conversion import load_student, load_teacher, open_job, prepare_teacher
from experiments.common.job import WORK, Job
from experiments.common.results import cached, run_info, save_results
from experiments.common.timing import seconds_per_token
from experiments.shallow.tables import LEVELS, SCHEDULES, SHOWN_LEVEL, plot, table
from model.masks import Layout
from report import generate, metrics
from training import cli

HEAVY_LAYERS = 3
LIGHT_LAYERS = 1
BLOCKS = (8, 16)
TURNS = 3


@dataclass
class Options:
    quick: bool = False  # tiny models, four updates: does it run at all?
    seeds: int = 3  # teachers, and both students of each
    updates: int = 320  # of 16 rows, of every student
    stories: int = 256  # per evaluation


def job_of(layers: int, block: int, seed: int, options: Options) -> Job:
    """The conversion of a teacher with this many transformer blocks."""
    flags = {
        "source": "data",
        "states": "prefix",
        "target": "teacher",
        "weight": "first",
        "lr": 0.01,
        "block": block,
    }
    teacher_flags = {"layers": layers}
    folder = f"shallow-{layers}"
    if options.quick:
        teacher_flags |= {"pretrain_steps": 20, "width": 64, "pretrain_batch": 4}
        folder = f"quick/{folder}"
    return Job(f"{layers} layers, block {block}", seed, flags, (options.updates,), stories=options.stories,
               teacher_flags=teacher_flags, folder=folder)


def become(small, net) -> None:
    """Turns `net` into a copy of `small`."""
    for name in ("wte", "wpe", "h", "ln_f", "config"):
        setattr(net, name, copy.deepcopy(getattr(small, name)))
    net.init_mask().requires_grad_(True)


def load_pair(block: int, seed: int, options: Options) -> tuple[dict, torch.nn.Module, Job]:
    """The students H and L, their teacher, and the job of H."""
    job = job_of(HEAVY_LAYERS, block, seed, options)
    small_ar = load_teacher(job_of(LIGHT_LAYERS, block, seed, options))
    light_job = replace(job, name=f"light, block {block}", prepare_student=partial(become, small_ar))
    heavy, _ = load_student(job)
    light, _ = load_student(light_job)
    return {"H": heavy, "L": light}, load_teacher(job), job


def make_generator(nets: dict, schedule: str, level: float, block: int, used: list) -> generate.TextGenerator:
    """Text by a schedule. Each denoiser that it makes, one per batch of texts, is added to `used`."""
    def scheduled_denoiser(heavy, layout):
        denoiser = model_scheduling.ScheduledDenoiser(nets, layout, model_scheduling.parse_schedule(schedule))
        used.append(denoiser)
        return denoiser
    rule = reveal.parse(f"leftmost:{level}")
    return generate.diffusion_generator(nets["H"], Layout(block, 1, 1), rule, denoiser=scheduled_denoiser)


def evaluate_all(options: Options, block: int, seed: int) -> dict[str, dict]:
    """Metrics of generated text by schedule and level of leftmost."""
    nets, teacher, job = load_pair(block, seed, options)
    _, corpus = open_job(job)
    starts = stories(corpus.val, corpus.tokenizer.eot)
    held = metrics.held_out(corpus.val, starts, options.stories, teacher.config.context)
    evaluations = {}
    for name, level in product(SCHEDULES, LEVELS):
        evaluations[f"{name} {level}"] = evaluate_one(
            nets, teacher, corpus.tokenizer, held, SCHEDULES[name], level, block, seed)
    return evaluations


def evaluate_one(
    nets: dict, teacher, tok, held: list, schedule: str, level: float, block: int, seed: int
) -> dict:
    """The usual metrics, positions per token of each model, and FLOPs per token of the transformer blocks."""
    context = teacher.config.context
    used = []
    generator = make_generator(nets, schedule, level, block, used)
    texts, seconds = generate.generate_texts(generator, held, tok.eot, context, seed)
    num_tokens = sum(int(text.response_mask.sum()) for text, _ in texts)
    positions, flops = {}, 0.0
    for name in used[0].denoisers:
        count = sum(int(denoiser.denoisers[name].positions.sum()) for denoiser in used)
        positions[name] = count / num_tokens
        flops += positions[name] * metrics.body_flops(nets[name].config, context / 2)
    numbers = metrics.text_metrics(teacher, texts, seconds, tok, story_world.breaks)
    return numbers | {"positions": positions, "flops": flops}


def speeds(options: Options, block: int, seed: int) -> dict[str, list[float]]:
    """Seconds per token of each schedule at the shown level, 8 texts one at a time, one number per turn."""
    nets, teacher, job = load_pair(block, seed, options)
    _, corpus = open_job(job)
    eot = corpus.tokenizer.eot
    held = metrics.held_out(corpus.val, stories(corpus.val, eot), 8, teacher.config.context)
    generators = {}
    for name, schedule in SCHEDULES.items():
        generators[name] = make_generator(nets, schedule, SHOWN_LEVEL, block, [])
    return seconds_per_token(generators, teacher, held, eot, seed, TURNS)


def measure(options: Options, work: tuple[int, int]) -> dict:
    """The evaluations of a (block, seed); read from out/ if they are there."""
    torch.set_num_threads(1)
    block, seed = work
    file = WORK / job_of(HEAVY_LAYERS, 8, 0, options).folder / f"evaluations-{block}-{seed}.json"
    jobs = [job_of(layers, block, seed, options).settings for layers in (HEAVY_LAYERS, LIGHT_LAYERS)]
    settings = {"jobs": jobs, "schedules": SCHEDULES, "levels": list(LEVELS)}
    return cached(file, settings, partial(evaluate_all, options, block, seed))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=4, stories=16)
    results = run_info("shallow", options) | {"runs": []}
    work = list(product(BLOCKS, range(options.seeds)))
    if options.quick:
        work = work[:1]
    teachers = list(product((HEAVY_LAYERS, LIGHT_LAYERS), range(options.seeds)))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare_teacher, [job_of(layers, 8, seed, options) for layers, seed in teachers]))
        for (block, seed), evaluations in zip(work, pool.map(partial(measure, options), work)):
            results["runs"].append({"block": block, "seed": seed, "evaluations": evaluations})
    for run in results["runs"]:
        run["seconds"] = speeds(options, run["block"], run["seed"])
    save_results("shallow", "story_world", results, plot, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
