"""Tables, picture and page of speculative decoding."""
import statistics

from experiments.common import page as md
from experiments.common.plots import legend_below, series_style
from experiments.common.results import by_row, markdown_table, mean_range

TITLE = "Speculative decoding: drafted by diffusion, verified by an AR model"
SUMMARY = "Tokens per forward pass of lossless decoding, verified by the student itself or by its teacher"
SAMPLERS = (
    "verifier=self",
    "verifier=self temperature=0",
    "verifier=teacher",
    "verifier=teacher temperature=0",
)
SAMPLED = ("verifier=self", "verifier=teacher")


def last(runs: list[dict], sampler: str, metric: str) -> list[float]:
    """By seed, a metric after the last update."""
    return [run["points"][-1][sampler][metric] for run in runs]


def ar_loss(runs: list[dict]) -> list[float]:
    """By seed, the student's validation NLL as an AR model, minus its teacher's."""
    return [run["points"][-1]["ar_nats"] - run["teacher"]["val_nats"] for run in runs]


def speedups(results: dict, name: str, verifier: str) -> list[float]:
    """By seed, how many times as fast as AR with its cache, one text at a time: the median of the turns."""
    found = []
    for run in results["speeds"]:
        if run["name"] == name:
            pairs = zip(run["seconds"]["ar"], run["seconds"][verifier])
            found.append(statistics.median(ar / ours for ar, ours in pairs))
    return found


def table(results: dict) -> str:
    """Markdown: one row per conversion, after the last update."""
    is_checked = "valid" in results["runs"][0]["teacher"]
    header = ["", "`tok_per_fwd`, verified by itself", "greedy", "by the teacher", "greedy",
              "`positions_per_tok`, itself", "teacher", "`val_nats` as an AR model minus the teacher's"]
    if is_checked:
        header += ["`valid`, itself", "teacher"]
    rows = []
    for name, runs in by_row(results["runs"]).items():
        cells = [mean_range(last(runs, sampler, "tok_per_fwd"), 2) for sampler in SAMPLERS]
        cells += [mean_range(last(runs, sampler, "positions_per_tok"), 1) for sampler in SAMPLED]
        cells.append(mean_range(ar_loss(runs)))
        if is_checked:
            cells += [mean_range(last(runs, sampler, "valid"), 2) for sampler in SAMPLED]
        rows.append([name, *cells])
    return markdown_table(header, rows)


def speed_table(results: dict) -> str:
    """Markdown: one row per student; times as fast as AR with its cache, one text at a time."""
    rows = []
    for name in dict.fromkeys(run["name"] for run in results["speeds"]):
        ar = [
            1000 * statistics.median(run["seconds"]["ar"]) for run in results["speeds"] if run["name"] == name
        ]
        cells = [mean_range(speedups(results, name, verifier), 2) for verifier in ("self", "teacher")]
        rows.append([name, mean_range(ar, 2), *cells])
    header = ["", "AR, ms per token", "verified by itself, times as fast", "by the teacher, times as fast"]
    return markdown_table(header, rows)


def plot(results: dict, figure) -> None:
    """Tokens per forward pass against training tokens: one line per conversion, a band over its seeds."""
    titles = {
        "verifier=self": "verified by the student itself",
        "verifier=teacher": "verified by its teacher",
    }
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (sampler, title) in zip(panels, titles.items()):
        for index, (name, runs) in enumerate(by_row(results["runs"]).items()):
            x, mean, low, high = [], [], [], []
            for points in zip(*(run["points"] for run in runs)):
                values = [point[sampler]["tok_per_fwd"] for point in points]
                x.append(statistics.mean(point["tokens"] for point in points) / 1000)
                mean.append(statistics.mean(values))
                low.append(min(values))
                high.append(max(values))
            style = series_style(index)
            axes.plot(x, mean, label=name, **style)
            axes.fill_between(x, low, high, alpha=0.12, color=style["color"])
        axes.set(xlabel="thousands of response tokens trained on", title=title)
    panels[0].set_ylabel("tokens per forward pass")
    figure.suptitle("Speculative decoding while the student learns (temperature 1)")
    legend_below(figure, panels[0])


PLOTS = {"story_world": plot, "tinystories": plot}


