"""Tables, picture and page of on-policy text under scarce data."""
import math
import statistics

from experiments.common import page as md
from experiments.common.plots import GREY, legend_below, series_style
from experiments.common.results import markdown_table, mean_range

TITLE = "Where a student's own text pays: few stories"
SUMMARY = "Conversions that have 16, 64, 256 or all stories: training stories, the teacher's text, own text"
FEWEST = 16             # stories of the hardest case
ENOUGH = 256            # stories that teach nearly as much themselves
FEW = 64                # stories that the learning rates are chosen with, and that the predictions are about
COST = 1.5              # tokens per forward pass of the comparison
SAMPLERS = ("reveal=leftmost:1", f"cost={COST}")
FAST = SAMPLERS[1]
COLUMNS = (             # of the table: metric, sampler
    ("valid", SAMPLERS[0]),
    ("valid", FAST),
    ("broken", FAST),
    ("recovery", FAST),
    ("gen_nats", FAST),
)
NOT_MEASURED = "Not measured yet:\n\n```bash\npython -m experiments.on_policy.run\n```"
TEACHER = "teacher's text"
BY_MEAN = "own text, by the mean"   # the student is the running mean of the weights, and it writes the text
# Written before the first run of the experiment, of `valid` at 1.5 tokens per forward pass.
PREDICTIONS = (
    "Own text with 64 stories is within 0.05 of the best row that has all stories.",
    "Both rows on the 64 stories themselves are at least 0.2 below that.",
    "The teacher's fresh text is as good as own text or better, at every number of stories.",
    "With all stories own text is not better than stories.",
    "Own text without any prompt is within 0.05 of own text with 64 stories.",
)
# Written when the learning rates had been chosen, where own text stayed behind the teacher's text.
LATER_PREDICTIONS = (
    "Own text written one token per pass is at least 0.2 above own text by the reveal rule, with 64 stories.",
    "A quarter of the updates on the 64 stories first gains at least 0.1 for own text.",
)
# Written after the rows above had been measured, and a conversion of seed 0 on development stories of the row
# that they are about.
MEAN_PREDICTIONS = (
    "Own text by the running mean is at least 0.1 above own text, with 64 stories.",
    "Own text by the running mean is within 0.05 of the teacher's text, at every number of stories.",
    "Own text by the running mean is within 0.05 of the best row that has all stories, with 64 stories.",
)
ALL_PREDICTIONS = PREDICTIONS + LATER_PREDICTIONS + MEAN_PREDICTIONS


# 1. reading the results ---------------------------------------------------------------------------------

def row_of(run: dict) -> str:
    return run["settings"]["name"].removeprefix("trial, ").rpartition(" stories, lr")[0].rpartition(", ")[0]


def count_of(run: dict) -> int | None:
    """The number of stories that a conversion had; None: all."""
    return run["settings"].get("train_stories")


def rate_of(run: dict) -> float:
    return run["settings"]["flags"]["lr"]


def best_rates(trials: list[dict]) -> dict[tuple[str, bool], float]:
    """By row and whether it has all stories: the learning rate with the most valid development stories."""
    best = {}
    for run in trials:
        key = (row_of(run), count_of(run) is None)
        if key not in best or trial_score(run) > trial_score(best[key]):
            best[key] = run
    return {key: rate_of(run) for key, run in best.items()}


def trial_score(run: dict) -> float:
    return run["points"][-1][FAST]["valid"]


def groups(results: dict) -> dict[tuple[str, int | None], list[dict]]:
    """By row and number of stories: the runs, one per seed."""
    found = {}
    for run in results["runs"]:
        if run["settings"]["name"] != "untrained":
            found.setdefault((row_of(run), count_of(run)), []).append(run)
    return found


def values(runs: list[dict], metric: str, sampler: str, step: int = -1) -> list[float]:
    """By seed, a metric of the text of the step-th evaluation."""
    found = [run["points"][step][sampler].get(metric) for run in runs]
    return [value for value in found if value is not None]


