"""The two worlds: a student with blocks of 8, and one whose block is the whole text; and all training-free
rules.

A rule's name is "SPEC in SIZE" or "SPEC in SIZE, sliding": SPEC is a reveal rule, SIZE the size of smaller
blocks inside the student's block, or of a window that begins at the first mask.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding import reveal
from decoding.reveal import largest
from experiments.common.conversion import load_student, open_job
from experiments.common.job import Job, quick_job
from unmasking import grpo
from unmasking.policy import WindowRule

STUDENT = {"source": "data", "states": "random", "target": "onehot", "weight": "1/t", "lr": 0.01}
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
COUNTED = (("static", ""), ("static", " by margin"), ("static", " by entropy"), ("random", ""))
ADAPTIVE = ("factor:0.5", "factor:1", "eb:0.1", "eb:0.25", "eb:0.5")


@dataclass(frozen=True)
class World:
    """A student, and what is tried on it."""
    flags: dict             # of train_tiny.py
    updates: int            # of 16 rows
    sizes: tuple            # of blocks inside its blocks, for the heuristics
    windows: tuple          # sizes of sliding windows
    alphas: tuple           # there are policies of each
    learning: dict          # grpo.Settings of these
    until: tuple            # updates until which they imitate, learn to be fast, and learn for their alpha
    begin: float = 1        # they imitate the heuristic that is best for this alpha


WORLDS = {
    "blocks": World(
        flags={**STUDENT, "block": 8},
        updates=480,
        sizes=(2, 4, 8),
        windows=(4,),
        alphas=(0, 0.3, 1, 3, 10),
        learning=grpo.BLOCK_SETTINGS,
        until=(150, 350, 550),
    ),
    "whole": World(
        flags={**STUDENT, "block": 0, "context": "block"},
        updates=1600,
        sizes=(8, 32, 96),
        windows=(4, 8),
        alphas=(0.3, 1, 3, 10),
        learning=grpo.FULL_SEQUENCE_SETTINGS,
        until=(100, 220, 340),
        begin=0.3,
    ),
}


def job_of(world: str, quick: bool) -> Job:
    """The conversion of the world's student."""
    job = Job(f"unmasking, {world}", 0, WORLDS[world].flags, (WORLDS[world].updates,))
    return replace(quick_job(job), eval_steps=(4,)) if quick else job


def open_world(world: str, quick: bool) -> tuple:
    """The student, its layout, the length of a text, the corpus."""
    job = job_of(world, quick)
    config, corpus = open_job(job)
    net, layout = load_student(job)
    return net, layout, config.length, corpus


def heuristics(world: str) -> dict[str, WindowRule]:
    """Every training-free rule over its parameters, in blocks of several sizes and in sliding windows, by
    name.

    In the whole block a sliding window is the same as a block.
    """
    sizes = WORLDS[world].sizes
    whole = sizes[-1]
    places = [(size, False) for size in sizes] + [(size, True) for size in WORLDS[world].windows]
    specs = []
    for spec in (*(f"threshold:{level}" for level in LEVELS), *ADAPTIVE):
        specs += [(spec, size, slides) for size, slides in places]
    for level in (0.3, 0.4, *LEVELS, 0.65, 0.75):
        specs.append((f"leftmost:{level}", whole, False))
    for rule, confidence in COUNTED:
        for n in (1, 2, 4):
            specs += [(f"{rule}:{n}{confidence}", size, False) for size in sizes[::2] if n < size]
    for n in (1, 2, 4):
        specs.append((f"ancestral:{whole // n}", whole, False))
    rules = {}
    for spec, size, slides in specs:
        name = f"{spec} in {size}" + ", sliding" * slides
        rules[name] = WindowRule(parse_rule(spec), size, slides or size == whole)
    return rules


def parse_rule(spec: str) -> reveal.Rule:
    """A rule from NAME:ARGUMENT, or NAME:ARGUMENT by CONFIDENCE."""
    spec, _, confidence = spec.partition(" by ")
    return reveal.parse(spec, confidence or None)


def can_be_imitated(rule: WindowRule) -> bool:
    """Whether it is a function of what a policy sees: the largest probabilities from the first mask on."""
    return rule.slides and rule.confidence is largest and not rule.rolls


def imitable_in(world: str) -> Callable:
    """The same, as a function of the name of one of the world's heuristics."""
    rules = heuristics(world)
    return lambda name: can_be_imitated(rules[name])


@dataclass(frozen=True)
class BlindRule:
    """A rule that sees wrong confidences at the masked positions: does it use them at all?"""
    rule: Callable
    how: str  # mean: each gets their mean; shuffled: they are permuted, by the rule's random numbers

    def __call__(self, confidence: Tensor, masked: Tensor, step: Tensor, u: Tensor) -> Tensor:
        if self.how == "mean":
            total = (confidence * masked).sum(1, keepdim=True)
            mean = total / masked.sum(1, keepdim=True).clamp(min=1)
            return self.rule(torch.where(masked, mean, confidence), masked, step, u)
        in_order = masked.long().argsort(dim=1, descending=True, stable=True)  # (B, K) masked ones first
        random_order = u[..., 0].masked_fill(~masked, 2.0).argsort(dim=1, stable=True)  # the same, permuted
        shuffled = confidence.scatter(1, in_order, confidence.gather(1, random_order))
        return self.rule(shuffled, masked, step, u)

    def __getattr__(self, name: str):
        return getattr(self.rule, name)
