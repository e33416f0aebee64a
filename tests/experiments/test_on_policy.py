"""Conversions with few stories, and text at a given cost."""
import math
import statistics
from collections import defaultdict

import numpy as np
import pytest
import torch

import opdlm
from data import story_world
from data.corpus import open_corpus
from data.tinystories import stories
from experiments.common import conversion, evaluation
from experiments.common.conversion import first_stories
from experiments.common.job import Job
from experiments.common.plots import save_picture
from experiments.common.results import load_results, results_path
from experiments.on_policy import run as on_policy
from experiments.on_policy import tables
from model.gpt import GPT, GPTConfig
from report import metrics


@pytest.fixture(scope="module")
def corpus():
    return open_corpus("toy", None, 2048)


# 1. the corpus of a conversion ----------------------------------------------------------------------------

def test_a_conversion_has_the_first_stories_and_no_other(corpus):
    few = first_stories(corpus, 3)
    assert len(few.starts) == 3
    assert few.train[-1] == corpus.tokenizer.eot
    assert np.array_equal(few.train, corpus.train[:len(few.train)])
    begin, end = corpus.starts[2:4]
    assert few.train[begin:].tolist() == corpus.train[begin:end + 1].tolist(), "the third story is whole"
    assert first_stories(corpus, None) is corpus
    with pytest.raises(ValueError, match="train_stories=30000: expected 1 to 29999"):
        first_stories(corpus, len(corpus.starts))


def test_a_conversion_learns_from_its_own_stories_alone(corpus, monkeypatch):
    seen = []

    def train_updates(student, teacher, corpus, recipes, config):
        seen.append(len(corpus.starts))
        return iter(())

    monkeypatch.setattr(conversion, "train_updates", train_updates)
    config, _ = conversion.open_job(Job("row", 0, {}, (1,)))
    teacher = GPT(GPTConfig(corpus.tokenizer.vocab_size, config.length, 1, 1, 64))
    for count in (5, None):
        job = Job("row", 0, {}, (1,), train_stories=count)
        list(conversion.train_student(job, teacher, corpus, config))
    assert seen == [5, len(corpus.starts)]


@pytest.mark.parametrize("mean_writes", [False, True])
def test_who_writes_the_text(corpus, monkeypatch, mean_writes):
    """The weights in training, or their running mean, which is the student that is evaluated."""
    writers = []

    def student_text(student, *args):
        writers.append(student)
        return opdlm.student_text(student, *args)

    monkeypatch.setitem(opdlm.SOURCES, "student", student_text)
    job = Job("row", 0, {"batch": 2, "length": 32}, (3,), mean_writes=mean_writes)
    config, _ = conversion.open_job(job)
    teacher = GPT(GPTConfig(corpus.tokenizer.vocab_size, config.length, 1, 1, 64))
    students = [student for _, student, _ in conversion.train_student(job, teacher, corpus, config)]
    evaluated = students[-1]
    assert len(writers) == 3
    assert all((writer is evaluated) == mean_writes for writer in writers)


def test_every_window_of_a_small_corpus_comes_from_its_stories(corpus):
    few = first_stories(corpus, 2)
    known = {corpus.train[begin:end].tobytes() for begin, end in zip(corpus.starts[:2], corpus.starts[1:3])}
    windows = few.windows(96)(np.linspace(0, 0.999, 50))
    for window in windows:
        begins = np.flatnonzero(window == corpus.tokenizer.eot)
        for begin, end in zip(begins, begins[1:]):
            if end > begin + 1:
                assert window[begin:end].astype(corpus.train.dtype).tobytes() in known


# 2. text at a given cost ----------------------------------------------------------------------------------

def texts_with(tokens: int, forwards: float) -> list:
    """A batch of one text, of so many tokens and forward passes."""
    ones = torch.ones(1, tokens, dtype=torch.long)
    rollout = opdlm.Rollout(ones, ones, ones.bool(), torch.tensor([forwards]), torch.tensor([1]))
    return [(rollout, torch.tensor([1]))]


