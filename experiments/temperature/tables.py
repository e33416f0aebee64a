"""Tables, picture and page of the temperature of text to learn from."""
import statistics

from experiments.common import page as md
from experiments.common.plots import GREY, legend_below, series_style
from experiments.common.results import markdown_table, mean_range

TITLE = "The temperature of the text that a student learns from"
SUMMARY = "Speculative decoding at 0, 0.7 and 1 after learning from text of temperature 0, 0.7 and 1"
TEMPERATURES = (0, 0.7, 1)
VERIFIERS = ("self", "teacher")
SAMPLERS = tuple(f"verifier={verifier} temperature={t}" for verifier in VERIFIERS for t in TEMPERATURES)
COMMAND = "python -m experiments.temperature.run"
# Written before the first run, of tokens per forward pass verified by itself.
PREDICTIONS = (
    "At each decoding temperature the best row learns from text of that temperature.",
    "Greedy decoding gains most: text at 0 is at least 10 % above text at 1 there, on TinyStories.",
    "Own text and the teacher's text at the same temperature are level within the spread of seeds.",
    "Text at 0 raises the student's own NLL as an AR model more than text at 1.",
)


# 1. reading the results ---------------------------------------------------------------------------------

def row_of(run: dict) -> str:
    return run["settings"]["name"].removeprefix("trial, ").partition(", block")[0]


def rate_of(run: dict) -> float:
    return run["settings"]["flags"]["lr"]


def tok_per_fwd(run: dict, temperature: float, verifier: str = "self", step: int = -1) -> float:
    return run["points"][step][f"verifier={verifier} temperature={temperature}"]["tok_per_fwd"]


def trial_score(run: dict) -> float:
    """Tokens per forward pass, verified by itself: at the temperature of its text; of stories, at 1."""
    return tok_per_fwd(run, run["settings"]["flags"].get("temperature", 1))


def best_rates(trials: list[dict]) -> dict[str, float]:
    """By row the learning rate with the most tokens per forward pass on development stories."""
    best = {}
    for run in trials:
        name = row_of(run)
        if name not in best or trial_score(run) > trial_score(best[name]):
            best[name] = run
    return {name: rate_of(run) for name, run in best.items()}


def groups(results: dict) -> dict[str, list[dict]]:
    """By row the runs, one per seed."""
    found = {}
    for run in results["runs"]:
        found.setdefault(row_of(run), []).append(run)
    return found


# 2. tables ----------------------------------------------------------------------------------------------

def table(results: dict) -> str:
    """Markdown: one row per text; tokens per forward pass after the last update."""
    header = ["learns from", "rate"]
    for verifier in VERIFIERS:
        header += [f"{verifier} at {temperature}" for temperature in TEMPERATURES]
    header += ["`val_nats` as an AR model minus the teacher's", "`distinct2`, greedy"]
    rows = [["nothing (untrained)", "", *cells(list(groups(results).values())[0], 0), ""]]
    for name, runs in groups(results).items():
        greedy = f"verifier=self temperature={TEMPERATURES[0]}"
        distinct = [run["points"][-1][greedy]["distinct2"] for run in runs]
        rows.append([name, str(rate_of(runs[0])), *cells(runs, -1), mean_range(distinct)])
    return markdown_table(header, rows)


def mean_speed(runs: list[dict], temperature: float) -> float:
    """Tokens per forward pass verified by itself, over the seeds."""
    return statistics.mean(tok_per_fwd(run, temperature) for run in runs)


def ar_loss(runs: list[dict], step: int = -1) -> list[float]:
    """By seed, the student's NLL as an AR model minus the teacher's."""
    return [run["points"][step]["ar_nats"] - run["teacher"]["val_nats"] for run in runs]


