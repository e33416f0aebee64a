"""Seconds and peak memory of a function, a plain AR loop, and seconds per token of generators in turns."""
import gc
import time
from collections.abc import Callable

import torch

from model.gpt import Cache
from report import generate


def seconds_of(function: Callable) -> float:
    """Wall-clock seconds of one call, including the work that it leaves to a GPU."""
    wait_for_gpu()
    began = time.perf_counter()
    function()
    wait_for_gpu()
    return time.perf_counter() - began


def wait_for_gpu() -> None:
    """Returns when a GPU, if this process uses one, has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def allocated(device: torch.device) -> int:
    """Bytes of all tensors on a GPU; 0 on a CPU, where torch does not count them."""
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def gpu_peak(function: Callable, device: torch.device, before: int) -> int | None:
    """Bytes: the largest sum of all tensors on a GPU during a call, less `before`.

    None on a CPU, where nothing is called.
    """
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


@torch.inference_mode()
def greedy_ar(net, prompt: torch.Tensor, length: int) -> torch.Tensor:
    """(B, P + length): greedy AR text after prompt (B, P), by a loop that does nothing else.

    It is faster than our sampler with blocks of 1, and so the fairer thing to compare with.
    """
    B, P = prompt.shape
    T = P + length
    caches = [Cache(T) for _ in net.h]
    tokens = torch.cat([prompt, prompt.new_zeros(B, length)], 1)
    position = torch.arange(T, device=prompt.device)
    row = torch.arange(B, device=prompt.device)
    begin = 0
    for end in range(P, T):
        new = position[begin:end]                                # the positions of this forward pass
        mask = (position[:end] <= new[:, None])[None, None]
        read = row * len(new) + len(new) - 1
        slots = caches[0].flat_index(new.expand(B, -1))
        logits = net(tokens[:, begin:end], mask, new, read, caches, slots)
        tokens[:, end] = logits.argmax(-1)
        begin = end
    return tokens


def seconds_per_token(generators: dict[str, generate.TextGenerator], teacher, held: list, eot: int, seed: int,
                      turns: int, least: int = 1) -> dict[str, list[float]]:
    """Seconds per token by name, one number per turn, of texts that continue the `held` stories one at a
    time.

    "ar" is the teacher's greedy text by the plain loop. Nothing else may run meanwhile.
    """
    length = teacher.config.context

    def by_generator(generator):
        texts, seconds = generate.generate_texts(generator, held, eot, length, seed, batch=1,
                                                 min_prompt=least)
        return seconds / sum(int(text.response_mask.sum()) for text, _ in texts)

    def by_ar_loop():
        new_tokens = length - 7 - least
        seconds = 0.0
        for k, story in enumerate(held):
            prompt = story[None, :least + k % 8]
            seconds += seconds_of(lambda prompt=prompt: greedy_ar(teacher, prompt, new_tokens))
        return seconds / (len(held) * new_tokens)

    torch.set_num_threads(1)
    seconds = {name: [] for name in ("ar", *generators)}
    for _ in range(turns):
        seconds["ar"].append(by_ar_loop())
        for name, generator in generators.items():
            seconds[name].append(by_generator(generator))
    return seconds
