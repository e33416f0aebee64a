"""Invariants of decoding/sampling.py: temperature, top-k and top-p against values worked out by hand."""
import math

import pytest
import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import MIN_TEMPERATURE, NotFiniteError, SamplingConfig, uniforms
from decoding.speculative import speculative_decode
from model.masks import AR, Layout

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
GREEDY = SamplingConfig(temperature=0)


def test_temperature():
    assert torch.equal(GREEDY(PROBS), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    assert torch.equal(SamplingConfig(1)(PROBS), PROBS)
    assert torch.allclose(SamplingConfig(0.5)(PROBS), PROBS ** 2 / (PROBS ** 2).sum(-1, keepdim=True))


def test_top_k_and_top_p_by_hand():
    top_k_2 = SamplingConfig(top_k=2)(PROBS)
    assert torch.allclose(top_k_2, torch.tensor([[5 / 8, 3 / 8, 0], [0, 1 / 3, 2 / 3]]))
    top_p_85 = SamplingConfig(top_p=0.85)(PROBS)
    assert torch.allclose(top_p_85, torch.tensor([[0.5, 0.3, 0.2], [0, 1 / 3, 2 / 3]]))
    top_p_50 = SamplingConfig(top_p=0.5)(PROBS)
    assert torch.allclose(top_p_50, torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    both = SamplingConfig(top_k=2, top_p=0.62)(PROBS)
    assert torch.allclose(both[0], torch.tensor([1.0, 0, 0]))   # of what top_k keeps: 5/8 is more than 0.62


def test_limits():
    """The strictest top-k and top-p are greedy; the loosest ones change nothing."""
    probs = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.equal(SamplingConfig(top_k=1)(probs), GREEDY(probs))
    assert torch.equal(SamplingConfig(top_p=1e-6)(probs), GREEDY(probs))
    assert torch.allclose(SamplingConfig(top_k=20)(probs), probs)
    assert torch.allclose(SamplingConfig(top_p=1.0)(probs), probs)
    assert torch.allclose(SamplingConfig(0.7, 20, 1.0)(probs), SamplingConfig(0.7)(probs))


ALMOST_EQUAL = torch.tensor([[0.25, 0.2500001, 0.2499999, 0.25]])    # differ by a few units in the last place
CERTAIN = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
EQUAL = torch.full((1, 4), 0.25)
UNLIKELY = torch.full((1, 50000), 2e-5).index_fill(1, torch.tensor([7]), 2.1e-5)


@pytest.mark.parametrize("probs", [PROBS, ALMOST_EQUAL, CERTAIN, EQUAL, UNLIKELY], ids=lambda x: len(x[0]))
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-46, 1e-40, 1e-38, 1e-10, 0.99 * MIN_TEMPERATURE])
@pytest.mark.parametrize("limits", [{}, {"top_k": 2}, {"top_p": 1e-300}])
def test_a_temperature_too_small_for_float32_is_zero(probs, temperature, limits):
    sampling = SamplingConfig(temperature, **limits)
    assert torch.equal(sampling(probs), GREEDY(probs))
    for u in (0.0, 0.5, 0.9999999):
        assert torch.equal(sampling.sample(probs, torch.full((len(probs),), u)), probs.argmax(-1))


@pytest.mark.parametrize("probs", [PROBS, ALMOST_EQUAL, CERTAIN, EQUAL, UNLIKELY], ids=lambda x: len(x[0]))
@pytest.mark.parametrize("temperature", [MIN_TEMPERATURE, 1e-5, 1e-3, 0.1, 10, 1e20, 1e30])
def test_every_other_temperature_gives_probabilities(probs, temperature):
    """They sum to 1 and keep the order of the probabilities; what was impossible stays so."""
    found = SamplingConfig(temperature)(probs)
    assert torch.allclose(found.sum(-1), torch.ones(len(probs)), atol=1e-3)
    assert (found >= 0).all() and not found[probs == 0].any()
    for row in range(len(probs)):
        assert (found[row][probs[row].argsort()].diff() >= 0).all()


def test_at_a_low_temperature_the_most_likely_token_is_sampled():
    for temperature in (MIN_TEMPERATURE, 1e-5, 1e-3):
        sampling = SamplingConfig(temperature)
        for u in (0.0, 0.5, 0.9999999):
            assert sampling.sample(PROBS, torch.full((2,), u)).tolist() == [0, 2]


