"""The targets of model/loss.py: distributions over a large vocabulary that are never whole, only some places at a time.

What the teacher says stays what it is made of, hidden states (N, C) and a table (V, C), and is multiplied out for CHUNK
places at a time; or its K likeliest tokens are kept, and what is left for all others. A target has rows(places, said),
q (n, V), where `said` are the student's log-probabilities (n, V), and gather(1, ids), the probabilities of ids (N, 1),
as a whole target's would be.

Letters: N places with a loss, n of them at a time, C width, V vocabulary, K likeliest tokens.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64          # places multiplied out at a time


def wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def chunks(places: int) -> Iterator[slice]:
    """At least one, so that no places have results too, of length 0."""
    return (slice(i, i + CHUNK) for i in range(0, max(places, 1), CHUNK))


class Late(NamedTuple):
    """(N, V) logits, multiplied out where asked for: a `head`, and what it returns. As a target, their softmax."""
    hidden: Tensor                  # (N, C)
    table: Tensor                   # (V, C)
    bias: Tensor | None = None      # (V,), not trained: what keeps a [MASK] inside the vocabulary from being said

    def at(self, places: slice) -> Tensor:
        """(n, V)."""
        return wide(F.linear(self.hidden[places], self.table, self.bias))

    def rows(self, places: slice, said: Tensor | None = None) -> Tensor:
        return self.at(places).softmax(-1)

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        return torch.cat([self.rows(places).gather(dim, ids[places]) for places in chunks(len(ids))])


class Top(NamedTuple):
    """Its K likeliest tokens, and the bucket."""
    logits: Late
    probs: Tensor                   # (N, K)
    ids: Tensor                     # (N, K)
    rest: Tensor                    # (N, 1) log of the probability of all the others

    def rows(self, places: slice, said: Tensor) -> Tensor:
        others = said.scatter(1, self.ids[places], -torch.inf)
        others += self.rest[places] - others.logsumexp(1, keepdim=True)                  # as the student spreads them
        return others.exp_().scatter_(1, self.ids[places], self.probs[places])

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        return self.logits.gather(dim, ids)


class Text(NamedTuple):
    """The text itself: one-hot."""
    ids: Tensor                     # (N, 1)

    def rows(self, places: slice, said: Tensor) -> Tensor:
        return torch.zeros_like(said).scatter_(1, self.ids[places], 1)

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        return (self.ids == ids).float()


def top(logits: Late, k: int) -> Top:
    """A teacher's logits, bucketed."""
    def parts(places):
        z = logits.at(places).log_softmax(-1)                                            # (n, V)
        best, ids = z.topk(min(k, z.size(1)))                                            # (n, K) twice
        return best.exp(), ids, z.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return Top(logits, *map(torch.cat, zip(*map(parts, chunks(len(logits.hidden))))))


@torch.no_grad()
def teacher_rows(teacher, tokens: Tensor, rows: Tensor, at: Tensor, k: int | None = None) -> Late | Top:
    """As `opdlm.teacher_probs`; with `k` its likeliest tokens and the bucket."""
    logits = teacher(tokens, read=rows * tokens.size(1) + at - 1, head=Late)
    return logits if k is None else top(logits, k)


def text_rows(teacher, tokens: Tensor, rows: Tensor, at: Tensor) -> Text:
    """As `opdlm.one_hot`."""
    return Text(tokens[rows, at][:, None])
