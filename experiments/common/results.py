"""Results files: reading, writing, cells of tables, and numbers read off a student's evaluations.

experiments/NAME/results/VARIANT.json holds everything that a run measured, and its settings, commit and
machine.
"""
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch

from experiments.common.job import WORK
from experiments.common.plots import save_picture
from report import metrics
from report.compare import write_json

EXPERIMENTS = Path(__file__).parents[1]


# 1. reading and writing -----------------------------------------------------------------------------------

# Names that older results files use -> the names of today.
RENAMED_KEYS = {
    "places": "loss_positions",
    "looks": "evaluations",
    "hurried": "fast_phase_seconds",
    "shown": "shown_alpha",
    "volumes": "areas",
    "tried": "dev_by_temperature",
    "choices": "disagreements",
    "a text": "per_text",
    "sure": "confidence",
    "seconds a token": "seconds_per_token",
    "seconds of the policy a step": "seconds_per_step",
}
RENAMED_SETTINGS = {"looks": "samplers", "points": "eval_steps", "pretrain": "teacher_flags",
                    "start": "prepare_student"}
RENAMED_FLAGS = {"text": "source", "updates": "updates_per_rollout"}
RENAMED_ROWS = {
    "ours": "warm_start", "ours x4": "warm_start_x4",
    "1 updates a rollout": "1 update per rollout", "16 updates a rollout": "16 updates per rollout",
    "half of it on stories": "half of the updates on stories",
    "stories, every left part": "stories, every prefix", "block 4, left parts": "block 4, prefixes",
}
PATHS = {"data": "FILE.txt", "val_data": "FILE.txt", "init": "FOLDER"}      # options that are paths
TEXT_FLAGS = "--data=FILE.txt --val_data=FILE.txt"
RENAMED_COMMANDS = {    # of older results; the first word is experiments/NAME
    "ablations": "ablations",
    "compiled": "compile",
    "decoding": "decoding",
    "memory": "memory",
    "methods --name=methods": "methods",
    "methods --name=methods_text": f"methods {TEXT_FLAGS} --rows=opdlm,sft,sdar,warm_start --aligns=ar "
                                   "--rates=0.005,0.02 --updates=120 --long=480 --length=128 "
                                   "--levels=0,0.3,0.6,1 --stories=64",
    "scheduling --name=scheduling": "scheduling",
    "scheduling --name=scheduling_text": f"scheduling {TEXT_FLAGS} --length=64 --updates=4000 --lr=0.005 "
                                         "--samples=128",
    "shallow": "shallow",
    "speed": "speed",
    "tiny --name=toy --seeds=3": "main_run",
    "tiny --name=text --seeds=1": f"main_run {TEXT_FLAGS} --seeds=1",
    "unmasking --world=blocks": "unmasking --world=blocks",
    "unmasking --world=whole": "unmasking --world=whole",
    "verified --name=verified": "speculative",
    "verified --name=verified_text": f"speculative {TEXT_FLAGS} --length=128 --lr=0.005 "
                                     "--rows=\"block 4, clean 0.5\"",
}


def load_results(path: Path) -> dict:
    """A results file with the names of today, whatever version of the experiment wrote it."""
    results = rename_keys(json.loads(path.read_text()), RENAMED_KEYS)
    if "command" in results:
        results["command"] = rename_command(results["command"])
    for run in results.get("runs", []):
        if "settings" in run:
            run["settings"] = rename_settings(run["settings"])
    return results


def rename_keys(value, names: dict[str, str]):
    """The value with these keys renamed in every dictionary inside it."""
    if isinstance(value, dict):
        return {names.get(key, key): rename_keys(x, names) for key, x in value.items()}
    if isinstance(value, list):
        return [rename_keys(x, names) for x in value]
    return value


def rename_settings(settings: dict) -> dict:
    """The settings of a job (Job.settings) with the names of today."""
    names = RENAMED_SETTINGS | {"evaluations": "samplers"}     # RENAMED_KEYS comes first
    settings = {names.get(name, name): value for name, value in settings.items()}
    settings["flags"] = {RENAMED_FLAGS.get(name, name): value for name, value in settings["flags"].items()}
    row, comma, rest = settings["name"].partition(", ")
    settings["name"] = RENAMED_ROWS.get(settings["name"]) or RENAMED_ROWS.get(row, row) + comma + rest
    return settings


def rename_command(command: str) -> str:
    """The command that makes these results today."""
    old = command.removeprefix("python -m experiments.")
    if old not in RENAMED_COMMANDS:
        return command
    name, space, flags = RENAMED_COMMANDS[old].partition(" ")
    return f"python -m experiments.{name}.run{space}{flags}"


def results_path(experiment: str, variant: str) -> Path:
    return EXPERIMENTS / experiment / "results" / f"{variant}.json"


def output_folder(experiment: str, quick: bool) -> Path:
    """Where a run leaves its files: experiments/EXPERIMENT/results, or of a quick run in out/."""
    return WORK / "quick" / experiment if quick else EXPERIMENTS / experiment / "results"


