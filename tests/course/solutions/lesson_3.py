"""Answers of lesson 3: what takes the place of `raise NotImplementedError` in its exercise."""
import torch
from torch import Tensor

from model.masks import Layout


def training_mask(length: int, prompt_len: int, layout: Layout) -> Tensor:
    position = torch.arange(length)
    block = (position - prompt_len) // layout.block                          # (T,)
    context = (position - prompt_len) // layout.context_block
    noisy = block[prompt_len:]                                               # (R,)
    R = length - prompt_len
    clean_clean = context[None, :] <= context[:, None]                       # (T, T)
    clean_noisy = torch.zeros(length, R, dtype=torch.bool)
    noisy_clean = block[None, :] < noisy[:, None]                            # (R, T)
    noisy_noisy = noisy[None, :] == noisy[:, None]                           # (R, R)
    top = torch.cat([clean_clean, clean_noisy], 1)
    bottom = torch.cat([noisy_clean, noisy_noisy], 1)
    return torch.cat([top, bottom], 0)


def source_column(position: Tensor, length: int, prompt_len: int, layout: Layout) -> Tensor:
    source = position - layout.logit_shift
    block_of_source = (source - prompt_len) // layout.block
    block_of_position = (position - prompt_len) // layout.block
    in_noisy = length + source - prompt_len
    return torch.where(block_of_source == block_of_position, in_noisy, source)
