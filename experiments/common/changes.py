"""Changes of a conversion that train_tiny.py has no flag for, since they are compared here and nowhere else.

A change gives the recipes that `count` rollouts take in turn; those of a start work on the student before the first.
"""
from dataclasses import replace

import torch
from torch import Tensor

import opdlm


def reverse_kl(target: Tensor, logits: Tensor) -> Tensor:
    """(N,) nats: KL from the student to the teacher."""
    said = logits.float().log_softmax(-1)
    return (said.exp() * (said - target.clamp(min=1e-9).log())).sum(-1)


def jensen_shannon(target: Tensor, logits: Tensor) -> Tensor:
    """(N,) nats: the mean of both KLs to the middle."""
    p = logits.float().softmax(-1)
    middle = ((p + target) / 2).clamp(min=1e-9).log()
    return (torch.xlogy(p, p) + torch.xlogy(target, target) - (p + target) * middle).sum(-1) / 2


def with_divergence(divergence, recipe, count):
    return [replace(recipe, divergence=divergence)]


def mixed(recipe, count):
    return [replace(recipe, layout=replace(recipe.layout, block=block)) for block in (4, 8, 16)]


def stories_first(part, recipe, count):
    """A part of the updates on training stories, as train_tiny.py's --warm_steps."""
    warm, first = replace(recipe, source=opdlm.data_text, states=opdlm.prefix_shown), round(part * count)
    return [warm] * first + [recipe] * (count - first)


def every_state(recipe, count):
    """All states of a block: each text stands in the batch once for each of its steps, its prefix paid each time."""
    return [replace(recipe, source=repeated(recipe.source), states=each_step, batch=recipe.batch * recipe.layout.block)]


def every_prefix(recipe, count):
    """The same of the states that show a left part; the batch has as many rows as before, and so fewer texts."""
    return [replace(recipe, source=repeated(recipe.source), states=each_prefix)]


def repeated(write):
    def text(student, teacher, rows, P, R, u, recipe):
        K = recipe.layout.block
        text = write(student, teacher, rows[::K], P, R, u[::K], recipe)
        return opdlm.Rollout(*(x.repeat_interleave(K, 0) for x in vars(text).values()))
    return text


def each_step(order, kept, u, block):
    return order >= torch.arange(len(order))[:, None] % block


def each_prefix(order, kept, u, block):
    return torch.arange(order.size(1)) % block >= torch.arange(len(order))[:, None] % block


def all_masked(recipe, count):
    """The state from which a block is drafted, and no other."""
    return [replace(recipe, states=lambda order, kept, u, block: torch.ones_like(kept))]


@torch.no_grad()
def zero_mask(student) -> None:
    student.mask_vector.zero_()


@torch.no_grad()
def end_mask(student) -> None:
    """[MASK] begins as the last id's embedding, that of end-of-text."""
    student.mask_vector.copy_(student.wte.weight[-1])
