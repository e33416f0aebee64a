"""The README's main job over several seeds: what its tables are made of.

    python -m experiments.main_run.run                                          the story world, three seeds
    python -m experiments.main_run.run --name=text --data=FILE.txt --val_data=FILE.txt --seeds=1

Leaves experiments/NAME/results.json (every seed, every number, the commit) and the pictures of the first seed. A seed
that has run already (its summary.json is in out/NAME-SEED) is not run again.
"""
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.common.results import cell
from report.compare import write_json
from training import cli

HERE = Path(__file__).parent


@dataclass
class Options:
    name: str = "toy"  # of the results: experiments/NAME, runs in out/NAME-SEED
    data: str = "toy"  # --data of train_tiny.py
    val_data: str | None = None  # --val_data of train_tiny.py
    seeds: int = 3  # runs


def command(options: Options, seed: int) -> list[str]:
    """The line that makes one run."""
    val = [f"--val_data={options.val_data}"] if options.val_data else []
    return [sys.executable, str(HERE.parent / "train_tiny.py"), f"--data={options.data}", *val, f"--seed={seed}",
            f"--out=out/{options.name}-{seed}"]


def run(options: Options, seed: int) -> dict:
    """A run's summary, its header, and the seconds its steps took."""
    folder = Path("out", f"{options.name}-{seed}")
    if not (folder / "summary.json").exists():
        begun = time.perf_counter()
        subprocess.run(command(options, seed), check=True)
        (folder / "seconds").write_text(f"{time.perf_counter() - begun:.0f}")
    header, *records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    header["config"] |= {"data": options.name, "val_data": None, "out": ""}              # no paths of this machine
    return {"summary": json.loads((folder / "summary.json").read_text()), "header": header,
            "seconds": int((folder / "seconds").read_text()), "share": shares(header, records)}


def shares(header: dict, records: list[dict]) -> dict:
    """Useful FLOP/s over those of a matrix product: of all AR steps, of those on stories, of those on the own text.

    Totals, not medians: of several updates a rollout, the first one pays for it.
    """
    def total(steps):
        flops, seconds = sum(r["flops"] for r in steps), sum(r["seconds"] for r in steps)
        return round(flops / seconds / header["matmul_flops"], 3) if steps else None
    distil = [r for r in records if r.get("phase") == "distil"]
    return {"pretrain": total([r for r in records if r.get("phase") == "pretrain"]),
            "stories": total([r for r in distil if not r["positions"]]),
            "own_text": total([r for r in distil if r["positions"]])}


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    results = {"command": f"python -m experiments.main_run.run --name={options.name} --seeds={options.seeds}",
               "runs": [run(options, seed) for seed in range(options.seeds)]}
    folder = HERE / options.name
    write_json(folder / "results.json", results)
    for picture in ("states.png", "curves.png"):
        shutil.copy(Path("out", f"{options.name}-0", picture), folder / picture)
    print(table(results))


ROWS = {"val_nats": "nats/token", "bits_per_byte": "bits", "gen_nats": "nats/token", "valid": "share",
        "distinct2": "share", "entropy": "nats", "tok_per_fwd": "tokens", "positions_per_tok": "positions"}


def table(results: dict) -> str:
    """Markdown: mean over seeds, and smallest to largest where there are several."""
    lines = ["| | AR teacher | student before | student after |", "|---|---|---|---|"]
    for row, unit in ROWS.items():
        cells = []
        for name in ("ar", "before", "after"):
            values = [run["summary"][name].get(row) for run in results["runs"]]
            cells.append("" if None in values else cell(values))
        if any(cells):
            lines.append(f"| `{row}`, {unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
