"""The memory-lean twin of the head and `opdlm.distill_loss`, for large vocabularies: no (N, V) tensor is ever whole.

Both sides of the loss stay what they are made of (model/targets.py), and are multiplied out for CHUNK places at a time;
once more in the backward pass, which costs time and holds nothing. With q a target's row and p the student's,
KL(q || p) has in the student's logits the gradient p - q. A bucket's has it too, if q spreads what is in it as p does:
then all tokens in it contribute the same log(q / p), and a small change of the spread changes nothing.
Under FSDP2 the table is used after the student's forward pass: the root must not be resharded before the backward one.

Letters: N places with a loss, n of them at a time, C width, V vocabulary.
"""
from functools import partial

import torch
from torch import Tensor

from model.targets import Late, Text, Top, chunks, teacher_rows, text_rows, wide

VOCAB = 16_384      # tokens of vocabulary from which on --kl is full unless it is given


class Divergence(torch.autograd.Function):
    """(N,) nats: KL from `target` to the softmax of the student's logits, of which hidden and table are trained."""

    @staticmethod
    def forward(ctx, hidden, table, bias, target):
        ctx.save_for_backward(hidden, table, bias)
        ctx.target = target
        kl = torch.empty(len(hidden), dtype=wide(hidden[:0]).dtype, device=hidden.device)
        for places in chunks(len(hidden)):
            said = Late(hidden, table, bias).at(places).log_softmax(-1)                  # (n, V)
            q = target.rows(places, said)
            kl[places] = torch.xlogy(q, q).sum(-1) - (q * said).sum(-1)
        return kl

    @staticmethod
    def backward(ctx, slope):
        hidden, table, bias = ctx.saved_tensors
        to_hidden, to_table = torch.empty_like(hidden), torch.zeros_like(table, dtype=wide(table[:0]).dtype)
        for places in chunks(len(hidden)):
            said = Late(hidden, table, bias).at(places).log_softmax(-1)                  # (n, V)
            q = ctx.target.rows(places, said)
            d = said.exp_().sub_(q).mul_(slope[places, None]).to(table.dtype)            # rounded as the head's is
            to_hidden[places] = d @ table
            add(to_table, d.T, hidden[places])
        return to_hidden, to_table.to(table.dtype), None, None


def add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; without a second such tensor where nothing is rounded."""
    total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def distill_loss(target: Late | Top | Text, logits: Late) -> Tensor:
    """(N,) nats, as `opdlm.distill_loss`."""
    return Divergence.apply(*logits, target)


def lean(kl: str | None, target: str, vocab: int = 0) -> dict:
    """The dials of an `opdlm.Recipe` for --kl, by the name of its target, "teacher" or "onehot": plain needs none; full
    is the same loss in chunks; topk:K, the teacher's K likeliest tokens and one bucket for all others on both sides, is
    still a divergence, never above the full one, and multiplies the teacher out once where full does so twice."""
    name, _, count = (kl or ("plain" if vocab < VOCAB else "full")).partition(":")
    if (name, count) == ("plain", ""):
        return {}
    if not ((name, count) == ("full", "") or name == "topk" and count.isdecimal() and int(count)):
        raise ValueError(f"--kl={kl} is not known: take plain, full, or topk:K with K at least 1, such as topk:64")
    targets = {"teacher": partial(teacher_rows, k=int(count) if count else None), "onehot": text_rows}
    return {"target": targets[target], "divergence": distill_loss, "head": Late}
