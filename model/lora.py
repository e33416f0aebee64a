"""A student as a small adapter (LoRA, arXiv 2106.09685) on the frozen AR model, which stays whole.

Beside every matrix W of the blocks stand two small ones, A and B:

    y = W x                     where the input is text: this is the AR model, to the last bit
    y = W x + B A x             where the input is [MASK]

One copy of the weights is the teacher, the AR model that verifies drafts, and the student. Text is read as
the AR model reads it, so keys and values in the cache are the AR model's. The adapter is on at [MASK] alone,
as in "Your LLM knows the future" (arXiv 2507.11851); so it cannot be merged into W.

Trained are A, B and the [MASK] vector. The files are those of the library `peft` (model/checkpoint.py).

Shapes: B rows, T positions, N positions read, C channels in, D channels out, R rank.
"""
import copy
import math
from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import masks
from model.gpt import Cache, without_output_layer
from model.masks import Layout


class Gate:
    """Which positions of a forward pass are [MASK]. All adapted matrices of a network share one gate."""

    def __init__(self, mask_id: int):
        self.mask_id = mask_id
        self.is_on = True       # False: no adapter is needed in this pass
        self.is_everywhere = False      # True: every position of this pass is [MASK]
        self.all = None         # (B, T, 1) bool
        self.read = None        # the same of the positions that are read, (N, 1); of all, without `read`

    def prepare(self, net, args: tuple, kwargs: dict) -> None:
        """Called before each forward pass of the network, with its arguments."""
        tokens = args[0]                                         # (B, T)
        read = args[3] if len(args) > 3 else kwargs.get("read")
        self.all = (tokens == self.mask_id)[..., None]
        self.read = self.all.flatten(0, 1)
        if read is not None:
            self.read = self.read[read]
        self.is_on = torch.is_grad_enabled() or bool(self.all.any())
        self.is_everywhere = bool(self.all.all())

    def of(self, x: Tensor) -> Tensor:
        """The gate of activations (B, T, C), or (N, C) after the last block's attention."""
        return self.all if x.dim() == 3 else self.read


class AdaptedLinear(nn.Module):
    """A linear layer that is frozen, and the adapter beside it. Names are the layer's own."""

    def __init__(self, linear: nn.Linear, rank: int, gate: Gate, generator: torch.Generator):
        super().__init__()
        self.weight = linear.weight                              # (D, C)
        self.bias = linear.bias                                  # (D,) or None
        self.gate = gate
        size, width = linear.weight.shape
        bound = 1 / math.sqrt(width)
        random = torch.rand(rank, width, generator=generator)    # on the CPU: the same on every device
        at = {"device": linear.weight.device, "dtype": precise(linear.weight)}
        self.lora_A = nn.Parameter(((2 * random - 1) * bound).to(**at))      # (R, C)
        self.lora_B = nn.Parameter(torch.zeros(size, rank, **at))            # (D, R)

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if not self.gate.is_on:
            return y
        low = F.linear(x, self.lora_A.to(x.dtype))               # (..., R)
        change = F.linear(low, self.lora_B.to(x.dtype))          # (..., D)
        if self.gate.is_everywhere:
            return y + change
        return torch.where(self.gate.of(x), y + change, y)


def precise(x: Tensor) -> torch.dtype:
    """The dtype of what is trained: small steps would be lost in bf16."""
    return torch.promote_types(x.dtype, torch.float32)


def adapt(net, rank: int, seed: int = 0):
    """A network with the weights of `net`, not copies of them, and with an adapter of this rank.

    It has a [MASK] vector of its own. The weights of `net` are frozen. At first the adapter changes nothing.
    """
    net.requires_grad_(False)
    shared = {id(p): p for p in net.parameters()}                # deepcopy takes these as they are
    student = copy.deepcopy(net, shared)
    gate = Gate(student.mask_id)
    generator = torch.Generator().manual_seed(seed)
    for module in list(student.h.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, AdaptedLinear(child, rank, gate, generator))
    if student.mask_vector is not None:
        vector = student.mask_vector.detach()
        student.mask_vector = nn.Parameter(vector.to(precise(vector), copy=True))
    student.register_forward_pre_hook(gate.prepare, with_kwargs=True)
    return student


