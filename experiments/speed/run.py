"""How fast the sampler is: under the paper's layout, beside AR with its cache, on the same networks, in
turns.

    python -m experiments.speed.run             one thread, twenty minutes on a machine that does nothing else
    python -m experiments.speed.run --quick     one small network, two turns

Greedy, 272 or fewer tokens after a prompt of 16, no end-of-text. The networks are random, with enlarged
weights, so that confidences spread as a trained network's do; a threshold is set to reveal two tokens per
step. Samplers of other projects ran on the same networks, through an adapter, when results/cpu_peers.json was
made, which has their commits and the method. Writes experiments/speed/results/cpu.json and .png.
"""
import statistics
import sys
from dataclasses import dataclass
from functools import partial

import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig
from experiments.common.results import load_results, results_path, run_info, save_results
from experiments.common.timing import greedy_ar, seconds_of
from experiments.speed.tables import plot, table
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from training import cli

PROMPT = 16         # tokens
NO_EOT = -1         # an id that no network generates
SIZES = {           # networks, and the factor that enlarges their weights
    "small, 4 x 128": (GPTConfig(256, 288, 4, 4, 128), 6.0),
    "wide, 6 x 384": (GPTConfig(2048, 288, 6, 6, 384), 4.0),
}
TINY = {"tiny": (GPTConfig(64, 64, 1, 2, 32), 6.0)}


@dataclass
class Options:
    repeats: int = 5  # turns that are timed
    quick: bool = False  # a small network, two turns: does it run at all?


@torch.no_grad()
def random_network(config: GPTConfig, gain: float) -> GPT:
    """GPT-2's initial weights, enlarged: otherwise all tokens are about equally likely."""
    generator = torch.Generator().manual_seed(1234)
    net = GPT(config).init_weights(generator)
    for p in net.parameters():
        if p.dim() == 2:
            p.mul_(gain)
    net.wpe.weight.normal_(0, 0.04 * gain, generator=generator)
    net.ln_f.weight.mul_(3.0)
    net.mask_vector.normal_(0, 0.02 * gain, generator=generator)
    return net.requires_grad_(False)


def response_length(net) -> int:
    """Tokens to generate: a whole number of blocks of 16."""
    return (net.config.context - PROMPT) // 16 * 16


def generate(net, layout: Layout, prompt: torch.Tensor, rule: str) -> opdlm.Rollout:
    """Greedy text by our sampler."""
    length = response_length(net)
    u = torch.full((len(prompt), PROMPT + length, 1), 0.5)       # greedy text does not depend on it
    greedy = SamplingConfig(temperature=0)
    return opdlm.rollout(Denoiser(net, layout), prompt, length, reveal.parse(rule), u, NO_EOT, greedy)


def two_token_threshold(net, layout: Layout, prompt: torch.Tensor) -> float:
    """The threshold that reveals two tokens per forward pass, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        text = generate(net, layout, prompt, f"threshold:{middle}")
        if text.response_mask.sum() > 2 * text.forwards.sum():
            low = middle
        else:
            high = middle
    return round(low, 4)


def measure(name: str, config: GPTConfig, gain: float, options: Options) -> list[dict]:
    """Of a network: tokens per second by batch, block size and rule, turn by turn, and relative to AR."""
    net = random_network(config, gain)
    prompts = torch.randint(config.vocab, (32, PROMPT), generator=torch.Generator().manual_seed(5))
    rows = []
    for batch in (1, 4) if options.quick else (1, 32):
        for block in (4, 16):
            layout = Layout(block, block, 0)
            prompt = prompts[:batch]
            threshold = two_token_threshold(net, layout, prompts[:1])
            rules = list(dict.fromkeys(["static:1", f"static:{block // 4}", f"threshold:{threshold}"]))
            calls = {rule: partial(generate, net, layout, prompt, rule) for rule in rules}
            calls["AR"] = partial(greedy_ar, net, prompt, response_length(net))
            first = {rule: call() for rule, call in calls.items()}
            turns = []
            for _ in range(options.repeats):
                turns.append({rule: seconds_of(call) for rule, call in calls.items()})
            for rule in rules:
                tokens = int(first[rule].response_mask.sum())
                row = {
                    "net": name, "batch": batch, "block": block, "rule": rule, "tokens": tokens // batch,
                    "forwards": int(first[rule].forwards.max()),
                    "tok_s": [tokens / turn[rule] for turn in turns],
                    "over_ar": [turn["AR"] / turn[rule] for turn in turns],
                }
                rows.append(row)
                print(
                    f"{name}, batch {batch}, block {block}, {rule}: {statistics.median(row['tok_s']):.0f} "
                    f"tokens/s, {statistics.median(row['over_ar']):.2f} of AR's",
                    flush=True,
                )
    return rows


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options.repeats = 2
    torch.set_num_threads(1)
    results = run_info("speed", options) | {"rows": []}
    for name, (config, gain) in (TINY if options.quick else SIZES).items():
        results["rows"] += measure(name, config, gain, options)
    save_results("speed", "cpu", results, plot, options.quick)
    peers = results_path("speed", "cpu_peers")
    print(table(results, load_results(peers)["rows"] if peers.exists() else []))


if __name__ == "__main__":
    sys.exit(cli.run(main))
