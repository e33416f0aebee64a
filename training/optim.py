"""Muon (Keller Jordan, 2024): momentum whose matrices are made orthogonal before they are applied; AdamW for all else.

Float32, since `torch.optim.Muon` (torch 2.9 and later) works in bf16, which crawls on CPUs that lack it.
"""
import math

import torch
from torch import Tensor

from training import dist


def orthogonal(g: Tensor) -> Tensor:
    """(n, a, b): about U V^T of each matrix U S V^T, by five steps of a quintic Newton-Schulz iteration."""
    tall = g.size(1) > g.size(2)
    x = g.transpose(1, 2) if tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.transpose(1, 2) if tall else x


class Muon(torch.optim.Optimizer):
    """Two groups of parameters: the blocks' matrices at `lr`, and embeddings, biases and norms by AdamW at
    `lr * adam`."""

    def __init__(self, net, lr: float = 0.02, momentum: float = 0.95, adam: float = 0.5, betas=(0.9, 0.95), eps=1e-10):
        matrices = [p for p in net.h.parameters() if p.dim() == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in net.parameters() if id(p) not in chosen]
        groups = [{"params": matrices, "lr": lr, "muon": True}, {"params": others, "lr": lr * adam, "muon": False}]
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self.adam(params, group)
                continue
            shapes = {}
            for p in params:                                     # matrices of one shape are made orthogonal together
                shapes.setdefault(p.shape, []).append(p)
            for same in shapes.values():
                self.muon(same, group)

    def muon(self, params: list[Tensor], group: dict) -> None:
        for p in params:
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - group["momentum"])
        ahead = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params]      # Nesterov's
        rate = group["lr"] * max(1.0, params[0].size(0) / params[0].size(1)) ** 0.5
        for p, update in zip(params, orthogonal(torch.stack(ahead))):
            p.add_(update, alpha=-rate)

    def adam(self, params: list[Tensor], group: dict) -> None:
        (b1, b2) = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p))
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - b1)
            state["square"].lerp_(p.grad.square(), 1 - b2)
            n = state["step"].item()
            scale = (state["square"] / (1 - b2 ** n)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - b1 ** n))


class SkipNonFinite:
    """An optimizer whose step sums the gradients of `passes` backward passes, leaves a step out where they are not
    finite, and after ten such in a row stops the run.

    FSDP takes the mean over processes; a loss is divided by the rows of all, so it is the sum that is wanted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, passes: int = 1):
        self.optimizer, self.passes, self.done, self.skipped, self.in_a_row = optimizer, passes, 0, 0, 0

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.done % self.passes == 0:
            self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        self.done += 1
        if self.done % self.passes:
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        assert params, "no gradient came: was the optimizer made after a forward of a sharded network?"
        for p in params if dist.count() > 1 else ():
            p.grad.mul_(dist.count())
        if dist.gather(torch.nn.utils.clip_grad_norm_(params, torch.inf)).isfinite():          # which clips nothing
            self.in_a_row = 0
            return self.optimizer.step()
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        print(f"a gradient is not finite: this step is left out, the {self.skipped}. so far", flush=True)
        if self.in_a_row == 10:
            raise ValueError("the gradients of ten steps in a row were not finite: lower --lr, or look at the data")


RATES = {"muon": 0.02, "adamw": 1e-3}       # learning rates that small networks take to


def make_optimizer(name: str, net, lr: float | None = None) -> torch.optim.Optimizer:
    """muon or adamw, for the distillation of a network."""
    if name == "muon":
        return Muon(net, lr or RATES[name])
    return torch.optim.AdamW(net.parameters(), lr or RATES[name], weight_decay=0.0)


SHAPES = {"linear": lambda done: 1 - done, "trapezoid": lambda done: min(1.0, 2 * (1 - done)),
          "cosine": lambda done: 0.55 + 0.45 * math.cos(math.pi * done), "constant": lambda done: 1.0}


def lr_schedule(optimizer, shape: str, steps: int, warmup: int = 10):
    """A function that sets the learning rates of a step: a linear warm-up to their peaks, today's, and then `shape`:
    linear to 0, that in the second half only (trapezoid), a cosine to a tenth, or constant."""
    peaks = [group["lr"] for group in optimizer.param_groups]

    def set_rates(step: int) -> None:
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * min(1.0, (step + 1) / warmup) * SHAPES[shape](step / steps)
    return set_rates


def length_schedule(shortest: int, longest: int, steps: int):
    """A function that gives the tokens of a step's response: a quarter of a cosine up to the longest."""
    def length(step: int) -> int:
        grown = 1 - math.cos(math.pi / 2 * min(1, step / steps)) if steps else 1
        return max(shortest, round(longest * grown))
    return length
