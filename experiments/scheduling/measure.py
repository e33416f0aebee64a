"""What experiments/scheduling.py asks of its models: curves, texts by a schedule, seconds.

What was measured or sampled lies in out/ and is not made again, unless it was made otherwise.
"""
import time

import torch

import opdlm
from data import story_world
from data.tinystories import stories
from decoding import reveal, scheduling
from decoding.scheduling import IMPORTANCE_FILE, Schedule, ScheduledDenoiser
from experiments.common.results import kept
from experiments.scheduling.models import corpus_of, folder_of, models, trained
from model.masks import Layout
from report import metrics
from report.compare import write_json


def checked(options):
    """Of the story world: its checker."""
    return story_world.check if options.data == "toy" else None


def measured(options, seed: int) -> dict:
    """The curves, the gap of the bounds that they should integrate to, and what the judge says of real stories."""
    draws, count = (2, 16) if options.quick else (32, 512)

    def make():
        nets, corpus = models(options, seed), corpus_of(options.data, options.val_data)
        eot, length = corpus.tokenizer.eot, nets["H"].config.context
        held = metrics.held_out(corpus.val, stories(corpus.val, eot), count, length)
        both, texts = (nets["H"], nets["L"], held, length, eot), [(real(held, length, eot), torch.ones(count).long())]
        said = metrics.text_metrics(nets["judge"], texts, 1.0, corpus.tokenizer, checked(options))
        return {**scheduling.importance_curves(*both), "gap": scheduling.bound_gap(*both, draws=draws, seed=1), "stories": said}
    settings = {"trained": trained(options), "stories": count, "draws": draws}
    found = kept(folder_of(options) / f"curves-{seed}.json", settings, make)
    write_json(folder_of(options) / f"L-{seed}" / IMPORTANCE_FILE, found)
    return found


def real(stories: list[torch.Tensor], length: int, eot: int) -> opdlm.Rollout:
    """Stories as if they had been written from nothing."""
    tokens = scheduling.pad_to_length(stories, length, eot)
    one = torch.ones(len(tokens), dtype=torch.long)
    return opdlm.Rollout(tokens, torch.zeros_like(tokens), opdlm.find_response(tokens, one, one * length, eot), one, one)


def written(nets: dict, plan: Schedule, steps: int, rows: range, seed: int, eot: int) -> tuple[opdlm.Rollout, ScheduledDenoiser]:
    """Texts of the `rows` of a seed, from nothing, and what wrote them."""
    length, rule = nets["H"].config.context, reveal.parse(f"ancestral:{steps}")
    denoiser, u = ScheduledDenoiser(nets, Layout(length, length, 0), plan), opdlm.uniforms(
        seed, 0, rows, (length, rule.numbers(length)))
    return opdlm.rollout(denoiser, torch.full((len(rows), 1), eot), length - 1, rule, u, eot), denoiser


def sampled(options, seed: int, name: str, plan: Schedule, steps: int, samples: int) -> dict:
    """What is said of texts written by the plan; nats and tokens of each; what each model did for one."""
    def make():
        nets, corpus = models(options, seed), corpus_of(options.data, options.val_data)
        tok, texts, work, each = corpus.tokenizer, [], {}, []
        for i in range(0, samples, 128):
            text, denoiser = written(nets, plan, steps, range(i, min(i + 128, samples)), seed, tok.eot)
            texts.append((text, torch.ones(len(text.tokens), dtype=torch.long)))
            each += zip(metrics.nats_of(nets["judge"], text).tolist(), text.response_mask.sum(1).tolist())
            for letter, one in denoiser.denoisers.items():
                now = {"forwards": int(one.forwards.sum()), "positions": int(one.positions.sum())}
                work[letter] = {what: work.get(letter, {}).get(what, 0) + n / samples for what, n in now.items()}
        numbers = metrics.text_metrics(nets["judge"], texts, 1.0, tok, checked(options))
        numbers["length"] = numbers.pop("tok_s") / samples
        return {"steps": plan.steps(), "work": work, "saved": saved(nets, plan, nets["H"].config.context), **numbers,
                "each": each}
    file = folder_of(options) / f"{name}-{steps}-{samples}-{seed}.json".replace(" ", "_")
    return kept(file, {"trained": trained(options), "steps": plan.steps()}, make)


def seconds(options, seed: int, plans: dict[str, Schedule], steps: int, samples: int, turns: int) -> dict:
    """Of `samples` texts at once, by plan, a number a turn. Nothing else may run meanwhile."""
    def once(nets, eot, plan):
        begun = time.perf_counter()
        written(nets, plan, steps, range(samples), seed, eot)
        return time.perf_counter() - begun

    def make():
        torch.set_num_threads(1)
        nets, eot = models(options, seed), corpus_of(options.data, options.val_data).tokenizer.eot
        seen = [{name: once(nets, eot, plan) for name, plan in plans.items()} for _ in range(turns)]
        return {name: [turn[name] for turn in seen] for name in plans}
    settings = {"trained": trained(options), "turns": turns, "plans": [plan.steps() for plan in plans.values()]}
    return kept(folder_of(options) / f"seconds-{samples}-{seed}.json", settings, make)


def saved(nets: dict, plan: Schedule, length: int) -> dict:
    """The share of a text's FLOPs, a pass of all positions at each step: of the blocks' (the paper's count), and with
    the head."""
    body, head = ({name: f(nets[name]) for name in "HL"} for f in (
        lambda net: metrics.body_flops(net.config, length), lambda net: metrics.head_flops(net.config)))
    light = plan.steps().count("L") / len(plan.steps())
    return {"blocks": light * (1 - body["L"] / body["H"]),
            "with head": light * (1 - (body["L"] + head["L"]) / (body["H"] + head["H"]))}
