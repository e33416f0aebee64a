"""Optimizers, and schedules of the learning rate and of the response length."""
import math
from collections.abc import Callable

import torch
from torch import Tensor

from training import dist

LEARNING_RATES = {"muon": 0.01, "adamw": 1e-3}      # peak rates of the distillation of small networks

# The learning rate relative to its peak, when a share `done` of the steps is done (after the warm-up).
LR_SHAPES = {
    "linear": lambda done: 1 - done,                                         # to 0
    "trapezoid": lambda done: min(1.0, 2 * (1 - done)),                      # constant, then linear to 0
    "cosine": lambda done: 0.55 + 0.45 * math.cos(math.pi * done),           # to a tenth
    "constant": lambda done: 1.0,
}


# 1. optimizers ------------------------------------------------------------------------------------

def orthogonalize(g: Tensor) -> Tensor:
    """(n, a, b): for each matrix U S V^T approximately U V^T, by five quintic Newton-Schulz iterations."""
    is_tall = g.size(1) > g.size(2)
    x = g.transpose(1, 2) if is_tall else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.transpose(1, 2)
        polynomial = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + polynomial @ x
    return x.transpose(1, 2) if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024) for the matrices of the transformer blocks, AdamW for all other parameters.

    Muon orthogonalizes the momentum of a matrix before the step. It computes in the parameters' dtype, while
    `torch.optim.Muon` computes in bf16, which is slow on most CPUs. AdamW has no weight decay here, and the
    learning rate `lr * adam_ratio`.
    """

    def __init__(self, net, lr: float = 0.02, momentum: float = 0.95, adam_ratio: float = 0.5,
                 betas=(0.9, 0.95), eps=1e-10):
        matrices = [p for p in net.h.parameters() if p.dim() == 2]
        matrix_ids = {id(p) for p in matrices}
        others = [p for p in net.parameters() if id(p) not in matrix_ids]
        groups = [
            {"params": matrices, "lr": lr, "muon": True},
            {"params": others, "lr": lr * adam_ratio, "muon": False},
        ]
        super().__init__(groups, {"momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["muon"]:
                self.adamw_step(params, group)
                continue
            by_shape = {}
            for p in params:
                by_shape.setdefault(p.shape, []).append(p)
            for same_shape in by_shape.values():
                self.muon_step(same_shape, group)

    def muon_step(self, params: list[Tensor], group: dict) -> None:
        """Update matrices of the same shape, which are orthogonalized as one batch."""
        momentum = group["momentum"]
        directions = []
        for p in params:
            buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
            buffer.lerp_(p.grad, 1 - momentum)
            directions.append(p.grad.lerp(buffer, momentum))                 # Nesterov momentum
        rows, columns = params[0].shape
        lr = group["lr"] * max(1.0, rows / columns) ** 0.5
        updates = orthogonalize(torch.stack(directions))                     # (n, rows, columns)
        for p, update in zip(params, updates):
            p.add_(update, alpha=-lr)

    def adamw_step(self, params: list[Tensor], group: dict) -> None:
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state["step"] = torch.zeros(())
                state["mean"] = torch.zeros_like(p)
                state["square"] = torch.zeros_like(p)
            state["step"] += 1
            state["mean"].lerp_(p.grad, 1 - beta1)
            state["square"].lerp_(p.grad.square(), 1 - beta2)
            n = state["step"].item()
            variance = state["square"] / (1 - beta2 ** n)                    # corrects the start at 0
            scale = variance.sqrt_().add_(group["eps"])
            lr = group["lr"] / (1 - beta1 ** n)
            p.addcdiv_(state["mean"], scale, value=-lr)


def make_optimizer(name: str, net, lr: float | None = None) -> torch.optim.Optimizer:
    """The optimizer of a distillation: muon or adamw, at `lr` or at its rate in LEARNING_RATES."""
    lr = lr or LEARNING_RATES[name]
    if name == "muon":
        return Muon(net, lr)
    return torch.optim.AdamW(net.parameters(), lr, weight_decay=0.0)


class SkipNonFinite:
    """An optimizer with gradient accumulation that skips steps whose gradients are not finite.

    Every `grad_accum`-th call of `step` takes a step with the sum of the gradients. `skipped` counts the
    skipped steps. After ten of them in a row `step` raises ValueError. Other attributes are the optimizer's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, grad_accum: int = 1):
        self.optimizer = optimizer
        self.grad_accum = grad_accum
        self.passes = 0                                          # backward passes so far
        self.skipped = 0
        self.skipped_in_a_row = 0

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.passes % self.grad_accum == 0:
            self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        self.passes += 1
        if self.passes % self.grad_accum:
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        assert params, "no gradients: create the optimizer before the first forward pass of a sharded network"
        dist.sum_gradients(params)
        norm = torch.nn.utils.clip_grad_norm_(params, torch.inf)             # clips nothing
        if dist.gather(norm).isfinite():
            self.skipped_in_a_row = 0
            self.optimizer.step()
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        print(f"gradients are not finite: step skipped, {self.skipped} so far", flush=True)
        if self.skipped_in_a_row == 10:
            raise ValueError("gradients were not finite for ten steps in a row: lower --lr or check the data")


# 2. schedules -------------------------------------------------------------------------------------

def lr_schedule(optimizer, shape: str, steps: int, warmup: int = 10) -> Callable[[int], None]:
    """A function of the step, from 0, that sets the learning rates of the optimizer.

    The peak of each group is its rate now. A linear warm-up is multiplied by the shape, one of LR_SHAPES.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]

    def set_lr(step: int) -> None:
        warm = min(1.0, (step + 1) / warmup)
        scale = LR_SHAPES[shape](step / steps)
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * warm * scale
    return set_lr


def length_schedule(shortest: int, longest: int, steps: int) -> Callable[[int], int]:
    """A function of the step, from 0: the length of responses in tokens.

    It grows to `longest` over `steps` steps along a quarter of a cosine, and is at least `shortest`.
    """
    def length(step: int) -> int:
        if not steps:
            return max(shortest, longest)
        done = min(1, step / steps)
        grown = 1 - math.cos(math.pi / 2 * done)
        return max(shortest, round(longest * grown))
    return length
