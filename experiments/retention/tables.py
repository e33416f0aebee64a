"""Tables, picture and page of what a conversion keeps of what it does not see."""
import statistics

from experiments.common import page as md
from experiments.common.plots import legend_below, series_style
from experiments.common.results import markdown_table, mean_range
from experiments.retention.worlds import FIRST, SECOND, WORLDS

TITLE = "Retention: what a conversion keeps of what it does not see"
SUMMARY = "A teacher of two story worlds, converted with stories of one, with prompts of one, or with none"
COST = 1.5              # tokens per forward pass of the comparison
ONE_PER_PASS, FAST = SAMPLERS = ("reveal=leftmost:1", f"cost={COST}")
AR_ROW = "AR fine-tune"
BOTH_ROW = "stories of both worlds"
OWN = "own text, no prompts"
TEACHER = "teacher's text, no prompts"
DATA_ROWS = (AR_ROW, "SDAR", "stories")     # they learn from stories of the first world alone
NOT_MEASURED = "Not measured yet:\n\n```bash\npython -m experiments.retention.run\n```"
# Written before the first run, to hold at every learning rate of the table.
PREDICTIONS = (
    "The AR fine-tune loses at least 0.1 nats per token of the second world's held-out stories.",
    "Own text without prompts loses at most a third of what the AR fine-tune, SDAR and stories each lose.",
    "Own text with prompts of the first world loses as much as stories do, within a third: its texts are of "
    "the same world.",
    "Stories of the first world teach parallel text there only: at 1.5 tokens per forward pass their `valid` "
    "in the second world is at least 0.2 below that of own text without prompts.",
    "In the first world, at 1.5 tokens, own text without prompts is within 0.05 of stories, with half as "
    "many texts of that world.",
    "The teacher's text without prompts keeps as much as own text without prompts: its loss in the second "
    "world is at most 0.01 nats larger.",
)


# 1. reading the results ---------------------------------------------------------------------------------

def row_of(run: dict) -> str:
    return run["settings"]["name"].rpartition(", lr")[0]


def rate_of(run: dict) -> float:
    return run["settings"]["flags"]["lr"]


def untrained(results: dict) -> list[dict]:
    return [run for run in results["runs"] if run["settings"]["name"] == "untrained"]


def groups(results: dict) -> dict[tuple[str, float], list[dict]]:
    """By row and learning rate: the runs, one per seed."""
    found = {}
    for run in results["runs"]:
        if run["settings"]["name"] != "untrained":
            found.setdefault((row_of(run), rate_of(run)), []).append(run)
    return found


def rates_of(results: dict) -> list[float]:
    return sorted({rate for _, rate in groups(results)})


def losses(runs: list[dict], world: str, step: int = -1) -> list[float]:
    """By seed: NLL of a world's held-out stories above the teacher's, nats per token."""
    return [run["points"][step][world]["val_nats"] - run["teacher"][world]["val_nats"] for run in runs]


def valid(runs: list[dict], world: str, sampler: str, step: int = -1) -> list[float]:
    """By seed: the share of valid texts after beginnings of a world's stories; empty if not measured."""
    if any(sampler not in run["points"][step][world] for run in runs):
        return []
    return [run["points"][step][world][sampler]["valid"] for run in runs]


# 2. tables ----------------------------------------------------------------------------------------------

def cells(runs: list[dict], step: int = -1) -> list[str]:
    found = [mean_range(losses(runs, world, step)) for world in WORLDS]
    for sampler in SAMPLERS:
        for world in WORLDS:
            shares = valid(runs, world, sampler, step)
            found.append(mean_range(shares, 2) if shares else "")
    return found


def teacher_cells(results: dict) -> list[str]:
    found = ["0", "0"]
    for world in WORLDS:
        found.append(mean_range([run["teacher"][world]["valid"] for run in untrained(results)], 2))
    return [*found, "", ""]


