"""What the output head and the KL cost a training step, in memory and time: plain, in chunks, and with top-k
targets.

    python -m experiments.memory.run                GPT-2 (124M parameters), one row of 1,024 tokens, CPU
    python -m experiments.memory.run --quick        does it run at all? a minute

Memory is the largest running sum of what torch's CPU allocator gave and took back within one `train_step`,
gradients included, beyond what was allocated before it (parameters and the optimizer's state). It is exact,
and the same in every run. What head and KL add is the difference to a step without them, whose loss is a
plain sum of the hidden states. In that step the embedding table has its gradient too: it exists however a
loss is computed. The steps take turns, so that other load on the machine falls on all alike; ratios of times
are taken within a turn.

Writes experiments/memory/results/cpu.json and .png.
"""
import copy
import gc
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import opdlm
from experiments.common.results import run_info, save_results
from experiments.common.timing import seconds_of
from experiments.memory.tables import plot, table
from model.gpt import GPT, GPTConfig, checkpointed
from model.masks import Layout
from training import chunked_kl, cli

KINDS = ("none", "plain", "full", "topk:64")        # of --kl; none: without head and KL
SMALL = GPTConfig(vocab=4000, context=128, layers=2, heads=2, width=64)
PROMPT = 16         # tokens


@dataclass
class Options:
    repeats: int = 3  # turns that are timed
    quick: bool = False  # a network of two small layers, two turns: does it run at all?


def recipe_of(kind: str, eot: int) -> opdlm.Recipe:
    """Our layout on a given text with random states; `kind` is one of KINDS."""
    layout = Layout.of(4, "ar", "causal")
    recipe = opdlm.Recipe(
        opdlm.data_text, opdlm.random_mask, opdlm.teacher_probs, opdlm.mean_of_masked, layout, eot, batch=1
    )
    if kind != "none":
        return replace(recipe, **chunked_kl.chunked_kl(kind, "teacher"))

    def hidden_sum(target, parts):
        hidden, weights = parts[0], parts[1]
        return hidden.sum(-1) + (0 * weights).sum()     # gives the table its gradient, of zeros
    return replace(recipe, target=read_without_head, head=lambda *parts: parts, divergence=hidden_sum)


@torch.no_grad()
def read_without_head(teacher, tokens, rows, position):
    """The teacher's forward pass without its output head; the target is the text itself."""
    read = rows * tokens.size(1) + position - 1
    teacher(tokens, read=read, head=lambda *parts: parts)
    return chunked_kl.one_hot_target(teacher, tokens, rows, position)


def steps_of(config: GPTConfig) -> dict[tuple[str, bool], Callable]:
    """One training step per kind, without and with checkpointing, on one text. Returns its record."""
    teacher = GPT(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    student = GPT(config).init_weights(torch.Generator().manual_seed(1))
    T = config.context
    eot = config.vocab - 1
    tokens = torch.randint(0, eot, (1, T), generator=torch.Generator().manual_seed(2))
    text = opdlm.data_text(None, None, tokens, PROMPT, T - PROMPT, None, recipe_of("none", eot))
    u = opdlm.uniforms(0, opdlm.STATE, range(1), (T, 2))
    steps = {}
    for checkpointing in (False, True):
        net = checkpointed(copy.deepcopy(student).init_mask(), checkpointing)
        optimizer = torch.optim.AdamW(net.parameters(), 0.0)        # all steps begin with the same weights
        for kind in KINDS:
            arguments = net, teacher, text, PROMPT, u, recipe_of(kind, eot), optimizer

            def step(arguments=arguments):
                record = opdlm.train_step(*arguments)
                arguments[-1].zero_grad()
                return record
            steps[kind, checkpointing] = step
    return steps


def peak(step: Callable) -> int:
    """Bytes: the largest running sum of allocations during the step."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    events = [event for event in events if event.get("name") == "[memory]"]
    allocated = largest = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        largest = max(largest, allocated)
    return largest


def measure(config: GPTConfig, repeats: int) -> list[dict]:
    """One row per kind of step. Its first call is not timed: it makes the optimizer's state."""
    steps = steps_of(config)
    rows = {}
    for (kind, checkpointing), step in steps.items():
        rows[kind, checkpointing] = {
            "kl": kind, "checkpointing": checkpointing, "record": step(), "peak": peak(step), "seconds": [],
        }
    for turn in range(repeats):
        for key, step in steps.items():
            rows[key]["seconds"].append(seconds_of(step))
        print(f"turn {turn + 1} of {repeats}", flush=True)
    return list(rows.values())


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    config, repeats = (SMALL, 2) if options.quick else (GPTConfig(), options.repeats)
    results = run_info("memory", options)
    results["config"] = asdict(config)
    results["chunk"] = chunked_kl.CHUNK
    results["table_gradient"] = 4 * config.vocab * config.width
    results["rows"] = measure(config, repeats)
    save_results("memory", "cpu", results, plot, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
