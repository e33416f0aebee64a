import pytest
import torch

from decoding.sampling import SamplingConfig

PROBS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])


def test_temperature():
    assert torch.equal(SamplingConfig(0)(PROBS), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    assert torch.equal(SamplingConfig(1)(PROBS), PROBS)
    assert torch.allclose(SamplingConfig(0.5)(PROBS), PROBS ** 2 / (PROBS ** 2).sum(-1, keepdim=True))


def test_top_k_and_top_p_by_hand():
    assert torch.allclose(SamplingConfig(top_k=2)(PROBS), torch.tensor([[5 / 8, 3 / 8, 0], [0, 1 / 3, 2 / 3]]))
    assert torch.allclose(SamplingConfig(top_p=0.85)(PROBS), torch.tensor([[0.5, 0.3, 0.2], [0, 1 / 3, 2 / 3]]))
    assert torch.allclose(SamplingConfig(top_p=0.5)(PROBS), torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    assert torch.allclose(SamplingConfig(top_k=2, top_p=0.62)(PROBS)[0], torch.tensor([1.0, 0, 0]))   # 5/8 of the two, not of all


def test_limits():
    probs = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.equal(SamplingConfig(top_k=1)(probs), SamplingConfig(0)(probs)) and torch.equal(SamplingConfig(top_p=1e-6)(probs), SamplingConfig(0)(probs))
    assert torch.allclose(SamplingConfig(top_k=20)(probs), probs) and torch.allclose(SamplingConfig(top_p=1.0)(probs), probs)
    assert torch.allclose(SamplingConfig(0.7, 20, 1.0)(probs), SamplingConfig(0.7)(probs))


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="wanted are a temperature of at least 0"):
        SamplingConfig(**wrong)
