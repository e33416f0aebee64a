"""Reveal rules: which masked positions of a block are revealed at a denoising step.

    1. confidence   a number per position: how certain the network is there
    2. rules        small functions from the confidences to the revealed positions
    3. parsing      a rule from NAME:ARGUMENT, as in --reveal=leftmost:0.98

A rule and a confidence are chosen independently of each other.

Shapes: B rows, K block size, M masked positions, V vocabulary, S random numbers per position.
"""
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# 1. confidence ------------------------------------------------------------------------------------
# Each function takes probs (M, V) and the tokens sampled from them (M,); it returns the confidences (M,).

def largest(probs: Tensor, sampled: Tensor) -> Tensor:
    """The largest probability at the position, whatever was sampled.

    The sampled tokens do not influence the order then. So exact conditionals, revealed one at a time, sample
    the joint distribution exactly. The same holds for `margin` and `entropy`.
    """
    return probs.amax(-1)


def drawn(probs: Tensor, sampled: Tensor) -> Tensor:
    """The probability of the sampled token, which is sampled anew at each step (OPDLM's code).

    It is biased towards likely text: an unlikely token is rarely revealed before it is sampled again.
    """
    return probs.gather(-1, sampled[:, None]).squeeze(-1)


def margin(probs: Tensor, sampled: Tensor) -> Tensor:
    """The largest probability minus the second largest (Kim et al., 2502.06768)."""
    two = probs.topk(min(2, probs.size(-1)), -1).values
    return two[:, 0] - two[:, 1:].sum(-1)


def entropy(probs: Tensor, sampled: Tensor) -> Tensor:
    """exp(-entropy): 1 if one token is certain, 1 / n if n tokens are equally likely (Dream, 2508.15487)."""
    return torch.special.entr(probs).sum(-1).neg().exp()


CONFIDENCE = {"largest": largest, "drawn": drawn, "margin": margin, "entropy": entropy}


# 2. rules -----------------------------------------------------------------------------------------
# Each function takes its argument, then
#     confidence   (B, K) a number per position; p below
#     masked       (B, K) bool: the positions that are still masked
#     step         (B,) denoising steps that the block has had so far
#     u            (B, K, S) uniform random numbers; a rule that is random uses the last one of a position
# and returns revealed (B, K) bool, a part of `masked`: at least one position of each row that has a mask.
# Only `ancestral` may reveal nothing.

