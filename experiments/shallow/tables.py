"""What experiments/shallow.py says of its looks: quality by schedule, beside what heavy reaches with as many FLOPs."""
import statistics
from itertools import product

import numpy as np

from experiments.common.results import cell

PLANS = {"heavy": "mask:1-0=H", "light": "mask:1-0=L", "light first": "mask:1-0.5=L,0.5-0=H",
         "light last": "mask:1-0.5=H,0.5-0=L", "light first and last": "mask:1-0.75=L,0.75-0.25=H,0.25-0=L"}
LEVELS, SHOWN = (0, 0.3, 0.5, 0.7, 0.9, 0.98, 1), 0.9          # of leftmost; that of the table


def blocks(results: dict) -> list[int]:
    return list(dict.fromkeys(run["block"] for run in results["runs"]))


def of_block(results: dict, block: int) -> list[dict]:
    """The looks of all seeds."""
    return [run["looks"] for run in results["runs"] if run["block"] == block]


def heavy_at(seen: dict, flops: float, number: str) -> float:
    """The heavy student's number where it spends as much, between two of its levels by a straight line; nan, where it
    always spends more."""
    points = sorted((seen[f"heavy {level}"]["flops"], seen[f"heavy {level}"][number]) for level in LEVELS)
    return float(np.interp(flops, *zip(*points), left=np.nan))


def table(results: dict) -> str:
    """Markdown: a row a block and plan, at the level shown."""
    lines = ["| block, schedule | `valid` | heavy's at these FLOPs | `gen_nats` | heavy's at these FLOPs | "
             "FLOPs / heavy's | seconds / heavy's |", "|" + "---|" * 7]
    for block, plan in product(blocks(results), PLANS):
        runs, name = [run for run in results["runs"] if run["block"] == block], f"{plan} {SHOWN}"
        seen, cells = of_block(results, block), []
        for number in ("valid", "gen_nats"):
            same = [heavy_at(one, one[name]["flops"], number) for one in seen]
            cells += [cell([one[name][number] for one in seen]), "-" if np.isnan(same).any() else cell(same)]
        cells.append(cell([one[name]["flops"] / one[f"heavy {SHOWN}"]["flops"] for one in seen], 2))
        cells.append(cell([statistics.median(a / b for a, b in zip(run["seconds"][plan], run["seconds"]["heavy"]))
                           for run in runs], 2))
        lines.append(f"| {block}, {plan} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """`valid` against FLOPs a token, a line a plan over its levels."""
    each = blocks(results)
    for axes, block in zip(figure.subplots(1, len(each), sharey=True, squeeze=False)[0], each):
        for plan in PLANS:
            mean = [[statistics.mean(one[f"{plan} {level}"][number] for one in of_block(results, block))
                     for level in LEVELS] for number in ("flops", "valid")]
            axes.plot(*mean, marker=".", label=plan)
        axes.set(xlabel="FLOPs of the blocks, a token", title=f"block {block}", xscale="log")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("valid")
    figure.axes[0].legend(fontsize=8)
