"""Tables, picture and page of model scheduling: what a placement loses and saves, and whether the curves
predict it."""
import statistics

from decoding.scheduling import derive_schedule
from experiments.common import page as md
from experiments.common.plots import COLORS, GREY, series_style
from experiments.common.results import markdown_table, mean_range
from experiments.scheduling.placements import predicted_cost, spearman

TITLE = "Model scheduling: a light model for some of the denoising steps"
SUMMARY = (
    "Which steps of a full-sequence diffusion model a smaller model can take, and whether one can predict it"
)
LAYERS = {"H": 3, "L": 1, "evaluator": 4}  # transformer blocks; 6 and 2 are about as good in the story world


# 1. numbers -----------------------------------------------------------------------------------------------

def with_errors(evaluations: list[dict]) -> list[dict]:
    """Each evaluation with the standard error of its `gen_nats` minus the heavy model's, without single
    texts.

    The heavy model's texts of as many steps use the same random numbers.
    """
    heavy = {x["T"]: x["each"] for x in evaluations if x["name"] == "heavy"}
    found = []
    for evaluation in evaluations:
        numbers = {name: value for name, value in evaluation.items() if name != "each"}
        T = evaluation["T"]
        numbers["error"] = paired_error(evaluation["each"], heavy[T]) if T in heavy else None
        found.append(numbers)
    return found


def paired_error(ours: list, theirs: list) -> float:
    """The standard error of the difference of two means of nats per token, from (nats, tokens) of each text,
    pair by pair."""
    n = len(ours)
    if n == 1:
        return 0.0
    deviations = []
    for texts in (ours, theirs[:n]):
        mean_nats = sum(nats for nats, _ in texts) / n
        mean_tokens = sum(tokens for _, tokens in texts) / n
        ratio = mean_nats / mean_tokens
        deviations.append([(nats - ratio * tokens) / mean_tokens for nats, tokens in texts])
    return statistics.stdev([a - b for a, b in zip(*deviations)]) / n ** 0.5


def by_name(run: dict, steps: int) -> dict[str, dict]:
    """The evaluations of a seed with so many steps."""
    return {evaluation["name"]: evaluation for evaluation in run["evaluations"] if evaluation["T"] == steps}


def seeds_of(results: dict, steps: int) -> list[dict[str, dict]]:
    return [by_name(run, steps) for run in results["runs"]]


def names_of(seeds: list[dict]) -> list[str]:
    """The schedules, without those of the search."""
    return [name for name in seeds[0] if not name.startswith("segments")]


def lost(seed: dict, name: str) -> float:
    """The share of the gap between the heavy and the light model's `gen_nats` that a schedule loses."""
    heavy = seed["heavy"]["gen_nats"]
    light = seed["light"]["gen_nats"]
    return (seed[name]["gen_nats"] - heavy) / (light - heavy)


def lost_error(seed: dict, name: str) -> float:
    """Its standard error over texts."""
    return seed[name]["error"] / (seed["light"]["gen_nats"] - seed["heavy"]["gen_nats"])


def lost_cell(seeds: list[dict], name: str) -> str:
    """The share by seed, and its standard error: the root of the mean square over seeds."""
    errors = [lost_error(seed, name) for seed in seeds]
    error = statistics.mean(x * x for x in errors) ** 0.5
    return f"{mean_range([lost(seed, name) for seed in seeds], 2)} +- {error:.2f}"


def work(evaluation: dict) -> float:
    """Positions times transformer blocks, of the forward passes that both models made."""
    return sum(LAYERS[letter] * done["positions"] for letter, done in evaluation["work"].items())


def seconds_saved(results: dict, name: str) -> list[float]:
    """By seed, the percentage of the heavy model's seconds that a schedule saves: the median of the turns."""
    saved = []
    for run in results["runs"]:
        if name in run["seconds"]:
            pairs = zip(run["seconds"][name], run["seconds"]["heavy"])
            saved.append(100 * statistics.median(1 - ours / heavy for ours, heavy in pairs))
    return saved


def ranks(run: dict) -> tuple[list[float], list[float]]:
    """Predicted and measured damage of the schedules of the search."""
    found = [x for x in run["evaluations"] if x["name"].startswith("segments")]
    predicted = [predicted_cost(x["steps"], run["curves"]) for x in found]
    return predicted, [x["gen_nats"] for x in found]


def correlations(results: dict) -> list[float]:
    """By seed, Spearman's correlation of predicted and measured damage."""
    return [spearman(*ranks(run)) for run in results["runs"]]


def gap_ratios(results: dict) -> list[float]:
    """By seed, the mean of CE over the gap between the two models' likelihood bounds: 1 in theory."""
    return [
        statistics.mean(run["curves"]["ce"][:-1]) / run["curves"]["gap"]["nats"] for run in results["runs"]
    ]


def peaks(results: dict) -> list[float]:
    """By seed, the masked share at which KL is largest."""
    return [max(zip(run["curves"]["kl"], run["curves"]["t"]))[1] for run in results["runs"]]


# 2. table and picture -------------------------------------------------------------------------------------