def is_adapted(net) -> bool:
    """Whether the network has an adapter."""
    return any(isinstance(module, AdaptedLinear) for module in net.modules())


def adapter_names(net) -> list[str]:
    """The names of what is trained in an adapted network: A and B of each matrix, and the [MASK] vector."""
    names = []
    for name in net.state_dict():
        if name == "mask_vector" or name.endswith((".lora_A", ".lora_B")):
            names.append(name)
    return names


def rank_of(net) -> int:
    """The rank of the adapter."""
    return next(module.lora_A.size(0) for module in net.modules() if isinstance(module, AdaptedLinear))


# Training ------------------------------------------------------------------------------------------------

def student_logits(student, tokens: Tensor, noisy: Tensor, P: int, layout: Layout, rows: Tensor,
                   position: Tensor, head: Callable = F.linear) -> Tensor:
    """(N, V) logits of N positions: the twin of `opdlm.student_logits` for an adapted network.

    The clean text has no gradient, since no adapter is on there. So it is read first, without one, and its
    keys and values are kept in a cache for the noisy response. C is its length here.
    """
    T = tokens.size(1)
    B, R = noisy.shape
    device = tokens.device
    last_block = (T - P - 1) % layout.block + 1
    C = T - last_block                                           # no block attends to the last one's text
    mask = masks.training_mask(T, P, layout, device, C)          # (C + R, C + R)
    clean_position = torch.arange(C, device=device)
    noisy_position = torch.arange(P, T, device=device)
    noisy_slot = torch.arange(C, C + R, device=device)           # in the cache, after the clean text

    # Logits are read `logit_shift` before their position: in the noisy response if that is in the same block,
    # else in the clean text.
    source = position - layout.logit_shift                       # (N,)
    in_noisy = masks.block_of(source, P, layout.block) == masks.block_of(position, P, layout.block)
    in_clean = ~in_noisy
    read_clean = rows[in_clean] * C + source[in_clean]
    read_noisy = rows[in_noisy] * R + source[in_noisy] - P

    cache = [Cache(C + R) for _ in student.h]
    with torch.no_grad():
        slots = cache[0].flat_index(clean_position.expand(B, -1))
        clean, _ = student(tokens[:, :C], mask[:C, :C], clean_position, read_clean, cache, slots,
                           head=without_output_layer)
    slots = cache[0].flat_index(noisy_slot.expand(B, -1))
    changed, output_layer = student(noisy, mask[C:], noisy_position, read_noisy, cache, slots,
                                    head=without_output_layer)

    hidden = changed.new_zeros(len(position), changed.size(-1))  # (N, width)
    hidden = hidden.index_put((in_clean,), clean)
    hidden = hidden.index_put((in_noisy,), changed)
    return head(hidden, *output_layer)


# The files of peft --------------------------------------------------------------------------------------

def peft_name(hf_name: str) -> str:
    """The name of a tensor in adapter_model.safetensors, from its name in `transformers`."""
    return f"base_model.model.{hf_name}.weight"


def peft_config(net, base: str) -> dict:
    """adapter_config.json. `base` is the checkpoint that the adapter belongs to."""
    names = [name for name, module in net.h.named_modules() if isinstance(module, AdaptedLinear)]
    rank = rank_of(net)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.removeprefix("hf:"),
        "r": rank,
        "lora_alpha": rank,                                      # peft multiplies B A by lora_alpha / r
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in names}),
        "fan_in_fan_out": net.config.family == "gpt2",           # its matrices are transposed there
        "inference_mode": True,
    }
