"""How sure a model is of a slot: 1 is certainty. A reveal rule (model/reveal.py) goes by one of these.

Each is a function of the probabilities at the M masked slots (M, V) and of the tokens drawn there (M,). The first line
of its docstring is what --help says.
"""
import torch
from torch import Tensor


def largest(probs: Tensor, drawn: Tensor) -> Tensor:
    """the largest probability at the slot, whatever was drawn

    Exact conditionals revealed so, one at a time, sample the joint; by the other two below as well."""
    return probs.amax(-1)


def drawn(probs: Tensor, drawn: Tensor) -> Tensor:
    """that of the token drawn, which is drawn anew each step (OPDLM's code): biased towards likely text"""
    return probs.gather(-1, drawn[:, None]).squeeze(-1)


def margin(probs: Tensor, drawn: Tensor) -> Tensor:
    """the largest less the second (Kim et al., 2502.06768)"""
    two = probs.topk(min(2, probs.size(-1)), -1).values
    return two[:, 0] - two[:, 1:].sum(-1)


def entropy(probs: Tensor, drawn: Tensor) -> Tensor:
    """exp(-entropy), one over the number of tokens between which the slot hesitates (Dream orders by it)"""
    return torch.special.entr(probs).sum(-1).neg().exp()


CONFIDENCE = {"largest": largest, "drawn": drawn, "margin": margin, "entropy": entropy}
