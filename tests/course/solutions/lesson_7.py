"""Answers of lesson 7: what takes the place of `raise NotImplementedError` in its exercise."""
import torch
from torch import Tensor

from course import given
from decoding import speculative


def accept(p: Tensor, q: Tensor, drafts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    p_draft = p.gather(2, drafts[..., None])[..., 0]             # (B, A + 1)
    q_draft = q.gather(2, drafts[..., None])[..., 0]
    is_accepted = u[..., speculative.ACCEPT] * q_draft < p_draft
    is_accepted = is_accepted & (q_draft > 0)                    # False where there is no draft
    num_accepted = is_accepted.long().cumprod(1).sum(1)          # (B,)

    row = torch.arange(len(p))
    p_next = p[row, num_accepted]                                # (B, V)
    q_next = q[row, num_accepted]
    residual = (p_next - q_next).clamp(min=0)
    total = residual.sum(-1, keepdim=True)
    residual = torch.where(total > 0, residual / total.clamp(min=1e-30), p_next)
    token = given.draw(residual, u[row, num_accepted, speculative.RESAMPLE])
    return num_accepted, token
