"""Laws of lesson 2: several tokens revealed by one step, and the error that this makes."""
import math
from itertools import permutations, product

import torch
from torch import Tensor

from course.given import random_joint
from course.laws.common import close, require, require_shape, show

WRITE = ("text_probs", "kl")
SIZES = ((2, 1), (2, 2), (3, 2), (2, 3), (3, 3), (2, 4))          # V and R, the smallest first


# What the laws need -------------------------------------------------------------------------------

def all_orders(R: int) -> list[list[int]]:
    """Every way to distribute R positions over steps 0, 1, ... without an empty step."""
    orders = product(range(R), repeat=R)
    return [list(order) for order in orders if set(order) == set(range(max(order) + 1))]


def probs_of(mine, joint: Tensor, order: list[int]) -> Tensor:
    probs = mine.text_probs(joint, torch.tensor(order))
    require_shape(probs, (joint.numel(),), None, "text_probs")
    return probs


def entropy(joint: Tensor, positions: list[int]) -> float:
    """Nats: the entropy of the tokens at these positions, by summing the joint over all the others."""
    others = [i for i in range(joint.dim()) if i not in positions]
    marginal = joint.sum(others) if others else joint
    return float(torch.special.entr(marginal).sum())


def error_by_entropies(joint: Tensor, order: list[int]) -> float:
    """The factorisation error from entropies alone, without the probability of any text.

    A step with positions G after the positions E loses sum of H(i | E) over G, minus H(G | E).
    """
    error = 0.0
    for step in range(max(order) + 1):
        before = [i for i, at in enumerate(order) if at < step]
        group = [i for i, at in enumerate(order) if at == step]
        for i in group:
            error += entropy(joint, before + [i]) - entropy(joint, before)
        error -= entropy(joint, before + group) - entropy(joint, before)
    return error


# The laws -----------------------------------------------------------------------------------------

def no_divergence_from_itself(mine):
    """The KL divergence from a distribution to itself is 0, also if it has zeros."""
    for probs in ([1.0], [0.5, 0.5], [1.0, 0.0], [0.5, 0.25, 0.25, 0.0]):
        p = torch.tensor(probs, dtype=torch.float64)
        value = mine.kl(p, p)
        require_shape(value, (), None, "kl")
        require(close(value, 0.0), f"p = q = {show(p)}: your KL is {value.item():.4f}",
                "0 times log 0 is 0 by convention (x log x tends to 0), but a computer says nan")


def uniform_in_uniform(mine):
    """If p is uniform over m of n texts and q over all n, KL(p, q) is log(n / m)."""
    for n, m in ((2, 1), (3, 2), (4, 1), (4, 2)):
        q = torch.full((n,), 1 / n, dtype=torch.float64)
        p = torch.zeros(n, dtype=torch.float64)
        p[:m] = 1 / m
        value = mine.kl(p, q)
        exact = math.log(n / m)
        require(close(value, exact), f"p = {show(p)}, q = {show(q)}: your KL is {value.item():.4f} nats, "
                f"log(n / m) is {exact:.4f}",
                "over the texts of which of the two is the mean taken, and with which logarithm?")


def sum_to_one(mine):
    """The probabilities of all texts sum to 1."""
    for V, R in SIZES:
        joint = random_joint(V, R)
        for order in all_orders(R):
            probs = probs_of(mine, joint, order)
            require(close(probs.sum(), 1.0), f"V = {V}, order = {order}: they sum to {probs.sum():.4f}",
                    "a position that is still masked at step k must not help to predict itself or another "
                    "position of step k")


def one_at_a_time(mine):
    """If every step reveals one position, the texts have exactly the joint, in any order."""
    for V, R in SIZES:
        joint = random_joint(V, R)
        for order in permutations(range(R)):
            probs = probs_of(mine, joint, list(order))
            require(close(probs, joint.flatten()), f"V = {V}, order = {list(order)}: your probabilities are "
                    f"{show(probs)}, the joint is {show(joint.flatten())}",
                    "the chain rule: which tokens are visible when position i is sampled?")


def independent_tokens(mine):
    """If the tokens of the joint are independent, no order makes an error."""
    for R in (2, 3):
        marginals = [random_joint(2, 1, seed) for seed in range(R)]
        joint = marginals[0]
        for marginal in marginals[1:]:
            joint = joint[..., None] * marginal
        for order in all_orders(R):
            probs = probs_of(mine, joint, order)
            require(close(probs, joint.flatten()), f"V = 2, order = {order}: your probabilities are "
                    f"{show(probs)}, the joint is {show(joint.flatten())}",
                    "each text's probability is a product with one factor per position")


def total_correlation(mine):
    """If one step reveals everything, the error is the sum of the entropies minus the joint entropy."""
    for V, R in SIZES:
        joint = random_joint(V, R)
        error = mine.kl(joint.flatten(), probs_of(mine, joint, [0] * R))
        exact = sum(entropy(joint, [i]) for i in range(R)) - entropy(joint, list(range(R)))
        require(close(error, exact), f"V = {V}, order = {[0] * R}: your error is {error:.4f} nats, the sum "
                f"of the entropies minus the joint entropy is {exact:.4f}",
                "for R = 2 this is the mutual information; write it down for a 2 x 2 joint")


def any_order(mine):
    """In any order, the error is the sum over the steps of what each step alone loses."""
    for V, R in SIZES:
        joint = random_joint(V, R)
        for order in all_orders(R):
            error = mine.kl(joint.flatten(), probs_of(mine, joint, order))
            exact = error_by_entropies(joint, order)
            require(close(error, exact), f"V = {V}, order = {order}: your error is {error:.4f} nats, the sum "
                    f"over the steps is {exact:.4f}",
                    "positions of one step do not see each other, but they see all earlier steps")


LAWS = [sum_to_one, one_at_a_time, independent_tokens, no_divergence_from_itself, uniform_in_uniform,
        total_correlation, any_order]
