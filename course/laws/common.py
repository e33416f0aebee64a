"""What the laws of all lessons share.

A lesson's laws are in lesson_N.py:

    WRITE   the names of the functions that the learner writes
    LAWS    functions law(mine). `mine` is the learner's file as a module. The first line of a law's docstring
            is the law, as one sentence. A law returns nothing, or raises Broken.

A law tries its smallest inputs first, so the first input that breaks it is the smallest.
"""
import torch
from torch import Tensor


class Broken(Exception):
    """A law is broken: the smallest input that shows it, and a hint that is not the answer."""

    def __init__(self, counterexample: str, hint: str):
        super().__init__(counterexample)
        self.counterexample = counterexample
        self.hint = hint


def require(holds: bool, counterexample: str, hint: str) -> None:
    """Broken, unless the condition holds."""
    if not holds:
        raise Broken(counterexample, hint)


def require_shape(value, shape: tuple, dtype: torch.dtype | None, name: str) -> None:
    """Broken, unless `value` is a tensor of this shape and number format (None: any)."""
    if not isinstance(value, Tensor):
        raise Broken(f"{name} returned a {type(value).__name__}", "return a tensor; the docstring says which")
    require(tuple(value.shape) == tuple(shape), f"{name} returned shape {tuple(value.shape)}, not {shape}",
            "compare with the shapes in the docstring")
    require(dtype is None or value.dtype == dtype, f"{name} returned {value.dtype}, not {dtype}",
            "the docstring says what kind of numbers the tensor holds")


def close(a, b, tolerance: float = 1e-6) -> bool:
    """Whether all numbers differ by at most `tolerance`. NaN is close to nothing."""
    difference = torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)
    return bool((difference.abs() <= tolerance).all())


def show(x) -> str:
    """A small tensor in one line, at most 4 decimals: [0.5, 0.25], or for bools 0 and 1."""
    if not isinstance(x, Tensor):
        return str(x)
    if x.dtype == torch.bool:
        x = x.int()
    if x.is_floating_point():
        x = (x.double() * 10000).round() / 10000
    return str(x.tolist())
