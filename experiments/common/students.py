"""A student that is looked at in many ways: converted once, and kept in out/. How fast they are."""
import copy
import json
from functools import partial

import torch

import train_tiny
from experiments.common.conversion import opened, recipes_of, take_in, teacher_of, updates
from experiments.common.job import Job
from experiments.speed import run as speed
from model import checkpoint
from report import generate
from report.compare import write_json


def student(job: Job) -> tuple:
    """The job's student after its last update, and its Layout; converted, if it is not there with these settings."""
    folder = job.file.with_suffix("")
    said = folder / "job.json"
    if not said.exists() or json.loads(said.read_text()) != job.settings:
        checkpoint.save(folder, *converted(job))
        write_json(said, job.settings)
    net, layout = checkpoint.load(folder)
    return net.requires_grad_(False), layout


def converted(job: Job) -> tuple:
    """The mean of the weights (conversion.take_in), the tokenizer, the layout."""
    (options, corpus), teacher = opened(job), teacher_of(job)
    recipe = train_tiny.make_recipe(options, corpus.tokenizer.eot)
    net = copy.deepcopy(teacher).init_mask().requires_grad_(True)
    if job.start:
        job.start(net)
    mean = copy.deepcopy(net)
    for record in updates(net, teacher, corpus, recipes_of(job, recipe, options), options):
        take_in(mean, net, record["step"])
    return mean, corpus.tokenizer, recipe.layout


def in_turns(writers: dict[str, generate.TextGenerator], teacher, held: list, eot: int, seed: int, turns: int,
             least: int = 1) -> dict:
    """Seconds a token by name, of texts that go on from the `held` stories one at a time, a number a turn; "ar" is a
    loop that writes the teacher's greedy text and does nothing else. Nothing else may run meanwhile."""
    length = teacher.config.context

    def alone(writer):
        texts, seconds = generate.generate_texts(writer, held, eot, length, seed, batch=1, min_prompt=least)
        return seconds / sum(int(text.response_mask.sum()) for text, _ in texts)

    def plain():
        prompts = [story[None, :least + k % 8] for k, story in enumerate(held)]
        return sum(speed.timed(partial(speed.ar, teacher, row, length - 7 - least)) for row in prompts) / (
            len(held) * (length - 7 - least))
    torch.set_num_threads(1)
    seen = [{"ar": plain(), **{name: alone(writer) for name, writer in writers.items()}} for _ in range(turns)]
    return {name: [turn[name] for turn in seen] for name in seen[0]}
