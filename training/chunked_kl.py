"""KL divergence for large vocabularies: the memory-saving twin of the output layer and `opdlm.distill_loss`.

A tensor of N positions by V tokens is never stored. Both sides of the loss keep the two factors of their
logits, the hidden states (N, C) and the table of the output layer (V, C), and multiply them for CHUNK
positions at a time. The backward pass multiplies again: it costs time and needs no memory.

The gradient, with q the target's distribution at a position and p the student's:

    KL(q || p) = sum over tokens v of q_v (log q_v - log p_v)        dKL / dlogits = p - q

A top-k target has the probabilities of k tokens and r, the sum of all others: one bucket. Its loss compares
k + 1 probabilities: r is compared with p_rest, the student's sum over the same tokens. The code spreads r
over the bucket in proportion to the student: q_v = r p_v / p_rest. Then log(q_v / p_v) = log(r / p_rest) is
the same for all tokens of the bucket, so that the KL over V tokens equals the KL over k + 1. The gradient is
p - q again, although q now depends on p: a change of p only moves probability within the bucket, where
log(q_v / p_v) is constant.

Under FSDP2 the table is used after the student's forward pass has returned. Therefore the root module must
keep its parameters gathered until the backward pass (training/dist.py, shard_and_compile).

Shapes: N positions in the loss, n of them in a chunk, C width, V vocabulary, k tokens of a top-k target.
"""
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64              # positions whose logits exist at the same time
LARGE_VOCAB = 16_384    # vocabularies of this size and larger use --kl=full by default


def at_least_fp32(x: Tensor) -> Tensor:
    """float64 stays float64; everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def chunks(num_positions: int) -> Iterator[slice]:
    """Slices of at most CHUNK positions. One empty slice if there are none, so that results have a shape."""
    for start in range(0, max(num_positions, 1), CHUNK):
        yield slice(start, start + CHUNK)


# 1. logits and targets, computed for a chunk of positions -----------------------------------------
# A target has two methods. `probs(chunk, log_probs)` returns its distributions (n, V) for a chunk, where
# `log_probs` (n, V) are the student's. `gather(1, ids)` returns its probabilities (N, 1) of the tokens
# `ids` (N, 1).

class LazyLogits(NamedTuple):
    """(N, V) logits, stored as two factors. As a target they stand for their softmax.

    The class itself is the `head` of a model: it takes what the output layer takes.
    """
    hidden: Tensor                  # (N, C)
    table: Tensor                   # (V, C)
    bias: Tensor | None = None # (V,), not trained; excludes a [MASK] token that is in the vocabulary

    def logits(self, chunk: slice) -> Tensor:
        """(n, V)."""
        return at_least_fp32(F.linear(self.hidden[chunk], self.table, self.bias))

    def probs(self, chunk: slice, log_probs: Tensor | None = None) -> Tensor:
        """(n, V)."""
        return self.logits(chunk).softmax(-1)

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        """(N, 1)."""
        parts = []
        for chunk in chunks(len(ids)):
            probs = self.probs(chunk)                                        # (n, V)
            parts.append(probs.gather(dim, ids[chunk]))
        return torch.cat(parts)


class TopKTarget(NamedTuple):
    """The k most likely tokens of a teacher, and one bucket for all others."""
    full: LazyLogits
    top_probs: Tensor               # (N, k)
    top_ids: Tensor                 # (N, k)
    log_rest: Tensor                # (N, 1) log of the probability of all other tokens

    def probs(self, chunk: slice, log_probs: Tensor) -> Tensor:
        """(n, V): the bucket's probability is spread over its tokens in proportion to the student's."""
        top_ids = self.top_ids[chunk]                                        # (n, k)
        log_q = log_probs.scatter(1, top_ids, -torch.inf)                    # (n, V)
        student_log_rest = log_q.logsumexp(1, keepdim=True)                  # (n, 1)
        log_q += self.log_rest[chunk] - student_log_rest
        return log_q.exp_().scatter_(1, top_ids, self.top_probs[chunk])

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        """(N, 1), from the teacher's full distribution."""
        return self.full.gather(dim, ids)


class OneHotTarget(NamedTuple):
    """All probability on the token of the text."""
    ids: Tensor                     # (N, 1)

    def probs(self, chunk: slice, log_probs: Tensor) -> Tensor:
        """(n, V)."""
        return torch.zeros_like(log_probs).scatter_(1, self.ids[chunk], 1)

    def gather(self, dim: int, ids: Tensor) -> Tensor:
        """(N, 1)."""
        return (self.ids == ids).float()


Target = LazyLogits | TopKTarget | OneHotTarget