def test_bisection_finds_the_level_of_a_cost(monkeypatch):
    """Tokens per forward pass that fall from 4 at level 0 to 1 at level 1."""
    def generate_texts(level, held, *_):
        assert len(held) <= evaluation.TRIALS
        return texts_with(6000, round(6000 / (4 - 3 * level))), 1.0

    monkeypatch.setattr(evaluation.generate, "generate_texts", generate_texts)
    for cost in (1.1, 1.5, 2, 3):
        level = evaluation.level_for_cost(cost, lambda level: level, [None] * 500, 0, 96, 0)
        assert 4 - 3 * level == pytest.approx(cost, abs=1.1 * evaluation.TOLERANCE)


def test_bisection_finds_the_level_of_a_student_that_is_certain_of_everything(monkeypatch):
    """4 tokens per forward pass up to the level 0.999, and one less for each further nine."""
    def cost_of(level):
        nines = -math.log10(1 - level)
        return min(4, max(1, 7 - nines))

    def generate_texts(level, held, *_):
        return texts_with(6000, round(6000 / cost_of(level))), 1.0

    monkeypatch.setattr(evaluation.generate, "generate_texts", generate_texts)
    level = evaluation.level_for_cost(1.5, lambda level: level, [None] * 500, 0, 96, 0)
    assert cost_of(level) == pytest.approx(1.5, abs=1.1 * evaluation.TOLERANCE)


def test_valid_texts_say_which_texts_are_valid(corpus):
    """Two stories of the world, one without its end, and one with its sentences in another order."""
    tok = corpus.tokenizer
    starts = stories(corpus.val, tok.eot)
    whole = [story.tolist() for story in metrics.held_out(corpus.val, starts, 2, 96)]
    sentences = story_world.story(0).split(". ")
    disordered = [tok.eot, *tok.encode(". ".join(sentences[::-1])), tok.eot]
    batches = []
    for ids in (*whole, whole[0][:-1], disordered):
        tokens = torch.tensor([ids])
        response = torch.ones_like(tokens, dtype=torch.bool)
        response[:, :1] = False
        one = torch.tensor([1])
        batches.append((opdlm.Rollout(tokens, tokens, response, one, one), one))
    digits = evaluation.valid_texts(batches, tok, story_world.breaks)
    assert digits == "1100"
    scores = metrics.story_scores(metrics.whole_stories(batches, tok), story_world.breaks)
    assert scores["valid"] == 0.5


# 3. rows, rates, differences ------------------------------------------------------------------------------

def test_fields_that_older_results_lack_do_not_change_their_settings():
    job = Job("row", 0, {}, (1,))
    assert not {"first_story", "train_stories", "copies", "mean_writes"} & set(job.settings)
    assert Job("row", 0, {}, (1,), train_stories=16).settings["train_stories"] == 16


def test_development_stories_are_not_those_of_the_numbers():
    options = on_policy.Options()
    trial = on_policy.trials(options)[0]
    job = on_policy.job_of("stories", 64, 0.01, 0, options)
    assert trial.first_story >= job.first_story + job.stories


def scarce_run(name: str, count: int | None, rate: float, valid: float, digits: str = "", seed: int = 0):
    point = {tables.FAST: {"valid": valid, "valid_texts": digits}}
    settings = {"name": name, "seed": seed, "flags": {"lr": rate}, "train_stories": count}
    return {"settings": settings, "points": [point]}


