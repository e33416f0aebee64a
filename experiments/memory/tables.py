"""Table, picture and page of the memory of a training step."""
from experiments.common import page as md
from experiments.common.plots import COLORS
from experiments.common.results import markdown_table, median_range

TITLE = "Memory and time of the output head and the KL"
SUMMARY = "Peak memory of a training step with a large vocabulary: plain, in chunks, and with top-k targets"
MB = 1e6


def rows_by_kind(results: dict) -> dict[tuple[str, bool], dict]:
    """The rows by --kl and --checkpointing."""
    return {(row["kl"], row["checkpointing"]): row for row in results["rows"]}


def added(results: dict, kind: str, checkpointing: bool) -> int:
    """Bytes that head and KL add to the peak of a step without them."""
    rows = rows_by_kind(results)
    return rows[kind, checkpointing]["peak"] - rows["none", checkpointing]["peak"]


def table(results: dict) -> str:
    """Markdown: memory in MB, and time relative to the plain step."""
    rows = rows_by_kind(results)
    plain_seconds = rows["plain", False]["seconds"]
    header = ["`--kl`", "`--checkpointing`", "peak, MB", "of it head and KL, MB", "times less than plain",
              "time / plain's"]
    cells = []
    for (kind, checkpointing), row in rows.items():
        head, less = "0", "-"
        if kind != "none":
            plain = added(results, "plain", checkpointing)
            head = f"{added(results, kind, checkpointing) / MB:.0f}"
            less = f"{plain / added(results, kind, checkpointing):.1f}"
        ratios = [a / b for a, b in zip(row["seconds"], plain_seconds)]
        peak = f"{row['peak'] / MB:.0f}"
        cells.append([kind, "yes" if checkpointing else "no", peak, head, less, median_range(ratios)])
    return markdown_table(header, cells)


def plot(results: dict, figure) -> None:
    """The peaks: what the step needs without head and KL, and what these add."""
    axes = figure.subplots()
    rows = results["rows"][::-1]
    labels = []
    for row in rows:
        kind = "no head, no KL" if row["kl"] == "none" else f"--kl={row['kl']}"
        labels.append(kind + ", checkpointing" * row["checkpointing"])
    without = [rows_by_kind(results)["none", row["checkpointing"]]["peak"] / MB for row in rows]
    with_head = [added(results, row["kl"], row["checkpointing"]) / MB for row in rows]
    axes.barh(labels, without, color=COLORS[5], label="the step without head and KL")
    axes.barh(labels, with_head, left=without, color=COLORS[1], hatch="//", label="head and KL")
    axes.set_xlabel("peak beyond parameters and the optimizer's state, MB")
    figure.suptitle("Peak memory of one training step, GPT-2, 1,024 tokens")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)


PLOTS = {"cpu": plot}


def page(all_results: dict[str, dict]) -> str:
    results = all_results["cpu"]
    config = results["config"]
    positions = results["rows"][0]["record"]["loss_positions"]
    gradient = results["table_gradient"]
    rows = rows_by_kind(results)
    ratio = (added(results, "plain", False) + gradient) / (added(results, "full", False) + gradient)

    def added_mb(kind: str, checkpointing: bool = False) -> str:
        return f"{added(results, kind, checkpointing) / MB:.0f} MB"

    def times(kind: str, checkpointing: bool = False) -> str:
        pairs = zip(rows[kind, checkpointing]["seconds"], rows["plain", False]["seconds"])
        return median_range([a / b for a, b in pairs])

    return md.join(
        f"# {TITLE}",
        md.paragraph(f"""
            With a vocabulary of 50,000 to 150,000 tokens, tensors of positions by vocabulary run a GPU out of
            memory. `--kl=full` computes the loss in chunks of {results['chunk']} positions, with the same
            value and gradient as `--kl=plain`. `--kl=topk:64` keeps the teacher's 64 most likely tokens and
            one bucket for the rest, on both sides. The network is GPT-2 ({config['layers']} layers of width
            {config['width']}, {config['vocab']:,} tokens), one row of {config['context']:,} tokens,
            {positions} of them with a loss."""),
        md.measured(results, "cpu", "about half an hour on one CPU core"),
        table(results),
        md.paragraph("""
            Peak is what one step allocates beyond parameters and the optimizer's state. "Of it head and KL"
            is what they add to the same step without them ("none"), in which the embedding table has its
            gradient too. Times are medians of three turns on a machine that did other things (smallest to
            largest)."""),
        md.picture("cpu", "Peak memory of a step by kind of KL"),
        "## What was found",
        md.bullets([
            f"In chunks, head and KL add {added_mb('full')} instead of {added_mb('plain')}. Counted with the "
            f"gradient of the embedding table ({gradient / MB:.0f} MB), which no way of computing the loss "
            f"avoids, it is {ratio:.1f} times less.",
            f"Time of a step relative to plain: full {times('full')}, topk:64 {times('topk:64')}. The spread "
            "is as large as the difference.",
            f"topk:64 saves no more memory than full here ({added_mb('topk:64')}): both compute 64 positions "
            "at a time.",
            f"With checkpointing, full adds {added_mb('full', True)}: the peak is then that of the gradients "
            f"at the end of the backward pass, not the head's. It costs {times('full', True)} of plain's "
            "time.",
        ]),
    )
