"""Speed and memory on one GPU, of a network with GPT-2 medium's shape and random weights.

    python -m experiments.performance.run             one GPU that does nothing else
    python -m experiments.performance.run --quick     the same code, a tiny network, any machine: seconds

With --quick, --compile adds the compiled blocks, and a minute or two of the compiler's.

Training: MFU, tokens per second and peak memory of an AR update, of a distillation update and of a rollout,
with plain and with compiled transformer blocks. Decoding: AR, block diffusion and speculative decoding at
several batch sizes. What belongs together is timed in turns, and ratios are taken within a turn.

`python -m experiments.performance.gpu` is the same command. It writes
experiments/performance/results/gpu.json and .png.
"""
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch

from experiments.common.results import run_info, save_results
from experiments.common.timing import allocated, gpu_peak, seconds_of
from experiments.performance import pieces
from experiments.performance.pieces import Size
from experiments.performance.tables import break_even_table, decoding_table, plot, training_table
from model.gpt import GPTConfig
from report import metrics
from training import cli
from training.flags import Range, check_ranges

MEDIUM = Size(GPTConfig(50257, 1024, 24, 16, 1024), batch=8, decoding=(1, 8, 64), response=256, matmul=8192)
TINY = Size(GPTConfig(300, 48, 2, 1, 64), batch=2, decoding=(1, 3), response=16, matmul=256)
RANGES = {"repeats": Range(2, 1000), "batch": Range(1, 10**6)}


@dataclass
class Options:
    repeats: int = 5  # turns that are timed
    batch: int = 8  # rows of 1,024 tokens per update
    compile: bool | None = None  # measure compiled transformer blocks too; default: yes, with --quick no
    quick: bool = False  # a tiny network, two turns, with or without a GPU: does it run at all?


def prepare(row: dict, call: Callable, device: torch.device, before: int) -> dict:
    """The row of a call with its peak in bytes, beyond the `before` bytes that belong to other things.

    The first two calls, which compile and allocate, are timed apart.
    """
    first = seconds_of(call) + seconds_of(call)
    peak = gpu_peak(call, device, before)
    return {**row, "first": first, "peak": peak, "seconds": [], "records": []}


def take_turns(rows: list[dict], calls: list[Callable], repeats: int) -> None:
    """Adds the seconds and the record of each call to its row, turn by turn."""
    for _ in range(repeats):
        for row, call in zip(rows, calls):
            records = []
            seconds = seconds_of(lambda call=call, records=records: records.append(call()))
            record = records[0]
            row["seconds"].append(record.get("seconds", seconds))
            row["records"].append(record)


def measure_training(size: Size, device: torch.device, options: Options) -> list[dict]:
    """One row per piece, plain and compiled."""
    measured = []
    for name, make in pieces.PIECES.items():
        variants = [False]
        if options.compile and name not in pieces.NEVER_COMPILED:
            variants.append(True)
        rows = []
        calls = []
        for compiled in variants:
            before = allocated(device)
            call = make(size, device, compiled)
            row = {"piece": name, "compiled": compiled}
            rows.append(prepare(row, call, device, before))
            calls.append(call)
        take_turns(rows, calls, options.repeats)
        measured += rows
        for row in rows:
            report(name + ", compiled" * row["compiled"], row)
    return measured


def measure_decoding(size: Size, device: torch.device, options: Options) -> list[dict]:
    """One row per batch and way of decoding."""
    before = allocated(device)
    config = pieces.config_of(size, device)
    student = pieces.student_of(size, config, device).requires_grad_(False)
    measured = []
    for batch in size.decoding:
        calls = pieces.decoders(student, size, config, batch)
        rows = []
        for mode, call in calls.items():
            row = {"batch": batch, "mode": mode}
            rows.append(prepare(row, call, device, before))
        take_turns(rows, list(calls.values()), options.repeats)
        measured += rows
        for row in rows:
            report(f"batch {batch}, {row['mode']}", row)
    return measured


def report(name: str, row: dict) -> None:
    print(f"{name}: {statistics.median(row['seconds']) * 1000:.0f} ms", flush=True)


def measure(size: Size, device: torch.device, options: Options) -> dict:
    """Everything that a results file holds besides run_info."""
    began = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results = {
        "config": asdict(size.network),
        "batch": size.batch,
        "response": size.response,
        "prompt": pieces.PROMPT,
        "block": pieces.config_of(size, device).block,
        "rule": pieces.config_of(size, device).reveal,
        "matmul": {
            "size": size.matmul,
            "dtype": str(dtype).removeprefix("torch."),
            "flops": metrics.matmul_rate(device, size.matmul, dtype),
        },
        "training": measure_training(size, device, options),
        "decoding": measure_decoding(size, device, options),
    }
    results["minutes"] = (time.perf_counter() - began) / 60
    return results


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    check_ranges(options, RANGES)
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.quick:
        raise ValueError("torch finds no GPU here: run this on a machine with one, or try the same code on a "
                         "tiny network with --quick")
    info = run_info("performance", options, device)
    if options.compile is None:
        options = replace(options, compile=not options.quick)
    size = replace(MEDIUM, batch=options.batch)
    if options.quick:
        size = TINY
        options = replace(options, repeats=2)
    results = info | measure(size, device, options)
    save_results("performance", "gpu", results, plot, options.quick)
    for table in (training_table, decoding_table, break_even_table):
        print(table(results), end="\n\n")


if __name__ == "__main__":
    sys.exit(cli.run(main))