def table(results: dict) -> str:
    """Markdown: one row per row and learning rate."""
    header = ["learns from", "rate", "nats lost, first world", "second", "`valid` at 1, first", "second",
              f"`valid` at {COST}, first", "second", "TFLOP", "seconds"]
    rows = []
    for (row, rate), runs in groups(results).items():
        last = [run["points"][-1] for run in runs]
        tera_flops = statistics.mean(point["flops"] for point in last) / 1e12
        seconds = statistics.mean(point["seconds"] for point in last)
        rows.append([row, str(rate), *cells(runs), f"{tera_flops:.2f}", f"{seconds:.0f}"])
    rows.append(["nothing (untrained)", "", *cells(untrained(results), 0), "0", "0"])
    rows.append(["the AR model itself", "", *teacher_cells(results), "", ""])
    return markdown_table(header, rows)


def plot(results: dict, figure) -> None:
    """For each row, at the largest rate: nats lost and `valid` in both worlds."""
    rate = rates_of(results)[-1]
    found = {row: runs for (row, row_rate), runs in groups(results).items() if row_rate == rate}
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("nats per token lost", "valid, 1 token per pass", f"valid, {COST} tokens per pass")
    for axes, title in zip(panels, titles):
        axes.set_title(title)
        for index, world in enumerate(WORLDS):
            style = series_style(index) | {"linestyle": ""}
            means = {}
            for row, runs in found.items():
                if title == titles[0]:
                    values = losses(runs, world)
                else:
                    values = valid(runs, world, SAMPLERS[titles.index(title) - 1])
                if values:
                    means[row] = statistics.mean(values)
            y = [list(found).index(row) + 0.2 * index - 0.1 for row in means]
            axes.plot(list(means.values()), y, label=f"{world} world", **style)
    panels[0].set_yticks(range(len(found)), list(found))
    panels[0].invert_yaxis()
    legend_below(figure, panels[0])


PLOTS = {"worlds": plot}


# 3. page ------------------------------------------------------------------------------------------------

def checks_at(results: dict, rate: float) -> list[tuple[bool, str]]:
    """Whether each prediction held at a learning rate, and the numbers."""
    found = {row: runs for (row, row_rate), runs in groups(results).items() if row_rate == rate}
    lost = {row: statistics.mean(losses(runs, SECOND)) for row, runs in found.items()}

    def share(row: str, world: str) -> float:
        return statistics.mean(valid(found[row], world, FAST))

    ratio = lost["own text"] / lost["stories"]
    return [
        (lost[AR_ROW] >= 0.1, f"{lost[AR_ROW]:.3f}"),
        (all(lost[OWN] <= lost[row] / 3 for row in DATA_ROWS),
         f"{lost[OWN]:.3f}, against " + ", ".join(f"{lost[row]:.3f} ({row})" for row in DATA_ROWS)),
        (2 / 3 <= ratio <= 4 / 3, f"{lost['own text']:.3f} and {lost['stories']:.3f}"),
        (share("stories", SECOND) <= share(OWN, SECOND) - 0.2,
         f"{share('stories', SECOND):.3f} and {share(OWN, SECOND):.3f}"),
        (share(OWN, FIRST) >= share("stories", FIRST) - 0.05,
         f"{share(OWN, FIRST):.3f} and {share('stories', FIRST):.3f}"),
        (lost[TEACHER] <= lost[OWN] + 0.01, f"{lost[TEACHER]:.3f} and {lost[OWN]:.3f}"),
    ]


def verdicts(results: dict) -> list[str]:
    """Each prediction, at which rates it held, and the numbers."""
    rates = rates_of(results)
    by_rate = {rate: checks_at(results, rate) for rate in rates}
    lines = []
    for index, prediction in enumerate(PREDICTIONS):
        held = all(by_rate[rate][index][0] for rate in rates)
        numbers = "; ".join(f"{by_rate[rate][index][1]} at rate {rate}" for rate in rates)
        lines.append(f"{prediction} **{'It held' if held else 'It did not hold'}**: {numbers}.")
    return lines


