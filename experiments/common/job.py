"""A conversion that an experiment runs: flags of train_tiny.py, and when and how it is evaluated."""
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import train_tiny

WORK = Path("out/experiments")      # finished work; it is read, not done again
# Fields that older results lack, and their defaults.
YOUNGER = {"copies": 1, "first_story": 0, "train_stories": None, "mean_writes": False, "corpus": None}


@dataclass(frozen=True)
class Job:
    """One conversion of the teacher of a random seed."""
    name: str                           # of its row in the tables
    seed: int
    flags: dict                         # of train_tiny.py
    eval_steps: tuple                   # the student is evaluated after these updates
    corpus: Callable | None = None      # () -> the teacher's corpus; default: that of --data
    samplers: tuple = ("",)             # ways to sample in an evaluation, e.g. "block=8 reveal=static:2"
    recipes: Callable | None = None     # (recipe, rollouts) -> the recipes that the rollouts use in turn
    prepare_student: Callable | None = None     # changes the student before the first update
    stories: int = 256                  # held-out stories that an evaluation continues
    first_story: int = 0                # number of the first of them
    train_stories: int | None = None    # the conversion has the first so many; default: all, as the teacher
    mean_writes: bool = False   # the student's text is written by the running mean of its weights
    teacher_flags: dict | None = None   # flags of the teacher that differ from the defaults
    folder: str = "story_world"         # where it is saved, under out/experiments
    copies: int = 1                     # of each text in a batch, if the recipes repeat texts

    @property
    def file(self) -> Path:
        name = f"{self.name}-{self.seed}.json"
        return WORK / self.folder / name.replace(" ", "").replace("/", "_")

    @property
    def settings(self) -> dict:
        """Everything above that JSON can hold. A saved result is read only if these are the same."""
        settings = {}
        for name, value in vars(self).items():
            if callable(value) or name == "folder" or (name in YOUNGER and value == YOUNGER[name]):
                continue
            settings[name] = list(value) if isinstance(value, tuple) else value
        return settings


def quick_job(job: Job) -> Job:
    """The same job with a tiny teacher and few stories, for --quick: does it run at all?"""
    small = {"pretrain_steps": 20, "layers": 1, "width": 64, "pretrain_batch": 4}
    return replace(job, folder="quick", stories=16, teacher_flags=small)


def without_paths(runs: list[dict]) -> list[dict]:
    """The runs without the names of files on this machine."""
    for run in runs:
        flags = run["settings"]["flags"]
        run["settings"]["flags"] = {name: value for name, value in flags.items() if "data" not in name}
    return runs


def config_of(job: Job, sampler: str = "") -> train_tiny.Config:
    """The configuration of a job; `sampler` sets further flags, written as in Job.samplers."""
    flags = {"data": "toy", "source": "student", "temperature": 1.0, "target": "teacher", "weight": "first",
             "clean_weight": 0.0, "clean_text": "own", "batch": 16, "warm_steps": 0,
             "updates_per_rollout": 1, "optimizer": "muon"}
    flags |= job.teacher_flags or {}
    flags |= job.flags
    flags["seed"] = job.seed
    flags["distill_steps"] = max(job.eval_steps)
    for part in sampler.split():
        name, value = part.split("=")
        flags[name] = int(value) if value.isdigit() else value
    return train_tiny.Config(**flags)
