"""The main command, train_tiny.py, over several seeds.

    python -m experiments.main_run.run                                          the story world, three seeds
    python -m experiments.main_run.run --data=FILE.txt --val_data=FILE.txt --seeds=1
    python -m experiments.main_run.run --data=FILE.txt --val_data=FILE.txt --seeds=1 --source=student
    python -m experiments.main_run.run --quick                                  does it run at all? a minute

Writes experiments/main_run/results/VARIANT.json, and of the first seed the pictures VARIANT.png (curves) and
VARIANT_states.png; VARIANT is story_world or, with --data, tinystories; --source adds its value. A seed whose
summary.json is in out/VARIANT-SEED is not run again.
"""
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.common.job import WORK
from experiments.common.plots import write_small
from experiments.common.results import EXPERIMENTS, output_folder, run_info, variant_of
from experiments.main_run.tables import table
from report.compare import write_json
from training import cli


@dataclass
class Options:
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    source: str | None = None  # --source of train_tiny.py
    seeds: int = 3  # runs
    quick: bool = False  # one run of a tiny model, four updates: does it run at all?


QUICK = ("--pretrain_steps=4", "--pretrain_batch=4", "--distill_steps=4", "--warm_steps=2", "--layers=1",
         "--width=64", "--eval_texts=8")


def variant(options: Options) -> str:
    """The name of the results file."""
    name = variant_of(options.data)
    return f"{name}_{options.source}" if options.source else name


def run_folder(options: Options, seed: int) -> Path:
    name = f"{variant(options)}-{seed}"
    return WORK / "quick/main_run" / name if options.quick else Path("out", name)


def command(options: Options, seed: int) -> list[str]:
    """The command line of one run."""
    script = str(EXPERIMENTS.parent / "train_tiny.py")
    words = [
        sys.executable,
        script,
        f"--data={options.data}",
        f"--seed={seed}",
        f"--out={run_folder(options, seed)}",
    ]
    if options.val_data:
        words.append(f"--val_data={options.val_data}")
    if options.source:
        words.append(f"--source={options.source}")
    if options.quick:
        words += QUICK
    return words


def run(options: Options, seed: int) -> dict:
    """A run's summary, the header of its log, its seconds, and its share of the machine's speed."""
    folder = run_folder(options, seed)
    if not (folder / "summary.json").exists():
        began = time.perf_counter()
        subprocess.run(command(options, seed), check=True)
        (folder / "seconds").write_text(f"{time.perf_counter() - began:.0f}")
    lines = (folder / "log.jsonl").read_text().splitlines()
    header, *records = [json.loads(line) for line in lines]
    without_paths = {"data": variant_of(options.data), "val_data": None, "out": ""}
    header["config"] |= without_paths
    return {
        "summary": json.loads((folder / "summary.json").read_text()),
        "header": header,
        "seconds": int((folder / "seconds").read_text()),
        "share": flops_shares(header, records),
    }


def flops_shares(header: dict, records: list[dict]) -> dict:
    """Useful FLOP/s over those of a matrix product: of AR steps, of updates on stories, of updates on own
    text.

    From totals, not medians: if there are several updates per rollout, the first one pays for it.
    """
    def share(steps):
        if not steps:
            return None
        flops = sum(record["flops"] for record in steps)
        seconds = sum(record["seconds"] for record in steps)
        return round(flops / seconds / header["matmul_flops"], 3)

    pretrain = [record for record in records if record.get("phase") == "pretrain"]
    distil = [record for record in records if record.get("phase") == "distil"]
    return {
        "pretrain": share(pretrain),
        "stories": share([record for record in distil if not record["positions"]]),
        "own_text": share([record for record in distil if record["positions"]]),
    }


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1)
    name = variant(options)
    results = {"command": run_info("main_run", options)["command"]}
    results["runs"] = [run(options, seed) for seed in range(options.seeds)]
    folder = output_folder("main_run", options.quick)
    write_json(folder / f"{name}.json", results)
    write_small(run_folder(options, 0) / "curves.png", folder / f"{name}.png")
    write_small(run_folder(options, 0) / "states.png", folder / f"{name}_states.png")
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
