"""What --compile is worth on a CPU: the time of compiled blocks over that of plain ones, in turns within one run.

    python -m experiments.compile.run              one thread, about three minutes, most of it the compiler's
    python -m experiments.compile.run --quick      one small network, two turns

Three pieces of a conversion, which a compiler sees apart: the AR model's pass over a text, the student's update on it,
and a rollout. Leaves experiments/compiled/results.json and curves.png.
"""
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from experiments.common.results import finish
from model import masks
from model.gpt import GPT, GPTConfig
from report import metrics
from training import cli, dist

EOT, PROMPT = 0, 8
SIZES = {"story world, 4 x 128": (GPTConfig(650, 96, 4, 2, 128), 16), "GPT-2's width, 2 x 768": (
    GPTConfig(8192, 128, 2, 12, 768), 2)}                                               # and rows of a batch
SMALL = {"small": (GPTConfig(200, 32, 2, 2, 64), 2)}


@dataclass
class Options:
    repeats: int = 7  # turns that are timed
    quick: bool = False  # a small network, two turns: does it run?


def pieces(config: GPTConfig, rows: int, compiled: bool) -> dict[str, Callable]:
    """What is timed, by name."""
    teacher = GPT(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    student = dist.compile_blocks(copy.deepcopy(teacher).init_mask().requires_grad_(True), compiled)
    teacher, T = dist.compile_blocks(teacher, compiled), config.context
    recipe = opdlm.Recipe(opdlm.data_text, opdlm.prefix_shown, opdlm.teacher_probs, opdlm.first_masked_x8, masks.Layout(4, 1, 1),
                          EOT, batch=rows)
    tokens = torch.randint(1, config.vocab, (rows, T), generator=torch.Generator().manual_seed(1))
    text = opdlm.data_text(None, None, tokens, PROMPT, T - PROMPT, None, recipe)
    u, read = opdlm.uniforms(0, 2, range(rows), (T, 2)), torch.arange(rows * T)
    optimizer = torch.optim.AdamW(student.parameters(), 0.0)
    return {"AR pass": torch.no_grad()(lambda: teacher(tokens, read=read[::4])),
            "update": lambda: opdlm.train_step(student, teacher, text, PROMPT, u, recipe, optimizer),
            "rollout": lambda: opdlm.rollout(Denoiser(student, recipe.layout), tokens[:, :PROMPT], T - PROMPT,
                                             reveal.parse("static:2"), u[..., :1], -1)}


def timed(piece: Callable) -> float:
    """Seconds."""
    begun = time.perf_counter()
    piece()
    return time.perf_counter() - begun


def measured(name: str, config: GPTConfig, rows: int, repeats: int) -> list[dict]:
    """A row for each piece: seconds, turn by turn, plain and compiled. The first two calls come before the clock."""
    both = [pieces(config, rows, compiled) for compiled in (False, True)]
    made = []
    for piece in both[0]:
        first = [timed(kind[piece]) + timed(kind[piece]) for kind in both]
        seconds = [[timed(kind[piece]) for kind in both] for _ in range(repeats)]
        made.append({"size": name, "config": asdict(config), "rows": rows, "piece": piece, "first": first,
                     "plain": [a for a, _ in seconds], "compiled": [b for _, b in seconds]})
        print(f"{name}: {piece}, {statistics.median(made[-1]['compiled']) * 1e3:.0f} ms compiled", flush=True)
    return made


def table(results: dict) -> str:
    """Markdown: median over the turns (smallest to largest)."""
    lines = ["| | plain, ms | compiled / plain | first two calls, s |", "|---|---|---|---|"]
    for row in results["rows"]:
        ratios = [b / a for a, b in zip(row["plain"], row["compiled"])]
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        plain = f"{statistics.median(row['plain']) * 1e3:.0f}"
        lines.append(f"| {row['size']}: {row['piece']} | {plain} | {ratio} | {row['first'][1]:.0f} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """The ratios."""
    axes, rows = figure.subplots(), results["rows"][::-1]
    axes.barh([f"{row['size']}\n{row['piece']}" for row in rows],
              [statistics.median(b / a for a, b in zip(row["plain"], row["compiled"])) for row in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of compiled blocks over that of plain ones")


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    torch.set_num_threads(1)
    results = {"command": "python -m experiments.compile.run", **metrics.facts(torch.device("cpu")), "rows": []}
    for name, (config, rows) in (SMALL if options.quick else SIZES).items():
        results["rows"] += measured(name, config, rows, 2 if options.quick else options.repeats)
    finish("compiled", results, draw, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
