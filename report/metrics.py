"""The numbers of a run: likelihood, generated text, cost and useful arithmetic, each with its unit.

    val_nats        nats/token of held-out stories; the student reveals each block left to right, one token at a time
    bits_per_byte   the same per byte of text, in bits: comparable across vocabularies
    gen_nats        nats/token of generated text under the frozen AR teacher
    distinct2       share of different pairs among all neighbouring tokens generated
    entropy         nats, of the distribution of single tokens generated
    valid           share of stories that break no law (story world only)
    tok_per_fwd     tokens kept / all forwards of their rows: prefill, denoising and commits
    positions_per_tok, tok_s
"""
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import opdlm
from model.masks import Layout
from training import dist


def held_out(stream: np.ndarray, starts: np.ndarray, count: int, length: int) -> list[Tensor]:
    """The first `count` stories as ids, each from its end-of-text to the next, cut to `length` tokens."""
    ends = [*starts[1:count + 1], len(stream) - 1]
    return [torch.from_numpy(stream[a:min(b + 1, a + length)].astype(np.int64)) for a, b in zip(starts[:count], ends)]


def padded(rows: list[Tensor], fill: int) -> Tensor:
    """(B, T), filled up at the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def whole_blocks(tokens: Tensor, block: int, context: int, fill: int) -> Tensor:
    """(B, T): the last block filled up as far as there is room, or its number of masks would tell how a story ends."""
    T = tokens.size(1)
    return torch.nn.functional.pad(tokens, (0, max(0, min(-(T - 1) % block, context - T))), value=fill)


@torch.no_grad()
def story_nats(net, stories: list[Tensor], layout: Layout, eot: int, batch: int = 32) -> Tensor:
    """(stories,) nats of each story given its first token, by the chain rule from left to right.

    The j-th slot of every block is scored while the slots before it in its block are shown: one pass for each j.
    """
    device, order = net.wte.weight.device, sorted(range(len(stories)), key=lambda i: len(stories[i]))
    nats = torch.zeros(len(stories))
    for i in range(0, len(order), batch):
        part = order[i:i + batch]
        tokens = whole_blocks(padded([stories[k] for k in part], eot), layout.block, net.config.context, eot).to(device)
        length = torch.tensor([len(stories[k]) for k in part], device=device)
        slot = torch.arange(1, tokens.size(1), device=device)                           # (R,) positions of the response
        for j in range(layout.block):
            index = (slot - 1) % layout.block
            noisy = tokens[:, 1:].masked_fill(index >= j, net.mask_id)
            rows, at = ((index == j) & (slot < length[:, None])).nonzero(as_tuple=True)
            if len(rows):
                logits = opdlm.student_logits(net, tokens, noisy, 1, layout, rows, at + 1).float()
                said = logits.log_softmax(-1).gather(1, tokens[rows, at + 1][:, None])[:, 0]
                nats[part] -= torch.zeros(len(part)).index_add(0, rows.cpu(), said.cpu())
    return nats


def likelihood(net, stories: list[Tensor], layout: Layout, tokenizer) -> dict:
    """val_nats and bits_per_byte. The bytes are those of the tokens scored; ending a story is a token, not a byte."""
    nats = story_nats(net, stories, layout, tokenizer.eot).sum().item()
    size = sum(len(tokenizer.decode(s.tolist()).encode()) for s in stories)
    return {"val_nats": nats / sum(len(s) - 1 for s in stories), "bits_per_byte": nats / math.log(2) / size}


def text_metrics(teacher, texts: list, seconds: float, tokenizer, check: Callable | None) -> dict:
    """Everything that is said of generated texts."""
    tokens = [row[keep].tolist() for text, _ in texts for row, keep in zip(text.tokens.cpu(), text.response_mask.cpu())]
    count, forwards = sum(map(len, tokens)), sum(text.forwards.sum().item() for text, _ in texts)
    pairs = [pair for row in tokens for pair in zip(row, row[1:])]
    share = np.unique([t for row in tokens for t in row], return_counts=True)[1] / count
    numbers = {
        "gen_nats": sum(nats_of(teacher, text).sum().item() for text, _ in texts) / count,
        "distinct2": len(set(pairs)) / max(len(pairs), 1), "entropy": float(-(share * np.log(share)).sum()),
        "tok_per_fwd": count / forwards, "tok_s": count / seconds,
        "positions_per_tok": sum(text.positions.sum().item() for text, _ in texts) / count}
    if check:
        stories = [tokenizer.decode(ids) for ids in finished(texts, tokenizer.eot)]
        numbers["valid"] = sum(check(story) is None for story in stories) / len(tokens)
    return numbers


def finished(texts: list, eot: int) -> list[list[int]]:
    """The ids, prompt included, of the texts that reached an end-of-text."""
    rows = [(row[:n], row[keep]) for text, lens in texts
            for row, keep, n in zip(text.tokens.cpu(), text.response_mask.cpu(), lens)]
    return [torch.cat(row).tolist() for row in rows if row[1][-1] == eot]


@torch.no_grad()
def nats_of(teacher, text: opdlm.Rollout) -> Tensor:
    """(B,) nats of what is kept of each text under the AR teacher, float64."""
    rows, at = text.response_mask.nonzero(as_tuple=True)
    logits = teacher(text.tokens, read=rows * text.tokens.size(1) + at - 1).float()
    each = -logits.log_softmax(-1).gather(1, text.tokens[rows, at][:, None])[:, 0]
    return torch.zeros(len(text.tokens), dtype=torch.float64, device=rows.device).index_add(0, rows, each.double())


# Useful arithmetic ---------------------------------------------------------------------------------------------------

def body_flops(config, keys: float) -> float:
    """FLOPs of one position forward through the blocks, attending to `keys` positions; a multiply-add is 2."""
    return config.layers * (2 * config.matrices + 4 * keys * config.heads * config.head_size)


def head_flops(config) -> float:
    """FLOPs of one position's logits."""
    return 2 * config.width * config.vocab


def distill_flops(config, record: dict) -> float:
    """What a distillation step must compute at least: for each kept token one position of rollout and of teacher, and
    the two streams of the student, forward and backward (3 forwards); the head once a token that was written, and at
    each loss. Where nobody wrote a text, nothing is counted for it."""
    body, written = body_flops(config, record["len"] / 2), record["tokens"] * (record["positions"] > 0)
    head = head_flops(config) * (written + (1 + 3) * record["loss_positions"])
    return body * (written + (1 + 2 * 3) * record["tokens"]) + head


def facts(device: torch.device) -> dict:
    """What a number depends on besides the settings: commit, versions, device, threads, processes."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent) if shutil.which("git") else None
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"commit": (git and git.stdout.strip()) or "unknown", "torch": torch.__version__,
            "python": platform.python_version(), "device": f"{device} ({name})", "threads": torch.get_num_threads(),
            "processes": dist.count()}


def matmul_rate(device, size: int = 1024) -> float:
    """FLOP/s of a float32 square matrix product here and now: the median of five."""
    a = torch.randn(size, size, device=device)
    def seconds():
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        return time.perf_counter() - begun
    seconds()
    return 2 * size ** 3 / sorted(seconds() for _ in range(5))[2]