def rank_masked(score: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """The scores of the masked positions, highest first, then -inf; each position's rank. (B, K) both."""
    score = score.masked_fill(~masked, -torch.inf)
    best, order = score.sort(dim=-1, descending=True, stable=True)
    rank = order.argsort(-1)  # the inverse permutation of the sorting
    return best, rank


def static(count: int, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """The `count` most confident positions (MaskGIT, 2202.04200; LLaDA, 2502.09992).

    A block takes block / count steps.
    """
    if count == 1:  # the same as below for less work
        best = confidence.masked_fill(~masked, -torch.inf).argmax(-1, keepdim=True)
        return masked & torch.zeros_like(masked).scatter(1, best, True)
    _, rank = rank_masked(confidence, masked)
    return masked & (rank < count)


def random_order(count: int, confidence: Tensor, masked: Tensor, step: Tensor, u: Tensor) -> Tensor:
    """`count` random positions. Every order of the positions has the same probability."""
    _, rank = rank_masked(u[..., -1], masked)
    return masked & (rank < count)


def threshold(level: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """All positions with p > level, at least the most confident one (Fast-dLLM, 2505.22618).

    OPDLM's code calls it low_confidence_dynamic.
    """
    confident = masked & (confidence > level)
    return confident | static(1, confidence, masked)


def leftmost(level: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """All positions from the left as long as p > level, at least the first.

    No token is revealed to the right of a mask. So the student sees what a causal teacher sees.
    """
    confident = (confidence > level) | ~masked
    first = masked & (masked.cumsum(-1) == 1)
    return masked & (confident.cumprod(-1).bool() | first)


def factor(bound: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """The n most confident positions, n as large as (n + 1) (1 - p_n) < bound allows, at least one.

    p_n is the n-th largest confidence (Fast-dLLM, 2505.22618).
    """
    best, rank = rank_masked(confidence, masked)
    n = torch.arange(1, best.size(-1) + 1, device=best.device)
    allowed = (n + 1) * (1 - best) < bound
    most = allowed.mul(n).amax(-1, keepdim=True)                 # (B, 1)
    return masked & (rank < most.clamp(min=1))


def entropy_bound(bound: float, confidence: Tensor, masked: Tensor, *_) -> Tensor:
    """The n most confident positions, n as large as H_1 + ... + H_n - max H <= bound (nats) allows.

    H = -log p is the entropy of a position if the confidence is `entropy` (EB-sampler, 2505.24857). The
    entropies ascend, so the largest of n is the last and the sum without it is that of the n - 1 before.
    """
    best, rank = rank_masked(confidence, masked)
    total = -best.log().cumsum(-1)                               # (B, K) H_1 + ... + H_n
    total_before = F.pad(total[:, :-1], (1, 0))                  # nan or inf after the last masked position
    n = (total_before <= bound).sum(-1, keepdim=True)            # (B, 1)
    return masked & (rank < n)


def ancestral(steps: int, confidence: Tensor, masked: Tensor, step: Tensor, u: Tensor) -> Tensor:
    """Each position with probability 1 / (steps left), independently; possibly none (MDLM, 2406.07524).

    This is ancestral sampling of masked diffusion. Time runs from 1 to 0 in `steps` steps, and the random
    number of a position is the time at which it is revealed.
    """
    time = 1 - (step[:, None] + 1) / steps                       # (B, 1) at the end of this step
    return masked & (u[..., -1] >= time)


@dataclass(frozen=True)
class RuleType:
    """An entry of RULES: what `parse` and `Rule` have to know about a rule."""
    function: Callable
    kind: type                      # of the argument: int or float
    least: float                    # smallest argument allowed
    most: float                     # largest argument allowed
    argument: str                   # what messages call the argument
    default: str                    # the argument of NAME alone
    help: str
    rolls: int = 0                  # random numbers per position that the rule uses
    confidence: str | None = None   # the confidence that the rule was made for; None: no particular one


INF = float("inf")
MOST_TOKENS = 2 ** 31 - 1   # longer than any block
MOST_STEPS = 2 ** 24        # there are as many different random numbers
RULES = {
    "leftmost": RuleType(leftmost, float, 0, 1, "P", "0.98",
                         help="from the left as long as p > P, at least one"),
    "threshold": RuleType(threshold, float, 0, 1, "P", "0.9",
                          help="all positions with p > P, at least one"),
    "static": RuleType(static, int, 1, MOST_TOKENS, "COUNT", "1",
                       help="the COUNT most confident positions"),
    "random": RuleType(random_order, int, 1, MOST_TOKENS, "COUNT", "1",
                       help="COUNT random positions", rolls=1),
    "factor": RuleType(factor, float, 0, INF, "F", "1",
                       help="the most confident n positions with (n + 1) (1 - p_n) < F, at least one"),
    "eb": RuleType(entropy_bound, float, 0, INF, "G", "0.1",
                   help="the most confident positions, up to a joint entropy of about G nats",
                   confidence="entropy"),
    "ancestral": RuleType(ancestral, int, 1, MOST_STEPS, "STEPS", "32",
                          help="random positions, all of them in STEPS steps", rolls=1),
}


@dataclass(frozen=True)
class Rule:
    """A rule with its argument and its confidence. `parse` turns str(rule) into the rule again."""
    name: str
    argument: float
    confidence: Callable = largest

    def __call__(self, confidence: Tensor, masked: Tensor, step: Tensor, u: Tensor) -> Tensor:
        return RULES[self.name].function(self.argument, confidence, masked, step, u)

    def __str__(self) -> str:
        return f"{self.name}:{self.argument}"

    def steps(self, block: int) -> int:
        """The largest number of denoising steps of a block."""
        return self.argument if self.name == "ancestral" else block

    @property
    def rolls(self) -> int:
        """Random numbers per position that the rule itself uses: the last ones of the S."""
        return RULES[self.name].rolls

    def numbers(self, block: int) -> int:
        """S, the random numbers per position: those that sample its token, then the rule's own.

        One of them samples the token, or one per step if it is sampled anew at each step.
        """
        samples = block if self.confidence is drawn else 1
        return samples + self.rolls


# 3. parsing ---------------------------------------------------------------------------------------

EXTERNAL: dict[str, Callable[[str], object]] = {}  # rules of other modules: their names and parsers


def register(name: str, parser: Callable[[str], object]) -> None:
    """Add a rule of another module. `parser` makes the rule --reveal=NAME:ARGUMENT from ARGUMENT."""
    EXTERNAL[name] = parser


def parse(spec: str, confidence: str | None = None, default_confidence: str = "largest") -> Rule:
    """The rule NAME:ARGUMENT, for example "static:1"; with NAME alone, its default argument.

    Its confidence is `confidence`; if that is None, the one that the rule was made for, else
    `default_confidence`. ValueError if the rule does not exist or its argument is out of range.
    """
    name, _, argument = spec.partition(":")
    if name in EXTERNAL:
        return EXTERNAL[name](os.path.expanduser(argument))  # it may be a folder
    if name not in RULES:
        known = ", ".join(f"{other}:{RULES[other].default}" for other in RULES)
        raise ValueError(f"there is no reveal rule {name!r}: use one of {known}")
    rule_type = RULES[name]
    try:
        value = rule_type.kind(argument or rule_type.default)
    except ValueError:
        expected = "an integer" if rule_type.kind is int else "a number"
        raise ValueError(f"--reveal={spec}: expected {expected}, got {argument!r} "
                         f"(e.g. --reveal={name}:{rule_type.default})") from None
    least = rule_type.least
    most = rule_type.most
    if not least <= value <= most:
        if most == 1:
            allowed = f"from {least} to {most}"
        else:
            allowed = f"of at most {most}" if value > most else f"of at least {least}"
        raise ValueError(f"--reveal={spec}: {name}:{rule_type.argument} takes a number {allowed}")
    confidence = confidence or rule_type.confidence or default_confidence
    return Rule(name, value, CONFIDENCE[confidence])


def parse_saved(config: dict, file: str | os.PathLike, confidence: str | None = None,
                default_confidence: str = "largest") -> Rule:
    """The rule in `config`, the content of a checkpoint's config.json; the other arguments are as in `parse`.

    ValueError that names `file` if the rule does not exist or its argument is out of range.
    """
    spec = config.get("reveal", "static:1")
    try:
        return parse(spec, confidence, default_confidence)
    except ValueError as error:
        reason = str(error).removeprefix(f"--reveal={spec}: ")
        raise ValueError(f"reveal in {file}: {reason}") from None