def top_k_target(full: LazyLogits, k: int) -> TopKTarget:
    """The k most likely tokens of `full`, and the bucket. If k is V or more, the bucket is empty."""
    top_probs = []
    top_ids = []
    log_rest = []
    for chunk in chunks(len(full.hidden)):
        log_probs = full.logits(chunk).log_softmax(-1)                       # (n, V)
        top_log_probs, ids = log_probs.topk(min(k, log_probs.size(1)))       # (n, k) each
        others = log_probs.scatter_(1, ids, -torch.inf)
        top_probs.append(top_log_probs.exp())
        top_ids.append(ids)
        log_rest.append(others.logsumexp(1, keepdim=True))
    return TopKTarget(full, torch.cat(top_probs), torch.cat(top_ids), torch.cat(log_rest))


@torch.no_grad()
def teacher_target(teacher, tokens: Tensor, rows: Tensor, position: Tensor,
                   k: int | None = None) -> LazyLogits | TopKTarget:
    """Twin of `opdlm.teacher_probs`: the teacher's distributions, with `k` as a top-k target."""
    read = rows * tokens.size(1) + position - 1                              # (N,) flat indices into B * T
    full = teacher(tokens, read=read, head=LazyLogits)
    if k is None:
        return full
    return top_k_target(full, k)


def one_hot_target(teacher, tokens: Tensor, rows: Tensor, position: Tensor) -> OneHotTarget:
    """Twin of `opdlm.one_hot`: all probability on the token of the text."""
    return OneHotTarget(tokens[rows, position][:, None])


# 2. the loss --------------------------------------------------------------------------------------

class ChunkedKL(torch.autograd.Function):
    """(N,) nats: KL from `target` to the softmax of the student's logits. Trains `hidden` and `table`."""

    @staticmethod
    def forward(ctx, hidden, table, bias, target):
        ctx.save_for_backward(hidden, table, bias)
        ctx.target = target
        student = LazyLogits(hidden, table, bias)
        dtype = at_least_fp32(hidden[:0]).dtype
        kl = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        for chunk in chunks(len(hidden)):
            log_probs = student.logits(chunk).log_softmax(-1)                # (n, V)
            q = target.probs(chunk, log_probs)                               # (n, V)
            negative_entropy = torch.xlogy(q, q).sum(-1)
            kl[chunk] = negative_entropy - (q * log_probs).sum(-1)
        return kl

    @staticmethod
    def backward(ctx, grad_kl):
        hidden, table, bias = ctx.saved_tensors
        student = LazyLogits(hidden, table, bias)
        grad_hidden = torch.empty_like(hidden)
        grad_table = None
        if ctx.needs_input_grad[1]:  # not of a frozen table, which --lora has
            grad_table = torch.zeros_like(table, dtype=at_least_fp32(table[:0]).dtype)  # bf16 rounds sums
        for chunk in chunks(len(hidden)):
            log_probs = student.logits(chunk).log_softmax(-1)                # (n, V)
            q = ctx.target.probs(chunk, log_probs)                           # (n, V)
            # In place, since each of these tensors is n x V.
            grad_logits = log_probs.exp_().sub_(q)                           # p - q
            grad_logits.mul_(grad_kl[chunk, None])
            grad_logits = grad_logits.to(table.dtype)  # as in the backward pass of the plain output layer
            grad_hidden[chunk] = grad_logits @ table
            if grad_table is not None:
                add_product(grad_table, grad_logits.T, hidden[chunk])
        if grad_table is not None:
            grad_table = grad_table.to(table.dtype)
        return grad_hidden, grad_table, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. If the dtypes agree, without a second tensor of that size."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(a @ b)


def distill_loss(target: Target, logits: LazyLogits) -> Tensor:
    """(N,) nats: twin of `opdlm.distill_loss`."""
    return ChunkedKL.apply(logits.hidden, logits.table, logits.bias, target)


# 3. the choice ------------------------------------------------------------------------------------

def chunked_kl(kl: str | None, target: str, vocab: int = 0) -> dict:
    """The fields of an `opdlm.Recipe` that --kl sets; `target` is the value of --target.

    plain     no fields: opdlm.py computes the loss
    full      the same loss in chunks
    topk:K    the K most likely tokens of the teacher and one bucket for all others. The loss is never above
              the full one. The teacher's logits are computed once instead of twice.

    The default is full for LARGE_VOCAB tokens or more, else plain. Target "sampled" needs plain.
    ValueError for other values.
    """
    if not kl:
        kl = "plain" if vocab < LARGE_VOCAB or target == "sampled" else "full"
    name, _, number = kl.partition(":")
    if kl == "plain":
        return {}
    if target == "sampled":
        raise ValueError(f"--kl={kl} does not go with --target=sampled: use --kl=plain")
    if kl == "full":
        k = None
    elif name == "topk" and number.isdecimal() and int(number) > 0:
        k = int(number)
    else:
        raise ValueError(f"--kl: expected plain, full or topk:K with K at least 1, got {kl!r} "
                         "(e.g. --kl=topk:64)")
    targets = {"teacher": partial(teacher_target, k=k), "onehot": one_hot_target}
    return {"target": targets[target], "divergence": distill_loss, "head": LazyLogits}
