"""The two worlds of experiments/unmasking.py, and every training-free rule that policies are compared with there.

In blocks: a student with blocks of 8. Over whole texts: one whose block is the text, and what follows its end.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from decoding import reveal
from decoding.reveal import largest
from experiments.common.conversion import opened
from experiments.common.job import Job, tiny
from experiments.common.students import student
from unmasking.grpo import BLOCK_SETTINGS, FULL_SEQUENCE_SETTINGS
from unmasking.policy import WindowRule

ANY = {"source": "data", "states": "random", "target": "onehot", "weight": "1/t", "lr": 0.01}
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
COUNTS = (("static", ""), ("static", " by margin"), ("static", " by entropy"), ("random", ""))
FAST = ("factor:0.5", "factor:1", "eb:0.1", "eb:0.25", "eb:0.5")


@dataclass(frozen=True)
class World:
    """A student, and what is tried on it."""
    flags: dict             # of train_tiny.py
    updates: int            # of 16 rows
    sizes: tuple            # of blocks inside its blocks, for the heuristics
    windows: tuple          # and of windows that slide
    alphas: tuple           # policies of each
    learning: dict          # how these are learned: grpo.Settings
    until: tuple            # updates after which they have imitated, hurried, and learned
    begin: float = 1        # the alpha whose best heuristic they imitate


WORLDS = {
    "blocks": World({**ANY, "block": 8}, 480, (2, 4, 8), (4,), (0, 0.3, 1, 3, 10),
                    BLOCK_SETTINGS, (150, 350, 550)),
    "whole": World({**ANY, "block": 0, "context": "block"}, 1600, (8, 32, 96), (4, 8), (0.3, 1, 3, 10),
                   FULL_SEQUENCE_SETTINGS, (100, 220, 340), 0.3)}


def job_of(name: str, quick: bool) -> Job:
    """The world's student."""
    job = Job(f"unmasking, {name}", 0, WORLDS[name].flags, (WORLDS[name].updates,))
    return replace(tiny(job), points=(4,)) if quick else job


def opened_world(name: str, quick: bool) -> tuple:
    """The student, its layout, the length of a text, the corpus."""
    resolve_options, corpus = opened(job := job_of(name, quick))
    return *student(job), resolve_options.length, corpus


def heuristics(name: str) -> dict[str, WindowRule]:
    """Rules over their parameters, in blocks of several sizes, or in windows that slide; of a whole block both are the
    same."""
    sizes, windows = WORLDS[name].sizes, WORLDS[name].windows
    whole, places = sizes[-1], [(size, False) for size in sizes] + [(size, True) for size in windows]
    specs = [(spec, *place) for spec in (*(f"threshold:{level}" for level in LEVELS), *FAST) for place in places]
    specs += [(f"leftmost:{level}", whole, False) for level in (0.3, 0.4, *LEVELS, 0.65, 0.75)]
    specs += [(f"{rule}:{n}{by}", size, False) for rule, by in COUNTS for n in (1, 2, 4)
              for size in sizes[::2] if n < size]
    specs += [(f"ancestral:{whole // n}", whole, False) for n in (1, 2, 4)]
    return {f"{spec} in {size}{', sliding' * slides}": WindowRule(parsed(spec), size, slides or size == whole)
            for spec, size, slides in specs}


def parsed(spec: str) -> reveal.Rule:
    """A rule from NAME:ARGUMENT, or NAME:ARGUMENT by CONFIDENCE."""
    spec, _, by = spec.partition(" by ")
    return reveal.parse(spec, by or None)


def imitable(rule: WindowRule) -> bool:
    """If it is a function of what a policy sees, the largest probabilities from the first mask on."""
    return rule.slides and rule.confidence is largest and not rule.rolls


def imitable_in(name: str) -> Callable:
    """The same of the names of a world's heuristics."""
    rules = heuristics(name)
    return lambda title: imitable(rules[title])


@dataclass(frozen=True)
class Blind:
    """A rule that does not see how sure the model is of a slot, but of which it is not: does the rule use it at all?"""
    rule: Callable
    how: str            # "mean": each masked slot has their mean; "shuffled": they change places, by the rule's numbers

    def __call__(self, sure: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        mean = (sure * masked).sum(1, keepdim=True) / masked.sum(1, keepdim=True).clamp(min=1)
        if self.how == "mean":
            return self.rule(torch.where(masked, mean, sure), masked, step, numbers)
        place = masked.long().argsort(dim=1, descending=True, stable=True)              # (B, K) masked slots first
        other = numbers[..., 0].masked_fill(~masked, 2.0).argsort(dim=1, stable=True)   # the same in another order
        return self.rule(sure.scatter(1, place, sure.gather(1, other)), masked, step, numbers)

    def __getattr__(self, name: str):
        return getattr(self.rule, name)
