"""Compares policies with heuristics: hulls, dominated areas, and gains with bootstrap intervals.

A point is (NFE, share of valid texts). A heuristic has numbers on the stories for choosing ("dev"); those
that might matter also have numbers on the other stories ("test"). A policy's numbers are of the test stories.
An interval's ends are the 2.5th and 97.5th percentiles of a bootstrap over stories, which are the same for
all that is compared, and over the seeds of policies.
"""
import statistics
from collections.abc import Callable

import numpy as np
import torch

from experiments.unmasking.worlds import imitable_in
from unmasking import grpo

BOOTSTRAP_SAMPLES = 2000
BLIND = ("mean", "shuffled")


# 1. hulls and areas ---------------------------------------------------------------------------------------

def hull(points: list[tuple]) -> list[tuple]:
    """The points that no mixture of the others beats, fastest first: the upper left of their convex hull."""
    found = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1])):
        if found and y <= found[-1][1]:
            continue
        while len(found) > 1 and slope(found[-2], found[-1]) <= slope(found[-1], (x, y)):
            found.pop()
        found.append((x, y))
    return found


def slope(a: tuple, b: tuple) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def mixture_at(points: list[tuple], nfe: float) -> float:
    """What a mixture of the points reaches at an NFE. One of them may be to generate nothing: (0, 0)."""
    corners = hull([(0.0, 0.0), *points])
    for a, b in zip(corners, corners[1:]):
        if nfe <= b[0]:
            return a[1] + slope(a, b) * (nfe - a[0])
    return corners[-1][1]


def dominated_area(points: list[tuple], length: float) -> float:
    """The share (0 to 1) of the area of quality by saved NFE in which some point is at least as good and
    as fast."""
    points = sorted(points)
    area = best = 0.0
    for (x, y), (next_x, _) in zip(points, [*points[1:], (length, 0)]):
        best = max(best, y)
        area += best * (min(next_x, length) - min(x, length))
    return area / length


# 2. the heuristics and policies of a results file ---------------------------------------------------------

def point_of(numbers: dict) -> tuple:
    return numbers["nfe"], numbers["valid"]


def heuristics_named(results: dict, *prefixes: str) -> list[dict]:
    """The heuristics, or those whose name begins so."""
    return [rule for rule in results["heuristics"] if rule["rule"].startswith(prefixes or ("",))]


def rules_to_test(results: dict) -> list[dict]:
    """The heuristics that also get test numbers: on the dev hull, best for some alpha, thresholds, and
    random ones."""
    rules = heuristics_named(results)
    imitable = imitable_in(results["world"])
    best = set()
    for alpha in rules[0]["dev"]["reward"]:
        best.add(best_rule(results, alpha, imitable))
        best.add(best_rule(results, alpha))
    on_hull = dev_hull(results)
    found = []
    for rule in rules:
        if rule["rule"] in best or rule in on_hull or rule["rule"].startswith(("threshold", "random")):
            found.append(rule)
    return found


def dev_hull(results: dict) -> list[dict]:
    """The heuristics on the hull of the stories for choosing."""
    rules = heuristics_named(results)
    corners = hull([point_of(rule["dev"]) for rule in rules])
    return [rule for rule in rules if point_of(rule["dev"]) in corners]


def best_rule(results: dict, alpha, allowed: Callable = lambda name: True) -> str:
    """The heuristic with the best reward on the stories for choosing; of equals the fastest."""
    rules = [rule for rule in heuristics_named(results) if allowed(rule["rule"])]
    best = max(rules, key=lambda rule: (rule["dev"]["reward"][str(alpha)], -rule["dev"]["nfe"]))
    return best["rule"]


def test_points(results: dict) -> list[tuple]:
    """The heuristics as they are on the test stories."""
    return [point_of(rule["test"]) for rule in heuristics_named(results) if "test" in rule]


def test_of(results: dict, name: str) -> dict:
    """The test numbers of a heuristic."""
    return next(rule for rule in heuristics_named(results) if rule["rule"] == name)["test"]


def by_policy(results: dict) -> dict[str, list[dict]]:
    """By name, one policy per seed."""
    found = {}
    for policy in results["policies"]:
        found.setdefault(policy["policy"], []).append(policy)
    return found


def by_seed(results: dict) -> dict[int, list[dict]]:
    """By seed the evaluations of all policies that learned from rewards, also with scaled rates (beta)."""
    found = {}
    for policy in results["policies"]:
        if policy["alpha"] is not None:
            evaluations = [x for name, x in policy["evaluations"].items() if name not in BLIND]
            found.setdefault(policy["seed"], []).extend(evaluations)
    return found


# 3. gains, from the single texts of a run -----------------------------------------------------------------

