"""Answers of lesson 4: what takes the place of `raise NotImplementedError` in its exercise."""
import torch
from torch import Tensor

from course.given import CachedModel


def threshold(level: float, confidence: Tensor, masked: Tensor) -> Tensor:
    confident = masked & (confidence > level)
    best = confidence.masked_fill(~masked, -torch.inf).argmax(-1, keepdim=True)
    fallback = torch.zeros_like(masked).scatter(-1, best, True) & masked
    return confident | fallback


def block_logits(model: CachedModel, tokens: Tensor, start: int) -> Tensor:
    shift = model.layout.logit_shift
    first = min(model.written, start - shift)
    last = min(start + model.layout.block, model.end)
    logits = model.forward(tokens, first, last, start)
    model.written = start
    source = torch.arange(start, last) - shift
    return logits[source - first]
