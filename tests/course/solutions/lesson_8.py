"""Answers of lesson 8: what takes the place of `raise NotImplementedError` in its exercise."""
import torch
from torch import Tensor


def advantages(quality: Tensor, nfe: Tensor, length: int, alpha: float) -> Tensor:
    saved = (length - nfe + 1) / length                          # (prompts, G)
    reward = quality * saved ** alpha
    return reward - reward.mean(1, keepdim=True)


def paired_interval(ours: Tensor, theirs: Tensor, picks: Tensor) -> tuple[float, float]:
    gain = ours - theirs                                         # (N,)
    means = gain[picks].mean(1)                                  # (D,)
    ends = torch.tensor([0.025, 0.975], dtype=means.dtype)
    low, high = torch.quantile(means, ends).tolist()
    return low, high
