"""Tables, picture and page of the methods: tokens until a student generates nearly what its teacher does."""
import statistics
from collections.abc import Callable

from experiments.common import page as md
from experiments.common.plots import plain_log_axis, series_style
from experiments.common.results import (
    gap_to_teacher,
    interpolate_at_cost,
    markdown_table,
    mean_range,
    ratio_cell,
    spent_to_reach,
    tokens_cell,
)

TITLE = "What conversion costs, method by method"
SUMMARY = "Training tokens until a student's text is near its teacher's, for OPDLM and its relatives"
COSTS = (1, 1.5)                # tokens per forward pass at which text is compared
NATS = (0.25, 0.1, 0.05)        # bounds on the nats above the teacher's
PLOT_COST = 1.5
AXES = {
    "tokens": "response tokens trained on",
    "loss_positions": "positions in a loss",
    "flops": "FLOPs with rollouts and teacher",
}
# By seed, of a copy of the teacher with a [MASK] vector and no update: at 1 token per forward pass, on the
# stories of the evaluations, nats above the teacher's; `valid` of it and of the teacher. Measured apart: no
# results file has it.
UNTRAINED_GAPS = (0.0998, 0.0372, 0.0802)
UNTRAINED_VALID = ((0.648, 0.953), (0.859, 0.969), (0.688, 0.961))
UNTRAINED_GAP_TINYSTORIES = 0.63        # one seed, with the default rule


def gap_of(run: dict, metric: str, cost: float) -> Callable:
    """gap(point) of a run, see gap_to_teacher."""
    return gap_to_teacher(run, metric, cost, run["settings"]["samplers"])


def row_name(run: dict) -> str:
    """The run's row: its name without the learning rate."""
    return run["settings"]["name"].partition(", lr")[0]


def rate_of(run: dict) -> float:
    return run["settings"]["flags"]["lr"]


def best_rates(runs: list[dict], cost: float) -> dict[str, float]:
    """By row the rate that comes within 0.1 nats first, seed 0; if none does, the one that ends nearest."""
    def score(run):
        gap = gap_of(run, "gen_nats", cost)
        tokens, reached = spent_to_reach(run["points"], gap, 0.1)
        return (0, tokens) if reached else (1, gap(run["points"][-1]))

    best = {}
    for run in runs:
        name = row_name(run)
        if run["settings"]["seed"] == 0 and (name not in best or score(run) < score(best[name])):
            best[name] = run
    return {name: rate_of(run) for name, run in best.items()}


def rows_of(results: dict, cost: float) -> dict[str, list[dict]]:
    """By row the runs, one per seed, at the rate that is best at this cost."""
    rows = {}
    for name, rate in best_rates(results["runs"], cost).items():
        rows[name] = [run for run in results["runs"] if row_name(run) == name and rate_of(run) == rate]
    return rows


def spent(
    runs: list[dict], metric: str, bound: float, cost: float, axis: str = "tokens"
) -> list[tuple[float, bool]]:
    """By seed, what was spent until the metric was within the bound of the teacher's."""
    return [spent_to_reach(run["points"], gap_of(run, metric, cost), bound, axis) for run in runs]


def end_values(runs: list[dict], metric: str, cost: float) -> list[float]:
    """By seed, the metric at the last evaluation."""
    values = []
    for run in runs:
        values.append(interpolate_at_cost(run["points"][-1], metric, cost, run["settings"]["samplers"]))
    return values


def table(results: dict) -> str:
    """Markdown: one row per method; thousands of tokens to come near the teacher, and the last evaluation
    at 1.5."""
    metrics = [metric for metric in ("gen_nats", "valid") if metric in results["runs"][0]["teacher"]]
    bounds = [("gen_nats", bound, 1) for bound in NATS]
    bounds.append(("gen_nats", 0.1, 1.5))
    if "valid" in metrics:
        bounds += [("valid", 0.05, cost) for cost in COSTS]
    header = ["method, alignment", "rates"]
    header += [f"`{metric}` within {bound} at {cost}" for metric, bound, cost in bounds]
    header += [f"`{metric}` at the end, at 1.5" for metric in metrics]
    rows_at = {cost: rows_of(results, cost) for cost in COSTS}
    rows = []
    for name in rows_at[1.5]:
        rates = ", ".join(str(rate_of(rows_at[cost][name][0])) for cost in COSTS)
        cells = [
            tokens_cell(spent(rows_at[cost][name], metric, bound, cost)) for metric, bound, cost in bounds
        ]
        cells += [mean_range(end_values(rows_at[1.5][name], metric, 1.5)) for metric in metrics]
        rows.append([name, rates, *cells])
    return markdown_table(header, rows)


