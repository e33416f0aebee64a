"""Where a light model may stand among the steps: the paper's sandwich and what it is compared with."""
import itertools
import random

from decoding.scheduling import Schedule, derive_schedule, schedule_from_steps, step_costs

SEGMENTS, LIGHT = 8, 2          # of the exhaustive search: 28 schedules


def at(steps: int, light) -> Schedule:
    chosen = set(light)
    return schedule_from_steps([k in chosen for k in range(steps)])


def placements(steps: int, share: float, curves: dict, seed: int) -> dict[str, Schedule]:
    """The same share of the steps light, in seven ways; step 0 sees nothing but masks."""
    n = round(share * steps)
    begin, end = n - n // 2, steps - n // 2
    return {"sandwich (paper)": at(steps, [*range(begin), *range(end, steps)]), "all early": at(steps, range(n)),
            "all late": at(steps, range(steps - n, steps)),
            "middle": at(steps, range((steps - n) // 2, (steps + n) // 2)),
            "evenly": at(steps, (int((k + 0.5) * steps / n) for k in range(n))),
            "random": at(steps, random.Random(seed).sample(range(steps), n)), "derived": derive_schedule(curves, steps, share)}


def segments(steps: int) -> dict[str, Schedule]:
    """Each choice of two light segments of eight."""
    size = steps // SEGMENTS
    return {" ".join(map(str, some)): at(steps, (k for k in range(steps) if k // size in some))
            for some in itertools.combinations(range(SEGMENTS), LIGHT)}


def predicted(names: list[str], curves: dict) -> float:
    """Nats per token that the light ones of these steps cost, to first order: each reveals as many tokens as the next.
    """
    return sum(x for x, name in zip(step_costs(curves, len(names)).tolist(), names) if name == "L") / len(names)


def spearman(x: list[float], y: list[float]) -> float:
    """The correlation of ranks, none of them shared."""
    n, ranks = len(x), [[sorted(values).index(v) for v in values] for values in (x, y)]
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(*ranks)) / (n * (n * n - 1))