def test_the_best_rate_is_chosen_by_row_and_by_few_or_all_stories():
    trials = [
        scarce_run("trial, own text, 64 stories, lr 0.01", 64, 0.01, 0.5),
        scarce_run("trial, own text, 64 stories, lr 0.02", 64, 0.02, 0.6),
        scarce_run("trial, stories, 64 stories, lr 0.01", 64, 0.01, 0.3),
        scarce_run("trial, stories, 64 stories, lr 0.02", 64, 0.02, 0.2),
        scarce_run("trial, stories, all stories, lr 0.01", None, 0.01, 0.7),
        scarce_run("trial, stories, all stories, lr 0.02", None, 0.02, 0.8),
    ]
    rates = tables.best_rates(trials)
    assert rates == {("own text", False): 0.02, ("stories", False): 0.01, ("stories", True): 0.02}
    jobs = on_policy.jobs_of(on_policy.Options(counts="16,all", seeds=1), rates | {
        ("SDAR", False): 0.1, ("SDAR", True): 0.2, ("teacher's text", False): 0.3,
        ("own text, by the mean", False): 0.4,
    })
    found = {job.name: job.flags["lr"] for job in jobs}
    assert found.pop("untrained") and found == {
        "own text, no prompts, all stories, lr 0.02": 0.02,
        "own text, one per pass, 64 stories, lr 0.02": 0.02,
        "own text, warm start, 64 stories, lr 0.02": 0.02,
        "SDAR, 16 stories, lr 0.1": 0.1, "stories, 16 stories, lr 0.01": 0.01,
        "teacher's text, 16 stories, lr 0.3": 0.3, "own text, 16 stories, lr 0.02": 0.02,
        "SDAR, all stories, lr 0.2": 0.2, "stories, all stories, lr 0.02": 0.02,
        "teacher's text, all stories, lr 0.3": 0.3, "own text, all stories, lr 0.02": 0.02,
        "own text, by the mean, 16 stories, lr 0.4": 0.4, "own text, by the mean, all stories, lr 0.4": 0.4,
    }


def test_rows_keep_commas_of_their_own():
    run = scarce_run("own text, no prompts, all stories, lr 0.02", None, 0.02, 1.0)
    assert tables.row_of(run) == "own text, no prompts"


def test_a_difference_is_paired_by_text():
    """Pairs +1, 0, 0, +1: mean 0.5, standard error 0.577 / 2."""
    ours = [scarce_run("a", 16, 0.1, 0, "11", 0), scarce_run("a", 16, 0.1, 0, "01", 1)]
    theirs = [scarce_run("b", 16, 0.1, 0, "01", 0), scarce_run("b", 16, 0.1, 0, "00", 1)]
    assert tables.difference(ours, theirs) == "+0.500 (-0.066 to +1.066)"
    assert tables.difference(ours, ours) == "+0.000 (+0.000 to +0.000)"


def scarce_results(valid: dict, counts: str = "16,64,256,all") -> dict:
    """Results of one seed; `valid` by row and number of stories."""
    options = on_policy.Options(seeds=1, counts=counts)
    rates = {(row, is_all): 0.01 for row in on_policy.ROWS for is_all in (True, False)}
    runs = []
    for job in on_policy.jobs_of(options, rates):
        run = {"settings": job.settings, "teacher": {"valid": 0.96, "val_nats": 0.3}}
        key = (job.name, None) if job.name == "untrained" else (tables.row_of(run), job.train_stories)
        text = {"valid": valid[key], "broken": 1.0, "gen_nats": 0.3, "valid_texts": "01"}
        point = {sampler: text for sampler in tables.SAMPLERS}
        point |= {"val_nats": 0.31, "flops": 2e12, "seconds": 60.0}
        runs.append(run | {"points": [point, point]})
    trials = [scarce_run(f"trial, {row}, 64 stories, lr {rate}", 64, rate, rate)
              for row in on_policy.ROWS for rate in (0.01, 0.02)]
    facts = {"command": "command", "commit": "0", "torch": "2", "python": "3", "device": "cpu", "threads": 1}
    return {**facts, "runs": runs, "trials": trials}


def test_predictions_are_judged_by_the_numbers():
    counts = (16, 64, 256, None)
    valid = {(row, count): 0.5 for row in on_policy.ROWS for count in counts}
    valid |= {("untrained", None): 0.0, (on_policy.NO_PROMPTS, None): 0.5}
    valid |= {(on_policy.ONE_PER_PASS, 64): 0.71, (on_policy.WARM_START, 64): 0.61}
    valid |= {(tables.BY_MEAN, 64): 0.61}

    def held(changes: dict) -> list[bool]:
        return ["**It held**" in line for line in tables.verdicts(scarce_results(valid | changes))]

    assert held({}) == [True, False, True, True, True, True, True, True, True, True]
    few_fail = [False, False, True, True, True, True, True, True, True, False]
    assert held({("stories", None): 0.67}) == few_fail
    assert held({("stories", 64): 0.3, ("SDAR", 64): 0.29})[1]
    assert not held({("stories", 64): 0.3, ("SDAR", 64): 0.31})[1]
    assert not held({("teacher's text", 256): 0.49})[2]
    assert not held({("own text", None): 0.51})[3]
    assert not held({(on_policy.NO_PROMPTS, None): 0.44})[4]
    assert not held({(on_policy.ONE_PER_PASS, 64): 0.69})[5]
    assert not held({(on_policy.WARM_START, 64): 0.59})[6]
    assert not held({(tables.BY_MEAN, 64): 0.59})[7]
    assert not held({("teacher's text", 16): 0.56})[8]


