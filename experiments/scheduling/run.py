"""Model scheduling (arXiv 2604.02340): at which denoising steps may a light model stand in for a heavy one?

    python -m experiments.scheduling.run            the story world, three seeds: 50 minutes on two cores
    python -m experiments.scheduling.run --quick    does it run at all? a minute
    python -m experiments.scheduling.run --data=FILE.txt --val_data=FILE.txt --length=64 --updates=4000 \
        --lr=0.005 --samples=128

Measures what the light model costs at each masked share (decoding/scheduling.py), derives schedules from
that, and evaluates what they generate with an AR model that is larger and has read other stories. Writes
experiments/scheduling/results/VARIANT.json and .png, VARIANT being story_world or, with --data, tinystories;
and importance.json beside the light model, which --schedule=auto reads. Finished work is in out/ and is not
done again.
"""
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch

import opdlm
from data import story_world
from data.tinystories import stories
from decoding import reveal
from decoding import scheduling as model_scheduling
from decoding.scheduling import IMPORTANCE_FILE, Schedule, ScheduledDenoiser, derive_schedule
from experiments.common.results import cached, run_info, save_results, variant_of
from experiments.common.timing import seconds_of
from experiments.scheduling.models import load_corpus, load_models, settings_of, work_folder
from experiments.scheduling.placements import light_at, placements, segment_pairs
from experiments.scheduling.tables import plot, table, with_errors
from model.masks import Layout
from report import metrics
from report.compare import write_json
from training import cli

SHARES = (0.125, 0.375, 0.5, 0.75)      # of light steps, beside 0, a quarter and 1


@dataclass
class Options:
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    length: int | None = None  # --length of train_tiny.py
    quick: bool = False  # tiny models, few samples: does it run at all?
    seeds: int = 3  # heavy model, light model and evaluator of each
    pretrain: int = 480  # AR updates that each begins with
    updates: int = 3000  # of 16 rows, of the heavy and the light model
    samples: int = 512  # texts of each placement; of each segment pair a quarter as many
    lr: float = 0.01  # --lr of train_tiny.py, of the heavy and the light model
    steps: int = 32  # per text, ancestral; and four times as many, for four placements and half the texts

    @property
    def flags(self) -> dict:
        """Flags of train_tiny.py."""
        flags = {name: getattr(self, name) for name in ("data", "val_data", "length") if getattr(self, name)}
        flags |= {"pretrain_steps": self.pretrain, "distill_steps": self.updates, "lr": self.lr}
        if self.quick:
            flags |= {"width": 64, "pretrain_batch": 4, "batch": 4}
        return flags


def judge_of(options: Options):
    """What finds broken laws in a story, if the data is the story world."""
    return story_world.breaks if options.data == "toy" else None


# 1. what a light step costs -------------------------------------------------------------------------------

def measure_curves(options: Options, seed: int) -> dict:
    """The curves, the gap of the likelihood bounds that they integrate to, and metrics of real stories."""
    draws, count = (2, 16) if options.quick else (32, 512)

    def make():
        nets = load_models(options, seed)
        corpus = load_corpus(options.data, options.val_data)
        eot = corpus.tokenizer.eot
        length = nets["H"].config.context
        held = metrics.held_out(corpus.val, stories(corpus.val, eot), count, length)
        arguments = nets["H"], nets["L"], held, length, eot
        texts = [(as_rollout(held, length, eot), torch.ones(count).long())]
        real_stories = metrics.text_metrics(
            nets["evaluator"], texts, 1.0, corpus.tokenizer, judge_of(options)
        )
        curves = model_scheduling.importance_curves(*arguments)
        gap = model_scheduling.bound_gap(*arguments, draws=draws, seed=1)
        return {**curves, "gap": gap, "stories": real_stories}

    settings = {"trained": settings_of(options), "stories": count, "draws": draws}
    found = cached(work_folder(options) / f"curves-{seed}.json", settings, make)
    write_json(work_folder(options) / f"L-{seed}" / IMPORTANCE_FILE, found)
    return found


def as_rollout(held: list[torch.Tensor], length: int, eot: int) -> opdlm.Rollout:
    """Real stories as if they had been generated without a prompt."""
    tokens = model_scheduling.pad_to_length(held, length, eot)
    ones = torch.ones(len(tokens), dtype=torch.long)
    response_mask = opdlm.find_response(tokens, ones, ones * length, eot)
    return opdlm.Rollout(tokens, torch.zeros_like(tokens), response_mask, ones, ones)


# 2. what a schedule generates -----------------------------------------------------------------------------

def generate(nets: dict, schedule: Schedule, steps: int, rows: range, seed: int,
             eot: int) -> tuple[opdlm.Rollout, ScheduledDenoiser]:
    """Texts of these rows without a prompt, and the denoiser that made them."""
    length = nets["H"].config.context
    rule = reveal.parse(f"ancestral:{steps}")
    denoiser = ScheduledDenoiser(nets, Layout(length, length, 0), schedule)
    u = opdlm.uniforms(seed, 0, rows, (length, rule.numbers(length)))
    prompt = torch.full((len(rows), 1), eot)
    return opdlm.rollout(denoiser, prompt, length - 1, rule, u, eot), denoiser