def difference(ours: list[dict], theirs: list[dict]) -> str:
    """`valid` of ours minus theirs at COST: mean, and its 95 % interval from pairs of texts with the same
    prompt, random numbers and teacher."""
    pairs = []
    for a, b in zip(ours, theirs):
        texts = zip(a["points"][-1][FAST]["valid_texts"], b["points"][-1][FAST]["valid_texts"])
        pairs += [int(x) - int(y) for x, y in texts]
    mean = statistics.mean(pairs)
    half = 1.96 * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def rounded(difference: float) -> float:
    """With three digits; a small negative one is 0, not -0."""
    return round(difference, 3) + 0.0


# 2. tables ----------------------------------------------------------------------------------------------

def count_name(count: int | None) -> str:
    return "all" if count is None else str(count)


def table(results: dict) -> str:
    """Markdown: one row per row and number of stories."""
    header = ["learns from", "stories", "rate", "`valid` at 1", f"`valid` at {COST}", "`broken`",
              "`recovery`", "`gen_nats`", "`val_nats`", "TFLOP", "seconds"]
    rows = []
    for (row, count), runs in sorted(groups(results).items(), key=lambda item: order(*item[0])):
        cells = text_cells(runs)
        cells.append(mean_range([run["points"][-1]["val_nats"] for run in runs]))
        tera_flops = statistics.mean(run["points"][-1]["flops"] for run in runs) / 1e12
        seconds = statistics.mean(run["points"][-1]["seconds"] for run in runs)
        rows.append([row, count_name(count), str(rate_of(runs[0])), *cells, f"{tera_flops:.2f}",
                     f"{seconds:.0f}"])
    rows.append(["nothing (untrained)", "", "", *control_cells(results), "0", "0"])
    rows.append(["the AR model itself", "all", "", *teacher_cells(results), "", ""])
    return markdown_table(header, rows)


def rates_table(results: dict) -> str:
    """Markdown: `valid` of development stories at COST by learning rate; the chosen rate in bold."""
    rates = sorted({rate_of(run) for run in results["trials"]})
    chosen = best_rates(results["trials"])
    scores = {}
    for run in results["trials"]:
        scores.setdefault((row_of(run), count_of(run)), {})[rate_of(run)] = trial_score(run)
    rows = []
    for (row, count), by_rate in scores.items():
        cells = []
        for rate in rates:
            bold = "**" if rate == chosen[row, count is None] else ""
            cells.append(f"{bold}{by_rate[rate]:.3f}{bold}")
        rows.append([row, count_name(count), *cells])
    return markdown_table(["learns from", "stories", *map(str, rates)], rows)


def order(row: str, count: int | None) -> tuple:
    return (math.inf if count is None else count, row)


def text_cells(runs: list[dict], step: int = -1) -> list[str]:
    """The cells of COLUMNS; empty where no seed has the metric."""
    cells = []
    for metric, sampler in COLUMNS:
        found = values(runs, metric, sampler, step)
        cells.append(mean_range(found, 2) if found else "")
    return cells


def control_cells(results: dict) -> list[str]:
    """The untrained student's cells."""
    runs = [run for run in results["runs"] if run["settings"]["name"] == "untrained"]
    return [*text_cells(runs, step=0), mean_range([run["points"][0]["val_nats"] for run in runs])]


def teacher_cells(results: dict) -> list[str]:
    """The AR model's cells: it writes one token per pass."""
    teachers = [run["teacher"] for run in results["runs"] if run["settings"]["name"] == "untrained"]
    cells = []
    for metric, sampler in COLUMNS:
        is_one_per_pass = sampler == SAMPLERS[0]
        cells.append(mean_range([teacher[metric] for teacher in teachers], 2) if is_one_per_pass else "")
    cells.append(mean_range([teacher["val_nats"] for teacher in teachers]))
    return cells