def page(all_results: dict[str, dict]) -> str:
    results = all_results.get("worlds")
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            The AR model has learned from two story worlds, 15,000 stories each. The second world is the first
            with upper and lower case swapped ("oNE SUNNY DAY, tOM TOOK HIS RED BALL TO THE PARK."). A word is
            a token, so the worlds share the article "a", the comma and the full stop, and nothing else. The
            conversion has stories of the first world alone. What it costs the second world is what is asked
            here."""),
        md.paragraph(f"""
            "{AR_ROW}" is the control: next-token prediction on the first world's stories, no conversion
            (blocks of one token). "SDAR" learns from the stories' own tokens, "stories" from the teacher's
            distributions on them. For "own text" they give prompts of 1 to 16 tokens; in "no prompts" each
            text begins with the end-of-text token alone, so that about half of the texts are of either
            world. Own text is written by the running mean of the weights, which is the student that is
            evaluated ([on_policy](../on_policy/README.md)). "{BOTH_ROW}" is what could be had with all data.
            All rows have 320 updates of 16 rows, block 4, the aligned layout, text at temperature 1 and a
            constant learning rate, which was not searched: every one that was tried is in the table."""),
        md.paragraph(f"""
            "Nats lost" is the NLL of held-out stories of a world, from left to right, above the AR model's.
            `valid` is the share of texts that break no law of the world in which they begin, at 1 token per
            forward pass and at {COST}, where an untrained student fails; the level of `leftmost` for it is
            found by bisection for each student and world. Cells are mean (smallest to largest) over the
            seeds, each with its own teacher."""),
        "## Predictions",
        "Written before the first run.",
        md.bullets(verdicts(results) if results else list(PREDICTIONS)),
        "## Results",
        *(results_of(results) if results else [NOT_MEASURED]),
    )


def results_of(results: dict) -> list[str]:
    return [
        md.measured(results, "worlds", "about an hour on two CPU cores"),
        table(results),
        md.picture("worlds", "Nats lost and share of valid texts in both worlds"),
        "## What was found",
        md.bullets(findings(results)),
    ]


def findings(results: dict) -> list[str]:
    """At the largest learning rate."""
    rate = rates_of(results)[-1]
    found = {row: runs for (row, row_rate), runs in groups(results).items() if row_rate == rate}

    def lost(row: str, digits: int = 1) -> str:
        return mean_range(losses(found[row], SECOND), digits)

    def share(row: str, world: str, sampler: str = FAST) -> str:
        return mean_range(valid(found[row], world, sampler), 2)

    before = untrained(results)
    return [
        f"Text of one world erases the other. In nats per token of the second world's stories the AR "
        f"fine-tune loses {lost(AR_ROW)}, SDAR {lost('SDAR')}, and stories {lost('stories')}, although the "
        "teacher's distributions are their targets. None of them writes one valid story of that world. The "
        "worlds share no words, so this is an extreme case: the text of a conversion says that the words "
        "of the second world never occur.",
        f"Own text keeps it: without prompts the loss is {lost(OWN, 3)}, and "
        f"{share(OWN, SECOND, ONE_PER_PASS)} of the second world's stories are valid at 1 token per forward "
        "pass. The student writes what the AR model can write, and is taught there.",
        f"With prompts of the first world the loss is {lost('own text', 3)}. In one of 16 updates the "
        "prompt is the end-of-text token alone, and then half of the texts are of the second world: these "
        "few texts keep its likelihood. They are too few for its blocks: at 1 token per forward pass "
        f"{share('own text', SECOND, ONE_PER_PASS)} of its stories are valid.",
        f"At {COST} tokens per forward pass own text without prompts has {share(OWN, FIRST)} valid stories "
        f"in the first world and {share(OWN, SECOND)} in the second, the teacher's {share(TEACHER, FIRST)} "
        f"and {share(TEACHER, SECOND)}: far behind stories of both worlds ({share(BOTH_ROW, FIRST)} and "
        f"{share(BOTH_ROW, SECOND)}). Every text begins after one token, so that blocks begin at every "
        "fourth token after it; in the evaluation prompts have other lengths, and blocks begin elsewhere.",
        f"Fresh text of the teacher keeps as much as own text: {lost(TEACHER, 3)} nats are lost. What keeps "
        "the second world is that the texts come from the model, not who of the two writes them.",
        f"At 1 token per forward pass there was nothing to learn: the student before any update loses "
        f"{mean_range(losses(before, SECOND, 0))} nats in the second world and has "
        f"{mean_range(valid(before, SECOND, ONE_PER_PASS, 0), 2)} valid stories there. What is missing "
        f"from that was lost in training. At {COST} tokens it has "
        f"{mean_range(valid(before, SECOND, FAST, 0), 2)}.",
    ]