def verdicts(results: dict) -> list[str]:
    """Each prediction, whether it held, and the numbers."""
    found = groups(results)
    bests = {}
    for temperature in TEMPERATURES:
        bests[temperature] = max(found, key=lambda row, t=temperature: mean_speed(found[row], t))
    is_matched = all(row.endswith(f"text at {temperature}") for temperature, row in bests.items())
    named = [f"at {temperature} it is {row}" for temperature, row in bests.items()]
    cold = found[f"own text at {TEMPERATURES[0]}"]
    hot = found[f"own text at {TEMPERATURES[-1]}"]
    gain = mean_speed(cold, 0) / mean_speed(hot, 0) - 1
    losses = [statistics.mean(ar_loss(runs)) for runs in (cold, hot)]
    checks = [
        (is_matched, "; ".join(named)),
        (gain >= 0.1, f"{mean_speed(cold, 0):.2f} against {mean_speed(hot, 0):.2f}, {gain:+.0%}"),
        level_sources(found),
        (losses[0] > losses[1], f"{losses[0]:.3f} against {losses[1]:.3f} nats"),
    ]
    lines = []
    for prediction, (held, numbers) in zip(PREDICTIONS, checks, strict=True):
        verdict = {True: "It held", False: "It did not hold", None: "Not measured here"}[held]
        lines.append(f"{prediction} **{verdict}**" + (f": {numbers}." if numbers else "."))
    return lines


def level_sources(found: dict[str, list[dict]]) -> tuple[bool | None, str]:
    """Whether own text and the teacher's have overlapping ranges everywhere; None without the teacher's."""
    if "teacher's text at 0" not in found:
        return None, ""
    apart = []
    for of_text in TEMPERATURES:
        pair = [found[f"{source} at {of_text}"] for source in ("own text", "teacher's text")]
        for decoding in TEMPERATURES:
            ours, theirs = ([tok_per_fwd(run, decoding) for run in runs] for runs in pair)
            if min(ours) > max(theirs) or min(theirs) > max(ours):
                apart.append(f"text at {of_text} decoded at {decoding}")
    return not apart, f"ranges that do not overlap: {', '.join(apart) or 'none'}"


def findings(results: dict) -> list[str]:
    """What the results on TinyStories say; a test holds the words to the numbers."""
    found = groups(results)

    def speed(row: str, temperature: float) -> str:
        return mean_range([tok_per_fwd(run, temperature) for run in found[row]], 2)

    def loss(row: str) -> str:
        return mean_range(ar_loss(found[row]), 2)

    return [
        f"Greedy decoding gains from cold text: {speed('own text at 0', 0)} tokens per forward pass after "
        f"own text at 0 and {speed('own text at 0.7', 0)} after own text at 0.7, against "
        f"{speed('own text at 1', 0)} after own text at 1 and {speed('stories', 0)} after training stories.",
        f"At 0.7 own text at 0.7 has {speed('own text at 0.7', 0.7)}, own text at 0 "
        f"{speed('own text at 0', 0.7)} and at 1 {speed('own text at 1', 0.7)}. At 1 the rows differ little: "
        f"{speed('own text at 0', 1)}, {speed('own text at 0.7', 1)} and {speed('own text at 1', 1)}.",
        f"Cold text costs the student as an AR model, whose text this is: {loss('own text at 0')} nats per "
        f"token above the teacher at 0, {loss('own text at 0.7')} at 0.7 and {loss('own text at 1')} at 1, "
        "in spite of the clean loss on training text. So 0.7, the default of the project, is the better "
        "compromise here; a larger `--clean_weight` keeps the student nearer "
        "([the model that comes with the code](../../model/pretrained/README.md)).",
        "Drafts that the teacher verifies gain little in all rows.",
    ]


def cells(runs: list[dict], step: int) -> list[str]:
    found = []
    for verifier in VERIFIERS:
        for temperature in TEMPERATURES:
            found.append(mean_range([tok_per_fwd(run, temperature, verifier, step) for run in runs], 2))
    return [*found, mean_range(ar_loss(runs, step))]