def short_table(results: dict) -> str:
    """Markdown, for real text: tokens to come within half and a quarter of a nat at 1 token per forward pass,
    and what is left at the end."""
    header = ["method, alignment", "rate", "within 0.5", "within 0.25", "tokens in all",
              "`gen_nats` above the teacher's", "`val_nats` above the teacher's"]
    rows = []
    for name, runs in rows_of(results, 1).items():
        tokens = statistics.mean(run["points"][-1]["tokens"] for run in runs)
        val_nats = [run["points"][-1]["val_nats"] - run["teacher"]["val_nats"] for run in runs]
        rows.append([
            name,
            str(rate_of(runs[0])),
            tokens_cell(spent(runs, "gen_nats", 0.5, 1)),
            tokens_cell(spent(runs, "gen_nats", 0.25, 1)),
            f"{tokens / 1000:.0f}k",
            mean_range(end_gaps(runs), 2),
            mean_range(val_nats),
        ])
    return markdown_table(header, rows)


def end_gaps(runs: list[dict], cost: float = 1) -> list[float]:
    """By seed, the nats above the teacher's at the last evaluation."""
    return [gap_of(run, "gen_nats", cost)(run["points"][-1]) for run in runs]


def ratio(results: dict, ours: str, theirs: str, metric: str, bound: float, cost: float) -> str:
    """By seed, tokens of the row `theirs` until it is within the bound, over those of the row `ours`."""
    rows = rows_of(results, cost)
    return ratio_cell(spent(rows[ours], metric, bound, cost), spent(rows[theirs], metric, bound, cost))


def plot(results: dict, figure) -> None:
    """gen_nats above the teacher's at 1.5 tokens per forward pass, against what was spent."""
    rows = rows_of(results, PLOT_COST)
    aligns = [align for align in ("ar", "paper") if any(name.endswith(align) for name in rows)]
    figure.set_size_inches(13, 4.2 * len(aligns) + 0.8)
    styles = {}
    panels = figure.subplots(len(aligns), 3, sharex="col", sharey=True, squeeze=False)
    for line, align in zip(panels, aligns):
        title = f"align={align}" + " (half the updates)" * (align == "paper")
        for axes, (axis, label) in zip(line, AXES.items()):
            for name, runs in rows.items():
                method = f"{name} (align=paper)" if "published" in name else name.partition(",")[0]
                if not name.endswith(align) and not (align == aligns[-1] and "published" in name):
                    continue
                style = styles.setdefault(method, series_style(len(styles)))
                plot_runs(axes, runs, axis, method, style)
            axes.set(xscale="log", yscale="log", xlabel=label, title=title)
            plain_log_axis(axes.yaxis)
        line[0].set_ylabel("nats per token above\nthe teacher's")
    figure.suptitle(
        "Generated text at 1.5 tokens per forward pass: distance to the teacher while the student learns"
    )
    handles = {}
    for axes in panels[:, 0]:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, frameon=False)


def plot_runs(axes, runs: list[dict], axis: str, label: str, style: dict) -> None:
    """The mean of the seeds as a line, smallest to largest as a band."""
    gaps = [gap_of(run, "gen_nats", PLOT_COST) for run in runs]
    x, mean, low, high = [], [], [], []
    for points in zip(*(run["points"] for run in runs)):
        values = [max(gap(point), 1e-3) for gap, point in zip(gaps, points)]
        x.append(statistics.mean(point[axis] for point in points))
        mean.append(statistics.mean(values))
        low.append(min(values))
        high.append(max(values))
    axes.plot(x, mean, label=label, **style)
    axes.fill_between(x, low, high, alpha=0.12, color=style["color"])


PLOTS = {"story_world": plot, "tinystories": plot}


