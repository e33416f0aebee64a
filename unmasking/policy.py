"""A learned unmasking policy (arXiv 2512.09106): a small network that decides which positions are revealed.

At each denoising step the network gets, for every slot of the current block, the diffusion model's confidence
and whether the slot is still masked, and the share of the block's steps that have passed. It returns the
probability of revealing each slot. `PolicyRule` makes this a reveal rule like those of decoding/reveal.py.
How the network is trained is in unmasking/grpo.py.

Shapes: N states (one text at one denoising step), K slots of a block, C channels, H attention heads,
D channels per head, B rows, S random numbers per slot.
"""
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from decoding import reveal
from decoding.reveal import largest
from model import files
from model.config_check import Expected, check_values
from model.llama import rotate, rotations

WEIGHTS = "policy.safetensors"
MAX_SLOTS = 8192    # slots in one pass of the network; the activations of more do not fit into a CPU's cache


# 1. the network -------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PolicyConfig:
    """Sizes. The paper has width 128, 2 heads and an MLP 4 times as wide: 331,265 parameters."""
    block: int              # slots of the blocks that it is trained on
    width: int = 32
    heads: int = 2
    theta: float = 1e4      # base of the rotary position embedding

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def initial_bias(self) -> float:
        """The output's bias before training: a slot stays masked for `block` steps with probability 0.01."""
        reveal_prob = 1 - 0.01 ** (1 / self.block)
        return math.log(reveal_prob / (1 - reveal_prob))


class Policy(nn.Module):
    """One transformer block with bidirectional attention over the slots.

    Whether a slot is masked, and the time, scale and shift the activations (adaptive layer norm, adaLN).
    """

    def __init__(self, config: PolicyConfig):
        super().__init__()
        self.config = config
        C = config.width
        self.confidence = nn.Linear(1, C)
        self.masked = nn.Embedding(2, C)
        self.time = nn.Sequential(nn.Linear(C, C), nn.SiLU(), nn.Linear(C, C))
        self.modulate = nn.Linear(C, 6 * C)
        self.norm1 = nn.LayerNorm(C)
        self.norm2 = nn.LayerNorm(C)
        self.norm3 = nn.LayerNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.proj = nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 4 * C), nn.GELU(), nn.Linear(4 * C, C))
        self.head = nn.Linear(C, 1)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> "Policy":
        """Random matrices, scaled by their input size; no modulation, and logits near their bias."""
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(0, p.size(1) ** -0.5, generator=generator)
            elif "norm" not in name:
                p.zero_()
        # Without this bias, norm1 would reduce every confidence to its sign.
        self.confidence.bias.normal_(generator=generator)
        self.modulate.weight.zero_()
        self.head.weight.mul_(0.1)
        self.head.bias.fill_(self.config.initial_bias)
        return self

    def forward(self, confidence: Tensor, masked: Tensor, time: Tensor) -> Tensor:
        """(N, K) logits of revealing each slot.

        `confidence` (N, K) is ignored where a slot is not masked; `masked` (N, K) bool; `time` (N,) is the
        share of the block's steps that have passed.
        """
        chunk_size = max(MAX_SLOTS // confidence.size(1), 1)
        inputs = (confidence, masked, time)
        chunks = zip(*(x.split(chunk_size) for x in inputs))
        return torch.cat([self.forward_chunk(*chunk) for chunk in chunks])

    def forward_chunk(self, confidence: Tensor, masked: Tensor, time: Tensor) -> Tensor:
        """The same for so few states that all go through the network at once."""
        N = len(time)
        C = self.config.width
        pair = torch.arange(0, C, 2, device=time.device) / C
        frequency = (1000 * 1e4 ** -pair).to(time)
        angle = time[:, None] * frequency                                   # (N, C / 2)
        sinusoids = torch.cat([angle.cos(), angle.sin()], 1)                # (N, C)

        # The modulation of a masked slot and of one that is not, then for every slot the one that applies.
        condition = self.masked.weight + self.time(sinusoids)[:, None]      # (N, 2, C)
        modulation = self.modulate(F.silu(condition))                       # (N, 2, 6 C)
        row = torch.arange(N, device=time.device)[:, None]
        modulation = modulation[row, masked.long()]                         # (N, K, 6 C)
        scale1, shift1, gate1, scale2, shift2, gate2 = modulation.chunk(6, -1)

        # Log-odds, where 0.98 and 0.99 differ clearly. (The paper's input is the confidence itself.)
        log_odds = torch.where(masked, confidence, 1.0).logit(1e-4) / 2
        x = self.confidence(log_odds[..., None])                            # (N, K, C)
        normed = self.norm1(x) * (1 + scale1) + shift1
        x = x + (1 + gate1) * self.attend(normed)
        normed = self.norm2(x) * (1 + scale2) + shift2
        x = x + (1 + gate2) * self.mlp(normed)
        return self.head(self.norm3(x))[..., 0]                             # (N, K)

    def attend(self, x: Tensor) -> Tensor:
        """(N, K, C): self-attention, every slot to every slot."""
        N, K, C = x.shape
        qkv = self.qkv(x).view(N, K, 3, self.config.heads, -1)
        q, k, v = qkv.unbind(2)                                             # (N, K, H, D) each
        position = torch.arange(K, device=x.device)
        angles = rotations(position, self.config, x.dtype)
        q = rotate(q, angles).transpose(1, 2)                               # (N, H, K, D)
        k = rotate(k, angles).transpose(1, 2)
        v = v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).reshape(N, K, C)
        return self.proj(y)


