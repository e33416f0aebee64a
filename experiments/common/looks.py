"""What is said of a conversion's student at a point: its likelihood, and what it writes in each of several ways."""
from dataclasses import replace

import train_tiny
from data import story_world
from decoding.sampling import SamplingConfig
from experiments.common.job import Job, options_of
from model.masks import AR
from report import generate, metrics


def writer_of(look: str, net, teacher, job: Job, recipe, layout=None) -> generate.TextGenerator:
    """The way to write that a look stands for: a rule, or verifier=self or teacher, which may have a temperature."""
    flags = dict(part.split("=") for part in look.split())
    verifier, sampling = flags.pop("verifier", None), SamplingConfig(float(flags.pop("temperature", 1)))
    how = train_tiny.make_recipe(options_of(job, " ".join(f"{k}={v}" for k, v in flags.items())), recipe.eot)
    if verifier:
        return generate.speculative_generator(net, how.layout, teacher if verifier == "teacher" else None, sampling)
    return generate.diffusion_generator(net, layout or how.layout, how.rule, sampling)


def judge(net, teacher, job: Job, corpus, held: list, options, layout=None) -> dict:
    """The likelihood, and for each look what is written; with a `layout` under that and the rule of the AR model. Of a
    student that verifies itself also `ar_nats`, its likelihood as an AR model."""
    recipe = train_tiny.make_recipe(options, corpus.tokenizer.eot)
    check = story_world.check if corpus.name == "toy" else None
    numbers = metrics.likelihood(net, held, layout or recipe.layout, corpus.tokenizer)
    if any("verifier=self" in look for look in job.looks):
        numbers["ar_nats"] = metrics.likelihood(net, held, AR, corpus.tokenizer)["val_nats"]
    for look in job.looks:
        writer = writer_of(look, net, teacher, job, recipe, layout)
        made = generate.generate_texts(writer, held, recipe.eot, options.length, job.seed)
        numbers[look] = metrics.text_metrics(teacher, *made, corpus.tokenizer, check)
    return numbers


def ar_numbers(teacher, job: Job, corpus, held: list, options) -> dict:
    """The same of the AR model."""
    numbers = judge(teacher, teacher, replace(job, flags={}, looks=("reveal=static:1",)), corpus, held, options, AR)
    return numbers | numbers.pop("reveal=static:1")
