"""Answers of lesson 6: what takes the place of `raise NotImplementedError` in its exercise."""
import torch
from torch import Tensor

import opdlm
from model.masks import Layout


def visited(order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    order_in_block = opdlm.split_blocks(order, block, -1)              # (B, blocks, K)
    in_response = opdlm.split_blocks(response_mask, block, False)
    last_step = order_in_block.masked_fill(~in_response, -1).amax(-1, keepdim=True)
    num_states = last_step + 1                                   # (B, blocks, 1)
    k = (opdlm.per_block(u, block) * num_states).long()
    masked = order_in_block >= k
    return opdlm.join_blocks(masked, order.size(1))


def state_kl(student, teacher, tokens: Tensor, masked: Tensor, P: int, layout: Layout) -> Tensor:
    rows, slots = masked.nonzero(as_tuple=True)                  # (N,) each
    position = slots + P
    with torch.no_grad():
        teacher_logits = teacher(tokens).view(*tokens.shape, -1)             # (B, T, V)
        log_q = teacher_logits[rows, position - 1].log_softmax(-1)           # (N, V)
    noisy = tokens[:, P:].masked_fill(masked, student.mask_id)
    logits = opdlm.student_logits(student, tokens, noisy, P, layout, rows, position)
    log_p = logits.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)                 # (N,)
    total = torch.zeros(len(tokens), dtype=kl.dtype).index_add(0, rows, kl)
    return total / masked.sum(1)
