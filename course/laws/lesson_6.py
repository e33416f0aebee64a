"""Laws of lesson 6: visited states, the teacher's targets, the loss of on-policy distillation."""
import torch
import torch.nn as nn
from torch import Tensor

import opdlm
from course import given
from course.laws.common import close, require, require_shape, show
from decoding import reveal
from decoding.sampling import uniforms
from model import masks
from model.masks import Layout

WRITE = ("visited", "state_kl")


# What the laws need -------------------------------------------------------------------------------

def all_orders(K: int) -> list[Tensor]:
    """Every order (K,) in which a block can be revealed: each step from 0 on reveals something."""
    orders = []
    for order in given.all_texts(K, K):
        steps = order.unique()
        if len(steps) == steps.max() + 1:
            orders.append(order)
    return sorted(orders, key=lambda order: int(order.max()))


def evenly(rows: int, R: int) -> Tensor:
    """(rows, R, 2) numbers whose first one in each row runs evenly from 0 to 1."""
    u = torch.zeros(rows, R, 2)
    u[:, :, :] = ((torch.arange(rows) + 0.5) / rows)[:, None, None]
    return u


def states_of(mine, order: Tensor, response_mask: Tensor, u: Tensor, block: int) -> Tensor:
    masked = mine.visited(order, response_mask, u, block)
    require_shape(masked, tuple(order.shape), torch.bool, "visited")
    return masked


def kl_of(mine, student, teacher, tokens: Tensor, masked: Tensor, P: int, layout: Layout) -> Tensor:
    kl = mine.state_kl(student, teacher, tokens, masked, P, layout)
    require_shape(kl, (len(tokens),), None, "state_kl")
    return kl


