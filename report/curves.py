"""A run's log as a picture: the AR model's pretraining and its conversion, every number in nats a token over tokens.

log.jsonl has one JSON object a line: a header, then steps ("phase" is pretrain or distil) and held-out scores (eval).
"""
from __future__ import annotations

import json
from pathlib import Path

from report.trace import save

BLUE, ORANGE, GREY = "#1f5fa8", "#d9480f", "#6b7280"


def read(path) -> tuple[dict, list[dict]]:
    """The header and the other records; a last line that a killed run left half written is skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").strip().split("\n")
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}): a run's log.jsonl was wanted") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is no JSON: a run's log.jsonl was wanted") from error
    if not records or not all(isinstance(record, dict) for record in records) or "config" not in records[0]:
        raise ValueError(f"{path} does not begin with a run's header (config, commit, ...): a log.jsonl was wanted")
    return records[0], records[1:]


def series(records: list[dict], name: str, **where) -> tuple[list[int], list[float]]:
    """(tokens, values) of name in the records where e.g. phase="eval"; of a step done again after a resume the last."""
    points = {record["tokens"]: record[name] for record in records
              if name in record and "tokens" in record and all(record.get(key) == want for key, want in where.items())}
    tokens = sorted(points)
    return tokens, [points[token] for token in tokens]


def smooth(values: list[float], reach: int) -> list[float]:
    """Each value's mean with up to reach neighbours on each side, fewer at the steep start and at the end."""
    sides = [min(i + 3, reach) for i in range(len(values))]
    windows = [values[max(i - side, 0):i + side + 1] for i, side in enumerate(sides)]
    return [sum(window) / len(window) for window in windows]


def draw(log_path, png_path) -> None:
    """Write the curves of a log as an image."""
    save(figure(*read(log_path)), png_path)


def figure(header: dict, records: list[dict]):
    """A panel for pretraining and one for the conversion; a phase that the log hasn't got has no panel."""
    from matplotlib.figure import Figure
    panels = [(phase, panel) for phase, panel in (("pretrain", _pretrain), ("distil", _distil))
              if any(record.get("phase") == phase for record in records)]
    if not panels:
        raise ValueError("the log has no step yet: draw it when the run has trained")
    fig = Figure(figsize=(1 + 5.4 * len(panels), 4.6), dpi=160, facecolor="white", layout="constrained")
    for axes, (_, panel) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels):
        panel(axes, records)
        _frame(axes)
        axes.legend(frameon=False, fontsize=10)
    if isinstance(header.get("parameters"), int):
        fig.supxlabel(f"{header['parameters'] / 1e6:.3g} M parameters", fontsize=9, color=GREY, x=0.99, ha="right")
    return fig


def _pretrain(axes, records: list[dict]) -> None:
    axes.set_title("The AR model learns to write", loc="left", fontsize=13, weight="bold")
    axes.set(xlabel="pretraining tokens", ylabel="loss (nats/token)")
    _noisy(axes, *series(records, "loss", phase="pretrain"), BLUE, "training loss")
    _scores(axes, *series(records, "val_nats", phase="eval", of="ar"), BLUE, "held-out text")


def _distil(axes, records: list[dict]) -> None:
    """KL and likelihood share the axis, both being nats a token; the student's score should come down to the AR's."""
    axes.set_title("The AR model becomes a diffusion model", loc="left", fontsize=13, weight="bold")
    tokens, kl = series(records, "kl", phase="distil")
    axes.set(xlabel="distilled tokens", ylabel="nats/token", yscale="log" if any(k > 0 for k in kl) else "linear")
    _noisy(axes, tokens, kl, ORANGE, "KL to the AR model")
    _scores(axes, *series(records, "val_nats", phase="eval", of="student"), ORANGE, "held-out text, student")
    teacher = series(records, "val_nats", phase="eval", of="ar")[1]
    if teacher:
        axes.axhline(teacher[-1], color=BLUE, linestyle="--", linewidth=1.5, label=f"the same, AR: {teacher[-1]:.2f}")


def _noisy(axes, tokens: list[int], values: list[float], color: str, label: str) -> None:
    """Faint points as they were logged, and the line one reads."""
    axes.plot(tokens, values, ".", color=color, alpha=0.18, markersize=4, markeredgewidth=0)
    axes.plot(tokens, smooth(values, len(values) // 40), color=color, linewidth=2, label=label)


def _scores(axes, tokens: list[int], values: list[float], color: str, label: str) -> None:
    """Few exact points, the last with its number."""
    if tokens:
        axes.plot(tokens, values, "o-", color=color, markerfacecolor="white", linewidth=1, markersize=6,
                  label=f"{label}: {values[-1]:.2f}")


def _frame(axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=10)
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # 0.1 and 1, not powers of ten
        axes.yaxis.set_minor_formatter(NullFormatter())
