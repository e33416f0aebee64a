"""Where a light model may take denoising steps: the paper's placement and others to compare it with."""
import itertools
import random
from collections.abc import Iterable

from decoding.scheduling import Schedule, derive_schedule, schedule_from_steps, step_costs

SEGMENTS = 8            # of the exhaustive search over pairs of segments: 28 schedules


def light_at(steps: int, light: Iterable[int]) -> Schedule:
    """The schedule of so many steps whose steps `light` use the light model."""
    light = set(light)
    return schedule_from_steps([step in light for step in range(steps)])


def placements(steps: int, share: float, curves: dict, seed: int) -> dict[str, Schedule]:
    """The same share of light steps in seven ways. Step 0 sees nothing but masks."""
    n = round(share * steps)
    first_half = range(n - n // 2)
    last_half = range(steps - n // 2, steps)
    spread_evenly = [int((k + 0.5) * steps / n) for k in range(n)]
    return {
        "sandwich (paper)": light_at(steps, [*first_half, *last_half]),
        "all early": light_at(steps, range(n)),
        "all late": light_at(steps, range(steps - n, steps)),
        "middle": light_at(steps, range((steps - n) // 2, (steps + n) // 2)),
        "evenly": light_at(steps, spread_evenly),
        "random": light_at(steps, random.Random(seed).sample(range(steps), n)),
        "derived": derive_schedule(curves, steps, share),
    }


def segment_pairs(steps: int) -> dict[str, Schedule]:
    """Every choice of two light segments of SEGMENTS."""
    size = steps // SEGMENTS
    schedules = {}
    for pair in itertools.combinations(range(SEGMENTS), 2):
        light = [step for step in range(steps) if step // size in pair]
        schedules[f"{pair[0]} {pair[1]}"] = light_at(steps, light)
    return schedules


def predicted_cost(names: list[str], curves: dict) -> float:
    """Nats per token that the light steps among `names` ("H" or "L" per step) cost, to first order.

    Every step reveals as many tokens as the next one.
    """
    cost_of_step = step_costs(curves, len(names)).tolist()
    return sum(cost for cost, name in zip(cost_of_step, names) if name == "L") / len(names)


def spearman(x: list[float], y: list[float]) -> float:
    """The rank correlation; no ties."""
    n = len(x)
    ranks_x = [sorted(x).index(value) for value in x]
    ranks_y = [sorted(y).index(value) for value in y]
    return 1 - 6 * sum((a - b) ** 2 for a, b in zip(ranks_x, ranks_y)) / (n * (n * n - 1))
