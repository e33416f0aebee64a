"""The rows of the ablations: what is changed in a conversion, and how its text is sampled."""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from experiments.common import changes
from train_tiny import PAPER

LEFTMOST = tuple(f"reveal=leftmost:{level}" for level in (0, 0.4, 0.7, 0.9, 0.98, 1))
THRESHOLD = tuple(f"reveal=threshold:{level}" for level in (0, 0.4, 0.7, 0.9, 1))
THRESHOLD_DRAWN = tuple(f"{sampler} confidence=drawn" for sampler in THRESHOLD)
THRESHOLD_LARGEST = tuple(f"{sampler} confidence=largest" for sampler in THRESHOLD)

OWN_TEXT = {
    "source": "student",
    "states": "visited",
    "target": "teacher",
    "weight": "first",
    "updates_per_rollout": 4,
    "lr": 0.005,
}
STORIES = {"source": "data", "states": "prefix", "target": "teacher", "weight": "first"}
SCHEDULES = ("length_ramp", "warm_steps", "lr_schedule", "batch")      # of the paper's preset, left out here
PRESET = {name: value for name, value in PAPER.items() if name not in SCHEDULES} | {"lr": 0.001}
BY_THRESHOLD = OWN_TEXT | {"reveal": "threshold:0.9"}
ONE_PER_STEP = OWN_TEXT | {"reveal": "static:1"}
BY_DRAWN = BY_THRESHOLD | {"confidence": "drawn"}


@dataclass
class Row:
    flags: dict
    samplers: tuple = LEFTMOST          # numbers at equal cost are interpolated between these
    recipes: Callable | None = None
    prepare_student: Callable | None = None
    job: str | None = None              # rows with the same job are one conversion, sampled in several ways


def leftmost_in_blocks(block: int) -> tuple:
    return tuple(f"block={block} {sampler}" for sampler in LEFTMOST)


ROWS = {}
for block in (4, 8, 16):
    for states in ("visited", "random", "prefix"):
        ROWS[f"{states}, block {block}"] = Row(OWN_TEXT | {"states": states, "block": block})
for block in (4, 8, 16):
    ROWS[f"paper's preset, block {block}"] = Row(PRESET | {"block": block}, THRESHOLD_DRAWN)
ROWS |= {
    "visited, sampled by threshold": Row(OWN_TEXT, THRESHOLD, job="visited, block 4"),
    "trained by threshold": Row(BY_THRESHOLD, job="threshold"),
    "trained and sampled by threshold": Row(BY_THRESHOLD, THRESHOLD, job="threshold"),
    "trained one token per step": Row(ONE_PER_STEP, job="static"),
    "trained one token per step, sampled by threshold": Row(ONE_PER_STEP, THRESHOLD, job="static"),
    "confidence of the sampled token": Row(BY_DRAWN, THRESHOLD_DRAWN, job="drawn"),
    "confidence of the sampled token, sampled by the largest": Row(BY_DRAWN, THRESHOLD_LARGEST, job="drawn"),
    "reverse KL": Row(OWN_TEXT, recipes=partial(changes.with_divergence, changes.reverse_kl)),
    "Jensen-Shannon": Row(OWN_TEXT, recipes=partial(changes.with_divergence, changes.jensen_shannon)),
    "every state": Row(OWN_TEXT, recipes=changes.every_state),
    "1 update per rollout": Row(OWN_TEXT | {"updates_per_rollout": 1}),
    "16 updates per rollout": Row(OWN_TEXT | {"updates_per_rollout": 16}),
    "half of the updates on stories": Row(OWN_TEXT, recipes=partial(changes.stories_first, 0.5)),
}
for block in (4, 8, 16):
    ROWS[f"stories, block {block}"] = Row(STORIES | {"block": block})
for block in (4, 8, 16):
    samplers = leftmost_in_blocks(block)
    ROWS[f"stories, mixed blocks, at {block}"] = Row(STORIES, samplers, changes.mixed_blocks, job="mixed")
ROWS |= {
    "stories, random": Row(STORIES | {"states": "random"}),
    "stories, every prefix": Row(STORIES, recipes=changes.every_prefix),
    "stories, weight mean": Row(STORIES | {"weight": "mean"}),
    "stories, weight 1/t": Row(STORIES | {"weight": "1/t"}),
    "stories, context block": Row(STORIES | {"context": "block"}),
    "stories, zero as [MASK]": Row(STORIES, prepare_student=changes.zero_mask_vector),
    "stories, end-of-text as [MASK]": Row(STORIES, prepare_student=changes.eot_mask_vector),
}


def job_name(row_name: str) -> str:
    """The conversion that a row is about."""
    return ROWS[row_name].job or row_name
