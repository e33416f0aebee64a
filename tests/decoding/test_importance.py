import itertools
import math

import pytest
import torch

from model.gpt import GPT, GPTConfig
from report.importance import costs, curves, gap, states, whole

EOT = 4
STORY = torch.tensor([EOT, 1, 3, 0, EOT])


def network(seed):
    """Loud and random, over five tokens."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(5, 8, 2, 2, 16)).double().init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.requires_grad_(False)


HEAVY, LIGHT = network(1), network(2)


def nats(net, known, at):
    """-log p of STORY[at] where only the tokens at `known` are seen: a plain pass, both ways but for the prompt."""
    tokens = torch.full((1, 5), net.mask_id)
    tokens[0, [0, *known]] = STORY[[0, *known]]
    sees = torch.ones(5, 5, dtype=torch.bool)
    sees[0, 1:] = False
    logits = net(tokens, sees, torch.arange(5)).float().view(5, -1)
    return -logits.log_softmax(-1)[at, STORY[at]].item()


def any_order(net):
    """Nats per token of the story, the mean over all 24 orders in which its tokens may be revealed."""
    orders = list(itertools.permutations(range(1, 5)))
    return sum(nats(net, order[:k], order[k]) for order in orders for k in range(4)) / len(orders) / 4


def test_the_mean_over_all_states_is_the_gap_of_the_bounds():
    """All 15 states of 4 tokens, those of each n alike, against all orders of revealing, one at a time."""
    mean = 0
    for n in range(1, 5):
        masked = torch.tensor([[i in some for i in range(4)] for some in itertools.combinations(range(4), n)])
        mean += costs(HEAVY, LIGHT, STORY.expand(len(masked), 5), masked)[0].mean().item() / 4
    assert mean == pytest.approx(any_order(LIGHT) - any_order(HEAVY), abs=1e-6)


def test_the_curves_and_the_gap_are_estimates_of_it():
    true, many = any_order(LIGHT) - any_order(HEAVY), [STORY] * 1500
    found, other = curves(HEAVY, LIGHT, many, 5, EOT, stretches=4), gap(HEAVY, LIGHT, many, 5, EOT, draws=4, seed=9)
    error = math.hypot(*found["ce_error"][:4]) / 4
    assert abs(sum(found["ce"][:4]) / 4 - true) < 4 * error < 0.1
    assert abs(other["nats"] - true) < 4 * other["error"] < 0.1
    assert min(found["kl"]) > 0


def test_all_masked_is_one_state():
    """Of four tokens the last quarter's only one; of more, the point behind the stretches."""
    found, coarse = (curves(HEAVY, LIGHT, [STORY] * 3, 5, EOT, stretches=n) for n in (4, 2))
    by_hand = sum(nats(LIGHT, (), at) - nats(HEAVY, (), at) for at in range(1, 5)) / 4
    assert found["t"] == [0.125, 0.375, 0.625, 0.875, 1] and coarse["t"] == [0.25, 0.75, 1]
    for ce, error in ((found["ce"][3], found["ce_error"][3]), (coarse["ce"][2], coarse["ce_error"][2])):
        assert ce == pytest.approx(by_hand, abs=1e-6) and error == pytest.approx(0, abs=1e-12)


def test_a_model_costs_nothing_against_itself():
    found = curves(HEAVY, HEAVY, [STORY] * 5, 5, EOT, stretches=3)
    assert set(found["ce"] + found["kl"]) == {0.0}


def test_states_have_their_share_masked_each_slot_alike():
    for k in range(4):
        masked = states(range(4000), 8, (k / 4, (k + 1) / 4), seed=0)
        assert masked.sum(1).unique().tolist() == [2 * k + 1, 2 * k + 2]
        assert (masked.float().mean(0) - (2 * k + 1.5) / 8).abs().max() < 0.03


def test_texts_are_filled_up_and_cut():
    assert whole([STORY, STORY[:2]], 4, EOT).tolist() == [[EOT, 1, 3, 0], [EOT, 1, EOT, EOT]]
    assert whole([STORY], 7, EOT).tolist() == [[EOT, 1, 3, 0, EOT, EOT, EOT]]