def bootstrap(statistic: Callable, stories: int, seeds: int) -> list[float]:
    """[value, lower end, upper end, standard deviation] of `statistic(weights, seeds)`.

    The value has all stories at the same weight and each seed once; the bootstrap samples both.
    """
    generator = np.random.default_rng(0)
    uniform = [1 / stories] * stories
    samples = []
    for _ in range(BOOTSTRAP_SAMPLES):
        weights = generator.multinomial(stories, uniform) / stories
        samples.append(statistic(weights, generator.integers(seeds, size=seeds)))
    value = statistic(np.full(stories, 1 / stories), range(seeds))
    return [float(x) for x in (value, *np.quantile(samples, (0.025, 0.975)), np.std(samples))]


def stack(evaluations: list[dict]) -> np.ndarray:
    """(n, 2, stories): of each evaluation and text its NFE and whether it is valid. Times the weights of
    stories it gives points."""
    stories = len(evaluations[0]["valid_each"]) if evaluations else 1
    values = [[evaluation["nfe_each"], evaluation["valid_each"]] for evaluation in evaluations]
    return np.array(values, dtype=float).reshape(-1, 2, stories)


def rivals(results: dict) -> dict[str, np.ndarray]:
    """The heuristics that policies are compared with: all; those on the hull of the stories for choosing,
    since of many some are lucky on the others; families."""
    groups = {
        "heuristics": heuristics_named(results),
        "chosen": dev_hull(results),
        "thresholds": heuristics_named(results, "threshold"),
        "random": heuristics_named(results, "random"),
    }
    return {name: stack([rule["test"] for rule in rules if "test" in rule]) for name, rules in groups.items()}


def areas(results: dict) -> dict[str, list[float]]:
    """The area that a seed's policies of all alphas and betas dominate together, the mean of seeds; the area
    of the heuristics; and the differences."""
    ours = [stack(evaluations) for evaluations in by_seed(results).values()]
    stories = ours[0].shape[-1]
    length = by_seed(results)[0][0]["length"]

    def our_area(weights, seeds):
        return statistics.mean(dominated_area((ours[k] @ weights).tolist(), length) for k in seeds)

    found = {"policies": bootstrap(our_area, stories, len(ours))}
    for name, rules in rivals(results).items():
        def their_area(weights, seeds, rules=rules):
            return dominated_area((rules @ weights).tolist(), length) if len(rules) else 0.0

        def difference(weights, seeds, their_area=their_area):
            return our_area(weights, seeds) - their_area(weights, seeds)

        found[name] = bootstrap(their_area, stories, len(ours))
        found[f"policies less {name}"] = bootstrap(difference, stories, len(ours))
    return found


def gains(results: dict) -> list[dict]:
    """Of each policy, the mean of its seeds, with intervals: see gain."""
    found = []
    for name, policies in by_policy(results).items():
        if policies[0]["alpha"] is not None:
            found.append({"policy": name, **gain(results, policies)})
    return found


def gain(results: dict, policies: list[dict]) -> dict:
    """reward: minus the best heuristic's for its alpha; mean, shuffled: minus its own when it is blind;
    heuristics and others: its share of valid texts minus what mixtures of these reach at its NFE."""
    alpha = policies[0]["alpha"]
    evaluations = [policy["evaluations"] for policy in policies]
    ours = stack([evaluation[""] for evaluation in evaluations])
    stories = ours.shape[-1]

    def reward_minus(others: list[dict]) -> list[float]:
        differences = []
        for evaluation, other in zip(evaluations, others):
            differences.append(rewards(evaluation[""], alpha) - rewards(other, alpha))

        def statistic(weights, seeds):
            return statistics.mean(weights @ differences[k] for k in seeds)
        return bootstrap(statistic, stories, len(policies))

    def valid_above(rules: np.ndarray) -> list[float]:
        def statistic(weights, seeds):
            points = (rules @ weights).tolist()
            above = []
            for k in seeds:
                nfe, valid = (ours[k] @ weights).tolist()
                above.append(valid - mixture_at(points, nfe))
            return statistics.mean(above)
        return bootstrap(statistic, stories, len(policies))

    best = test_of(results, best_rule(results, alpha))
    found = {"reward": reward_minus([best] * len(policies))}
    for how in BLIND:
        if how in evaluations[0]:
            found[how] = reward_minus([evaluation[how] for evaluation in evaluations])
    for name, rules in rivals(results).items():
        found[name] = valid_above(rules) if len(rules) else None
    return found


def rewards(evaluation: dict, alpha: float) -> np.ndarray:
    """Of each text."""
    valid = torch.tensor(evaluation["valid_each"])
    nfe = torch.tensor(evaluation["nfe_each"])
    return grpo.reward(valid, nfe, evaluation["length"], alpha).numpy()
