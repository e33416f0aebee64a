"""Tables, picture and page of the reveal rules: quality at equal cost, areas, and the generators without a
parameter.

An evaluation is a dictionary of metrics by generator: "RULE SPEC", or one of POINTS.
"""
import math
import statistics

from experiments.common import page as md
from experiments.common.plots import legend_below, series_style
from experiments.common.results import (
    interpolate_at_cost,
    load_results,
    markdown_table,
    mean_range,
    results_path,
)

TITLE = "Quality against speed"
SUMMARY = (
    "Every reveal rule over its parameter, beside AR and speculative decoding: valid stories at equal cost"
)
POINTS = {
    "ar": "AR",
    "self": "speculative, verified by itself",
    "teacher": "speculative, verified by the teacher",
}


def aup(points: list[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (d3LLM, 2601.07568): an area under accuracy (percent) over tokens per
    forward pass.

    Counted are points not more than 5 below the slowest one. An accuracy below the `best`, AR's, is weighted
    by exp(-3 (1 - accuracy / best)). From 0 to the slowest point the accuracy is that point's.
    """
    points = sorted(points)
    points = [(x, y) for x, y in points if y >= points[0][1] - 5]
    weighted = [(x, y * min(math.exp(-3 * (1 - y / max(best, 1))), 1)) for x, y in points]
    area = points[0][0] * points[0][1]
    for (x0, y0), (x1, y1) in zip(weighted, weighted[1:]):
        area += (x1 - x0) * (y0 + y1) / 2
    return area


def by_block(results: dict) -> dict[int, list[dict]]:
    """By block size the evaluations of all seeds, each with its speed relative to AR in the same turns."""
    blocks = {}
    for run in results["runs"]:
        ar = run["evaluations"]["ar"]["seconds"]
        evaluation = {}
        for name, numbers in run["evaluations"].items():
            speedup = statistics.median(b / a for a, b in zip(numbers["seconds"], ar))
            evaluation[name] = numbers | {"speedup": speedup}
        blocks.setdefault(run["block"], []).append(evaluation)
    return blocks


def names_by_rule(evaluation: dict) -> dict[str, list[str]]:
    """The generators of an evaluation by the rule that they belong to."""
    rules = {}
    for name in evaluation:
        if name not in POINTS:
            rules.setdefault(name.rpartition(" ")[0], []).append(name)
    return rules


def is_bracketed(evaluations: list[dict], names: list[str], cost: float) -> bool:
    """Whether for each seed some of these generators are slower than the cost and some faster."""
    for evaluation in evaluations:
        costs = [evaluation[name]["tok_per_fwd"] for name in names]
        if not min(costs) <= cost <= max(costs):
            return False
    return True


def values_at(evaluations: list[dict], names: list[str], metric: str, cost: float) -> list[float]:
    """By seed, a rule's metric at a cost."""
    return [interpolate_at_cost(evaluation, metric, cost, tuple(names)) for evaluation in evaluations]


def table(results: dict) -> str:
    """Markdown: one row per block size and rule, at equal cost."""
    columns = (
        ("valid", 1.5),
        ("valid", 2),
        ("gen_nats", 1.5),
        ("gen_nats", 2),
        ("distinct2", 1.5),
        ("speedup", 1.5),
    )
    header = ["block", "rule", "`valid` at 1.5", "at 2", "`gen_nats` at 1.5", "at 2", "`distinct2` at 1.5",
              "times as fast as AR at 1.5", "AUP"]
    rows = []
    for block, evaluations in by_block(results).items():
        for rule, names in names_by_rule(evaluations[0]).items():
            cells = []
            for metric, cost in columns:
                bracketed = is_bracketed(evaluations, names, cost)
                cells.append(mean_range(values_at(evaluations, names, metric, cost)) if bracketed else "-")
            areas = []
            for evaluation in evaluations:
                points = [
                    (evaluation[name]["tok_per_fwd"], 100 * evaluation[name]["valid"]) for name in names
                ]
                areas.append(aup(points, 100 * evaluation["ar"]["valid"]))
            rows.append([str(block), rule, *cells, mean_range(areas, 0)])
    return markdown_table(header, rows)


def points_table(results: dict) -> str:
    """Markdown: AR and speculative decoding, which have no parameter."""
    metrics = ("tok_per_fwd", "positions_per_tok", "valid", "gen_nats", "distinct2")
    header = ["block", "", *(f"`{metric}`" for metric in metrics), "times as fast as AR, one text at a time"]
    rows = []
    for block, evaluations in by_block(results).items():
        for name in POINTS:
            if name not in evaluations[0]:
                continue
            cells = [
                mean_range([evaluation[name][metric] for evaluation in evaluations]) for metric in metrics
            ]
            cells.append(mean_range([evaluation[name]["speedup"] for evaluation in evaluations], 2))
            rows.append([str(block), POINTS[name], *cells])
    return markdown_table(header, rows)


def plot(results: dict, figure) -> None:
    """`valid` against tokens per forward pass and against speed: a panel per block, a line per rule."""
    blocks = by_block(results)
    figure.set_size_inches(5 * max(len(blocks), 2), 9.5)
    axes_of = {         # label, and the range that is shown: beyond it no story is valid
        "tok_per_fwd": ("tokens per forward pass", (0.8, 4.5)),
        "speedup": ("times as fast as AR, one text at a time", (0.2, 1.5)),
    }
    panels = figure.subplots(2, len(blocks), sharey=True, squeeze=False)
    for line, (across, (label, shown)) in zip(panels, axes_of.items()):
        for axes, (block, evaluations) in zip(line, blocks.items()):
            plot_block(axes, evaluations, across)
            axes.set(xlabel=label, title=f"block {block}", xlim=shown)
        line[0].set_ylabel("valid")
    figure.suptitle("Valid stories against speed, story world, temperature 1 (means of the seeds)")
    legend_below(figure, panels[0, 0], 5)


def plot_block(axes, evaluations: list[dict], across: str) -> None:
    def mean(name: str, metric: str) -> float:
        return statistics.mean(evaluation[name][metric] for evaluation in evaluations)

    index = 0
    for rule, names in names_by_rule(evaluations[0]).items():
        x = [mean(name, across) for name in names]
        y = [mean(name, "valid") for name in names]
        axes.plot(x, y, label=rule, **series_style(index))
        index += 1
    for name in POINTS:
        if name in evaluations[0]:
            style = series_style(index) | {"linestyle": "none", "markersize": 11}
            axes.plot(mean(name, across), mean(name, "valid"), label=POINTS[name], **style)
            index += 1


PLOTS = {"story_world": plot}


def page(all_results: dict[str, dict]) -> str:
    results = all_results["story_world"]
    return md.join(
        f"# {TITLE}",
        md.paragraph("""
            How many generated stories are valid at a given cost, for every reveal rule over its parameter.
            The story world at temperature 1, three seeds, 256 stories per number, blocks of 4, 8 and 16.
            "leftmost" is of a student that learned with prefixes shown, from the teacher's distributions. All
            other rules are of a student that learned with random states from the text itself, and "leftmost,
            any" is of that student too. Both had 320 updates (305k response tokens). Cells are mean (smallest
            to largest); "-" where a rule has no parameter on both sides of the cost. AUP is the area under
            `valid` over tokens per forward pass ([d3LLM](https://arxiv.org/abs/2601.07568))."""),
        md.measured(results, "story_world", "an hour and a half on two CPU cores"),
        points_table(results),
        md.details("All rules, at equal cost", table(results)),
        md.picture("story_world", "Valid stories against tokens per forward pass and against speed"),
        "## What was found",
        md.bullets(findings(results)),
    )


def findings(results: dict) -> list[str]:
    evaluations = by_block(results)[4]
    rules = names_by_rule(evaluations[0])

    def valid_at(rule: str) -> str:
        return mean_range(values_at(evaluations, rules[rule], "valid", 1.5))

    def of(name: str, metric: str, block: int = 4) -> str:
        return mean_range([evaluation[name][metric] for evaluation in by_block(results)[block]])

    others = {}
    for rule in rules:
        if not rule.startswith("leftmost"):
            others[rule] = statistics.mean(values_at(evaluations, rules[rule], "valid", 1.5))
    best = max(others, key=others.get)
    speedups = []
    for seen in by_block(results).values():
        for names in names_by_rule(seen[0]).values():
            if is_bracketed(seen, names, 1.5):
                speedups.append(statistics.mean(values_at(seen, names, "speedup", 1.5)))
    greedy = load_results(results_path("unmasking", "blocks"))["heuristics"]
    greedy_valid = {rule["rule"]: rule["test"]["valid"] for rule in greedy if "test" in rule}
    return [
        "**Speculative decoding by the student itself** is above every rule at blocks 4 and 8. At block 4 "
        f"it makes {of('self', 'tok_per_fwd')} tokens per forward pass with `valid` {of('self', 'valid')}; "
        f"AR has {of('ar', 'valid')}. At block 16 `valid` is {of('self', 'valid', 16)}: after so few updates "
        "the student is not a good AR model any more.",
        f"**From the left**: at 1.5 tokens per forward pass and block 4, `valid` is {valid_at('leftmost')} "
        f"for leftmost, {valid_at(best)} for the best other rule ({best}) and {valid_at('threshold')} for "
        "threshold. The order matters more than the student: the other student has "
        f"{valid_at('leftmost, any')} from the left.",
        "**This holds for temperature 1 and a student that has hardly learned to read text to the right of "
        "a mask.** Even one position per step, most confident first, gives it "
        f"{of('static, largest static:1', 'valid')}. Greedily and after 480 updates (block 8, "
        "[unmasking](../unmasking/README.md)), threshold:0.9 has `valid` "
        f"{greedy_valid['threshold:0.9 in 2']:.3f} in windows of 2, {greedy_valid['threshold:0.9 in 4']:.3f} "
        f"in 4 and {greedy_valid['threshold:0.9 in 8']:.3f} in 8.",
        "Of the rules without an order, eb and confidence by entropy lose least.",
        "**Seconds**: at 1.5 tokens per forward pass every rule is slower than the AR loop on this CPU "
        f"({min(speedups):.2f} to {max(speedups):.2f} times as fast). Fewer forward passes do not pay for "
        "the larger ones in so small a network.",
    ]
