"""The hull of all heuristics, what mixtures of them reach, and which of them count.

A point is (NFE, share of valid texts). A heuristic has numbers on the stories for choosing, "dev", and those that might
matter also on the others, "test"; a policy's are of these.
"""
from collections.abc import Callable

from experiments.unmasking.worlds import imitable_in


def hull(points: list[tuple]) -> list[tuple]:
    """Those that no mixture of the others beats, the fastest first: the upper left corner of their convex hull."""
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


def at(points: list[tuple], nfe: float) -> float:
    """What a mixture of points reaches at an NFE, of which one may be to write nothing: 0 in no time."""
    corners = hull([(0.0, 0.0), *points])
    for a, b in zip(corners, corners[1:]):
        if nfe <= b[0]:
            return a[1] + slope(a, b) * (nfe - a[0])
    return corners[-1][1]


def volume(points: list[tuple], length: float) -> float:
    """The area, of quality by saved NFE, in which some point is at least as good and as fast: 0 to 1."""
    points, area, best = sorted(points), 0.0, 0.0
    for (x, y), (after, _) in zip(points, [*points[1:], (length, 0)]):
        best = max(best, y)
        area += best * (min(after, length) - min(x, length))
    return area / length


def point(numbers: dict) -> tuple:
    return numbers["nfe"], numbers["valid"]


def named(results: dict, *begin: str) -> list[dict]:
    """The heuristics, or those whose name begins so."""
    return [rule for rule in results["heuristics"] if rule["rule"].startswith(begin or ("",))]


def shown(results: dict) -> list[dict]:
    """The heuristics that numbers are given of: on the hull of the stories for choosing, with the best reward of an
    alpha, thresholds, and random ones."""
    some = named(results)
    best = {best_rule(results, alpha, among) for alpha in some[0]["dev"]["reward"]
            for among in (imitable_in(results["world"]), lambda name: True)}
    return [rule for rule in some if rule["rule"] in best or rule in corners(results)
            or rule["rule"].startswith(("threshold", "random"))]


def corners(results: dict) -> list[dict]:
    """The heuristics on the hull of the stories for choosing."""
    some = named(results)
    points = hull([point(rule["dev"]) for rule in some])
    return [rule for rule in some if point(rule["dev"]) in points]


def best_rule(results: dict, alpha, among: Callable = lambda name: True) -> str:
    """The heuristic with the best reward on the stories for choosing, of equals the fastest."""
    some = [rule for rule in named(results) if among(rule["rule"])]
    return max(some, key=lambda rule: (rule["dev"]["reward"][str(alpha)], -rule["dev"]["nfe"]))["rule"]


def bar(results: dict) -> list[tuple]:
    """Heuristics as they are on the stories that numbers are of."""
    return [point(rule["test"]) for rule in named(results) if "test" in rule]


def policies(results: dict) -> dict[str, list[dict]]:
    """By name, a policy a seed."""
    found = {}
    for policy in results["policies"]:
        found.setdefault(policy["policy"], []).append(policy)
    return found


def test_of(results: dict, name: str) -> dict:
    """What is said of a heuristic."""
    return next(rule for rule in named(results) if rule["rule"] == name)["test"]
