"""A learned unmasking policy (arXiv 2512.09106): a small network decides which masks come off.

At each step it sees of every slot of the block how sure the diffusion model is, whether the slot is masked, and how
late it is, and gives the probability that its mask comes off. It is a reveal rule like the others (model/reveal.py).
How it is trained is in model/grpo.py.

Letters: N states, K slots of a block, C width, B rows, S numbers of a slot.
"""
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from decoding import reveal
from decoding.reveal import largest
from model.llama import rotate, rotations

FILE = "policy.safetensors"
SLOTS = 8192        # gone through together: what a CPU's cache can hold the numbers of


# 1. the network -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PolicyConfig:
    """Sizes; the paper's are width 128, 2 heads and 4 times as wide an MLP: 331,265 parameters."""
    block: int              # slots that it was trained to see
    width: int = 32
    heads: int = 2
    theta: float = 1e4      # base of the rotations' wavelengths

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def bias(self) -> float:
        """Of the output at first: a slot that nothing is known of stays masked for a whole block once in a hundred."""
        share = 1 - 0.01 ** (1 / self.block)
        return math.log(share / (1 - share))


class Policy(nn.Module):
    """One transformer block over the slots, both ways. Whether a slot is masked, and when, scales and shifts what goes
    through (adaLN)."""

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config, C = config, config.width
        self.sure, self.masked = nn.Linear(1, C), nn.Embedding(2, C)
        self.time = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Linear(C, C))
        self.modulate = nn.Linear(C, 6 * C)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(C), nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
        self.head = nn.Linear(C, 1)

    def init_weights(self, generator: torch.Generator) -> "Policy":
        """Each matrix by its width; the modulation begins at nothing, the output near its bias."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                if p.dim() == 2:
                    p.normal_(0, p.size(1) ** -0.5, generator=generator)
                elif "norm" not in name:
                    p.zero_()
            self.sure.bias.normal_(generator=generator)         # else norm1 would leave of a confidence its sign alone
            self.modulate.weight.zero_()
            self.head.weight.mul_(0.1)
            self.head.bias.fill_(self.config.bias)
        return self

    def forward(self, sure: Tensor, masked: Tensor, time: Tensor) -> Tensor:
        """(N, K) logits, one a slot, from `sure` (N, K), the confidences, taken for 1 where the slot is not masked;
        `masked` (N, K); `time` (N,), the share of the block's steps that is over."""
        some = max(SLOTS // sure.size(1), 1)
        return torch.cat([self.logits(*x) for x in zip(*(x.split(some) for x in (sure, masked, time)))])

    def logits(self, sure: Tensor, masked: Tensor, time: Tensor) -> Tensor:
        """The same of some of the N."""
        pair = torch.arange(0, self.config.width, 2, device=time.device) / self.config.width
        angle = time[:, None] * (1000 * 1e4 ** -pair).to(time)                          # (N, C / 2)
        told = self.masked.weight + self.time(torch.cat([angle.cos(), angle.sin()], 1))[:, None]    # (N, 2, C)
        told = self.modulate(F.silu(told))[torch.arange(len(time), device=time.device)[:, None], masked.long()]
        scale1, shift1, gate1, scale2, shift2, gate2 = told.chunk(6, -1)                # (N, K, C) each
        odds = torch.where(masked, sure, 1.0).logit(1e-4) / 2           # the paper takes it as it is: 0.98 is 0.99 then
        x = self.sure(odds[..., None])
        x = x + (1 + gate1) * self.attend(self.norm1(x) * (1 + scale1) + shift1)
        x = x + (1 + gate2) * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return self.head(self.norm3(x))[..., 0]

    def attend(self, x: Tensor) -> Tensor:
        """(N, K, C): every slot looks at every slot."""
        N, K, C = x.shape
        q, k, v = self.qkv(x).view(N, K, 3, self.config.heads, -1).unbind(2)            # (N, K, H, D)
        turn = rotations(torch.arange(K, device=x.device), self.config, x.dtype)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (rotate(q, turn), rotate(k, turn), v)))
        return self.proj(y.transpose(1, 2).reshape(N, K, C))