class ConstantNet(nn.Module):
    """A network that predicts the same at every position: its only parameters are V logits."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))
        self.mask_id = len(logits)

    def forward(self, tokens, mask=None, position=None, read=None, head=None):
        count = tokens.numel() if read is None else len(read)
        return self.logits.expand(count, -1)


class RecordingDenoiser(opdlm.PlainDenoiser):
    """Notes every state that it is asked about: (row, start of the block) -> a list of masks (K,)."""

    def reset(self, prompt_len: Tensor, end: Tensor) -> None:
        super().reset(prompt_len, end)
        self.seen = {}

    def __call__(self, tokens: Tensor, start: Tensor, masked: Tensor) -> Tensor:
        for row in range(len(start)):
            self.seen.setdefault((row, int(start[row])), []).append(masked[row].tolist())
        return super().__call__(tokens, start, masked)


# The laws -----------------------------------------------------------------------------------------

def is_a_state(mine):
    """State k has exactly the positions with order >= k masked, and every state has a mask."""
    for K in (1, 2, 3):
        for order in all_orders(K):
            num_states = int(order.max()) + 1
            u = evenly(10 * num_states, K)
            response_mask = torch.ones(len(u), K, dtype=torch.bool)
            allowed = [(order >= k).tolist() for k in range(num_states)]
            for masked in states_of(mine, order.expand(len(u), -1), response_mask, u, K):
                if not masked.any():
                    hint = ("the finished block is no state to learn from: how many states have a mask, and "
                            "has the student seen at step k what step k reveals?")
                else:
                    hint = "at step k the student has not yet seen what step k itself reveals"
                require(masked.tolist() in allowed, f"a block of {K} with order {show(order)}: masked = "
                        f"{show(masked)}", hint)


def all_states_alike(mine):
    """Each state of a block is equally likely."""
    for K in (1, 2, 3):
        for order in all_orders(K):
            num_states = int(order.max()) + 1
            u = evenly(10 * num_states, K)
            response_mask = torch.ones(len(u), K, dtype=torch.bool)
            masked = states_of(mine, order.expand(len(u), -1), response_mask, u, K)
            for k in range(num_states):
                count = int((masked == (order >= k)).all(1).sum())
                require(count == 10, f"a block of {K} with order {show(order)}, and {len(u)} random numbers "
                        f"evenly from 0 to 1: state {k} came {count} times, not 10",
                        "the number of states differs from block to block: scale the random number by it")


def blocks_are_independent(mine):
    """Two blocks side by side get the states that each of them gets alone."""
    for K in (1, 2, 3):
        for first in all_orders(K):
            for second in all_orders(K):
                u = torch.rand(8, 2 * K, 2, generator=torch.Generator().manual_seed(K))
                whole = torch.ones(8, K, dtype=torch.bool)
                left = states_of(mine, first.expand(8, -1), whole, u[:, :K], K)
                right = states_of(mine, second.expand(8, -1), whole, u[:, K:], K)
                order = torch.cat([first, second]).expand(8, -1)
                both = states_of(mine, order, torch.cat([whole, whole], 1), u, K)
                require(torch.equal(both, torch.cat([left, right], 1)),
                        f"blocks of {K} with orders {show(first)} and {show(second)}",
                        "each block has its own number of steps and its own random number")


def mask_in_response(mine):
    """Every state has a mask in the response, also where the text ends within the block."""
    for K in (2, 3):
        for order in all_orders(K):
            for length in range(1, K):
                response_mask = torch.arange(K) < length
                u = evenly(20, K)
                masked = states_of(mine, order.expand(20, -1), response_mask.expand(20, -1), u, K)
                holds = (masked & response_mask).any(1)
                require(bool(holds.all()), f"order {show(order)}, response_mask {show(response_mask)}: "
                        f"masked = {show(masked[~holds][:1].flatten())}",
                        "the last state to count is the one before the response's last position is revealed")


def replay(mine):
    """Every state is one that the denoiser was asked about in the rollout."""
    net = given.tiny_net(5, context=24)
    for K in (2, 4):
        layout = Layout(K)
        denoiser = RecordingDenoiser(net, layout)
        prompt = torch.zeros(6, 3, dtype=torch.long)
        rule = reveal.parse("random:1") if K == 2 else reveal.parse("threshold:0.4")
        u = uniforms(0, 0, range(6), (3 + 2 * K, rule.numbers(K)))
        text = opdlm.rollout(denoiser, prompt, 2 * K, rule, u, eot=-1)
        order = text.order[:, 3:]
        for seed in range(5):
            u = uniforms(seed, 1, range(6), (2 * K, 2))
            masked = states_of(mine, order, text.response_mask[:, 3:], u, K)
            for row in range(6):
                for start in (0, K):
                    state = masked[row, start:start + K].tolist()
                    require(state in denoiser.seen[row, 3 + start], f"a rollout in blocks of {K}, order "
                            f"{show(order[row, start:start + K])}: masked = {show(torch.tensor(state))}",
                            "compare with the states of the rollout: which positions were masks at step k?")


def nothing_to_learn(mine):
    """Where the student is the teacher, the loss is zero, and so is its gradient."""
    for V, R in ((2, 1), (2, 2), (3, 3)):
        teacher = given.tiny_net(V)
        student = given.tiny_net(V).requires_grad_(True)
        tokens = given.all_texts(V, R + 1)
        masked = torch.ones(len(tokens), R, dtype=torch.bool)
        kl = kl_of(mine, student, teacher, tokens, masked, 1, masks.AR)
        student.zero_grad()
        kl.sum().backward()
        gradients = [p.grad.abs().max() for p in student.parameters() if p.grad is not None]
        require(len(gradients) > 0, f"V = {V}, R = {R}: the loss has no gradient",
                "the student is to learn from it")
        largest = max(gradients)
        if largest < 1e-5:
            hint = "the gradient is zero, the loss is not: what has KL(q || p) beside the cross-entropy?"
        else:
            hint = "are q and p predictions of the same position, each read where its network predicts it?"
        for text, value in zip(tokens, kl):
            require(close(value, 0, 1e-5), f"V = {V}, block size 1, text {show(text)}: the loss is "
                    f"{value:.4f}", hint)
        require(bool(largest < 1e-5), f"V = {V}, R = {R}: the largest gradient is {largest:.4f}", hint)


def target_is_causal(mine):
    """What stands at a position, or after it, does not change its target."""
    V, P = 3, 1
    teacher = given.tiny_net(V)
    student = given.tiny_net(V, seed=1)
    for K, R in ((1, 1), (2, 2), (2, 4), (3, 3)):
        tokens = torch.zeros(1, P + R, dtype=torch.long)
        masked = torch.zeros(1, R, dtype=torch.bool)
        masked[0, K - 1] = True                                  # the last position of the first block
        before = kl_of(mine, student, teacher, tokens, masked, P, Layout(K))
        for i in range(P + K - 1, P + R):
            other = tokens.clone()
            other[0, i] = 1
            after = kl_of(mine, student, teacher, other, masked, P, Layout(K))
            require(close(before, after, 1e-6), f"block size {K}, only position {P + K - 1} of "
                    f"{show(tokens[0])} is masked: with token {i} changed to 1 the loss went from "
                    f"{before.item():.4f} to {after.item():.4f}",
                    "an AR model's logits at position i have read token i; which logits have not?")


def mean_over_masked(mine):
    """If every position costs the same, so does every state, however many masks it has."""
    teacher = ConstantNet([1.0, 0.0])
    student = ConstantNet([0.0, 0.0])
    one = None
    for R in (1, 2, 3):
        for masked in given.all_texts(2, R).bool()[1:]:
            tokens = torch.zeros(1, 1 + R, dtype=torch.long)
            value = kl_of(mine, student, teacher, tokens, masked[None], 1, Layout(2)).detach()
            one = value if one is None else one
            require(close(value, one, 1e-6), f"masked = {show(masked)}: the loss is {value.item():.4f}, that "
                    f"of one masked position is {one.item():.4f}",
                    "the mean has to be over the masked positions of the row, and only over them")


def gradient(mine):
    """The gradient of the loss with respect to the student's logits is p - q."""
    for logits in ([3.0, 0.0], [2.0, 0.0, -1.0], [0.0, 3.0, 0.0]):
        teacher = ConstantNet(logits)
        student = ConstantNet([0.0, 0.5, 1.0][:len(logits)])
        tokens = torch.zeros(1, 3, dtype=torch.long)
        masked = torch.ones(1, 2, dtype=torch.bool)
        kl_of(mine, student, teacher, tokens, masked, 1, Layout(2)).sum().backward()
        p = student.logits.detach().softmax(-1)
        q = teacher.logits.detach().softmax(-1)
        require(close(student.logits.grad, p - q, 1e-5), f"q = {show(q)}, p = {show(p)}: the gradient is "
                f"{show(student.logits.grad)}, p - q is {show(p - q)}",
                "KL is not symmetric: which of the two distributions is the average taken over?")
        leaked = teacher.logits.grad is not None and teacher.logits.grad.abs().max() > 0
        require(not leaked, f"q = {show(q)}: the teacher gets a gradient of {show(teacher.logits.grad)}",
                "the teacher is frozen: compute its distributions under torch.no_grad()")


LAWS = [is_a_state, all_states_alike, blocks_are_independent, mask_in_response, replay, nothing_to_learn,
        target_is_causal, mean_over_masked, gradient]
