"""What experiments/unmasking.py says of its looks: the hull of all heuristics, and what lies above it.

A point is (NFE, share of valid texts). A heuristic has numbers on the stories for choosing, "dev", and on the others,
"test"; a policy's are of these.
"""
from experiments.results import cell


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


def of_world(results: dict, world: str, rules: str = "") -> list[dict]:
    """The heuristics of a world, or those whose name begins so."""
    return [rule for rule in results["heuristics"] if rule["world"] == world and rule["rule"].startswith(rules)]


def best_rule(results: dict, world: str, alpha: float) -> str:
    """The heuristic with the best reward on the stories for choosing."""
    return max(of_world(results, world), key=lambda rule: rule["dev"]["reward"][str(alpha)])["rule"]


def bar(results: dict, world: str, rules: str = "") -> list[tuple]:
    """The heuristics that lie on the hull on the stories for choosing, as they are on the others."""
    found = {point(rule["dev"]): point(rule["test"]) for rule in of_world(results, world, rules)}
    return [found[corner] for corner in hull(list(found))]


def policies(results: dict, world: str, reward: str = "reward") -> dict[float, list[dict]]:
    """By alpha, a policy a seed."""
    found = {}
    for policy in results["policies"]:
        if (policy["world"], policy["reward"]) == (world, reward):
            found.setdefault(policy["alpha"], []).append(policy)
    return found


def worlds(results: dict) -> list[str]:
    return list(dict.fromkeys(policy["world"] for policy in results["policies"]))


def table(results: dict) -> str:
    """Markdown: a row a policy, and what was made of it; the heuristics beside it at the same NFE, and the one whose
    reward is best."""
    lines = ["| world | policy | NFE | `valid` | heuristics' hull at that NFE | reward | the best heuristic's | "
             "minutes to train |", "|" + "---|" * 8]
    for world in worlds(results):
        for alpha, some in policies(results, world).items():
            best = next(rule for rule in of_world(results, world) if rule["rule"] == some[0]["expert"])["test"]
            minutes = cell([policy["seconds"] / 60 for policy in some], 0)
            for what in some[0]["looks"]:
                seen = [policy["looks"][what] for policy in some]
                cells = [cell([x["nfe"] for x in seen], 1), cell([x["valid"] for x in seen], 2),
                         cell([at(bar(results, world), x["nfe"]) for x in seen], 2),
                         cell([x["reward"][str(alpha)] for x in seen]),
                         f"{best['reward'][str(alpha)]:.3f} +- {best['error'][str(alpha)]:.3f}"]
                lines.append(f"| {world} | alpha {alpha}{what and ', ' + what} | {' | '.join(cells)} | {minutes} |")
    return "\n".join(lines)


def volumes(results: dict, world: str, length: int) -> dict[str, list[float]]:
    """What a seed's policies dominate together, and what heuristics do: all, and thresholds over the whole block."""
    seeds = zip(*policies(results, world).values())
    ours = [volume([point(x) for policy in some for what, x in policy["looks"].items() if what[:4] in ("", "beta")],
                   length) for some in seeds]
    largest = max(int(rule["rule"].split()[-1]) for rule in of_world(results, world))
    wide = [point(rule["test"]) for rule in of_world(results, world, "threshold")
            if rule["rule"].endswith(f" {largest}")]
    return {"policies": ours, "heuristics": [volume(bar(results, world), length)],
            "thresholds of the whole block": [volume(wide, length)]}


def draw(results: dict, figure) -> None:
    """`valid` against NFE, a picture a world: heuristics, their hull, the policies. And the reward that collapses."""
    figure.set_size_inches(14, 4.8)
    axes = figure.subplots(1, len(worlds(results)) + 1)
    for one, world in zip(axes, worlds(results)):
        one.plot(*zip(*(point(rule["test"]) for rule in of_world(results, world))), ".", color="0.8")
        one.plot(*zip(*sorted(bar(results, world))), color="0.5", label="hull of the heuristics")
        for alpha, some in policies(results, world).items():
            one.plot(*zip(*(point(policy["looks"][""]) for policy in some)), "*", label=f"policies, alpha {alpha}")
            if len(some[0]["looks"]) > 1:
                scaled = [x for policy in some for what, x in policy["looks"].items() if what.startswith("beta")]
                one.plot(*zip(*map(point, scaled)), "+", label=f"alpha {alpha}, times beta")
        one.set(xlabel="NFE, steps a text", title=world)
        one.grid(alpha=0.3)
        one.legend(fontsize=6)
    axes[0].set_ylabel("valid")
    for policy in results["policies"]:
        if policy["world"] == "blocks" and policy["alpha"] == 1:
            steps, quality, _ = zip(*policy["log"])
            axes[-1].plot(steps, quality, color="C3" if policy["reward"] == "additive" else "0.6",
                          label=policy["reward"])
    axes[-1].set(xlabel="update", title="quality of what explores, two rewards")
    if axes[-1].lines:
        axes[-1].legend(fontsize=6)