def test_a_page_of_results_has_every_row_and_the_grid():
    counts = (16, 64, 256, None)
    valid = {(row, count): 0.5 for row in on_policy.ROWS for count in counts}
    valid |= {("untrained", None): 0.125, (on_policy.NO_PROMPTS, None): 0.5}
    valid |= {(on_policy.ONE_PER_PASS, 64): 0.5, (on_policy.WARM_START, 64): 0.5}
    page = tables.page({"scarce": scarce_results(valid)})
    for row in (*on_policy.ROWS, on_policy.NO_PROMPTS, "nothing (untrained) |  |  | 0.12 | 0.12"):
        assert f"| {row} |" in page
    assert "| own text | 64 | 0.010 | **0.020** |" in page
    assert "| own text | 64 | 0.01 | 0.50 | 0.50 | 1.00 |  | 0.30 | 0.310 | 2.00 | 60 |" in page


@pytest.mark.parametrize("counts", ["16,64,256,all", "64,all", "16,all"])
def test_a_picture_has_every_row(counts, tmp_path):
    valid = defaultdict(lambda: 0.5)
    labels = []

    def plot(results, figure):
        tables.plot(results, figure)
        labels.extend(figure.axes[0].get_legend_handles_labels()[1])

    save_picture(plot, scarce_results(valid, counts), tmp_path / "scarce.png")
    variants = (on_policy.NO_PROMPTS, on_policy.ONE_PER_PASS, on_policy.WARM_START)
    assert sorted(labels) == sorted([*on_policy.ROWS, *variants])


# 4. what the page and README say of the published results -------------------------------------------------

def test_what_is_said_of_the_published_results():
    results = load_results(results_path("on_policy", "scarce"))
    found = tables.groups(results)

    def valid(row, count, sampler=tables.FAST):
        return statistics.mean(tables.values(found[row, count], "valid", sampler))

    slow = tables.SAMPLERS[0]
    assert valid("own text", 64, slow) > valid("stories", None, slow) - 0.05
    assert valid("stories", 64, slow) < valid("own text", 64, slow) - 0.2
    assert valid("teacher's text", 64) > valid("own text", 64) + 0.1
    for count in (64, None):
        by_mean = valid(tables.BY_MEAN, count)
        assert by_mean > valid("own text", count) + 0.1
        assert 0 < valid("teacher's text", count) - by_mean < 0.05
    assert valid(tables.BY_MEAN, 16) > valid("own text", 16) + 0.1
    assert abs(valid(tables.BY_MEAN, 16) - valid(tables.BY_MEAN, None)) < 0.05
    assert valid("SDAR", 16) < valid(tables.BY_MEAN, 16) - 0.1
    assert valid("stories", 16, slow) < 0.01 < 0.9 < valid(tables.BY_MEAN, 16, slow)
    for variant in (on_policy.ONE_PER_PASS, on_policy.WARM_START):
        assert valid(variant, 64) < valid("own text", 64) + 0.05
    assert all(run["points"][-1]["val_nats"] > 0.6 for run in found["SDAR", 64])
    assert all(run["points"][-1]["val_nats"] < 0.32 for run in found["own text", 64])
    assert all(min(tables.values(runs, "recovery", tables.FAST)) > 1 for runs in found.values())
    for runs in found.values():
        for run in runs:
            assert abs(run["points"][-1][tables.FAST]["tok_per_fwd"] - tables.COST) < 0.1
