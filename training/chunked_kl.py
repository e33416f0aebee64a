"""The memory-lean twin of the head and `opdlm.distill_loss`, for large vocabularies: no (N, V) tensor is ever whole.

Both sides of the loss stay what they are made of (model/targets.py), and are multiplied out for CHUNK places at a time;
once more in the backward pass, which costs time and holds nothing. With q a target's row and p the student's,
KL(q || p) has in the student's logits the gradient p - q. A bucket's has it too, if q spreads what is in it as p does:
then all tokens in it contribute the same log(q / p), and a small change of the spread changes nothing.
Under FSDP2 the table is used after the student's forward pass: the root must not be resharded before the backward one.

Letters: N places with a loss, n of them at a time, C width, V vocabulary.
"""
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64          # places multiplied out at a time


def at_least_fp32(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def chunks(places: int) -> Iterator[slice]:
    """At least one, so that no places have results too, of length 0."""
    return (slice(i, i + CHUNK) for i in range(0, max(places, 1), CHUNK))


class LazyLogits(NamedTuple):
    """(N, V) logits, multiplied out where asked for: a `head`, and what it returns. As a target, their softmax."""
    hidden: Tensor                  # (N, C)
    table: Tensor                   # (V, C)
    bias: Tensor | None = None      # (V,), not trained: what keeps a [MASK] inside the vocabulary from being said

    def at(self, places: slice) -> Tensor:
        """(n, V)."""
        return at_least_fp32(F.linear(self.hidden[places], self.table, self.bias))

    def rows(self, places: slice, said: Tensor | None = None) -> Tensor:
        return self.at(places).softmax(-1)

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        return torch.cat([self.rows(places).gather(dim, ids[places]) for places in chunks(len(ids))])


class TopKTarget(NamedTuple):
    """Its K likeliest tokens, and the bucket."""
    logits: LazyLogits
    probs: Tensor                   # (N, K)
    ids: Tensor                     # (N, K)
    rest: Tensor                    # (N, 1) log of the probability of all the others

    def rows(self, places: slice, said: Tensor) -> Tensor:
        others = said.scatter(1, self.ids[places], -torch.inf)
        others += self.rest[places] - others.logsumexp(1, keepdim=True)                  # as the student spreads them
        return others.exp_().scatter_(1, self.ids[places], self.probs[places])

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        return self.logits.gather(dim, ids)


class OneHotTarget(NamedTuple):
    """The text itself: one-hot."""
    ids: Tensor                     # (N, 1)

    def rows(self, places: slice, said: Tensor) -> Tensor:
        return torch.zeros_like(said).scatter_(1, self.ids[places], 1)

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        return (self.ids == ids).float()


def top(logits: LazyLogits, k: int) -> TopKTarget:
    """A teacher's logits, bucketed."""
    def parts(places):
        z = logits.at(places).log_softmax(-1)                                            # (n, V)
        best, ids = z.topk(min(k, z.size(1)))                                            # (n, K) twice
        return best.exp(), ids, z.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return TopKTarget(logits, *map(torch.cat, zip(*map(parts, chunks(len(logits.hidden))))))


@torch.no_grad()
def teacher_rows(teacher, tokens: Tensor, rows: Tensor, at: Tensor, k: int | None = None) -> LazyLogits | TopKTarget:
    """As `opdlm.teacher_probs`; with `k` its likeliest tokens and the bucket."""
    logits = teacher(tokens, read=rows * tokens.size(1) + at - 1, head=LazyLogits)
    return logits if k is None else top(logits, k)


def text_rows(teacher, tokens: Tensor, rows: Tensor, at: Tensor) -> OneHotTarget:
    """As `opdlm.one_hot`."""
    return OneHotTarget(tokens[rows, at][:, None])


VOCAB = 16_384      # tokens of vocabulary from which on --kl is full unless it is given


class Divergence(torch.autograd.Function):
    """(N,) nats: KL from `target` to the softmax of the student's logits, of which hidden and table are trained."""

    @staticmethod
    def forward(ctx, hidden, table, bias, target):
        ctx.save_for_backward(hidden, table, bias)
        ctx.target = target
        kl = torch.empty(len(hidden), dtype=at_least_fp32(hidden[:0]).dtype, device=hidden.device)
        for places in chunks(len(hidden)):
            said = LazyLogits(hidden, table, bias).at(places).log_softmax(-1)                  # (n, V)
            q = target.rows(places, said)
            kl[places] = torch.xlogy(q, q).sum(-1) - (q * said).sum(-1)
        return kl

    @staticmethod
    def backward(ctx, slope):
        hidden, table, bias = ctx.saved_tensors
        to_hidden, to_table = torch.empty_like(hidden), torch.zeros_like(table, dtype=at_least_fp32(table[:0]).dtype)
        for places in chunks(len(hidden)):
            said = LazyLogits(hidden, table, bias).at(places).log_softmax(-1)                  # (n, V)
            q = ctx.target.rows(places, said)
            d = said.exp_().sub_(q).mul_(slope[places, None]).to(table.dtype)            # rounded as the head's is
            to_hidden[places] = d @ table
            add(to_table, d.T, hidden[places])
        return to_hidden, to_table.to(table.dtype), None, None


def add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; without a second such tensor where nothing is rounded."""
    total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def distill_loss(target: LazyLogits | TopKTarget | OneHotTarget, logits: LazyLogits) -> Tensor:
    """(N,) nats, as `opdlm.distill_loss`."""
    return Divergence.apply(*logits, target)


def chunked_kl(kl: str | None, target: str, vocab: int = 0) -> dict:
    """The dials of an `opdlm.Recipe` for --kl, by the name of its target, "teacher" or "onehot": plain needs none; full
    is the same loss in chunks; topk:K, the teacher's K likeliest tokens and one bucket for all others on both sides, is
    still a divergence, never above the full one, and multiplies the teacher out once where full does so twice."""
    name, _, count = (kl or ("plain" if vocab < VOCAB else "full")).partition(":")
    if (name, count) == ("plain", ""):
        return {}
    if not ((name, count) == ("full", "") or name == "topk" and count.isdecimal() and int(count)):
        raise ValueError(f"--kl={kl} is not known: take plain, full, or topk:K with K at least 1, such as topk:64")
    targets = {"teacher": partial(teacher_rows, k=int(count) if count else None), "onehot": text_rows}
    return {"target": targets[target], "divergence": distill_loss, "head": LazyLogits}