# 2. the reveal rules --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PolicyRule:
    """A reveal rule (decoding/reveal.py) that samples which slots to reveal, from the policy's probabilities.

    `beta` multiplies the probabilities: larger is faster. `temperature` divides the logits. If no slot is
    sampled, the most probable one is revealed, so that every step makes progress. `explore`, for training,
    switches this off.
    """
    policy: Policy
    beta: float = 1.0
    temperature: float = 1.0
    explore: bool = False
    folder: str = ""        # where the policy was loaded from
    name: str = "policy"
    confidence: Callable = largest

    def __call__(self, confidence: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        """(B, K) bool: the slots to reveal. `numbers` (B, K, S) are uniform; each step uses another one."""
        K = masked.size(1)
        S = numbers.size(2)
        logits = self.policy(confidence, masked, step / K)                  # (B, K)
        reveal_prob = self.beta * torch.sigmoid(logits / self.temperature)
        index = (S - self.rolls + step).clamp(max=S - 1)                    # (B,)
        index = index.view(-1, 1, 1).expand(-1, K, 1)
        u = numbers.gather(2, index)[..., 0]                                # (B, K)
        revealed = masked & (u < reveal_prob)
        if self.explore:
            return revealed
        best = logits.masked_fill(~masked, -torch.inf).argmax(1, keepdim=True)
        is_best = torch.zeros_like(masked).scatter(1, best, True)
        none_revealed = ~revealed.any(1, keepdim=True)
        return revealed | (masked & none_revealed & is_best)

    def __str__(self) -> str:
        return f"{self.name}:{self.folder},{self.beta:g},{self.temperature:g}"

    def steps(self, block: int) -> int:
        """The largest number of steps for a block; the last one reveals all that is still masked."""
        return block

    @property
    def rolls(self) -> int:
        """Random numbers per slot that the rule itself uses: one per step."""
        return self.policy.config.block

    def numbers(self, block: int) -> int:
        """S, all random numbers per slot: one samples its token, the others are the rule's."""
        return 1 + self.rolls


@dataclass(frozen=True)
class WindowRule:
    """Another rule, restricted to a window of `size` slots of the block.

    By default the block is split into windows of this size, which are finished from left to right: the
    semi-autoregressive sampling of full-sequence models and of the paper's experts. With `slides`, the window
    begins at the first mask instead. A policy can imitate only this kind: it does not know a slot's index.
    """
    rule: Callable
    size: int
    slides: bool = False

    def __call__(self, confidence: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        slot = torch.arange(masked.size(1), device=masked.device)
        first = masked.long().argmax(1, keepdim=True)                       # (B, 1) the first masked slot
        if self.slides:
            in_window = slot < first + self.size                            # (B, K)
        else:
            in_window = slot // self.size == first // self.size
        return self.rule(confidence, masked & in_window, step, numbers)

    def __getattr__(self, name: str):
        return getattr(self.rule, name)


# 3. files -------------------------------------------------------------------------------------------------

def parse_rule(argument: str) -> PolicyRule:
    """The rule of --reveal=policy:FOLDER, policy:FOLDER,BETA or policy:FOLDER,BETA,TEMPERATURE."""
    folder, *numbers = argument.split(",")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = [math.nan]
    if len(values) > 2 or not all(0 < value < math.inf for value in values):
        raise ValueError(f"--reveal=policy:{argument}: expected at most two numbers above 0 after the "
                         f"folder, BETA and TEMPERATURE (e.g. --reveal=policy:{folder},1,0.5)")
    beta, temperature = values + [1.0] * (2 - len(values))
    try:
        policy = load_policy(folder)
    except ValueError as error:
        raise ValueError(f"--reveal=policy:{argument}: {error}") from None
    return PolicyRule(policy, beta, temperature, folder=folder)


def save_policy(folder: str | Path, policy: Policy) -> None:
    """Write config.json and the weights to a folder; `load_policy` reads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.replace_file(folder / WEIGHTS) as unfinished:
        files.write_tensors(unfinished, policy.state_dict())
    config = {"model_type": "policy", **asdict(policy.config)}
    with files.replace_file(folder / "config.json") as unfinished:
        unfinished.write_text(json.dumps(config, indent=1))


SIZES = {       # what config.json may say
    "block": Expected(int, 1, 10 ** 4),
    "width": Expected(int, 1, 10 ** 4),
    "heads": Expected(int, 1, 10 ** 4),
    "theta": Expected(float, 1e-3, 1e15),
}
RENAMED = {"sure.weight": "confidence.weight", "sure.bias": "confidence.bias"}  # in files of older policies


def load_policy(folder: str | Path) -> Policy:
    """The policy of a folder, without gradients. ValueError if there is none."""
    try:
        config = files.read_json(Path(folder, "config.json"))
        config.pop("model_type", None)
        config = PolicyConfig(**config)
        check_values(asdict(config), SIZES)
        files.refuse_lfs_pointer(Path(folder, WEIGHTS))
        weights = load_file(Path(folder, WEIGHTS))
        state = {RENAMED.get(name, name): tensor for name, tensor in weights.items()}
        with torch.device("meta"):
            policy = Policy(config)
        check_state(policy, state)
        policy.load_state_dict(state, assign=True)
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError,
            SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is not an unmasking policy ({reason}): train one with "
                         "python -m unmasking.train") from None
    return policy.requires_grad_(False)


def check_state(policy: Policy, state: dict[str, Tensor]) -> None:
    """ValueError for the first tensor that is missing, unexpected, of another shape or not float32."""
    if policy.config.width % (2 * policy.config.heads):
        raise ValueError(f"width={policy.config.width}: must be a multiple of 2 heads={policy.config.heads}")
    expected = policy.state_dict()
    for name in {**expected, **state}:
        if name not in expected or name not in state:
            where = "unexpected" if name in state else "missing"
            raise ValueError(f"the tensor {name} is {where}")
        shape = tuple(expected[name].shape)
        x = state[name]
        if tuple(x.shape) != shape or x.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32 of shape {shape}, got {x.dtype} {tuple(x.shape)}")


reveal.register("policy", parse_rule)
