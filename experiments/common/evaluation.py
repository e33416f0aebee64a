"""Evaluates a student: its validation NLL, and the text that it generates with each of several samplers."""
from dataclasses import replace

import train_tiny
from data import story_world
from decoding.sampling import SamplingConfig
from experiments.common.job import Job, config_of
from model.masks import AR
from report import generate, metrics


def make_generator(sampler: str, net, teacher, job: Job, recipe, layout=None) -> generate.TextGenerator:
    """The text generator that a sampler of Job.samplers stands for.

    Either a reveal rule, or speculative decoding with verifier=self or verifier=teacher and maybe a
    temperature.
    """
    flags = dict(part.split("=") for part in sampler.split())
    verifier = flags.pop("verifier", None)
    sampling = SamplingConfig(float(flags.pop("temperature", 1)))
    other_flags = " ".join(f"{name}={value}" for name, value in flags.items())
    sampler_recipe = train_tiny.make_recipe(config_of(job, other_flags), recipe.eot)
    if verifier:
        verifying_teacher = teacher if verifier == "teacher" else None
        return generate.speculative_generator(net, sampler_recipe.layout, verifying_teacher, sampling)
    layout = layout or sampler_recipe.layout
    return generate.diffusion_generator(net, layout, sampler_recipe.rule, sampling)


def evaluate(net, teacher, job: Job, corpus, held: list, config, layout=None) -> dict:
    """val_nats and bits_per_byte, and by sampler the metrics of generated text.

    `layout` replaces that of the job: an AR model is evaluated under its own. If the student verifies its own
    drafts, `ar_nats` is its validation NLL as an AR model.
    """
    tok = corpus.tokenizer
    recipe = train_tiny.make_recipe(config, tok.eot)
    judge = story_world.breaks if corpus.name == "toy" else None
    result = metrics.likelihood(net, held, layout or recipe.layout, tok)
    if any("verifier=self" in sampler for sampler in job.samplers):
        result["ar_nats"] = metrics.likelihood(net, held, AR, tok)["val_nats"]
    for sampler in job.samplers:
        generator = make_generator(sampler, net, teacher, job, recipe, layout)
        texts, seconds = generate.generate_texts(generator, held, recipe.eot, config.length, job.seed)
        result[sampler] = metrics.text_metrics(teacher, texts, seconds, tok, judge)
    return result


def evaluate_teacher(teacher, job: Job, corpus, held: list, config) -> dict:
    """The same numbers of the AR model, in one flat dictionary."""
    sampler = "reveal=static:1"
    ar_job = replace(job, flags={}, samplers=(sampler,))
    result = evaluate(teacher, teacher, ar_job, corpus, held, config, AR)
    return result | result.pop(sampler)
