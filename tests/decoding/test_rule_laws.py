"""Invariants of the rules `leftmost` and `threshold` at the level itself: p > P is strict.

In float32 a probability of nearly 1 is rounded to 1. At level 1 it must not count as confident, so that
leftmost:1 and threshold:1 reveal one token per step whatever the network predicts.
"""
import pytest
import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import uniforms
from model.masks import Layout

STEP = torch.zeros(3, dtype=torch.long)
MASKED = torch.tensor([[True, True, True, True], [False, True, True, False], [False, False, False, True]])


@pytest.mark.parametrize("level", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("name", ["leftmost", "threshold"])
def test_a_confidence_equal_to_the_level_is_not_above_it(name, level):
    """All masked slots have p = P: one of them is revealed, the first of the equally confident ones."""
    rule = reveal.parse(f"{name}:{level}")
    confidence = torch.full((3, 4), level)
    revealed = rule(confidence, MASKED, STEP, None)
    first_masked = MASKED & (MASKED.cumsum(1) == 1)
    assert torch.equal(revealed, first_masked)


@pytest.mark.parametrize("name", ["leftmost", "threshold"])
def test_a_confidence_just_above_the_level_is_above_it(name):
    rule = reveal.parse(f"{name}:0.5")
    just_above = torch.nextafter(torch.tensor(0.5), torch.tensor(1.0))
    revealed = rule(just_above.expand(3, 4), MASKED, STEP, None)
    assert torch.equal(revealed, MASKED)


@pytest.mark.parametrize("spec", ["leftmost:1", "threshold:1"])
def test_at_level_1_a_certain_network_reveals_one_token_per_step(tiny, spec):
    """The network's largest probability is rounded to exactly 1 at every position."""
    net = tiny().requires_grad_(False)
    net.ln_f.weight.zero_()
    net.ln_f.bias.copy_(net.wte.weight[4] * 50)
    logits = net(torch.zeros(1, 3, dtype=torch.long))
    assert (logits.float().softmax(-1).amax(-1) == 1).all()

    u = uniforms(0, 0, range(2), (14, 1))
    prompt = torch.zeros(2, 2, dtype=torch.long)
    text = opdlm.rollout(Denoiser(net, Layout(4, 1, 1)), prompt, 12, reveal.parse(spec), u, eot=-1)
    assert (text.tokens[:, 2:] == 4).all()
    assert text.order[:, 2:].tolist() == [[0, 1, 2, 3] * 3] * 2
    assert text.forwards.tolist() == [12, 12]