def page(all_results: dict[str, dict]) -> str:
    story_world = all_results["story_world"]
    real_text = all_results["tinystories"]
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            Speculative decoding is lossless with respect to its verifier: sampled text has the verifier's
            distribution, whatever the student drafts, and greedy text is the verifier's, token for token. So
            the question is only how many tokens a forward pass yields. The verifier is the student itself, as
            an AR model (one forward pass per iteration), or its teacher (two). All rows learn from training
            stories with all of a block masked, teacher targets (except "one-hot") and weight mean; "prefixes"
            has the setting of `--warm_steps`; "clean 0.5" is `--clean_weight=0.5`, which also trains the
            student as an AR model. Cells are mean (smallest to largest) over three seeds."""),
        "## The story world",
        md.measured(story_world, "story_world", "about an hour on two CPU cores"),
        md.paragraph(f"After {updates_of(story_world)}, 64 stories per number."),
        table(story_world),
        md.picture("story_world", "Tokens per forward pass while the student learns"),
        md.paragraph("Seconds, one text at a time, on one core of a small machine whose times scatter:"),
        speed_table(story_world),
        "### What was found",
        md.bullets(story_world_findings(story_world)),
        "## TinyStories",
        md.measured(real_text, "tinystories", "50 minutes on two CPU cores"),
        md.paragraph(f"2,048 BPE tokens, 128 positions, width 192. After {updates_of(real_text)}."),
        table(real_text),
        speed_table(real_text),
        md.picture("tinystories", "The same picture on TinyStories"),
        "### What was found on TinyStories",
        md.bullets(real_text_findings(real_text)),
    )


def updates_of(results: dict) -> str:
    point = results["runs"][0]["points"][-1]
    return f"{point['step']} updates ({point['tokens'] / 1000:.0f}k response tokens)"


def story_world_findings(results: dict) -> list[str]:
    rows = by_row(results["runs"])

    def cell(name: str, sampler: str, metric: str, digits: int = 2) -> str:
        return mean_range(last(rows[name], sampler, metric), digits)

    begin = [run["points"][0]["verifier=self"]["tok_per_fwd"] for run in rows["block 4, clean 0.5"]]
    growth = {}
    for sampler in SAMPLED:
        gained = []
        for run in rows["block 8, clean 0.5"]:
            half, end = run["points"][-2:]
            gained.append(end[sampler]["tok_per_fwd"] - half[sampler]["tok_per_fwd"])
        growth[sampler] = statistics.mean(gained)
    return [
        f"Verified by itself the student makes {cell('block 4, clean 0.5', 'verifier=self', 'tok_per_fwd')} "
        "tokens per forward pass at block 4 and "
        f"{cell('block 8, clean 0.5', 'verifier=self', 'tok_per_fwd')} at block 8, from "
        f"{mean_range(begin, 2)} before any conversion (block 4).",
        f"Verified by its teacher it makes {cell('block 4, clean 0.5', 'verifier=teacher', 'tok_per_fwd')} "
        f"and {cell('block 8, clean 0.5', 'verifier=teacher', 'tok_per_fwd')}. Both still improve at the "
        f"end: block 8 gained {growth['verifier=self']:.2f} and {growth['verifier=teacher']:.2f} in the "
        "second half of the training.",
        "`--clean_weight=0.5` matters for a student that verifies itself and learns with all of a block "
        f"masked: at block 8 `valid` is {cell('block 8, clean 0.5', 'verifier=self', 'valid')} with it and "
        f"{cell('block 8', 'verifier=self', 'valid')} without. With prefixes shown it is not needed: "
        f"{cell('block 4, prefixes', 'verifier=self', 'valid')}.",
        "The target hardly matters: one-hot targets give "
        f"{cell('block 4, one-hot', 'verifier=self', 'tok_per_fwd')} at block 4, the teacher's "
        f"{cell('block 4', 'verifier=self', 'tok_per_fwd')}.",
        f"Block 16 needs more training than this: {cell('block 16', 'verifier=self', 'tok_per_fwd')} tokens "
        f"per forward pass at {cell('block 16', 'verifier=self', 'positions_per_tok', 1)} positions per "
        f"token, and `valid` {cell('block 16', 'verifier=self', 'valid')}.",
        "Forward passes are not seconds. On one CPU core, with a network this small, self-verification is "
        f"{mean_range(speedups(results, 'block 4, clean 0.5', 'self'), 2)} times as fast as the AR loop at "
        f"block 4 and {mean_range(speedups(results, 'block 8, clean 0.5', 'self'), 2)} at block 8: **no "
        "gain**. A forward pass that drafts after each possible number of accepted tokens processes 20 "
        "positions at block 4 and 72 at block 8.",
    ]


def real_text_findings(results: dict) -> list[str]:
    runs = by_row(results["runs"])["block 4, clean 0.5"]

    def at(k: int) -> str:
        return mean_range([run["points"][k]["verifier=self"]["tok_per_fwd"] for run in runs], 2)

    steps = [point["step"] for point in runs[0]["points"]]
    teacher = statistics.mean(run["teacher"]["val_nats"] for run in runs)
    return [
        f"A token of this text has {teacher:.1f} nats where one of the story world has 0.3, and a draft does "
        "not know the draft before it: few are accepted. Verified by itself the student makes "
        f"{mean_range(last(runs, 'verifier=self', 'tok_per_fwd'), 2)} tokens per forward pass, greedily "
        f"{mean_range(last(runs, 'verifier=self temperature=0', 'tok_per_fwd'), 2)}.",
        f"Verified by the teacher it makes {mean_range(last(runs, 'verifier=teacher', 'tok_per_fwd'), 2)}.",
        f"Twice the training adds little: {at(-2)} after {steps[-2]} updates, {at(-1)} after {steps[-1]}.",
        f"In seconds it is {mean_range(speedups(results, 'block 4, clean 0.5', 'self'), 2)} times as fast as "
        f"the AR loop: **{1 / statistics.mean(speedups(results, 'block 4, clean 0.5', 'self')):.1f} times "
        "slower**.",
    ]