def plot(results: dict, figure) -> None:
    """`valid` at 1.5 and at 1 token per forward pass against the number of stories."""
    found = groups(results)
    counts = sorted({count for _, count in found if count}) + [None]
    panels = figure.subplots(1, 2, sharey=True)
    for axes, sampler, cost in zip(panels, (FAST, SAMPLERS[0]), (COST, 1)):
        for index, row in enumerate(dict.fromkeys(row for row, _ in found)):
            of_row = [count for count in counts if (row, count) in found]
            by_count = [values(found[row, count], "valid", sampler) for count in of_row]
            means = [statistics.mean(seeds) for seeds in by_count]
            if of_row == [None]:                                 # the number of stories means nothing to it
                axes.axhline(means[0], color=GREY, linestyle="--", label=row)
                continue
            below = [mean - min(seeds) for mean, seeds in zip(means, by_count)]
            above = [max(seeds) - mean for mean, seeds in zip(means, by_count)]
            x = [counts.index(count) for count in of_row]
            axes.errorbar(x, means, [below, above], capsize=2, label=row, **series_style(index))
        axes.set_xticks(range(len(counts)), [count_name(count) for count in counts])
        axes.set(xlabel="training stories", title=f"tokens per forward pass: {cost}", ylim=(0, 1))
    panels[0].set_ylabel("share of valid stories")
    legend_below(figure, panels[0])


PLOTS = {"scarce": plot}


# 3. page ------------------------------------------------------------------------------------------------

def differences(results: dict) -> str:
    """Markdown: pairs of rows at equal cost."""
    found = groups(results)
    counts = [count for row, count in found if row == "own text"]
    pairs = [(("own text", count), ("stories", count)) for count in counts]
    pairs += [(("own text", count), (TEACHER, count)) for count in counts]
    pairs += [((BY_MEAN, count), ("own text", count)) for count in counts]
    pairs += [((BY_MEAN, count), (TEACHER, count)) for count in counts]
    pairs += [
        (("own text", FEW), ("stories", None)),
        (("own text", FEW), (TEACHER, None)),
        ((BY_MEAN, FEW), ("stories", None)),
        (("own text, no prompts", None), ("own text", FEW)),
        (("own text, one per pass", FEW), ("own text", FEW)),
        (("own text, one per pass", FEW), (TEACHER, FEW)),
        (("own text, warm start", FEW), ("own text", FEW)),
    ]
    rows = []
    for ours, theirs in pairs:
        names = [f"{row}, {count_name(count)}" for row, count in (ours, theirs)]
        rows.append([*names, difference(found[ours], found[theirs])])
    return markdown_table(["row, stories", "minus", f"`valid` at {COST} (95 % interval)"], rows)


