"""Changes of a recipe that train_tiny.py has no flag for, since only the experiments compare them.

Each takes the recipe and the number of rollouts, and returns the list of recipes that the rollouts use in
turn. The last two functions change a student's [MASK] vector instead.
"""
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import opdlm


def reverse_kl(target: Tensor, logits: Tensor) -> Tensor:
    """(N,) nats: KL from the student to the teacher."""
    log_probs = logits.float().log_softmax(-1)
    target_log_probs = target.clamp(min=1e-9).log()
    return (log_probs.exp() * (log_probs - target_log_probs)).sum(-1)


def jensen_shannon(target: Tensor, logits: Tensor) -> Tensor:
    """(N,) nats: the mean of the KLs from student and teacher to their mean distribution."""
    probs = logits.float().softmax(-1)
    log_middle = ((probs + target) / 2).clamp(min=1e-9).log()
    negative_entropies = torch.xlogy(probs, probs) + torch.xlogy(target, target)
    return (negative_entropies - (probs + target) * log_middle).sum(-1) / 2


def with_divergence(divergence: Callable, recipe: opdlm.Recipe, rollouts: int) -> list[opdlm.Recipe]:
    """Another divergence than the forward KL."""
    return [replace(recipe, divergence=divergence)]


def mixed_blocks(recipe: opdlm.Recipe, rollouts: int) -> list[opdlm.Recipe]:
    """Rollouts with blocks of 4, 8 and 16 in turn."""
    return [replace(recipe, layout=replace(recipe.layout, block=block)) for block in (4, 8, 16)]


def stories_first(share: float, recipe: opdlm.Recipe, rollouts: int) -> list[opdlm.Recipe]:
    """The first `share` of the rollouts on training stories, as with --warm_steps."""
    warm = replace(recipe, source=opdlm.data_text, states=opdlm.prefix_shown)
    first = round(share * rollouts)
    return [warm] * first + [recipe] * (rollouts - first)


def every_state(recipe: opdlm.Recipe, rollouts: int) -> list[opdlm.Recipe]:
    """All K states of a block: each text is in the batch K times, once per step."""
    source = repeat_texts(recipe.source)
    return [replace(recipe, source=source, states=each_step, batch=recipe.batch * recipe.layout.block)]


def every_prefix(recipe: opdlm.Recipe, rollouts: int) -> list[opdlm.Recipe]:
    """All K states that show a left part of each block. The batch keeps its rows, of fewer texts."""
    return [replace(recipe, source=repeat_texts(recipe.source), states=each_prefix)]


def repeat_texts(source: Callable) -> Callable:
    """A source that takes every K-th row and repeats its text K times, K the block size."""
    def repeated(student, teacher, rows, P, R, u, recipe):
        K = recipe.layout.block
        text = source(student, teacher, rows[::K], P, R, u[::K], recipe)
        return opdlm.Rollout(*(x.repeat_interleave(K, 0) for x in vars(text).values()))
    return repeated


def each_step(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    """(B, R) masked: copy k of a text has the state at step k."""
    step = torch.arange(len(order))[:, None] % block
    return order >= step


def each_prefix(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    """(B, R) masked: copy k of a text shows the first k positions of each block."""
    shown = torch.arange(len(order))[:, None] % block
    return torch.arange(order.size(1)) % block >= shown


def all_masked(recipe: opdlm.Recipe, rollouts: int) -> list[opdlm.Recipe]:
    """Only the state in which all of a block is masked: drafts start from it."""
    def every_position(order, response_mask, u, block):
        return torch.ones_like(response_mask)
    return [replace(recipe, states=every_position)]


@torch.no_grad()
def zero_mask_vector(student) -> None:
    """[MASK] begins as the zero vector."""
    student.mask_vector.zero_()


@torch.no_grad()
def eot_mask_vector(student) -> None:
    """[MASK] begins as the embedding of the last id, end-of-text."""
    student.mask_vector.copy_(student.wte.weight[-1])