def table(results: dict, steps: int) -> str:
    """Markdown: one row per schedule of so many steps."""
    header = [
        "light steps",
        "`gen_nats`, evaluator",
        "share of the gap lost",
        "`valid`",
        "`entropy` / heavy's",
        "`distinct2` / heavy's",
        "FLOPs saved, blocks",
        "with the head",
        "of the forward passes made",
        "time saved",
    ]
    seeds = seeds_of(results, steps)
    rows = []
    for name in names_of(seeds):
        cells = [mean_range([seed[name]["gen_nats"] for seed in seeds]), lost_cell(seeds, name)]
        is_checked = "valid" in seeds[0][name]
        cells.append(mean_range([seed[name]["valid"] for seed in seeds], 2) if is_checked else "-")
        for metric in ("entropy", "distinct2"):
            cells.append(mean_range([seed[name][metric] / seed["heavy"][metric] for seed in seeds]))
        for part in ("blocks", "with head"):
            cells.append(f"{100 * seeds[0][name]['saved'][part]:.2f} %")
        less_work = [100 * (1 - work(seed[name]) / work(seed["heavy"])) for seed in seeds]
        cells.append(mean_range(less_work, 1) + " %")
        seconds = seconds_saved(results, name) if steps == results["options"]["steps"] else []
        cells.append(mean_range(seconds, 1) + " %" if seconds else "-")
        rows.append([name, *cells])
    return markdown_table(header, rows)


def plot(results: dict, figure) -> None:
    """What a light step costs at each masked share, with the derived schedule under it; quality against
    FLOPs."""
    figure.set_size_inches(12.5, 6)
    left, right = figure.subplots(1, 2)
    plot_curves(left, results)
    plot_schedules(right, results)
    figure.suptitle("Where a light model costs least, and what each placement of light steps loses")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)


def plot_curves(axes, results: dict) -> None:
    steps = results["options"]["steps"]
    highest = max(max(run["curves"]["kl"]) for run in results["runs"])
    for index, run in enumerate(results["runs"]):
        curves = run["curves"]
        style = series_style(index) | {"markersize": 4}
        for name, line in (("kl", "-"), ("ce", ":")):
            style["linestyle"] = line
            label = f"{name.upper()}, seed {run['seed']}"
            axes.errorbar(curves["t"], curves[name], curves[f"{name}_error"], label=label, **style)
        names = derive_schedule(curves, steps, 0.25).steps()
        light = [1 - step / steps for step, name in enumerate(names) if name == "L"]
        below = -0.05 * highest * (1 + index)
        axes.plot(light, [below] * len(light), "|", color=style["color"], markersize=9)
    axes.invert_xaxis()
    axes.set(xlabel="share masked: from all to none", ylabel="nats per masked token, light minus heavy",
             title="cost of a light step (ticks: the derived quarter)")


def plot_schedules(axes, results: dict) -> None:
    """One row per schedule at the base number of steps, ordered by `gen_nats`."""
    seeds = seeds_of(results, results["options"]["steps"])
    mean = {name: statistics.mean(seed[name]["gen_nats"] for seed in seeds) for name in names_of(seeds)}
    names = sorted(mean, key=mean.get, reverse=True)
    labels = [f"{name} ({100 * seeds[0][name]['saved']['blocks']:.0f} %)" for name in names]
    for y, name in enumerate(names):
        values = [seed[name]["gen_nats"] for seed in seeds]
        axes.plot([min(values), max(values)], [y, y], color=GREY, linewidth=2)
        axes.plot(mean[name], y, "o", color=COLORS[0])
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlabel="gen_nats under the evaluator (mean, smallest to largest)",
             title="schedules (FLOPs of the blocks saved)")


PLOTS = {"story_world": plot, "tinystories": plot}


# 3. page --------------------------------------------------------------------------------------------------

