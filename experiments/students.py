"""A student that is looked at in many ways: converted once, and kept in out/."""
import copy
import json

import train_tiny
from experiments.conversion import opened, take_in, teacher_of, updates
from experiments.job import Job
from model import hub
from report.publish import write_json


def student(job: Job) -> tuple:
    """The job's student after its last update, and its Layout; converted, if it is not there with these settings."""
    folder = job.file.with_suffix("")
    said = folder / "job.json"
    if not said.exists() or json.loads(said.read_text()) != job.settings:
        hub.save(folder, *converted(job))
        write_json(said, job.settings)
    net, layout = hub.load(folder)
    return net.requires_grad_(False), layout


def converted(job: Job) -> tuple:
    """The mean of the weights (conversion.take_in), the tokenizer, the layout."""
    (options, corpus), teacher = opened(job), teacher_of(job)
    recipe = train_tiny.recipe_of(options, corpus.tokenizer.eot)
    net = copy.deepcopy(teacher).init_mask().requires_grad_(True)
    if job.start:
        job.start(net)
    mean = copy.deepcopy(net)
    for record in updates(net, teacher, corpus, [recipe], options):
        take_in(mean, net, record["step"])
    return mean, corpus.tokenizer, recipe.layout
