"""What experiments/unmasking.py says of its policies: what they gain over all heuristics, with errors.

An interval is of a bootstrap, its ends are the 2.5th and 97.5th percentiles: over stories, which are the same for all
that is compared, and over the seeds of policies.
"""
import statistics
from collections.abc import Callable

import numpy as np
import torch

from experiments.common.results import cell
from experiments.unmasking.hull import at, bar, best_rule, corners, named, policies, test_of, volume
from unmasking import grpo

DRAWS = 2000        # of the bootstrap
BLIND = ("mean", "shuffled")


def table(results: dict) -> str:
    """Markdown: a row a policy, and what was made of it; at its NFE a mixture of heuristics; its reward and that of the
    heuristic that is best for its alpha."""
    lines = ["| policy | NFE | `valid` | the heuristics' hull at that NFE | reward | the best heuristic's | minutes to "
             "train |", "|" + "---|" * 7]
    for name, some in policies(results).items():
        for what in some[0]["looks"]:
            seen, alpha = [policy["looks"][what] for policy in some], some[0]["alpha"]
            cells = [cell([x["nfe"] for x in seen], 1), cell([x["valid"] for x in seen], 2)]
            cells.append(cell([at(bar(results), x["nfe"]) for x in seen], 2))
            cells += ["-", "-"] if alpha is None else [
                cell([x["reward"][str(alpha)] for x in seen]), of_best(results, alpha)]
            lines.append(f"| {name}{what and ', ' + what} | {' | '.join(cells)} | {cell(minutes(results, some), 0)} |")
    return "\n".join(lines)


def of_best(results: dict, alpha: float) -> str:
    """The reward of the heuristic that is best for an alpha, with its standard error."""
    test = test_of(results, best_rule(results, alpha))
    return f"{test['reward'][str(alpha)]:.3f} +- {test['error'][str(alpha)]:.3f}"


def minutes(results: dict, some: list[dict]) -> list[float]:
    """Of a core, what each policy took, with what it went on from."""
    begun = {p["seed"]: p["seconds"] + results["hurried"][p["seed"]] for p in policies(results)["imitated"]}
    return [(policy["seconds"] + begun[policy["seed"]] * (policy["alpha"] is not None)) / 60 for policy in some]


def table_of_gains(results: dict) -> str:
    """Markdown: a row a policy, each number with its interval: its reward less the best heuristic's, and its share of
    valid texts less what mixtures of heuristics reach at its NFE."""
    lines = ["| policy | reward less the best heuristic's | `valid` above the heuristics' hull | above that of "
             "those chosen before | of thresholds | of random rules |", "|" + "---|" * 6]
    for gain in results["gains"]:
        cells = [interval(gain[name]) for name in ("reward", "heuristics", "chosen", "thresholds", "random")]
        lines.append(f"| {gain['policy']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def interval(numbers: list[float] | None) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*numbers) if numbers else "-"


def drawn(of: Callable, stories: int, seeds: int) -> list[float]:
    """`of(share, who)` where each story has the same share (stories,) and `who` are all seeds, then of a bootstrap of
    both: the ends of its interval, its standard deviation."""
    source = np.random.default_rng(0)
    some = [of(source.multinomial(stories, [1 / stories] * stories) / stories, source.integers(seeds, size=seeds))
            for _ in range(DRAWS)]
    value = of(np.full(stories, 1 / stories), range(seeds))
    return [float(x) for x in (value, *np.quantile(some, (0.025, 0.975)), np.std(some))]


def cloud(looks: list[dict]) -> np.ndarray:
    """(n, 2, stories): of each look and text its steps, and if it is right; times shares of stories it is points."""
    count = len(looks[0]["right"]) if looks else 1
    return np.array([[x["steps"], x["right"]] for x in looks], dtype=float).reshape(-1, 2, count)


def rivals(results: dict) -> dict[str, np.ndarray]:
    """The heuristics that policies are compared with: all; those that were on the hull of the stories for choosing,
    since of many some are lucky on the others; families."""
    some = {"heuristics": named(results), "chosen": corners(results), "thresholds": named(results, "threshold"),
            "random": named(results, "random")}
    return {name: cloud([rule["test"] for rule in rules if "test" in rule]) for name, rules in some.items()}


def volumes(results: dict) -> dict[str, list[float]]:
    """What a seed's policies of all alphas and betas dominate together, the mean of seeds; what heuristics do; and the
    differences."""
    ours = [cloud(looks) for looks in by_seed(results).values()]
    stories, length = ours[0].shape[-1], by_seed(results)[0][0]["length"]

    def mine(share, who):
        return statistics.mean(volume((ours[k] @ share).tolist(), length) for k in who)
    found = {"policies": drawn(mine, stories, len(ours))}
    for name, looks in rivals(results).items():
        def theirs(share, who, looks=looks):
            return volume((looks @ share).tolist(), length) if len(looks) else 0.0
        found[name] = drawn(theirs, stories, len(ours))
        found[f"policies less {name}"] = drawn(lambda *x, theirs=theirs: mine(*x) - theirs(*x), stories, len(ours))
    return found


def gains(results: dict) -> list[dict]:
    """Of each policy's name, the mean of its seeds: its reward less the best heuristic's for its alpha; its share of
    valid texts less what mixtures of heuristics reach at its NFE; its reward less what it has when it is blind."""
    return [{"policy": name, **gain(results, some)} for name, some in policies(results).items()
            if some[0]["alpha"] is not None]


def gain(results: dict, some: list[dict]) -> dict:
    alpha, seen = some[0]["alpha"], [policy["looks"] for policy in some]
    ours, stories = cloud([looks[""] for looks in seen]), len(seen[0][""]["right"])

    def less(theirs: list[dict]) -> list[float]:
        worth = [rewards(looks[""], alpha) - rewards(other, alpha) for looks, other in zip(seen, theirs)]
        return drawn(lambda share, who: statistics.mean(share @ worth[k] for k in who), stories, len(some))

    def above(rules: np.ndarray) -> list[float]:
        def of(share, who):
            points = (rules @ share).tolist()
            return statistics.mean(y - at(points, x) for x, y in ((ours[k] @ share).tolist() for k in who))
        return drawn(of, stories, len(some))
    best = test_of(results, best_rule(results, alpha))
    blind = {how: less([looks[how] for looks in seen]) for how in BLIND if how in seen[0]}
    return {"reward": less([best] * len(some)), **blind,
            **{name: above(rules) if len(rules) else None for name, rules in rivals(results).items()}}


def rewards(look: dict, alpha: float) -> np.ndarray:
    """Of each text."""
    return grpo.reward(*map(torch.tensor, (look["right"], look["steps"])), look["length"], alpha).numpy()


def by_seed(results: dict) -> dict[int, list[dict]]:
    """What a seed's policies wrote, whatever their alpha, and however scaled."""
    found = {}
    for policy in results["policies"]:
        if policy["alpha"] is not None:
            found.setdefault(policy["seed"], []).extend(
                look for what, look in policy["looks"].items() if what not in BLIND)
    return found