def page(all_results: dict[str, dict]) -> str:
    story_world = all_results["story_world"]
    real_text = all_results["tinystories"]
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            At which denoising steps may a light model stand in for a heavy one
            ([2604.02340](https://arxiv.org/abs/2604.02340))? Two full-sequence diffusion models
            (`--preset=mdlm`), of 3 and of 1 transformer blocks, learned from the same stories in the same
            order. They generate without a prompt in ancestral steps. `gen_nats` is the NLL of their text
            under an evaluator, an AR model of 4 blocks that has read other stories. "Share of the gap lost"
            is where a schedule's text lies between the heavy model's (0) and the light model's (1). Cells are
            mean (smallest to largest) over three seeds, +- the standard error over texts, in pairs."""),
        md.paragraph("""
            A quarter of the steps is light, or the share named. Sandwich is the paper's placement: half of
            the light steps first, half last. Derived places them where the curves below say that they cost
            least: CE is measured on the text's own tokens, KL from the heavy model's distribution to the
            light model's, both against the share that is masked."""),
        "## The story world",
        md.measured(story_world, "story_world", "50 minutes on two CPU cores"),
        md.details("All placements", md.join(
            "32 steps, 512 texts per row:", table(story_world, 32),
            "128 steps, 256 texts per row:", table(story_world, 128)).strip()),
        md.picture("story_world", "Cost of a light step by the share masked; gen_nats of each placement"),
        "### What was found",
        md.bullets(story_world_findings(story_world)),
        "## TinyStories",
        md.paragraph("""
            2,048 BPE tokens, 64 positions, 4,000 updates; three seeds, 128 texts per row, 64 at 128
            steps."""),
        md.measured(real_text, "tinystories", "80 minutes on two CPU cores"),
        md.details("All placements", md.join(
            "32 steps:", table(real_text, 32), "128 steps:", table(real_text, 128)).strip()),
        md.picture("tinystories", "The same picture on TinyStories"),
        "### What was found on TinyStories",
        md.bullets(real_text_findings(real_text)),
    )


def lost_by_seed(results: dict, name: str, steps: int = 32) -> str:
    return mean_range([lost(seed, name) for seed in seeds_of(results, steps)], 2)


def nats(results: dict, name: str, steps: int = 32) -> str:
    return mean_range([seed[name]["gen_nats"] for seed in seeds_of(results, steps)])


def story_world_findings(results: dict) -> list[str]:
    seeds = seeds_of(results, 32)
    valid = max(round(512 * seed["heavy"]["valid"]) for seed in seeds)
    real = statistics.mean(run["curves"]["stories"]["gen_nats"] for run in results["runs"])
    saved = seeds[0]["derived"]["saved"]
    distinct = mean_range([seed["derived"]["distinct2"] / seed["heavy"]["distinct2"] for seed in seeds])
    ahead, certain = [], []
    for run in results["runs"]:
        ahead.append(-run["curves"]["ce"][-1])
        certain.append(-run["curves"]["ce"][-1] / run["curves"]["ce_error"][-1])
    return [
        f"**These texts are poor, and everything here is about poor text**: with 32 steps at most {valid} of "
        f"512 stories of the heavy model are valid, and its `gen_nats` is {nats(results, 'heavy')}, where "
        f"real stories have {real:.3f}. Each step reveals about three tokens that do not know of each other. "
        f"With 128 steps it is {nats(results, 'heavy', 128)}.",
        f"A quarter of the steps at the derived places loses {lost_by_seed(results, 'derived')} of the gap "
        f"and saves {100 * saved['blocks']:.2f} % of the blocks' FLOPs, {100 * saved['with head']:.2f} % "
        f"with the head, and {mean_range(seconds_saved(results, 'derived'), 1)} % of the time; `distinct2` "
        f"is {distinct} of the heavy model's. With 128 steps it loses "
        f"{lost_by_seed(results, 'derived', 128)}.",
        f"The paper's sandwich loses {lost_by_seed(results, 'sandwich (paper)')}, about as much as a random "
        f"quarter, {lost_by_seed(results, 'random')}. All late loses {lost_by_seed(results, 'all late')}, "
        f"the middle {lost_by_seed(results, 'middle')}, all early {lost_by_seed(results, 'all early')}.",
        "The expensive steps are early ones, most of all at a masked share of "
        f"{mean_range(peaks(results), 2)}. With everything masked the light model is level or ahead (CE: by "
        f"{min(ahead):.3f} to {max(ahead):.3f} nats, {min(certain):.0f} to {max(certain):.0f} standard "
        "errors).",
        "The curves predict the damage: over the 28 choices of two light eighths the rank correlation is "
        f"{mean_range(correlations(results), 2)}. The mean of CE is {mean_range(gap_ratios(results))} of the "
        "gap of the two likelihood bounds, as it should be.",
    ]


def real_text_findings(results: dict) -> list[str]:
    errors, gaps = [], []
    for steps in (32, 128):
        for seed in seeds_of(results, steps):
            errors.append(lost_error(seed, "derived"))
            gaps.append(seed["light"]["gen_nats"] - seed["heavy"]["gen_nats"])
    real = statistics.mean(run["curves"]["stories"]["gen_nats"] for run in results["runs"])
    return [
        f"**Nothing can be told apart here.** Only {min(gaps):.2f} to {max(gaps):.2f} nats lie between the "
        f"heavy and the light model's texts, and so few texts leave a standard error of {min(errors):.2f} to "
        f"{max(errors):.2f} of that gap by seed.",
        f"The text is poor too: the heavy model's has {nats(results, 'heavy')} nats per token with 32 steps, "
        f"real stories {real:.1f}.",
        f"derived, which here is all early, loses {lost_by_seed(results, 'derived')} with 32 steps and "
        f"{lost_by_seed(results, 'derived', 128)} with 128; the sandwich "
        f"{lost_by_seed(results, 'sandwich (paper)')} and {lost_by_seed(results, 'sandwich (paper)', 128)}.",
        f"The curves themselves are sharp (mean of CE {mean_range(gap_ratios(results))} of the gap) and "
        f"highest at a masked share of {mean_range(peaks(results), 2)}, in the middle, as in the paper and "
        "unlike in the story world. But their rank correlation with what was measured is "
        f"{mean_range(correlations(results), 2)}.",
        f"Time saved by the derived quarter: {mean_range(seconds_saved(results, 'derived'), 1)} %.",
    ]
