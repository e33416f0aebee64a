"""The look of all pictures: one style, colours that colour-blind readers can tell apart, legends outside
the data."""
import io
from collections.abc import Callable
from pathlib import Path

# Okabe and Ito, without their yellow, which is hard to see on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h")
LINES = ("-", "--", ":")
GREY = "#777777"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "figure.titlesize": 13,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.markersize": 6,
    "lines.linewidth": 1.6,
}


def series_style(index: int) -> dict:
    """Colour, marker and line of the index-th line of a plot: no two lines share all three."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index // len(COLORS) % len(LINES)],
    }


def legend_below(figure, axes, columns: int = 4) -> None:
    """One legend for the whole figure, under its panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def plain_log_axis(axis) -> None:
    """Ticks at 1, 2 and 5, written as 0.1 and 1, not as powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save_picture(plot: Callable, results: dict, path: Path) -> None:
    """Draws plot(results, figure) and writes it as a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 5.6), dpi=110, layout="constrained")
        plot(results, figure)
        buffer = io.BytesIO()
        figure.savefig(buffer)
        plt.close(figure)
    write_small(buffer, path)


def write_small(source, path: Path) -> None:
    """Writes the picture in `source`, a file or its path, as a PNG with at most 128 colours."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(source).convert("RGB").quantize(128).save(path, optimize=True)
