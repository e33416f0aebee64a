"""Table, picture and page of a light model inside blocks: quality by schedule, and the heavy model's at
equal FLOPs."""
import statistics

import numpy as np

from experiments.common import page as md
from experiments.common.plots import legend_below, series_style
from experiments.common.results import markdown_table, mean_range

TITLE = "A small model inside the blocks of a converted student"
SUMMARY = "Model scheduling inside blocks: quality, FLOPs and seconds of a 3-layer and a 1-layer student"
SCHEDULES = {       # see decoding/scheduling.py
    "heavy": "mask:1-0=H",
    "light": "mask:1-0=L",
    "light first": "mask:1-0.5=L,0.5-0=H",
    "light last": "mask:1-0.5=H,0.5-0=L",
    "light first and last": "mask:1-0.75=L,0.75-0.25=H,0.25-0=L",
}
LEVELS = (0, 0.3, 0.5, 0.7, 0.9, 0.98, 1)       # of leftmost
SHOWN_LEVEL = 0.9                               # that of the table


def runs_of(results: dict, block: int) -> list[dict]:
    return [run for run in results["runs"] if run["block"] == block]


def blocks_of(results: dict) -> list[int]:
    return list(dict.fromkeys(run["block"] for run in results["runs"]))


def heavy_at(evaluations: dict, flops: float, metric: str) -> float:
    """The heavy student's metric at these FLOPs, between two of its levels; nan if it always spends more."""
    points = [
        (evaluations[f"heavy {level}"]["flops"], evaluations[f"heavy {level}"][metric]) for level in LEVELS
    ]
    x, y = zip(*sorted(points))
    return float(np.interp(flops, x, y, left=np.nan))


def values(runs: list[dict], name: str, metric: str) -> list[float]:
    """By seed, a schedule's metric at the level of the table."""
    return [run["evaluations"][f"{name} {SHOWN_LEVEL}"][metric] for run in runs]


def flops_ratios(runs: list[dict], name: str) -> list[float]:
    """By seed, FLOPs relative to the heavy student's."""
    return [ours / heavy for ours, heavy in zip(values(runs, name, "flops"), values(runs, "heavy", "flops"))]


def seconds_ratios(runs: list[dict], name: str) -> list[float]:
    """By seed, seconds relative to the heavy student's in the same turns: the median."""
    ratios = []
    for run in runs:
        pairs = zip(run["seconds"][name], run["seconds"]["heavy"])
        ratios.append(statistics.median(ours / heavy for ours, heavy in pairs))
    return ratios


def table(results: dict) -> str:
    """Markdown: one row per block size and schedule."""
    header = ["block, schedule", "`valid`", "heavy's at these FLOPs", "`gen_nats`", "heavy's at these FLOPs",
              "FLOPs / heavy's", "seconds / heavy's"]
    rows = []
    for block in blocks_of(results):
        runs = runs_of(results, block)
        for name in SCHEDULES:
            cells = []
            for metric in ("valid", "gen_nats"):
                same = [heavy_at(run["evaluations"], flops, metric)
                        for run, flops in zip(runs, values(runs, name, "flops"))]
                cells.append(mean_range(values(runs, name, metric)))
                cells.append("-" if np.isnan(same).any() else mean_range(same))
            cells.append(mean_range(flops_ratios(runs, name), 2))
            cells.append(mean_range(seconds_ratios(runs, name), 2))
            rows.append([f"{block}, {name}", *cells])
    return markdown_table(header, rows)


def plot(results: dict, figure) -> None:
    """`valid` against FLOPs per token: one line per schedule over its levels."""
    blocks = blocks_of(results)
    panels = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for axes, block in zip(panels, blocks):
        runs = runs_of(results, block)
        for index, name in enumerate(SCHEDULES):
            x, y = [], []
            for level in LEVELS:
                evaluations = [run["evaluations"][f"{name} {level}"] for run in runs]
                x.append(statistics.mean(evaluation["flops"] for evaluation in evaluations) / 1e6)
                y.append(statistics.mean(evaluation["valid"] for evaluation in evaluations))
            axes.plot(x, y, label=name, **series_style(index))
        axes.set(xlabel="MFLOPs of the transformer blocks per token", title=f"block {block}", xscale="log")
        axes.set_xticks((1, 2, 5, 10), ("1", "2", "5", "10"))
        axes.minorticks_off()
    panels[0].set_ylabel("valid")
    figure.suptitle(
        "A light model for some of a block's steps (leftmost over its levels, means of three seeds)"
    )
    legend_below(figure, panels[0], 5)


PLOTS = {"story_world": plot}


def page(all_results: dict[str, dict]) -> str:
    results = all_results["story_world"]
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            Model scheduling ([2604.02340](https://arxiv.org/abs/2604.02340)) inside blocks: a light model
            takes the first or last steps of every block, by the share that is still masked. Heavy is a
            student with 3 transformer blocks, light one with 1 that learned from the same teacher. The rule
            is leftmost:0.9, the story world, temperature 1, 256 stories, commits counted. Beside each number
            stands what the heavy student reaches with as many FLOPs by revealing more at once. Cells are mean
            (smallest to largest) over three seeds."""),
        md.measured(results, "story_world", "20 minutes on two CPU cores"),
        table(results),
        md.picture("story_world", "Valid stories against FLOPs per token"),
        "## What was found",
        md.bullets(findings(results)),
    )


def findings(results: dict) -> list[str]:
    eight, sixteen = runs_of(results, 8), runs_of(results, 16)
    flops, seconds = [], []
    for runs in (eight, sixteen):
        for name in SCHEDULES:
            if name.startswith("light "):
                flops.append(statistics.mean(flops_ratios(runs, name)))
                seconds.append(statistics.mean(seconds_ratios(runs, name)))
    return [
        f"Schedules that mix both models take {min(flops):.2f} to {max(flops):.2f} of the heavy model's "
        f"FLOPs at about its quality, but {min(seconds):.2f} to {max(seconds):.2f} of its seconds: each "
        "model in use also reads the finished text.",
        f"The light model alone takes {mean_range(flops_ratios(eight, 'light'), 2)} of the FLOPs and "
        f"{mean_range(seconds_ratios(eight, 'light'), 2)} of the seconds at block 8, with `valid` "
        f"{mean_range(values(eight, 'light', 'valid'))} where the heavy one has "
        f"{mean_range(values(eight, 'heavy', 'valid'))}.",
        f"At block 16 the light model has {mean_range(values(sixteen, 'light', 'valid'))}, the heavy one "
        f"{mean_range(values(sixteen, 'heavy', 'valid'))}. So little lies between the two models in this "
        "world that the light one alone is the best choice, and mixing has nothing to gain.",
        "At equal FLOPs every mixed schedule is far better than the heavy model that reveals more at once.",
    ]