def test_the_most_likely_token_is_always_kept():
    """However small top-p is, in float32 even 0."""
    for top_p in (1e-3, 1e-38, 1e-46, 5e-324):
        assert torch.equal(SamplingConfig(top_p=top_p)(PROBS), GREEDY(PROBS))


def test_a_top_k_above_the_vocabulary_is_no_limit():
    for top_k in (3, 4, 10 ** 9, 2 ** 63, 10 ** 20, 10 ** 100):
        assert torch.equal(SamplingConfig(top_k=top_k)(PROBS), SamplingConfig(top_k=3)(PROBS))


# random numbers -------------------------------------------------------------------------------------------

def test_different_seeds_have_different_numbers():
    """At both ends of what is allowed, and where a float64 could not tell them apart."""
    seeds = [0, 1, 2 ** 32, 2 ** 53, 2 ** 53 + 1, 2 ** 62, 2 ** 63 - 1025, 2 ** 63 - 2, 2 ** 63 - 1]
    numbers = [tuple(uniforms(seed, 0, range(1), (4,))[0].tolist()) for seed in seeds]
    assert len(set(numbers)) == len(seeds)


@pytest.mark.parametrize("seed", [-1, -2 ** 63, 2 ** 63, 2 ** 63 + 500, 2 ** 64 - 1, 2 ** 64, 10 ** 20])
def test_other_seeds_are_refused(seed):
    with pytest.raises(ValueError, match=f"seed {seed}: expected an integer from 0 to 9223372036854775807"):
        uniforms(seed, 0, range(1), (4,))


# numbers that are not finite ------------------------------------------------------------------------------

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(), SamplingConfig(0.5, 2, 0.9)], ids=str)
def test_there_is_no_token_where_a_logit_is_not_finite(bad, sampling):
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(sampling(logits.softmax(-1))).all()
    logits[1, 4] = -math.inf                                     # a token that is impossible
    assert torch.isfinite(sampling(logits.softmax(-1))).all()
    logits[1, 3] = bad
    for use in (sampling, lambda probs: sampling.sample(probs, torch.full((3,), 0.5))):
        with pytest.raises(NotFiniteError, match="the model's numbers are not finite"):
            use(logits.softmax(-1))


def generate(net, mode, sampling):
    """A text with one of the samplers."""
    prompt = torch.tensor([[3, 4, 5]])
    u = uniforms(0, 0, range(1), (11, 3))
    layout = Layout(4, 1, 1)
    if mode == "speculative":
        return speculative_decode(net, layout, prompt, 8, u, 99, sampling)
    if mode == "teacher":
        return speculative_decode(net, layout, prompt, 8, u, 99, sampling, net)
    if mode == "ar":
        layout = AR
    return opdlm.rollout(Denoiser(net, layout), prompt, 8, reveal.parse("static:1"), u[..., :1], 99, sampling)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["diffusion", "ar", "speculative", "teacher"])
def test_no_sampler_makes_a_text_of_a_network_that_is_not_finite(tiny, mode, temperature):
    """Neither of weights that are NaN, nor of finite weights whose activations overflow."""
    sampling = SamplingConfig(temperature)
    net = tiny().float()
    generate(net, mode, sampling)
    with torch.no_grad():
        net.h[0].ln_1.weight.mul_(1e38)
        net.h[0].attn.c_attn.weight.mul_(1e38)
    with pytest.raises(NotFiniteError):
        generate(net, mode, sampling)
    net = tiny().float()
    with torch.no_grad():
        net.h[1].ln_2.bias[3] = math.nan
    with pytest.raises(NotFiniteError):
        generate(net, mode, sampling)


# values out of range --------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, message", [
    ({"temperature": -1}, "expected a temperature of at least 0, got -1"),
    ({"temperature": math.nan}, "expected a temperature of at least 0, got nan"),
    ({"temperature": math.inf}, r"expected a temperature of at most 1e\+30, got inf"),
    ({"temperature": 1e31}, r"expected a temperature of at most 1e\+30, got 1e\+31"),
    ({"top_k": 0}, "expected a top_k of at least 1, got 0"),
    ({"top_p": 0.0}, "expected a top_p above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, "expected a top_p above 0 and at most 1, got 1.5"),
])
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**wrong)