# 2. the reveal rule that it is ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PolicyRule:
    """A reveal rule (model/reveal.py): each mask comes off with the probability that the policy gives it, times `beta`:
    the dial between speed and quality. At least the likeliest one does, unless it explores, as it does in training."""
    policy: Policy
    beta: float = 1.0
    temperature: float = 1.0
    explore: bool = False
    folder: str = ""        # that it came from
    name: str = "policy"
    confidence: Callable = largest

    def __call__(self, sure: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        logits = self.policy(sure, masked, step / masked.size(1))                       # (B, K)
        now = (numbers.size(2) - self.rolls + step).clamp(max=numbers.size(2) - 1)      # (B,) each step has its own
        roll = numbers.gather(2, now.view(-1, 1, 1).expand(-1, masked.size(1), 1))[..., 0]
        show = masked & (roll < self.beta * torch.sigmoid(logits / self.temperature))
        if self.explore:
            return show
        best = logits.masked_fill(~masked, -torch.inf).argmax(1, keepdim=True)
        return show | masked & ~show.any(1, keepdim=True) & torch.zeros_like(masked).scatter(1, best, True)

    def __str__(self) -> str:
        return f"{self.name}:{self.folder},{self.beta:g},{self.temperature:g}"

    def steps(self, block: int) -> int:
        """The most that a block of so many slots takes: what is left then comes off, whatever the policy says."""
        return block

    @property
    def rolls(self) -> int:
        return self.policy.config.block

    def numbers(self, block: int) -> int:
        """All numbers of a slot: one for its token and one for each step."""
        return 1 + self.rolls


@dataclass(frozen=True)
class WindowRule:
    """Any rule, kept to blocks of `size` inside a block, from the left: so models of whole texts are mostly sampled,
    and so are the paper's experts. Or, if it slides, to as many slots from the first mask on: what a policy can learn,
    which sees no numbers of slots."""
    rule: Callable
    size: int
    slides: bool = False

    def __call__(self, sure: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        slot, first = torch.arange(masked.size(1), device=masked.device), masked.long().argmax(1, keepdim=True)
        near = slot < first + self.size if self.slides else slot // self.size == first // self.size     # (B, K)
        return self.rule(sure, masked & near, step, numbers)

    def __getattr__(self, name: str):
        return getattr(self.rule, name)


def parse(argument: str) -> PolicyRule:
    """The rule of --reveal=policy:FOLDER, policy:FOLDER,BETA or policy:FOLDER,BETA,TEMPERATURE."""
    folder, *numbers = argument.split(",")
    try:
        beta, temperature, *more = [*map(float, numbers), *[1.0] * (2 - len(numbers))]
        if more or not 0 < beta < math.inf or not 0 < temperature < math.inf:
            raise ValueError("behind the folder come at most two numbers above 0, beta and temperature")
        return PolicyRule(load(folder), beta, temperature, folder=folder)
    except ValueError as error:
        raise ValueError(f"--reveal=policy:{argument}: {error}") from None


def save(folder: str | Path, policy: Policy) -> None:
    """A folder with config.json and the weights; `load` takes it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(policy.state_dict(), folder / f"{FILE}.new")
    (folder / f"{FILE}.new").replace(folder / FILE)
    (folder / "config.json").write_text(json.dumps({"model_type": "policy", **asdict(policy.config)}, indent=1))


def load(folder: str | Path) -> Policy:
    try:
        said = json.loads(Path(folder, "config.json").read_text())
        policy = Policy(PolicyConfig(**{k: v for k, v in said.items() if k != "model_type"}))
        policy.load_state_dict(load_file(Path(folder, FILE)))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no unmasking policy ({error}): train one with train_tiny.py --stage=policy"
                         ) from None
    return policy.requires_grad_(False)


reveal.register("policy", parse)
