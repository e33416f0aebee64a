"""Which masks come off: each training-free rule is one small function of the confidences at a block's slots.

A rule is called with its argument, `confidence` (B, K), a number a slot, `masked` (B, K), the slots that still have a
mask, `step` (B,), the block's steps so far, and `numbers` (B, K, S), the slots' uniform ones. It answers with a bool
(B, K): a part of `masked`, at least one slot of every row that has any; only ancestral's steps may reveal nothing. How
sure a slot is, is chosen apart (model/confidence.py): rule x confidence.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


# Confidence.
def largest(probs: Tensor, drawn: Tensor) -> Tensor:
    """the largest probability at the slot, whatever was drawn

    Exact conditionals revealed so, one at a time, sample the joint; by the other two below as well."""
    return probs.amax(-1)


def drawn(probs: Tensor, drawn: Tensor) -> Tensor:
    """that of the token drawn, which is drawn anew each step (OPDLM's code): biased towards likely text"""
    return probs.gather(-1, drawn[:, None]).squeeze(-1)


def margin(probs: Tensor, drawn: Tensor) -> Tensor:
    """the largest less the second (Kim et al., 2502.06768)"""
    two = probs.topk(min(2, probs.size(-1)), -1).values
    return two[:, 0] - two[:, 1:].sum(-1)


def entropy(probs: Tensor, drawn: Tensor) -> Tensor:
    """exp(-entropy), one over the number of tokens between which the slot hesitates (Dream orders by it)"""
    return torch.special.entr(probs).sum(-1).neg().exp()


CONFIDENCE = {"largest": largest, "drawn": drawn, "margin": margin, "entropy": entropy}


# Rules. With p the confidences, the largest first.
def ranked(score: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) twice: the scores of the masked slots, the largest first and -inf behind them; each slot's rank."""
    best, order = score.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True)
    return best, order.argsort(-1)                                         # a rank is the inverse of the sorting


def static(count: int, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """the COUNT surest: block / COUNT steps a block (MaskGIT, 2202.04200; LLaDA, 2502.09992)"""
    if count == 1:                                                         # the first of the largest, in fewer steps
        best = confidence.masked_fill(~masked, -torch.inf).argmax(-1, keepdim=True)
        return masked & torch.zeros_like(masked).scatter(1, best, True)
    return masked & (ranked(confidence, masked)[1] < count)


def random_order(count: int, confidence: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
    """COUNT slots at random"""
    return masked & (ranked(numbers[..., -1], masked)[1] < count)          # an order of the slots, all alike


def threshold(level: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """all with p > P, at least the surest (Fast-dLLM, 2505.22618; low_confidence_dynamic in OPDLM's code)"""
    return masked & (confidence > level) | static(1, confidence, masked)


def leftmost(level: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """all from the left as long as p > P, at least the first: nothing right of a mask is shown, as to an AR teacher"""
    confident = (confidence > level) | ~masked
    first = masked & (masked.cumsum(-1) == 1)
    return masked & (confident.cumprod(-1).bool() | first)


def factor(bound: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """the most n with (n + 1)(1 - p_n) < F, at least one (Fast-dLLM, 2505.22618)"""
    best, rank = ranked(confidence, masked)
    n = torch.arange(1, best.size(-1) + 1, device=best.device)
    most = ((n + 1) * (1 - best) < bound).mul(n).amax(-1, keepdim=True)                 # (B, 1)
    return masked & (rank < most.clamp(min=1))


def entropy_bound(bound: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """the most n with H_1 + ... + H_n - max H <= G nats, H = -log p: entropies (EB-sampler, 2505.24857)"""
    best, rank = ranked(confidence, masked)
    before = F.pad(-best.log().cumsum(-1)[:, :-1], (1, 0))                  # (B, K) ascending: the max is the last one
    return masked & (rank < (before <= bound).sum(-1, keepdim=True))       # where no mask is left, before is nan


def ancestral(steps: int, confidence: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
    """each with probability 1 / (steps left) of STEPS (MDLM, 2406.07524): the unbiased one, which may reveal nothing

    A slot's number is the time, from 1 down to 0, at which its mask comes off."""
    return masked & (numbers[..., -1] >= 1 - (step[:, None] + 1) / steps)


@dataclass(frozen=True)
class Rule:
    """A rule with its argument, and the confidence that it goes by. str(rule) is what parse takes."""
    name: str
    argument: float
    confidence: Callable = largest

    def __call__(self, confidence: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        return RULES[self.name][0](self.argument, confidence, masked, step, numbers)

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}"

    def steps(self, block: int) -> int:
        """The most that a block of so many slots takes."""
        return self.argument if self.name == "ancestral" else block

    @property
    def rolls(self) -> int:
        """Numbers of a slot that the rule itself needs, the last ones."""
        return int(self.name in ("random", "ancestral"))

    def numbers(self, block: int) -> int:
        """S, all numbers of a slot: one to draw its token with, or one a step if it is drawn anew; and the rule's."""
        return (block if self.confidence is drawn else 1) + self.rolls


COUNT, SHARE, BOUND = (int, 1, float("inf")), (float, 0, 1), (float, 0, float("inf"))   # kinds: number, least, most
RULES = {"leftmost": (leftmost, SHARE, "P", "0.98"), "threshold": (threshold, SHARE, "P", "0.9"),
         "static": (static, COUNT, "COUNT", "1"), "random": (random_order, COUNT, "COUNT", "1"),
         "factor": (factor, BOUND, "F", "1"), "eb": (entropy_bound, BOUND, "G", "0.1"),
         "ancestral": (ancestral, COUNT, "STEPS", "32")}
OWN = {"eb": "entropy"}         # the confidence that a rule is made for


EXTERNAL: dict[str, Callable[[str], object]] = {}   # rules of other modules: NAME -> parser of what follows "NAME:"


def register(name: str, parser: Callable[[str], object]) -> None:
    """Make the rule --reveal=NAME:ARGUMENT available, which `parser` makes of ARGUMENT."""
    EXTERNAL[name] = parser


def parse(spec: str, confidence: str | None = None, usual: str = "largest") -> Rule:
    """A rule from NAME:ARGUMENT, as "static:1", "threshold:0.9", "leftmost:0.9"; without one, by its default.
    It goes by `confidence`; if that is None by the one that it is made for, and if there is none by the `usual` one."""
    name, _, argument = spec.partition(":")
    if name in EXTERNAL:
        return EXTERNAL[name](argument)
    if name not in RULES:
        known = ", ".join(f"{n}:{default}" for n, (*_, default) in RULES.items())
        raise ValueError(f"there is no reveal rule {name!r}: use one of {known}")
    _, (kind, least, most), what, default = RULES[name]
    try:
        value = kind(argument or default)
    except ValueError:
        wrong = f"{argument!r} is no {kind.__name__}"
        raise ValueError(f"--reveal={spec}: {wrong}; write for example {name}:{default}") from None
    if not least <= value <= most:
        wanted = f"from {least} to {most}" if most == 1 else f"of at least {least}"
        raise ValueError(f"--reveal={spec}: {name}:{what} takes a number {wanted}")
    return Rule(name, value, CONFIDENCE[confidence or OWN.get(name, usual)])
