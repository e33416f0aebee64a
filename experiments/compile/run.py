"""What --compile is worth on a CPU: the time of compiled blocks relative to plain ones, in turns within one
run.

    python -m experiments.compile.run              one thread, about three minutes, most of it the compiler's
    python -m experiments.compile.run --quick      one small network, two turns

Timed are three pieces of a conversion, which a compiler sees separately: the AR model's forward pass over a
text, the student's update on it, and a rollout. Writes experiments/compile/results/cpu.json and .png.
"""
import copy
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from experiments.common.results import run_info, save_results
from experiments.common.timing import seconds_of
from experiments.compile.tables import plot, table
from model import masks
from model.gpt import GPT, GPTConfig
from training import cli, dist

EOT = 0
PROMPT = 8          # tokens
SIZES = {           # networks, and rows per batch
    "story world, 4 x 128": (GPTConfig(650, 96, 4, 2, 128), 16),
    "GPT-2's width, 2 x 768": (GPTConfig(8192, 128, 2, 12, 768), 2),
}
SMALL = {"small": (GPTConfig(200, 32, 2, 2, 64), 2)}


@dataclass
class Options:
    repeats: int = 7  # turns that are timed
    quick: bool = False  # a small network, two turns: does it run at all?


def pieces_of(config: GPTConfig, rows: int, compiled: bool) -> dict[str, Callable]:
    """The pieces that are timed, by name."""
    T = config.context
    teacher = GPT(config).init_weights(torch.Generator().manual_seed(0)).requires_grad_(False)
    student = dist.compile_blocks(copy.deepcopy(teacher).init_mask().requires_grad_(True), compiled)
    teacher = dist.compile_blocks(teacher, compiled)
    layout = masks.Layout(4, 1, 1)
    recipe = opdlm.Recipe(
        opdlm.data_text,
        opdlm.prefix_shown,
        opdlm.teacher_probs,
        opdlm.first_masked_x8,
        layout,
        EOT,
        batch=rows,
    )
    tokens = torch.randint(1, config.vocab, (rows, T), generator=torch.Generator().manual_seed(1))
    text = opdlm.data_text(None, None, tokens, PROMPT, T - PROMPT, None, recipe)
    u = opdlm.uniforms(0, 2, range(rows), (T, 2))
    read = torch.arange(rows * T)[::4]
    rule = reveal.parse("static:2")
    optimizer = torch.optim.AdamW(student.parameters(), 0.0)

    @torch.no_grad()
    def ar_pass():
        teacher(tokens, read=read)

    def update():
        opdlm.train_step(student, teacher, text, PROMPT, u, recipe, optimizer)

    def rollout():
        opdlm.rollout(Denoiser(student, layout), tokens[:, :PROMPT], T - PROMPT, rule, u[..., :1], -1)
    return {"AR pass": ar_pass, "update": update, "rollout": rollout}


def measure(name: str, config: GPTConfig, rows: int, repeats: int) -> list[dict]:
    """One row per piece: seconds, turn by turn, plain and compiled. The first two calls are timed apart."""
    plain = pieces_of(config, rows, compiled=False)
    compiled = pieces_of(config, rows, compiled=True)
    measured = []
    for piece in plain:
        both = (plain[piece], compiled[piece])
        first = [seconds_of(function) + seconds_of(function) for function in both]
        turns = [[seconds_of(function) for function in both] for _ in range(repeats)]
        row = {
            "size": name, "config": asdict(config), "rows": rows, "piece": piece, "first": first,
            "plain": [seconds for seconds, _ in turns], "compiled": [seconds for _, seconds in turns],
        }
        measured.append(row)
        print(f"{name}: {piece}, {statistics.median(row['compiled']) * 1000:.0f} ms compiled", flush=True)
    return measured


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    torch.set_num_threads(1)
    results = run_info("compile", options) | {"rows": []}
    for name, (config, rows) in (SMALL if options.quick else SIZES).items():
        results["rows"] += measure(name, config, rows, 2 if options.quick else options.repeats)
    save_results("compile", "cpu", results, plot, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
