"""What a conversion of the experiments is: flags of train_tiny.py, when it is looked at, and how."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import train_tiny

WORK = Path("out/experiments")


@dataclass(frozen=True)
class Job:
    """A conversion of the teacher of `seed`, and when and how it is looked at."""
    name: str                           # of the row
    seed: int
    flags: dict                         # of train_tiny.py
    points: tuple                       # updates after which the student is judged
    looks: tuple = ("",)                # ways to sample: flags of train_tiny.py, "block=8 reveal=static:2"
    recipes: Callable | None = None     # (recipe, rollouts) -> the recipes that rollouts take in turn
    start: Callable | None = None       # something done to the student before
    stories: int = 256                  # that a look is made of
    pretrain: dict | None = None        # flags of the teacher
    folder: str = "full"                # under out/experiments
    copies: int = 1                     # of each text in a batch, by its recipes: a text's tokens count once

    @property
    def file(self) -> Path:
        return WORK / self.folder / f"{self.name}-{self.seed}.json".replace(" ", "")

    @property
    def settings(self) -> dict:
        """What JSON can hold of it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
                if not callable(value) and name != "folder" and (name, value) != ("copies", 1)}


def tiny(job: Job) -> Job:
    """The same for --quick: whether it runs at all."""
    return replace(job, folder="quick", stories=16, pretrain=dict(pretrain_steps=20, layers=1, width=64, pretrain_batch=4))


def without_paths(runs: list[dict]) -> list[dict]:
    """As they are published: a text's name on this machine is nobody's business."""
    for run in runs:
        run["settings"]["flags"] = {k: v for k, v in run["settings"]["flags"].items() if "data" not in k}
    return runs


def options_of(job: Job, more: str = "") -> train_tiny.Config:
    """Flags as a value; `more` are those of a look."""
    given = {"data": "toy", **(job.pretrain or {}), "warm_steps": 0, "updates_per_rollout": 1, **job.flags, "seed": job.seed,
             "distill_steps": max(job.points)}
    given |= {name: int(value) if value.isdigit() else value for name, value in (x.split("=") for x in more.split())}
    return train_tiny.Config(**given)
