"""Invariants of decoding/sampling.py: temperature, top-k and top-p against values worked out by hand."""
import pytest
import torch

from decoding.sampling import SamplingConfig

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


@pytest.mark.parametrize("wrong, message", [
    ({"temperature": -1}, "expected a temperature of at least 0, got -1"),
    ({"top_k": 0}, "expected a top_k of at least 1, got 0"),
    ({"top_p": 0.0}, "expected a top_p above 0 and at most 1, got 0.0"),
    ({"top_p": 1.5}, "expected a top_p above 0 and at most 1, got 1.5"),
])
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**wrong)
