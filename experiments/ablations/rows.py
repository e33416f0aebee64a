"""The rows of experiments/ablations.py: what is changed of a conversion, and how its text is sampled."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from experiments.common import changes
from train_tiny import PAPER

LEFTMOST = tuple(f"reveal=leftmost:{level}" for level in (0, 0.4, 0.7, 0.9, 0.98, 1))
THRESHOLD = tuple(f"reveal=threshold:{level}" for level in (0, 0.4, 0.7, 0.9, 1))
DRAWN, LARGEST = (tuple(f"{look} confidence={name}" for look in THRESHOLD) for name in ("drawn", "largest"))
OWN = {"source": "student", "states": "visited", "target": "teacher", "weight": "first", "updates_per_rollout": 4, "lr": 0.005}
STORIES = {"source": "data", "states": "prefix", "target": "teacher", "weight": "first"}
PRESET = {k: v for k, v in PAPER.items() if k not in ("length_ramp", "warm_steps", "lr_schedule", "batch")} | {"lr": 0.001}


@dataclass
class Row:
    flags: dict
    by: tuple = LEFTMOST                # the looks between whose levels it is compared
    recipes: Callable | None = None
    start: Callable | None = None
    job: str | None = None              # rows of one job are one conversion, looked at in several ways


def at_block(block: int) -> tuple:
    return tuple(f"block={block} {look}" for look in LEFTMOST)


ROWS = {
    **{f"{states}, block {block}": Row(OWN | {"states": states, "block": block})
       for block in (4, 8, 16) for states in ("visited", "random", "prefix")},
    **{f"paper's preset, block {block}": Row(PRESET | {"block": block}, DRAWN) for block in (4, 8, 16)},
    "visited, by threshold": Row(OWN, THRESHOLD, job="visited, block 4"),
    "trained by threshold": Row(OWN | {"reveal": "threshold:0.9"}, job="threshold"),
    "trained and sampled by threshold": Row(OWN | {"reveal": "threshold:0.9"}, THRESHOLD, job="threshold"),
    "trained one a step, by confidence": Row(OWN | {"reveal": "static:1"}, job="static"),
    "the same, sampled by threshold": Row(OWN | {"reveal": "static:1"}, THRESHOLD, job="static"),
    "drawn token's confidence": Row(OWN | {"reveal": "threshold:0.9", "confidence": "drawn"}, DRAWN, job="drawn"),
    "the same, sampled by the largest": Row(OWN | {"reveal": "threshold:0.9", "confidence": "drawn"}, LARGEST,
                                            job="drawn"),
    "reverse KL": Row(OWN, recipes=partial(changes.with_divergence, changes.reverse_kl)),
    "Jensen-Shannon": Row(OWN, recipes=partial(changes.with_divergence, changes.jensen_shannon)),
    "every state": Row(OWN, recipes=changes.every_state),
    **{f"{n} updates a rollout": Row(OWN | {"updates_per_rollout": n}) for n in (1, 16)},
    "half of it on stories": Row(OWN, recipes=partial(changes.stories_first, 0.5)),
    **{f"stories, block {block}": Row(STORIES | {"block": block}) for block in (4, 8, 16)},
    **{f"stories, mixed blocks, at {block}": Row(STORIES, at_block(block), changes.mixed, job="mixed")
       for block in (4, 8, 16)},
    "stories, random": Row(STORIES | {"states": "random"}),
    "stories, every left part": Row(STORIES, recipes=changes.every_prefix),
    **{f"stories, weight {weight}": Row(STORIES | {"weight": weight}) for weight in ("mean", "1/t")},
    "stories, context block": Row(STORIES | {"context": "block"}),
    "stories, zero as [MASK]": Row(STORIES, start=changes.zero_mask),
    "stories, end-of-text as [MASK]": Row(STORIES, start=changes.end_mask),
}
