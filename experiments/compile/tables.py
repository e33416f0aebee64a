"""Table, picture and page of --compile on a CPU."""
import statistics

from experiments.common import page as md
from experiments.common.plots import COLORS
from experiments.common.results import markdown_table, median_range

TITLE = "What --compile is worth on a CPU"
SUMMARY = "Time of compiled transformer blocks relative to plain ones: AR pass, update, rollout"


def ratios(row: dict) -> list[float]:
    """Compiled over plain, turn by turn."""
    return [compiled / plain for plain, compiled in zip(row["plain"], row["compiled"])]


def table(results: dict) -> str:
    """Markdown: one row per network and piece."""
    rows = []
    for row in results["rows"]:
        plain = f"{statistics.median(row['plain']) * 1000:.0f}"
        first = f"{row['first'][1]:.0f}"
        rows.append([f"{row['size']}: {row['piece']}", plain, median_range(ratios(row)), first])
    return markdown_table(
        ["network: piece", "plain, ms", "compiled / plain", "first two compiled calls, s"], rows
    )


def plot(results: dict, figure) -> None:
    """The ratios."""
    axes = figure.subplots()
    rows = results["rows"][::-1]
    medians = [statistics.median(ratios(row)) for row in rows]
    below = [median - min(ratios(row)) for median, row in zip(medians, rows)]
    above = [max(ratios(row)) - median for median, row in zip(medians, rows)]
    labels = [f"{row['size']}\n{row['piece']}" for row in rows]
    axes.errorbar(
        medians, labels, xerr=[below, above], color=COLORS[0], marker="o", linestyle="none", capsize=3
    )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time of compiled blocks / time of plain blocks")
    figure.suptitle(
        "torch.compile on one CPU thread (median, smallest and largest of the turns; below 1 is faster)"
    )


PLOTS = {"cpu": plot}


def page(all_results: dict[str, dict]) -> str:
    results = all_results["cpu"]
    medians = [statistics.median(ratios(row)) for row in results["rows"]]
    saved = [statistics.median(row["plain"]) * (1 - median) for row, median in zip(results["rows"], medians)]
    first = [row["first"][1] for row in results["rows"]]
    turns = len(results["rows"][0]["plain"])
    best = max(range(len(saved)), key=saved.__getitem__)
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            `--compile` compiles one transformer block and uses it for all layers. Timed are three pieces of a
            conversion, plain and compiled in turns: the AR model's forward pass over a text, the student's
            update on it, and a rollout. On GPUs it has not been measured."""),
        md.measured(results, "cpu", "about three minutes"),
        table(results),
        md.paragraph(f"Medians of {turns} turns (smallest to largest) on one thread of a busy machine."),
        md.picture("cpu", "Time of compiled blocks relative to plain ones"),
        "## What was found",
        md.bullets([
            f"Compiled pieces take {min(medians):.2f} to {max(medians):.2f} of the plain time.",
            f"The first two calls of a compiled piece take {min(first):.0f} to {max(first):.0f} seconds. The "
            f"piece that gains most saves {saved[best] * 1000:.0f} ms per call, so its compilation pays "
            f"after {first[best] / saved[best]:.0f} calls.",
            "The turns of one piece scatter as widely as the medians differ: on a CPU it is hardly worth it.",
        ]),
    )
