"""Tables, picture and page of speed and memory on one GPU. Without results the page says so."""
import statistics

from experiments.common import page as md
from experiments.common.plots import legend_below, series_style
from experiments.common.results import markdown_table, median_range

TITLE = "Speed and memory on a GPU"
SUMMARY = "GPT-2 medium's shape on a GPU: MFU, tokens per second, peak memory, break-even with AR"
COMMAND = "```bash\npython -m experiments.performance.run\n```"
GB = 1e9


# 1. numbers -----------------------------------------------------------------------------------------------

def training_rows(results: dict) -> dict[tuple[str, bool], dict]:
    """The rows of training by piece, and whether they are compiled."""
    return {(row["piece"], row["compiled"]): row for row in results["training"]}


def decoding_rows(results: dict) -> dict[tuple[int, str], dict]:
    """The rows of decoding by batch and mode."""
    return {(row["batch"], row["mode"]): row for row in results["decoding"]}


def batches_of(results: dict) -> list[int]:
    return list(dict.fromkeys(row["batch"] for row in results["decoding"]))


def mfu(row: dict, results: dict) -> list[float]:
    """Model FLOPs per second over those of the matrix product, turn by turn; empty without FLOPs."""
    rate = results["matmul"]["flops"]
    shares = []
    for seconds, record in zip(row["seconds"], row["records"]):
        if "flops" in record:
            shares.append(record["flops"] / seconds / rate)
    return shares


def tokens_per_second(row: dict) -> list[float]:
    """Of all rows of the batch together, turn by turn; empty where a call has no tokens."""
    speeds = []
    for seconds, record in zip(row["seconds"], row["records"]):
        if "tokens" in record:
            speeds.append(record["tokens"] / seconds)
    return speeds


def seconds_per_pass(row: dict) -> list[float]:
    """Turn by turn. The pass over the prompt counts as one."""
    return [seconds / record["forwards"] for seconds, record in zip(row["seconds"], row["records"])]


def tokens_per_pass(row: dict) -> float:
    """Tokens per forward pass and row, of the first turn: greedy text is the same in all."""
    record = row["records"][0]
    return record["tokens"] / row["batch"] / record["forwards"]


def break_even(results: dict, batch: int, mode: str) -> list[float]:
    """Tokens per pass and row from which a way of decoding is faster than AR, turn by turn.

    AR has one token per pass: it is the time of a pass over the time of an AR pass.
    """
    rows = decoding_rows(results)
    passes = seconds_per_pass(rows[batch, mode])
    ar_passes = seconds_per_pass(rows[batch, "AR"])
    return [seconds / ar_seconds for seconds, ar_seconds in zip(passes, ar_passes)]


def speed_at(results: dict, batch: int, tokens: float) -> float:
    """Tokens per second of speculative decoding, where it keeps so many `tokens` per pass and row."""
    row = decoding_rows(results)[batch, "speculative"]
    return batch * tokens / statistics.median(seconds_per_pass(row))


# 2. tables ------------------------------------------------------------------------------------------------

def gigabytes(row: dict | None) -> str:
    if row is None or row["peak"] is None:
        return "-"
    return f"{row['peak'] / GB:.1f}"


def whole(values: list[float]) -> str:
    """The median without decimals."""
    return f"{statistics.median(values):,.0f}" if values else "-"


def training_table(results: dict) -> str:
    """Markdown: one row per piece; the columns at the right are of compiled blocks."""
    rows = training_rows(results)
    header = ["piece", "ms", "tokens/s", "MFU", "peak, GB", "compiled / plain", "peak, GB, compiled",
              "first two compiled calls, s"]
    cells = []
    for (piece, compiled), row in rows.items():
        if compiled:
            continue
        twin = rows.get((piece, True))
        milliseconds = [seconds * 1000 for seconds in row["seconds"]]
        shares = mfu(row, results)
        ratio = "-"
        first = "-"
        if twin:
            pairs = zip(twin["seconds"], row["seconds"])
            ratio = median_range([compiled_seconds / seconds for compiled_seconds, seconds in pairs])
            first = f"{twin['first']:.0f}"
        cells.append([
            piece,
            median_range(milliseconds, 0),
            whole(tokens_per_second(row)),
            median_range(shares, 3) if shares else "-",
            gigabytes(row),
            ratio,
            gigabytes(twin),
            first,
        ])
    return markdown_table(header, cells)


