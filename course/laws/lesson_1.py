"""Laws of lesson 1: the states of masked diffusion, and the 1/t-weighted loss."""
import math
from itertools import permutations

import torch
from torch import Tensor

from course.given import all_states, all_texts, conditionals, random_joint, state_probs
from course.laws.common import close, require, require_shape, show

WRITE = ("random_state", "state_loss")


# What the laws need -------------------------------------------------------------------------------

def loss_of(mine, logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    loss = mine.state_loss(logits, tokens, masked)
    require_shape(loss, (len(masked),), None, "state_loss")
    return loss


def random_model(V: int, R: int) -> dict:
    """A model that is wrong: for each state, a tuple of tokens and masks, log-probabilities (R, V)."""
    generator = torch.Generator().manual_seed(1)
    model = {}
    for text in all_texts(V + 1, R):                             # token V is a mask
        model[tuple(text.tolist())] = torch.randn(R, V, generator=generator, dtype=torch.float64)
    return {state: logits.log_softmax(-1) for state, logits in model.items()}


def log_probs_of(model: dict, tokens: Tensor, masked: Tensor, V: int) -> Tensor:
    """(B, R, V) log-probabilities of that model."""
    states = tokens.masked_fill(masked, V)
    return torch.stack([model[tuple(state.tolist())] for state in states])


# The laws -----------------------------------------------------------------------------------------

def numbers_of_masks(mine):
    """Every number of masks from 1 to R is equally likely."""
    for R in (1, 2, 3, 4):
        B = 10 * R
        u = torch.rand(B, R, 2, generator=torch.Generator().manual_seed(0))
        u[:, 0, 0] = (torch.arange(B) + 0.5) / B                 # evenly from 0 to 1
        masked = mine.random_state(u)
        require_shape(masked, (B, R), torch.bool, "random_state")
        counts = masked.sum(-1).bincount(minlength=R + 1).tolist()
        require(counts == [0] + [10] * R,
                f"R = {R}, and {B} values of u[:, 0, 0] evenly from 0 to 1: the numbers of rows with "
                f"0, 1, .. {R} masks are {counts}, not {[0] + [10] * R}",
                "which values can n take, and from which interval of u[:, 0, 0] does each of them come?")


def sets_of_masks(mine):
    """The masked positions are those with the smallest numbers u[:, :, 1]."""
    for R in (2, 3, 4):
        u = torch.rand(20, R, 2, generator=torch.Generator().manual_seed(R))
        for row, masked in zip(u, mine.random_state(u)):
            shown, hidden = row[~masked, 1], row[masked, 1]
            holds = len(shown) == 0 or bool(hidden.max() < shown.min())
            require(holds, f"R = {R}, u[0, :, 1] = {show(row[:, 1])}: masked = {show(masked)}",
                    "argsort gives the positions in order of their numbers; you need the rank of each "
                    "position, which is the inverse permutation")


def visible_positions(mine):
    """What the logits say at a visible position does not change the loss."""
    for R in (2, 3):
        for masked in all_states(R)[:-1]:
            logits = torch.zeros(1, R, 2, dtype=torch.float64)
            tokens = torch.zeros(1, R, dtype=torch.long)
            other = logits.clone()
            other[0, ~masked, 0] = 3.0
            before = loss_of(mine, logits, tokens, masked[None])
            after = loss_of(mine, other, tokens, masked[None])
            require(close(before, after),
                    f"R = {R}, V = 2, masked = {show(masked)}: the logits at the visible position changed "
                    f"and the loss went from {before.item():.4f} to {after.item():.4f}",
                    "the model is asked only for what it cannot see")


def equally_likely_tokens(mine):
    """If all V tokens are equally likely, every state costs R log V nats."""
    for R in (1, 2, 3):
        states = all_states(R)
        logits = torch.zeros(len(states), R, 2, dtype=torch.float64)
        tokens = torch.zeros(len(states), R, dtype=torch.long)
        loss = loss_of(mine, logits, tokens, states)
        exact = R * math.log(2)
        share = states.double().mean(-1)
        if close(loss, exact * share):
            hint = "a state with one mask costs less than one with R masks: which weight makes them equal?"
        elif close(loss, exact / R):
            hint = "this is the loss per token; the bound is on the nats of the whole text"
        else:
            hint = "take a state with one mask: it stands for R positions, so what has its loss to count?"
        for masked, value in zip(states, loss):
            require(close(value, exact), f"R = {R}, V = 2, masked = {show(masked)}: your loss is "
                    f"{value:.4f} nats, R log V is {exact:.4f}", hint)


def perfect_model(mine):
    """For a perfect model, the loss averaged over all states is exactly -log p(text)."""
    for V, R in ((2, 1), (2, 2), (3, 2), (2, 3), (3, 3)):
        joint = random_joint(V, R)
        states = all_states(R)
        for text in all_texts(V, R):
            tokens = text.expand(len(states), R)
            logits = conditionals(joint, tokens, states).log().clamp(min=-1e6)
            bound = (loss_of(mine, logits, tokens, states) * state_probs(states)).sum()
            exact = -joint[tuple(text)].log()
            require(close(bound, exact), f"V = {V}, R = {R}, text {show(text)}: the average over all states "
                    f"is {bound:.4f} nats, -log p(text) is {exact:.4f}",
                    "write down the loss of each of the 2**R - 1 states for R = 2 and compare with the chain "
                    "rule of probability, once from the left and once from the right")


def any_model(mine):
    """For any model, that average is the mean over all R! orders of revealing one token after another."""
    for V, R in ((2, 2), (2, 3), (3, 3)):
        model = random_model(V, R)
        states = all_states(R)
        for text in all_texts(V, R):
            tokens = text.expand(len(states), R)
            logits = log_probs_of(model, tokens, states, V)
            bound = (loss_of(mine, logits, tokens, states) * state_probs(states)).sum()
            orders = []
            for order in permutations(range(R)):
                masked = torch.ones(1, R, dtype=torch.bool)
                nats = 0.0
                for i in order:
                    nats -= log_probs_of(model, text[None], masked, V)[0, i, text[i]]
                    masked[0, i] = False
                orders.append(nats)
            mean = sum(orders) / len(orders)
            require(close(bound, mean), f"V = {V}, R = {R}, text {show(text)}: the average over all states "
                    f"is {bound:.4f} nats, the mean over all orders is {mean:.4f}",
                    "a loss of a state adds up positions; is each of them weighted alike?")


def unbiased(mine):
    """The mean loss of 20000 random states is the bound, within five standard errors."""
    V, R = 2, 3
    joint = random_joint(V, R)
    u = torch.rand(20000, R, 2, generator=torch.Generator().manual_seed(0))
    masked = mine.random_state(u)
    tokens = torch.tensor([0, 1, 1]).expand(len(u), R)
    logits = conditionals(joint, tokens, masked).log().clamp(min=-1e6)
    loss = loss_of(mine, logits, tokens, masked)
    exact = -joint[0, 1, 1].log()
    error = loss.std() / len(loss) ** 0.5
    require(bool((loss.mean() - exact).abs() < 5 * error), f"V = 2, R = 3, text [0, 1, 1]: the mean is "
            f"{loss.mean():.4f} nats, the bound is {exact:.4f}, the standard error {error:.4f}",
            "each function obeys its own laws; do they agree on what t is?")


LAWS = [numbers_of_masks, sets_of_masks, visible_positions, equally_likely_tokens, perfect_model, any_model,
        unbiased]