def verdicts(results: dict) -> list[str]:
    """Each prediction, whether it held, and the numbers."""
    found = groups(results)
    counts = [count for row, count in found if row == "own text"]

    def valid(row: str, count: int | None) -> float:
        return statistics.mean(values(found[row, count], "valid", FAST))

    def named(row: str, count: int | None) -> str:
        return f"{row} with {count_name(count)} {valid(row, count):.3f}"

    best = max((row for row, count in found if count is None), key=lambda row: valid(row, None))
    data = [("SDAR", FEW), ("stories", FEW)]
    better = [rounded(valid(TEACHER, count) - valid("own text", count)) for count in counts]
    no_prompts = ("own text, no prompts", None)
    checks = [
        (valid("own text", FEW) >= valid(best, None) - 0.05,
         f"{named('own text', FEW)}, {named(best, None)}"),
        (all(valid(*group) <= valid(best, None) - 0.2 for group in data),
         ", ".join(named(*group) for group in data)),
        (min(better) >= 0,
         f"with {', '.join(map(count_name, counts))} stories the teacher's text has "
         f"{', '.join(f'{difference:+.3f}' for difference in better)} more"),
        (valid("own text", None) <= valid("stories", None),
         f"{named('own text', None)}, {named('stories', None)}"),
        (abs(valid(*no_prompts) - valid("own text", FEW)) <= 0.05,
         f"{valid(*no_prompts):.3f} without prompts, {named('own text', FEW)}"),
    ]
    own = valid("own text", FEW)
    one_per_pass = valid("own text, one per pass", FEW)
    warm_start = valid("own text, warm start", FEW)
    checks += [
        (one_per_pass >= own + 0.2, f"{one_per_pass:.3f} and {own:.3f}"),
        (warm_start >= own + 0.1, f"{warm_start:.3f} and {own:.3f}"),
    ]
    by_mean = valid(BY_MEAN, FEW)
    behind = [rounded(valid(TEACHER, count) - valid(BY_MEAN, count)) for count in counts]
    checks += [
        (by_mean >= own + 0.1, f"{by_mean:.3f} and {own:.3f}"),
        (max(behind) <= 0.05,
         f"with {', '.join(map(count_name, counts))} stories the teacher's text has "
         f"{', '.join(f'{difference:+.3f}' for difference in behind)} more"),
        (by_mean >= valid(best, None) - 0.05, f"{by_mean:.3f}, {named(best, None)}"),
    ]
    lines = []
    for prediction, (held, numbers) in zip(ALL_PREDICTIONS, checks, strict=True):
        lines.append(f"{prediction} **{'It held' if held else 'It did not hold'}**: {numbers}.")
    return lines


def findings(results: dict) -> list[str]:
    found = groups(results)

    def at(sampler: str, row: str, count: int | None) -> str:
        return mean_range(values(found[row, count], "valid", sampler), 2)

    def nats(row: str, count: int | None) -> str:
        return mean_range([run["points"][-1]["val_nats"] for run in found[row, count]])

    def tera_flops(row: str) -> str:
        return f"{statistics.mean(run['points'][-1]['flops'] for run in found[row, FEW]) / 1e12:.1f}"

    slow = SAMPLERS[0]
    return [
        f"At 1 token per forward pass prompts are enough: with {FEW} stories own text has `valid` "
        f"{at(slow, 'own text', FEW)} and the teacher's text {at(slow, TEACHER, FEW)}; learning "
        f"from all stories has {at(slow, 'stories', None)}. Learning from the {FEW} stories themselves has "
        f"{at(slow, 'stories', FEW)}, SDAR {at(slow, 'SDAR', FEW)}.",
        f"At {COST} tokens own text is behind, {at(FAST, 'own text', FEW)} with {FEW} stories and "
        f"{at(FAST, 'own text', None)} with all, so the number of prompts is not the reason. Who writes it "
        f"is: by the running mean of the weights, which is the student that is evaluated, it has "
        f"{at(FAST, BY_MEAN, FEW)} and {at(FAST, BY_MEAN, None)}. A likely reason: at a constant learning "
        "rate the weights in training are noisier than their mean, and write texts that it would not write.",
        f"The teacher's fresh text has {at(FAST, TEACHER, FEW)} and {at(FAST, TEACHER, None)}: it needs "
        f"as few prompts and less arithmetic ({tera_flops(TEACHER)} against "
        f"{tera_flops('own text')} TFLOP). In this setting it is the better choice.",
        "Two other ways of own text did not help: one token per forward pass "
        f"{at(FAST, 'own text, one per pass', FEW)}, a warm start on the {FEW} stories "
        f"{at(FAST, 'own text, warm start', FEW)}. Without any prompt it is "
        f"{at(FAST, 'own text, no prompts', None)}. Its texts all have blocks that begin after one token, "
        "and the texts that are compared have not.",
        f"With {FEWEST} stories, at {COST} tokens: the teacher's text {at(FAST, TEACHER, FEWEST)}, own text "
        f"by the mean {at(FAST, BY_MEAN, FEWEST)}, own text {at(FAST, 'own text', FEWEST)}, the stories "
        f"{at(FAST, 'stories', FEWEST)}; at 1 token {at(slow, TEACHER, FEWEST)}, "
        f"{at(slow, BY_MEAN, FEWEST)}, {at(slow, 'own text', FEWEST)} and {at(slow, 'stories', FEWEST)}.",
        f"{ENOUGH} stories are enough to learn from them themselves: at {COST} tokens stories "
        f"{at(FAST, 'stories', ENOUGH)}, SDAR {at(FAST, 'SDAR', ENOUGH)}, own text by the mean "
        f"{at(FAST, BY_MEAN, ENOUGH)}, the teacher's text {at(FAST, TEACHER, ENOUGH)}.",
        f"SDAR on {FEW} stories has `valid` {at(FAST, 'SDAR', FEW)} at {COST}, but held-out stories cost it "
        f"{nats('SDAR', FEW)} nats per token, the teacher's-text row {nats(TEACHER, FEW)}: it "
        "has overfitted the stories that it had. Own text keeps the teacher's likelihood "
        f"({nats('own text', FEW)}), whatever the number of stories.",
        "After a broken law further ones are more frequent (`recovery` above 1), after own text too. A "
        "likely reason, which was not tested here: this teacher has learned from correct stories only, so "
        "it is no good teacher of what to write after an error.",
    ]