def decoding_table(results: dict) -> str:
    """Markdown: one row per batch and mode. Of speculative decoding only what acceptance does not decide."""
    header = ["batch, mode", "ms per pass", "tokens per pass and row", "tokens/s", "times as fast as AR",
              "peak, GB"]
    rows = decoding_rows(results)
    cells = []
    for (batch, mode), row in rows.items():
        milliseconds = [seconds * 1000 for seconds in seconds_per_pass(row)]
        tokens = "-"
        speed = "-"
        ratio = "-"
        if mode != "speculative":
            tokens = f"{tokens_per_pass(row):.2f}"
            speed = whole(tokens_per_second(row))
            pairs = zip(tokens_per_second(row), tokens_per_second(rows[batch, "AR"]))
            ratio = median_range([own / ar for own, ar in pairs])
        cells.append([
            f"{batch}, {mode}",
            median_range(milliseconds),
            tokens,
            speed,
            ratio,
            gigabytes(row),
        ])
    return markdown_table(header, cells)


def break_even_table(results: dict) -> str:
    """Markdown: one row per batch."""
    most = results["block"]
    header = ["batch", "AR, tokens/s", "break-even, speculative", f"break-even, {results['rule']}"]
    header += [f"speculative at {tokens}, tokens/s" for tokens in range(1, most + 1)]
    cells = []
    for batch in batches_of(results):
        ar = decoding_rows(results)[batch, "AR"]
        row = [
            str(batch),
            whole(tokens_per_second(ar)),
            median_range(break_even(results, batch, "speculative")),
            median_range(break_even(results, batch, results["rule"])),
        ]
        for tokens in range(1, most + 1):
            row.append(f"{speed_at(results, batch, tokens):,.0f}")
        cells.append(row)
    return markdown_table(header, cells)


def plot(results: dict, figure) -> None:
    """Speed relative to AR over tokens per pass, a line per batch: it is AR's where a line crosses 1."""
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    modes = ("speculative", results["rule"])
    tokens = range(1, results["block"] + 1)
    for axes, mode in zip(panels, modes):
        for index, batch in enumerate(batches_of(results)):
            needed = statistics.median(break_even(results, batch, mode))
            speeds = [kept / needed for kept in tokens]
            axes.plot(tokens, speeds, label=f"batch {batch}", **series_style(index))
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xlabel="tokens kept per forward pass and row", title=mode)
    panels[0].set_ylabel("tokens per second / AR's")
    legend_below(figure, panels[0])
    figure.suptitle("Speed relative to AR, by the tokens that a forward pass keeps")


PLOTS = {"gpu": plot}


# 3. page --------------------------------------------------------------------------------------------------