def save_results(experiment: str, variant: str, results: dict, plot: Callable, quick: bool) -> None:
    """Writes VARIANT.json, whole or not at all, and VARIANT.png."""
    folder = output_folder(experiment, quick)
    write_json(folder / f"{variant}.json", round_floats(results))
    save_picture(plot, results, folder / f"{variant}.png")


def run_info(experiment: str, options, device: torch.device = torch.device("cpu")) -> dict:
    """What a results file begins with. Called before the work: a commit may follow. No paths."""
    flags = {}
    changed = [f"python -m experiments.{experiment}.run"]
    for field in fields(options):
        value = getattr(options, field.name)
        if field.name in PATHS:
            if value != field.default:
                changed.append(f"--{field.name}={PATHS[field.name]}")
            continue
        flags[field.name] = value
        if value != field.default:
            text = f'"{value}"' if " " in str(value) else str(value)
            changed.append(f"--{field.name}={text}")
    return {
        "command": " ".join(changed),
        "options": flags,
        **metrics.facts(device),
        "threads": 1,
    }


def variant_of(data: str) -> str:
    """The name of a results file: of the story world, or of real text."""
    return "story_world" if data == "toy" else "tinystories"


def round_floats(value):
    """The value with six digits per number: people read results files too."""
    if isinstance(value, dict):
        return {key: round_floats(x) for key, x in value.items()}
    if isinstance(value, list):
        return [round_floats(x) for x in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def cached(file: Path, settings: dict, make: Callable):
    """What make() returns; read from the file if it was made before with the same settings."""
    if file.exists():
        found = json.loads(file.read_text())
        if found.get("settings") == settings:
            return found["value"]
    value = make()
    write_json(file, {"settings": settings, "value": value})
    return value


# 2. cells of tables ---------------------------------------------------------------------------------------

def mean_range(values: list[float], digits: int = 3) -> str:
    """Mean (smallest to largest)."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def median_range(values: list[float], digits: int = 2) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


# 3. numbers read off the evaluations of conversions -------------------------------------------------------

def by_row(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs of each row, one per seed, in the order in which the names came."""
    rows = {}
    for run in runs:
        rows.setdefault(run["settings"]["name"], []).append(run)
    return rows


def interpolate_at_cost(point: dict, metric: str, cost: float, samplers: tuple) -> float:
    """A metric of text at `cost` tokens per forward pass, on a straight line between the two nearest
    samplers.

    If all `samplers` are on one side of the cost, the nearest one's. The line is no measurement: where the
    samplers are far apart, the value depends on which ones were evaluated.
    """
    found = sorted((point[sampler]["tok_per_fwd"], point[sampler][metric]) for sampler in samplers)
    if cost <= found[0][0]:
        return found[0][1]
    if cost >= found[-1][0]:
        return found[-1][1]
    for (x0, y0), (x1, y1) in zip(found, found[1:]):
        if x0 <= cost < x1:
            return y0 + (y1 - y0) * (cost - x0) / (x1 - x0)


def gap_to_teacher(run: dict, metric: str, cost: float, samplers: tuple) -> Callable:
    """gap(point): how much worse a point is than its teacher: nats above it, or `valid` below it."""
    sign = -1 if metric == "valid" else 1
    teacher = run["teacher"][metric]

    def gap(point: dict) -> float:
        return sign * (interpolate_at_cost(point, metric, cost, samplers) - teacher)
    return gap


def spent_to_reach(
    points: list[dict], gap: Callable, bound: float, axis: str = "tokens"
) -> tuple[float, bool]:
    """(what was spent until gap(point) <= bound, True), or (all that was spent, False): a lower bound.

    Between two points it is interpolated over the logarithm; before the first point it is that point's.
    """
    before = None
    for point in points:
        if gap(point) <= bound:
            if before is None:
                return point[axis], True
            share = (gap(before) - bound) / (gap(before) - gap(point))
            log_spent = (1 - share) * math.log(before[axis]) + share * math.log(point[axis])
            return math.exp(log_spent), True
        before = point
    return points[-1][axis], False


def tokens_cell(found: list[tuple[float, bool]]) -> str:
    """Thousands of tokens, mean (smallest to largest); "> n" if some seed did not reach the bound."""
    thousands = [tokens / 1000 for tokens, _ in found]
    mean = statistics.mean(thousands)
    if not all(reached for _, reached in found):
        return f"> {mean:.0f}k"
    if len(thousands) == 1:
        return f"{mean:.0f}k"
    return f"{mean:.0f}k ({min(thousands):.0f} to {max(thousands):.0f})"


def ratio_cell(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> str:
    """Their spending over ours, seed by seed; "> n" where theirs is a lower bound."""
    if not all(reached for _, reached in ours):
        return "not reached"
    ratios = [b / a for (a, _), (b, _) in zip(ours, theirs)]
    sign = "" if all(reached for _, reached in theirs) else "> "
    return sign + mean_range(ratios, 1)