def plot(results: dict, figure) -> None:
    """Tokens per forward pass against the temperature of the text, one panel per decoding temperature."""
    found = groups(results)
    panels = figure.subplots(1, len(TEMPERATURES), sharey=True)
    for axes, decoding in zip(panels, TEMPERATURES):
        for index, source in enumerate(("own text", "teacher's text")):
            by_text = [found.get(f"{source} at {temperature}") for temperature in TEMPERATURES]
            if not all(by_text):
                continue
            by_text = [[tok_per_fwd(run, decoding) for run in runs] for runs in by_text]
            means = [statistics.mean(seeds) for seeds in by_text]
            below = [mean - min(seeds) for mean, seeds in zip(means, by_text)]
            above = [max(seeds) - mean for mean, seeds in zip(means, by_text)]
            style = series_style(index)
            axes.errorbar(TEMPERATURES, means, [below, above], capsize=2, label=source, **style)
        if "stories" in found:
            mean = statistics.mean(tok_per_fwd(run, decoding) for run in found["stories"])
            axes.axhline(mean, color=GREY, linestyle="--", label="training stories")
        axes.set(title=f"decoding at {decoding}", xlabel="temperature of the training text")
        axes.set_xticks(TEMPERATURES)
    panels[0].set_ylabel("tokens per forward pass,\nverified by itself")
    legend_below(figure, panels[0])


PLOTS = {"story_world": plot, "tinystories": plot}


# 3. page ------------------------------------------------------------------------------------------------

def page(all_results: dict[str, dict]) -> str:
    parts = [
        f"# {TITLE}",
        md.paragraph("""
            A student drafts a block in one pass, and an AR model accepts as many of the drafted tokens as its
            own distribution allows: the student itself or its teacher. The student learns from training
            stories or from its own text as an AR model (on-policy for this way of decoding), sampled at
            temperature 0, 0.7 or 1; the teacher's text can be a row too (`--rows`). All rows learn with all
            of a block masked, the teacher's distributions as targets and `--clean_weight=0.5` on training
            text, four updates per rollout. Cells are tokens per forward pass after the last update, mean
            (smallest to largest) over three seeds, each with its own teacher."""),
        "## Predictions",
        "Written before the first run, of tokens per forward pass verified by itself:",
        md.bullets(list(PREDICTIONS)),
    ]
    if not all_results:
        parts += ["Not measured yet:", f"```bash\n{COMMAND}\n```"]
    titles = {"story_world": "The story world", "tinystories": "TinyStories"}
    for variant, title in titles.items():
        if variant in all_results:
            parts += results_of(all_results[variant], variant, title)
    return md.join(*parts)


def rates_chosen(results: dict) -> str:
    """How the learning rates were chosen."""
    if results["options"]["rate"]:
        return (f"All rows have the learning rate {results['options']['rate']}. The grid below is nearly "
                "flat in tokens per forward pass, and the student's own NLL rises with the rate.")
    if results["trials"]:
        return (f"Learning rates are the best of {results['options']['rates']} on development stories, by "
                "tokens per forward pass at the temperature of the text.")
    return "All rows have one learning rate, which was not searched."


def rates_table(results: dict) -> str:
    """Markdown: trials by row and learning rate."""
    rates = sorted({rate_of(run) for run in results["trials"]})
    by_row = {}
    for run in results["trials"]:
        by_row.setdefault(row_of(run), {})[rate_of(run)] = f"{trial_score(run):.2f}, {ar_loss([run])[0]:+.2f}"
    rows = [[row, *(cells[rate] for rate in rates)] for row, cells in by_row.items()]
    return markdown_table(["learns from", *map(str, rates)], rows)


def results_of(results: dict, variant: str, title: str) -> list[str]:
    options = results["options"]
    grid = []
    if results["trials"]:
        heading = ("Learning rates: tokens per forward pass at the temperature of the text (stories: at 1), "
                   "and `val_nats` as an AR model minus the teacher's; development stories, seed 0")
        grid = [md.details(heading, rates_table(results))]
    return [
        f"## {title}",
        md.measured(results, variant, "one to two hours on two CPU cores"),
        md.paragraph(f"""
            Blocks of {options['block']}, {options['updates']} updates, {options['stories']} texts per number.
            {rates_chosen(results)}"""),
        table(results),
        md.picture(variant, "Tokens per forward pass against the temperature of the training text"),
        "The predictions:",
        md.bullets(verdicts(results)),
        *(["What was found:", md.bullets(findings(results))] if variant == "tinystories" else []),
        *grid,
    ]
