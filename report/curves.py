"""The log of a run as a picture: AR pretraining and conversion, in nats per token over tokens.

log.jsonl has one JSON object per line: a header, then training steps ("phase" is pretrain or distil) and
held-out evaluations (eval).
"""
from __future__ import annotations

import json
from pathlib import Path

from report.trace import BLUE, GREY, VERMILLION, save

BLACK = "black"


# 1. the log ---------------------------------------------------------------------------------------

def read(path) -> tuple[dict, list[dict]]:
    """The header and the other records. An incomplete last line, left by a killed run, is skipped."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); expected a run's log.jsonl") from error
    lines = text.strip().split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                message = f"{path}, line {number}: not valid JSON; expected a run's log.jsonl"
                raise ValueError(message) from error
    only_objects = all(isinstance(record, dict) for record in records)
    if not records or not only_objects or "config" not in records[0]:
        raise ValueError(f"{path}: expected a run's log.jsonl, whose first line is a header")
    return records[0], records[1:]


def series(records: list[dict], name: str, **where) -> tuple[list[int], list[float]]:
    """(tokens, values) of one field in the records that match, e.g. phase="eval".

    A step that was repeated after a resume counts once, with its last value.
    """
    points = {}
    for record in records:
        matches = all(record.get(key) == value for key, value in where.items())
        if matches and record.get(name) is not None and "tokens" in record:     # None: was not finite
            points[record["tokens"]] = record[name]
    tokens = sorted(points)
    return tokens, [points[count] for count in tokens]


def smooth(values: list[float], radius: int) -> list[float]:
    """The mean of each value and its neighbours, up to `radius` on each side; fewer at the steep start."""
    means = []
    for i in range(len(values)):
        side = min(i + 3, radius)
        window = values[max(i - side, 0):i + side + 1]
        means.append(sum(window) / len(window))
    return means


# 2. the picture -----------------------------------------------------------------------------------

def draw(log_path, image_path) -> None:
    """Write the curves of a log as an image."""
    header, records = read(log_path)
    save(figure(header, records), image_path)


def figure(header: dict, records: list[dict]):
    """The curves as a matplotlib figure: one panel per phase in the log."""
    from matplotlib.figure import Figure

    logged_phases = {record.get("phase") for record in records}
    panels = [draw_panel for phase, draw_panel in PANELS.items() if phase in logged_phases]
    if not panels:
        raise ValueError("the log has no training step yet: draw it once the run has trained")
    size = (1 + 5.4 * len(panels), 5.4)
    fig = Figure(figsize=size, dpi=160, facecolor="white", layout="constrained")
    all_axes = fig.subplots(1, len(panels), squeeze=False)[0]
    for axes, draw_panel in zip(all_axes, panels):
        draw_panel(axes, records)
        style_axes(axes)
    parameters = header.get("parameters")
    if isinstance(parameters, int):
        fig.supxlabel(f"{parameters / 1e6:.3g} M parameters", fontsize=10, color=GREY, x=0.99, ha="right")
    return fig


def pretrain_panel(axes, records: list[dict]) -> None:
    """Training loss and held-out loss of the AR model."""
    axes.set_title("Pretraining of the AR model", loc="left", fontsize=13, weight="bold")
    axes.set(xlabel="pretraining tokens", ylabel="loss (nats/token)")
    plot_noisy(axes, *series(records, "loss", phase="pretrain"), VERMILLION, "training loss")
    plot_scores(axes, *series(records, "val_nats", phase="eval", of="ar"), BLUE, "s", "AR model, held-out")


def distil_panel(axes, records: list[dict]) -> None:
    """KL divergence and held-out loss of the student, which approaches the AR model's dashed line."""
    axes.set_title("Conversion to a diffusion model", loc="left", fontsize=13, weight="bold")
    tokens, kl = series(records, "kl", phase="distil")
    scale = "log" if any(value > 0 for value in kl) else "linear"
    axes.set(xlabel="distilled tokens", ylabel="nats/token", yscale=scale)
    plot_noisy(axes, tokens, kl, VERMILLION, "training: KL to the AR model")
    student_scores = series(records, "val_nats", phase="eval", of="student")
    plot_scores(axes, *student_scores, BLACK, "o", "student, held-out")
    _, ar_scores = series(records, "val_nats", phase="eval", of="ar")
    if ar_scores:
        label = f"AR model, held-out: {ar_scores[-1]:.2f}"
        axes.axhline(ar_scores[-1], color=BLUE, linestyle="--", linewidth=1.5, label=label)


PANELS = {"pretrain": pretrain_panel, "distil": distil_panel}


def plot_noisy(axes, tokens: list[int], values: list[float], color: str, label: str) -> None:
    """Logged values as faint points, their moving average as a line."""
    axes.plot(tokens, values, ".", color=color, alpha=0.25, markersize=4, markeredgewidth=0)
    radius = len(values) // 40
    axes.plot(tokens, smooth(values, radius), color=color, linewidth=2, label=label)


def plot_scores(axes, tokens: list[int], values: list[float], color: str, marker: str, label: str) -> None:
    """Held-out scores as points; the legend has the last one."""
    if tokens:
        axes.plot(tokens, values, marker + "-", color=color, markerfacecolor="white", linewidth=1,
                  markersize=6, label=f"{label}: {values[-1]:.2f}")


def style_axes(axes) -> None:
    """Grid, ticks, and the legend below the panel."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=10)
    axes.xaxis.label.set_size(11)
    axes.yaxis.label.set_size(11)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")                  # 0.1 and 1, not powers of ten
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False, fontsize=10)
