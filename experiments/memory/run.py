"""What the head and the KL cost a training step, in memory and time: plain, in chunks, and with the bucket.

    python -m experiments.memory.run                GPT-2 (124M parameters, 50,257 tokens), one row of 1,024 tokens, CPU

Memory is the largest running sum of what torch's CPU allocator gave and took back within one `train_step`, gradients
included, beyond what stood before it (parameters and the optimizer's state): exact, and the same in every run. Of it,
head and KL added what it is more than in a step without them, whose loss is a plain sum of the hidden states. The table
has its gradient in that step too: it is a parameter's, and there however a loss is computed. Seconds are of steps that
take turns, so that what else the machine does falls on all alike; ratios are taken within a turn.

Leaves experiments/memory/results.json and curves.png.
"""
import copy
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import opdlm
from experiments.common.results import finish
from model.gpt import GPT, GPTConfig, checkpointed
from model.masks import Layout
from report import metrics
from training import chunked_kl as loss
from training import chunked_kl as targets
from training import cli

KINDS = ("plain", "full", "topk:64")
SMALL = GPTConfig(vocab=4000, context=128, layers=2, heads=2, width=64)
PROMPT, MB = 16, 1e6


@dataclass
class Options:
    repeats: int = 3  # turns that are timed
    quick: bool = False  # a network of two small layers, two turns: does it run?


def recipe_of(kind: str, eot: int) -> opdlm.Recipe:
    """Our layout on a given text, with random states; `kind` is --kl, or none: without head and KL."""
    made = opdlm.Recipe(opdlm.data_text, opdlm.random_mask, opdlm.teacher_probs, opdlm.mean_of_masked,
                        Layout.of(4, "ar", "causal"), eot, batch=1)
    if kind != "none":
        return replace(made, **loss.chunked_kl(kind, "teacher"))
    return replace(made, target=read_only, head=lambda *parts: parts,
                   divergence=lambda target, parts: parts[0].sum(-1) + (0 * parts[1]).sum())


@torch.no_grad()
def read_only(teacher, tokens, rows, at):
    """The teacher reads the text, and nobody asks what it thinks of it."""
    teacher(tokens, read=rows * tokens.size(1) + at - 1, head=lambda *parts: parts)
    return targets.one_hot_target(teacher, tokens, rows, at)


def steps_of(config: GPTConfig) -> dict[tuple[str, bool], Callable]:
    """One training step of each kind, without and with checkpointing, on the same text; they give their records."""
    teacher, student = (GPT(config).init_weights(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    T, eot = config.context, config.vocab - 1
    row = torch.randint(0, eot, (1, T), generator=torch.Generator().manual_seed(2))
    text = opdlm.data_text(None, None, row, PROMPT, T - PROMPT, None, recipe_of("none", eot))
    u, made = opdlm.uniforms(0, opdlm.STATE, range(1), (T, 2)), {}
    for kept in (False, True):
        net = checkpointed(copy.deepcopy(student).init_mask(), kept)
        optimizer = torch.optim.AdamW(net.parameters(), 0.0)        # all steps begin with the same weights
        for kind in ("none", *KINDS):
            parts = net, teacher.requires_grad_(False), text, PROMPT, u, recipe_of(kind, eot), optimizer
            made[kind, kept] = lambda parts=parts: (opdlm.train_step(*parts), parts[-1].zero_grad())[0]
    return made


def peak(step: Callable) -> int:
    """Bytes: the most that stood at a time within `step`, beyond what stood before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    with tempfile.TemporaryDirectory() as folder:
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    stood = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        stood += event["args"]["Bytes"]
        most = max(most, stood)
    return most


def timed(step: Callable) -> float:
    """Seconds."""
    begun = time.perf_counter()
    step()
    return time.perf_counter() - begun


def measured(config: GPTConfig, repeats: int) -> list[dict]:
    """A row for each kind of step; the first of each comes before the clock, and makes the optimizer's state."""
    steps = steps_of(config)
    rows = {key: {"kl": key[0], "checkpointing": key[1], "record": step(), "peak": peak(step), "seconds": []}
            for key, step in steps.items()}
    for turn in range(repeats):
        for key, step in steps.items():
            rows[key]["seconds"].append(timed(step))
        print(f"turn {turn + 1} of {repeats}", flush=True)
    return list(rows.values())


def table(results: dict) -> str:
    """Markdown: memory in MB, and time over the plain step's, the median of the turns (smallest to largest)."""
    rows = {(row["kl"], row["checkpointing"]): row for row in results["rows"]}
    lines = ["| `--kl` | `--checkpointing` | peak, MB | of it head and KL, MB | plain's / this | time / plain's |",
             "|---|---|---|---|---|---|"]
    for (kind, kept), row in rows.items():
        added, plain = (rows[k, kept]["peak"] - rows["none", kept]["peak"] for k in (kind, "plain"))
        ratios = [a / b for a, b in zip(row["seconds"], rows["plain", False]["seconds"])]
        times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        less = f"{added / MB:.0f} | {plain / added:.1f}" if kind != "none" else "0 | -"
        lines.append(f"| {kind} | {'yes' if kept else 'no'} | {row['peak'] / MB:.0f} | {less} | {times} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """The peaks."""
    axes, rows = figure.subplots(), results["rows"][::-1]
    axes.barh([f"{row['kl']}{', checkpointing' * row['checkpointing']}" for row in rows],
              [row["peak"] / MB for row in rows])
    axes.set_xlabel("most memory of a step beyond parameters and optimizer, MB (none: without head and KL)")


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    config, repeats = (SMALL, 2) if options.quick else (GPTConfig(), options.repeats)
    here = metrics.facts(torch.device("cpu"))
    results = {"command": "python -m experiments.memory.run", **here, "config": asdict(config),
               "chunk": targets.CHUNK, "table_gradient": 4 * config.vocab * config.width}
    results["rows"] = measured(config, repeats)
    finish("memory", results, draw, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
