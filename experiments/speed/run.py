"""How fast the sampler is: ours under the paper's layout, and AR with its cache, on the same networks, in turns.

    python -m experiments.speed.run             one thread, twenty minutes on a machine that does nothing else
    python -m experiments.speed.run --quick     one small network, two turns

Greedy, 256 tokens behind a prompt of 16, no end-of-text. The networks are random, and loud, so that confidences spread
as a trained one's do; a threshold is set to reveal two tokens a step. Peers' samplers ran on the same networks, through
an adapter, when their figures were taken: peers.json beside the results has these, with commits and method. Leaves
experiments/speed/results.json and curves.png.
"""
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig
from experiments.common.results import finish
from experiments.speed.tables import draw, peers, table
from model.gpt import GPT, Cache, GPTConfig
from model.masks import Layout
from report import metrics
from training import cli

PROMPT, NEVER = 16, -1              # tokens; an id that nobody can emit
SIZES = {"small, 4 x 128": (GPTConfig(256, 288, 4, 4, 128), 6.0),
         "wide, 6 x 384": (GPTConfig(2048, 288, 6, 6, 384), 4.0)}
TINY = {"tiny": (GPTConfig(64, 64, 1, 2, 32), 6.0)}


@dataclass
class Options:
    repeats: int = 5  # turns that are timed
    quick: bool = False  # a small network, two turns: does it run?


@torch.no_grad()
def network(config: GPTConfig, gain: float) -> GPT:
    """GPT-2's first weights, made louder: else every token is as likely as the next."""
    source = torch.Generator().manual_seed(1234)
    net = GPT(config).init_weights(source)
    for p in net.parameters():
        if p.dim() == 2:
            p.mul_(gain)
    net.wpe.weight.normal_(0, 0.04 * gain, generator=source)
    net.ln_f.weight.mul_(3.0)
    net.mask_vector.normal_(0, 0.02 * gain, generator=source)
    return net.requires_grad_(False)


def room(net) -> int:
    """Tokens to write: a whole number of blocks of 16."""
    return (net.config.context - PROMPT) // 16 * 16


def write(net, layout: Layout, prompt: torch.Tensor, spec: str) -> opdlm.Rollout:
    """Ours."""
    length = room(net)
    u = torch.full((len(prompt), PROMPT + length, 1), 0.5)                              # greedy: it doesn't matter
    return opdlm.rollout(Denoiser(net, layout), prompt, length, reveal.parse(spec), u, NEVER, SamplingConfig(temperature=0))


@torch.inference_mode()
def ar(net, prompt: torch.Tensor, length: int) -> torch.Tensor:
    """(B, P + length): AR text as a loop that does nothing else, which is faster than our sampler with blocks of 1."""
    (B, P), T = prompt.shape, prompt.size(1) + length
    caches, tokens = [Cache(T) for _ in net.h], torch.cat([prompt, prompt.new_zeros(B, length)], 1)
    place, row, begin = torch.arange(T), torch.arange(B), 0
    for end in range(P, T):
        at = place[begin:end]
        mask = (place[:end] <= at[:, None])[None, None]
        read, slots = row * len(at) + len(at) - 1, caches[0].flat_index(at.expand(B, -1))
        logits = net(tokens[:, begin:end], mask, at, read, caches, slots)
        tokens[:, end], begin = logits.argmax(-1), end
    return tokens


def level(net, layout: Layout, prompt: torch.Tensor) -> float:
    """The threshold at which two tokens a step are revealed, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        text = write(net, layout, prompt, f"threshold:{middle}")
        low, high = (middle, high) if text.response_mask.sum() > 2 * text.forwards.sum() else (low, middle)
    return round(low, 4)


def timed(piece: Callable) -> float:
    """Seconds."""
    begun = time.perf_counter()
    piece()
    return time.perf_counter() - begun


def cells(name: str, config: GPTConfig, gain: float, options: Options) -> list[dict]:
    """Of a network: tokens a second of every block, batch and rule, turn by turn, AR's beside them."""
    net, made = network(config, gain), []
    prompts = torch.randint(config.vocab, (32, PROMPT), generator=torch.Generator().manual_seed(5))
    for batch in (1, 4) if options.quick else (1, 32):
        for block in (4, 16):
            layout, prompt = Layout(block, block, 0), prompts[:batch]
            specs = dict.fromkeys(["static:1", f"static:{block // 4}", f"threshold:{level(net, layout, prompts[:1])}"])
            calls = {spec: partial(write, net, layout, prompt, spec) for spec in specs}
            calls["AR"] = partial(ar, net, prompt, room(net))
            first = {what: call() for what, call in calls.items()}
            turns = [{what: timed(call) for what, call in calls.items()} for _ in range(options.repeats)]
            for what in specs:
                tokens = int(first[what].response_mask.sum())
                made.append({"net": name, "batch": batch, "block": block, "rule": what, "tokens": tokens // batch,
                             "forwards": int(first[what].forwards.max()), "tok_s": [tokens / t[what] for t in turns],
                             "over_ar": [t["AR"] / t[what] for t in turns]})
                print(f"{name}, batch {batch}, block {block}, {what}: {statistics.median(made[-1]['tok_s']):.0f} "
                      f"tokens/s, {statistics.median(made[-1]['over_ar']):.2f} of AR's", flush=True)
    return made


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options.repeats = 2
    torch.set_num_threads(1)
    results = {"command": "python -m experiments.speed.run", **metrics.facts(torch.device("cpu")), "rows": []}
    for name, (config, gain) in (TINY if options.quick else SIZES).items():
        results["rows"] += cells(name, config, gain, options)
    finish("speed", results, draw, options.quick)
    print(table(results, peers()))


if __name__ == "__main__":
    sys.exit(cli.run(main))
