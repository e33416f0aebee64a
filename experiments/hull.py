"""What experiments/unmasking.py says of its looks: the hull of all heuristics, and what lies above it.

A point is (NFE, share of valid texts). Looks are numbers by name: a heuristic's on the stories for choosing, "dev", and
on the others, "test"; a policy's on these alone.
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


def point(look: dict, part: str = "test") -> tuple:
    return look[part]["nfe"], look[part]["valid"]


def bar(look: dict) -> list[tuple]:
    """The heuristics that lie on the hull on the stories for choosing, as they are on the others."""
    names = {point(numbers, "dev"): numbers for numbers in look.values() if "dev" in numbers}
    return [point(names[corner]) for corner in hull(list(names))]


def constant(look: dict, alpha: str) -> dict:
    """The heuristic whose reward is best on the stories for choosing, as it is on the others."""
    best = max((numbers for numbers in look.values() if "dev" in numbers), key=lambda x: x["dev"]["reward"][alpha])
    return best["test"]


def policies(look: dict) -> dict[str, dict]:
    return {name: numbers["test"] for name, numbers in look.items() if "dev" not in numbers}


def by_world(results: dict) -> dict[str, list[dict]]:
    """The looks of all seeds."""
    seen = {}
    for run in results["runs"]:
        seen.setdefault(run["world"], []).append(run["looks"])
    return seen


def table(results: dict) -> str:
    """Markdown: a row a policy; the heuristics beside it at the same NFE, and that of the best reward."""
    lines = ["| world | policy | NFE | `valid` | heuristics' at that NFE | reward | the best heuristic's | s a text |",
             "|" + "---|" * 8]
    for world, seen in by_world(results).items():
        for name in policies(seen[0]):
            some, alpha = [policies(look)[name] for look in seen], name.split()[1].rstrip(",")
            cells = [cell([x["nfe"] for x in some], 1), cell([x["valid"] for x in some], 2),
                     cell([at(bar(look), x["nfe"]) for look, x in zip(seen, some)], 2),
                     cell([x["reward"][alpha] for x in some]),
                     cell([constant(look, alpha)["reward"][alpha] for look in seen]),
                     cell([x["seconds"] for x in some])]
            lines.append(f"| {world} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """`valid` against NFE, a picture a world: heuristics, their hull, the policies."""
    worlds = by_world(results)
    for axes, (world, seen) in zip(figure.subplots(1, len(worlds), squeeze=False)[0], worlds.items()):
        for look in seen:
            rules = [point(numbers) for numbers in look.values() if "dev" in numbers]
            axes.plot(*zip(*rules), ".", color="0.8")
            axes.plot(*zip(*sorted(bar(look))), color="0.5")
        for i, name in enumerate(policies(seen[0])):
            some = [policies(look)[name] for look in seen]
            axes.plot([x["nfe"] for x in some], [x["valid"] for x in some], "*", color=f"C{i % 10}", label=name)
        axes.set(xlabel="NFE, forwards a text", title=world)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    figure.axes[0].set_ylabel("valid")
