"""Which masks come off: each training-free rule is one small function of the confidences at a block's slots.

A rule is called with `confidence` (B, K), a number a slot, and `masked` (B, K), the slots that still have a mask, and
answers with a bool (B, K): a part of `masked`, at least one slot of every row that has any. A confidence is a function
of the probabilities at the M masked slots (M, V) and of the tokens drawn there (M,). The two are chosen apart: rule x
confidence.
"""
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Rule = Callable[[Tensor, Tensor], Tensor]


def largest(probs: Tensor, drawn: Tensor) -> Tensor:
    """(M,): the largest probability at a slot, whatever was drawn. Exact conditionals revealed so, one at a time,
    sample the joint."""
    return probs.amax(-1)


def drawn(probs: Tensor, drawn: Tensor) -> Tensor:
    """(M,): the probability of the token drawn (the paper's, section 1.6 of its code): biased towards likely text."""
    return probs.gather(-1, drawn[:, None]).squeeze(-1)


CONFIDENCE = {"largest": largest, "drawn": drawn}


def static(count: int, confidence: Tensor, masked: Tensor) -> Tensor:
    """The `count` most confident slots (MaskGIT, LLaDA): block / count steps a block."""
    best = confidence.masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    return masked & (best.argsort(-1) < count)                             # a slot's rank is the inverse of the sorting


def threshold(level: float, confidence: Tensor, masked: Tensor) -> Tensor:
    """Every slot above `level`, at least the most confident one (Fast-dLLM, 2505.22618; in the paper's code
    low_confidence_dynamic)."""
    return masked & (confidence > level) | static(1, confidence, masked)


def leftmost(level: float, confidence: Tensor, masked: Tensor) -> Tensor:
    """The longest run of confident slots from the left, at least the first slot: nothing is ever revealed right of a
    mask, so the student sees no more than its causal teacher does."""
    confident = (confidence > level) | ~masked
    first = masked & (masked.cumsum(-1) == 1)
    return masked & (confident.cumprod(-1).bool() | first)


RULES = {"static": (static, int, "1"), "threshold": (threshold, float, "0.9"), "leftmost": (leftmost, float, "0.9")}


def parse(spec: str) -> Rule:
    """A rule from NAME:ARGUMENT, as "static:1", "threshold:0.9", "leftmost:0.9"."""
    name, _, argument = spec.partition(":")
    if name not in RULES:
        known = ", ".join(f"{n}:{d}" for n, (_, _, d) in RULES.items())
        raise ValueError(f"there is no reveal rule {name!r}: use one of {known}")
    rule, kind, default = RULES[name]
    try:
        value = kind(argument or default)
    except ValueError:
        wrong = f"{argument!r} is no {kind.__name__}"
        raise ValueError(f"--reveal={spec}: {wrong}; write for example {name}:{default}") from None
    if kind is int and value < 1 or kind is float and not 0 <= value <= 1:
        wanted = "a count of at least 1" if kind is int else "a probability from 0 to 1"
        raise ValueError(f"--reveal={spec}: {name} takes {wanted}")
    return partial(rule, value)