def page(all_results: dict[str, dict]) -> str:
    results = all_results.get("scarce")
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            The AR model has learned from 30,000 stories of the story world. Its conversion has the first few
            of them (column "stories") or all. "stories" learns from them with the teacher's distributions
            as targets, "SDAR" with the stories' own tokens as targets. For "teacher's text" and "own text"
            they only give prompts of 1 to 16 tokens: the teacher, or the student itself, writes a new text
            after them for each update. "own text, no prompts" begins each text with the end-of-text token
            alone; in "one per pass" the student writes one token per forward pass, from the left; in "warm
            start" the first quarter of the updates learns from the stories. All rows have 320 updates of 16
            rows, one update per rollout, block 4, the aligned layout (`--align=ar --context=causal`), text at
            temperature 1, a constant learning rate, and no other warm start. The student that is evaluated is
            the running mean of the weights over about the last tenth of the updates; in "by the mean" that
            student also writes the text, which the weights in training write otherwise."""),
        md.paragraph(f"""
            Text is compared at 1 token per forward pass, from the left, and at {COST}, where an untrained
            student fails. The level of `leftmost` for {COST} is found by bisection for each student. Cells
            are mean (smallest to largest) over the seeds, each with its own teacher. `valid`, `broken`,
            `recovery` and `gen_nats` are defined in [reference.md](../../docs/reference.md); the last three
            are at {COST}. `val_nats` is of held-out stories: it sees a student that only repeats the stories
            it had, which `valid` does not. TFLOP and seconds, on one CPU core, are of the training with its
            rollouts."""),
        "## Predictions",
        md.paragraph(f"""
            Written before the first run, of `valid` at {COST} tokens per forward pass. Those of "one per
            pass" and "warm start" were written when the learning rates had been chosen and own text stayed
            behind there; those of "the running mean" after all other rows had been measured, from one
            conversion that was evaluated on development stories."""),
        md.bullets(verdicts(results) if results else list(ALL_PREDICTIONS)),
        "## Results",
        *(results_of(results) if results else [NOT_MEASURED]),
    )


def results_of(results: dict) -> list[str]:
    return [
        md.measured(results, "scarce", "about three hours on two CPU cores"),
        table(results),
        md.picture("scarce", "Share of valid stories against the number of training stories"),
        "Differences of pairs of texts with the same teacher, prompt and random numbers:",
        differences(results),
        "## What was found",
        md.bullets(findings(results)),
        md.details("Learning rates: `valid` of development stories, seed 0", rates_table(results)),
    ]
