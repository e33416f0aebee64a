"""Evaluates a student: its validation NLL, and the text that it generates with each of several samplers."""
from collections.abc import Callable
from dataclasses import replace

import train_tiny
from data import story_world
from decoding.sampling import SamplingConfig
from experiments.common.job import Job, config_of
from model.masks import AR
from report import generate, metrics

TOLERANCE = 0.02        # tokens per forward pass, of a level found by bisection
TRIALS = 96             # stories of each of its steps
STEPS = 24              # at most: float32 probabilities near 1 are 2 ** -24 apart


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


def level_for_cost(cost: float, generator_at: Callable, held: list, eot, length: int, seed: int) -> float:
    """The level of `leftmost` at which text takes `cost` tokens per forward pass, by bisection.

    `generator_at(level)` is a text generator. A higher level reveals fewer tokens per pass. The search ends
    within TOLERANCE of the cost, measured on the first TRIALS stories.
    """
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        level = (low + high) / 2
        texts, _ = generate.generate_texts(generator_at(level), held[:TRIALS], eot, length, seed)
        tokens = sum(int(rollout.response_mask.sum()) for rollout, _ in texts)
        forwards = sum(int(rollout.forwards.sum()) for rollout, _ in texts)
        found = tokens / forwards
        if abs(found - cost) < TOLERANCE:
            break
        if found > cost:
            low = level
        else:
            high = level
    return level


def at_cost(sampler: str, net, teacher, job: Job, recipe, held: list, length: int) -> str:
    """The sampler `cost=C` as a reveal rule with C tokens per forward pass; any other as it is."""
    name, _, value = sampler.partition("=")
    if name != "cost":
        return sampler

    def generator_at(level: float):
        return make_generator(f"reveal=leftmost:{level}", net, teacher, job, recipe)

    level = level_for_cost(float(value), generator_at, held, recipe.eot, length, job.seed)
    return f"reveal=leftmost:{level}"


def valid_texts(texts: list, tokenizer, judge: Callable) -> str:
    """One digit per text: 1 if it is finished and breaks no law, else 0."""
    digits = ""
    for text, is_finished in metrics.whole_stories(texts, tokenizer):
        digits += str(int(is_finished and not any(judge(text))))
    return digits


def evaluate(net, teacher, job: Job, corpus, held: list, config, layout=None,
             judge: Callable | None = None) -> dict:
    """val_nats and bits_per_byte, and by sampler the metrics of generated text.

    `layout` replaces that of the job: an AR model is evaluated under its own. If the student verifies its own
    drafts, `ar_nats` is its validation NLL as an AR model. `judge` finds the laws that a text breaks, by
    default those of the story world; with one, `valid_texts` says of each text whether it is valid.
    """
    tok = corpus.tokenizer
    recipe = train_tiny.make_recipe(config, tok.eot)
    if judge is None and corpus.name == "toy":
        judge = story_world.breaks
    result = metrics.likelihood(net, held, layout or recipe.layout, tok)
    if any("verifier=self" in sampler for sampler in job.samplers):
        result["ar_nats"] = metrics.likelihood(net, held, AR, tok)["val_nats"]
    for sampler in job.samplers:
        rule = at_cost(sampler, net, teacher, job, recipe, held, config.length)
        generator = make_generator(rule, net, teacher, job, recipe, layout)
        texts, seconds = generate.generate_texts(generator, held, recipe.eot, config.length, job.seed)
        result[sampler] = metrics.text_metrics(teacher, texts, seconds, tok, judge)
        if rule != sampler:
            result[sampler]["rule"] = rule
        if judge:
            result[sampler]["valid_texts"] = valid_texts(texts, tok, judge)
    return result


def evaluate_teacher(teacher, job: Job, corpus, held: list, config, judge: Callable | None = None) -> dict:
    """The same numbers of the AR model, in one flat dictionary."""
    sampler = "reveal=static:1"
    ar_job = replace(job, flags={}, samplers=(sampler,))
    result = evaluate(teacher, teacher, ar_job, corpus, held, config, AR, judge)
    return result | result.pop(sampler)