def page(all_results: dict[str, dict]) -> str:
    story_world = all_results["story_world"]
    real_text = all_results["tinystories"]
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            How many response tokens a student is trained on before its generated text is near its teacher's.
            Text is always revealed from the left, whatever the method, and compared at equal cost: at 1 or at
            1.5 tokens per forward pass. `gen_nats` is the NLL of generated text under the AR teacher, `valid`
            the share of stories that break no law of the story world. Cells are mean (smallest to largest)
            over three seeds; "> n" means that some seed did not get there with its n thousand tokens."""),
        "## The story world",
        md.measured(story_world, "story_world", "three to four hours on two CPU cores"),
        warnings(story_world),
        rows_explained(),
        md.details("All rows", table(story_world)),
        md.picture("story_world", "Nats above the teacher's against tokens, positions and FLOPs"),
        "### What was found",
        md.bullets(story_world_findings(story_world)),
        "## TinyStories",
        md.paragraph("""
            2,048 BPE tokens, 128 positions, width 192; three seeds, the better of two learning rates, at 1
            token per forward pass. At more, no row is near its teacher yet."""),
        md.measured(real_text, "tinystories", "75 minutes on two CPU cores"),
        md.warning(
            [
                f"An untrained student starts at about {UNTRAINED_GAP_TINYSTORIES} nats above its teacher "
                "with align=ar, context=causal (one seed, the default rule), and at about 12 with the "
                'published layout. So the column "within 0.5" mostly shows where a row starts, and ratios of '
                "its cells say nothing about a method.",
                "opdlm and sft had four updates per rollout, sdar and warm_start one; the published row had "
                "four times the updates.",
                "This table is to be measured anew.",
            ]
        ),
        short_table(real_text),
        md.picture("tinystories", "The same picture on TinyStories"),
        "### What was found on TinyStories",
        md.bullets(real_text_findings(real_text)),
    )


def warnings(results: dict) -> str:
    gaps = ", ".join(f"{gap:.4f}" for gap in UNTRAINED_GAPS[:-1]) + f" and {UNTRAINED_GAPS[-1]:.4f}"
    valid = ", ".join(f"{student:.3f} ({teacher:.3f})" for student, teacher in UNTRAINED_VALID)
    published = [run for run in rows_of(results, 1)["sdar, published"] if run["settings"]["seed"] == 0][0]
    gap = gap_of(published, "gen_nats", 1)
    before, last = published["points"][-2:]
    return md.warning([
        "**An untrained copy of the teacher already meets `gen_nats` within 0.1 at 1 token per forward "
        f"pass** with align=ar, context=causal: gaps {gaps} on the three seeds. So the columns of `gen_nats` "
        "at 1 say nothing about a method. Training first makes the student worse, and the columns count how "
        "long the repair takes; that is why every align=ar row was best at the grid's lowest rate there. "
        f"`valid` of the untrained student (of its teacher) is {valid}: the columns of `valid` and of "
        "`gen_nats` at 1.5 are not met by it.",
        "Rows with align=paper had half the updates of the others (240 instead of 480) and were still "
        "improving steeply when they ended; the published row had 2400.",
        "Rows on generated text (on-policy: opdlm, opdlm-off, prefix; the teacher's text: kd, sft) had four "
        "updates per rollout, rows on stories one. So they learned from older texts and from fewer prompt "
        "lengths.",
        "Learning rates were chosen on seed 0 with the stories that the numbers are of.",
        f"Rates are constant. The published row becomes worse again after {before['step']} updates (seed 0 "
        f"at 1: {gap(before):.3f} nats above its teacher, then {gap(last):.3f} after {last['step']}), so its "
        "lower bound for 0.05 is partly due to that.",
        "**These tables are to be measured anew.**",
    ])


def rows_explained() -> str:
    return md.paragraph("""
        Rows are the presets of train_tiny.py (opdlm, opdlm-off, kd, sft, sdar), and: prefix, OPDLM whose
        states show a random prefix of each block; warm_start, what `--warm_steps` does: training stories,
        prefix states, the teacher's distributions as targets, the first masked position of a block counting 8
        times; warm_start_x4, the same with each text in all 4 such states, its tokens counted once;
        published, the SDAR-style conversion as its paper has it (align=paper, context=block). "ar" and
        "paper" is `--align`; context is causal in all rows but the last; the optimizer is Muon in all.
        "rates" are the learning rates that were best at 1 and at 1.5.""")


def story_world_findings(results: dict) -> list[str]:
    at_1 = rows_of(results, 1)
    at_1_5 = rows_of(results, 1.5)
    teacher = statistics.mean(run["teacher"]["valid"] for run in at_1["warm_start, ar"])

    def tokens(name: str, metric: str, bound: float, cost: float) -> str:
        rows = at_1 if cost == 1 else at_1_5
        return tokens_cell(spent(rows[name], metric, bound, cost))

    def end(name: str, metric: str = "valid") -> str:
        return mean_range(end_values(at_1_5[name], metric, 1.5))

    def seed_0(name: str) -> dict:
        for run in results["runs"]:
            if row_name(run) == name and run["settings"]["seed"] == 0 and rate_of(run) == 0.01:
                return run

    def seed_0_tokens(name: str, bound: float) -> float:
        return spent([seed_0(name)], "gen_nats", bound, 2)[0][0]

    at_2 = []
    for bound in (1.0, 0.75):
        ours = seed_0_tokens("warm_start, ar", bound)
        theirs = seed_0_tokens("sdar, published", bound)
        at_2.append(f"within {bound} nats {ours / 1000:.0f}k against {theirs / 1000:.0f}k tokens "
                    f"({theirs / ours:.1f} times)")
    halves = end_gaps_by_step(seed_0("warm_start, paper"))
    return [
        f"By `valid` at 1 token per forward pass, within 0.05 of the teacher's {teacher:.3f}, warm_start "
        f"needs {tokens('warm_start, ar', 'valid', 0.05, 1)} tokens, and SDAR as published "
        f"{tokens('sdar, published', 'valid', 0.05, 1)}, "
        f"{ratio(results, 'warm_start, ar', 'sdar, published', 'valid', 0.05, 1)} times as many by seed.",
        "By `gen_nats` within 0.1 at 1.5 tokens per forward pass it is "
        f"{tokens('warm_start, ar', 'gen_nats', 0.1, 1.5)} against "
        f"{tokens('sdar, published', 'gen_nats', 0.1, 1.5)}, "
        f"{ratio(results, 'warm_start, ar', 'sdar, published', 'gen_nats', 0.1, 1.5)} times. SDAR with "
        f"align=ar, context=causal needs {tokens('sdar, ar', 'gen_nats', 0.1, 1.5)}.",
        "The advantage shrinks where diffusion saves forward passes. At 2 tokens per forward pass (seed 0, "
        f"rate 0.01, a coarse interpolation) it is {' and '.join(at_2)}.",
        f"At the end of its 480 updates warm_start has `valid` {end('warm_start, ar')} at 1.5, SDAR with "
        f"align=ar {end('sdar, ar')}, SDAR as published {end('sdar, published')} after five times the "
        f"updates, opdlm {end('opdlm, ar')}.",
        "The on-policy rows end with the lowest `valid` of the align=ar rows, and need more than "
        f"{tokens('opdlm, ar', 'gen_nats', 0.1, 1.5).removeprefix('> ')} tokens to within 0.1 nats at 1.5. "
        "They had four updates per rollout: this says nothing about on-policy text as such.",
        f"With align=paper, warm_start (seed 0, rate 0.01) fell from {halves[0]:.1f} to {halves[1]:.2f} nats "
        "above its teacher over the last doubling of its tokens, at 1 token per forward pass. Where it "
        "would have ended with the budget of the others was not measured here.",
        "Each text in all 4 states (warm_start_x4) needs "
        f"{tokens('warm_start_x4, ar', 'gen_nats', 0.1, 1.5)} tokens to within 0.1 at 1.5, counting a text "
        "once; it costs four times the arithmetic per token.",
    ]


def end_gaps_by_step(run: dict) -> list[float]:
    """The nats above the teacher's at the last two evaluations, at 1 token per forward pass."""
    gap = gap_of(run, "gen_nats", 1)
    return [gap(point) for point in run["points"][-2:]]


def real_text_findings(results: dict) -> list[str]:
    rows = rows_of(results, 1)

    def left(name: str) -> str:
        return mean_range(end_gaps(rows[name]), 2)

    pairs = list(zip(end_gaps(rows["opdlm, ar"]), end_gaps(rows["sft, ar"])))
    lower = sum(ours < theirs for ours, theirs in pairs)
    return [
        f"After as many tokens, text of opdlm is nearer to the teacher than text of sft for {lower} of "
        f"{len(pairs)} seeds: {left('opdlm, ar')} against {left('sft, ar')} nats above it. Whether by the "
        "student's text, the visited states or the teacher's distributions was not taken apart.",
        f"sdar with align=ar ends at {left('sdar, ar')}, level with opdlm within the spread of seeds.",
        f"warm_start, which has no text of the student's, ends nearest: {left('warm_start, ar')}.",
        f"SDAR as published has {left('sdar, published')} left after four times the tokens.",
        "The lower of the two rates, 0.005, was the better one for every row; lower ones were not tried.",
    ]