def evaluate(options: Options, seed: int, name: str, schedule: Schedule, steps: int, samples: int) -> dict:
    """Metrics of texts by a schedule; nats and tokens of each text; what each model did per text."""
    def make():
        nets = load_models(options, seed)
        denoisers = {letter: nets[letter] for letter in ("H", "L")}
        evaluator = nets["evaluator"]
        tok = load_corpus(options.data, options.val_data).tokenizer
        texts, each = [], []
        work = {}
        for i in range(0, samples, 128):
            rows = range(i, min(i + 128, samples))
            text, denoiser = generate(denoisers, schedule, steps, rows, seed, tok.eot)
            texts.append((text, torch.ones(len(text.tokens), dtype=torch.long)))
            nats = metrics.nats_of(evaluator, text).tolist()
            each += zip(nats, text.response_mask.sum(1).tolist())
            for letter, used in denoiser.denoisers.items():
                done = work.setdefault(letter, {"forwards": 0, "positions": 0})
                done["forwards"] += int(used.forwards.sum()) / samples
                done["positions"] += int(used.positions.sum()) / samples
        numbers = metrics.text_metrics(evaluator, texts, 1.0, tok, judge_of(options))
        numbers["length"] = numbers.pop("tok_s") / samples
        saved = saved_flops(nets, schedule, nets["H"].config.context)
        return {"steps": schedule.steps(), "work": work, "saved": saved, **numbers, "each": each}

    file = work_folder(options) / f"{name}-{steps}-{samples}-{seed}.json".replace(" ", "_")
    return cached(file, {"trained": settings_of(options), "steps": schedule.steps()}, make)


def saved_flops(nets: dict, schedule: Schedule, length: int) -> dict[str, float]:
    """The share of a text's FLOPs that is saved, if every step processes all positions: of the transformer
    blocks' (as the paper counts), and with the head."""
    body = {letter: metrics.body_flops(nets[letter].config, length) for letter in ("H", "L")}
    head = {letter: metrics.head_flops(nets[letter].config) for letter in ("H", "L")}
    light = schedule.steps().count("L") / len(schedule.steps())
    return {
        "blocks": light * (1 - body["L"] / body["H"]),
        "with head": light * (1 - (body["L"] + head["L"]) / (body["H"] + head["H"])),
    }


def measure_seconds(options: Options, seed: int, curves: dict) -> dict[str, list[float]]:
    """Seconds of up to 128 texts at once by schedule, one number per turn. Nothing else may run meanwhile."""
    schedules = few_schedules(options.steps, curves, seed)
    samples = min(options.samples, 128)
    turns = 5

    def make():
        torch.set_num_threads(1)
        nets = load_models(options, seed)
        eot = load_corpus(options.data, options.val_data).tokenizer.eot
        seconds = {name: [] for name in schedules}
        for _ in range(turns):
            for name, schedule in schedules.items():
                once = partial(generate, nets, schedule, options.steps, range(samples), seed, eot)
                seconds[name].append(seconds_of(once))
        return seconds

    steps = [schedule.steps() for schedule in schedules.values()]
    settings = {"trained": settings_of(options), "turns": turns, "schedules": steps}
    return cached(work_folder(options) / f"seconds-{samples}-{seed}.json", settings, make)


# 3. everything together -----------------------------------------------------------------------------------

def few_schedules(steps: int, curves: dict, seed: int) -> dict[str, Schedule]:
    """All heavy, the paper's placement, the derived one, all light."""
    quarter = placements(steps, 0.25, curves, seed)
    return {
        "heavy": light_at(steps, []),
        "sandwich (paper)": quarter["sandwich (paper)"],
        "derived": quarter["derived"],
        "light": light_at(steps, range(steps)),
    }


def all_evaluations(options: Options, seed: int, curves: dict) -> list[tuple]:
    """Everything that is sampled: name, schedule, steps, samples."""
    samples, steps = options.samples, options.steps
    schedules = few_schedules(steps, curves, seed) | placements(steps, 0.25, curves, seed)
    for share in SHARES:
        schedules[f"derived {share}"] = derive_schedule(curves, steps, share)
    found = [(name, schedule, steps, samples) for name, schedule in schedules.items()]
    for name, schedule in few_schedules(4 * steps, curves, seed).items():
        found.append((name, schedule, 4 * steps, max(samples // 2, 1)))
    for name, schedule in segment_pairs(steps).items():
        found.append((f"segments {name}", schedule, steps, max(samples // 4, 1)))
    return found


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, pretrain=10, updates=6, samples=4, steps=8)
    results = run_info("scheduling", options) | {"runs": []}
    began = time.perf_counter()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for seed, curves in enumerate(pool.map(partial(measure_curves, options), range(options.seeds))):
            todo = all_evaluations(options, seed, curves)[:: 9 if options.quick else 1]
            futures = [pool.submit(evaluate, options, seed, *arguments) for arguments in todo]
            evaluations = []
            for (name, _, steps, samples), future in zip(todo, futures):
                evaluations.append({"name": name, "T": steps, "samples": samples, **future.result()})
            results["runs"].append({"seed": seed, "curves": curves, "evaluations": with_errors(evaluations)})
            print(f"seed {seed}: {(time.perf_counter() - began) / 60:.0f} min", flush=True)
    for run in results["runs"]:
        run["seconds"] = measure_seconds(options, run["seed"], run["curves"])
    save_results("scheduling", variant_of(options.data), results, plot, options.quick)
    if not options.quick:                       # a quick run leaves out most rows
        print(table(results, options.steps), table(results, 4 * options.steps), sep="\n\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