METHOD = (
    """
    **Networks.** Random weights: they decide neither the time of an update nor that of a forward pass.
    The student is that of `train_tiny.py` on a GPU: bf16 by autocast, weights and optimizer in float32.
    The teacher has bf16 weights, and the loss is that of `--kl=full`. `sample.py` decodes in float32,
    so its times differ.""",
    """
    **Time.** Two calls come first and are not counted; they compile and allocate. Then the calls that
    are compared take turns, and each is timed until the GPU has finished. Reported are the median
    (smallest to largest) of the turns; ratios are taken within a turn.""",
    """
    **MFU** is model FLOPs per second over the *measured* rate of one large square matrix product in the
    same number format, not over a nominal peak. FLOPs are the least that an update needs, counted as in
    the log of every run ([report/metrics.py](../../report/metrics.py)). The optimizer's time counts,
    its FLOPs do not.""",
    """
    **Distillation** is an update on training text: teacher, student, loss, backward pass, optimizer. An
    update on the student's own text needs the time of a rollout in addition.""",
    """
    **AR** is a greedy loop with a cache that does nothing else, on the same network. All decoding is
    greedy.""",
    """
    **Acceptance is not measured.** How many drafts are accepted depends on the weights, and with random
    ones it means nothing. Therefore the time of a forward pass is measured, in which the student
    verifies its drafts and makes the next ones. The *break-even* is this time over that of an AR pass:
    the tokens that a pass must keep on average to be as fast as AR. The speed at a given number of
    tokens per pass follows from the time of a pass. In a batch, tokens per pass are those of all rows,
    divided by the rows and by the passes of the batch, which ends with its slowest row.""",
    """
    **Block diffusion.** With random weights the default rule reveals one token per pass, which is its
    slowest case. Its break-even is that of such passes. The rules `static` reveal a fixed number of
    tokens per step; more of their passes also write a finished block, and take longer.""",
    """
    **Peak** is the largest sum of all tensors on the GPU during a call, weights and optimizer included,
    without what the allocator holds in reserve.""",
)


def page(all_results: dict[str, dict]) -> str:
    if "gpu" not in all_results:
        return page_without_results()
    results = all_results["gpu"]
    config = results["config"]
    matmul = results["matmul"]
    return md.join(
        f"# {TITLE}",
        md.paragraph(f"""
            {config['layers']} layers of width {config['width']} with {config['heads']} heads,
            {config['vocab']:,} tokens, context {config['context']:,}. An update has {results['batch']} rows
            of the whole context; texts are {results['response']} tokens after a prompt of
            {results['prompt']}, in blocks of {results['block']}. The product of two {matmul['dtype']}
            matrices of {matmul['size']:,} x {matmul['size']:,} runs at {matmul['flops'] / 1e12:.3g}
            TFLOP/s."""),
        md.measured(results, "gpu", f"{results['minutes']:.1f} minutes"),
        "## How it is measured",
        md.bullets(METHOD),
        "## Training",
        training_table(results),
        "## Decoding",
        decoding_table(results),
        "## Break-even",
        md.paragraph(f"""
            Tokens per pass and row from which a way of decoding is faster than AR. A forward pass of
            speculative decoding keeps 1 to {results['block']} tokens."""),
        break_even_table(results),
        md.picture("gpu", "Tokens per second relative to AR, over tokens kept per forward pass"),
        "## What was found",
        md.bullets(findings(results)),
    )


def page_without_results() -> str:
    """The page of an experiment that has not been run: what it measures and how, without any number."""
    return md.join(
        f"# {TITLE}",
        md.paragraph("**Not measured yet: no GPU result is published.** On a machine with a GPU this command "
                     "measures it and writes the results file that this page is made of:"),
        COMMAND,
        md.paragraph("""
            The network has the shape of GPT-2 medium. Measured are MFU, tokens per second and peak memory of
            AR pretraining, of distillation updates and of rollouts, with plain and with compiled transformer
            blocks; and AR, block diffusion and speculative decoding at several batch sizes. `--quick` tries
            the same code with a tiny network, also without a GPU; its numbers mean nothing."""),
        "## How it is measured",
        md.bullets(METHOD),
    )


def findings(results: dict) -> list[str]:
    rows = training_rows(results)
    found = []
    for piece in ("AR pretraining", "distillation"):
        share = statistics.median(mfu(rows[piece, False], results))
        found.append(f"MFU of {piece}: {share:.3f}, of the measured rate.")
    for mode in ("speculative", results["rule"]):
        needed = []
        for batch in batches_of(results):
            tokens = statistics.median(break_even(results, batch, mode))
            needed.append(f"{tokens:.2f} at batch {batch}")
        found.append(f"Tokens per pass from which {mode} decoding is faster than AR: {', '.join(needed)}.")
    return found
