"""Two story worlds in one vocabulary: their texts, what each conversion learns from, predictions and page."""
import copy

import pytest
import torch

import train_tiny
from data import story_world
from data.tinystories import stories
from experiments.common.job import config_of
from experiments.common.results import load_results, results_path
from experiments.retention import run, tables, worlds
from model.gpt import GPT, GPTConfig
from model.masks import AR
from report import metrics


def test_the_worlds_share_no_word_but_the_article():
    tok = worlds.shared_tokenizer()
    first, second = (set(worlds.corpus_of(world).train.tolist()) for world in worlds.WORLDS)
    assert {tok.decode([i]) for i in (first & second) - {tok.eot}} == {" a", " A", ",", "."}
    assert set(worlds.both_worlds().train.tolist()) == first | second


@pytest.mark.parametrize("world", worlds.WORLDS)
def test_a_story_is_valid_in_its_own_world_only(world):
    other = worlds.SECOND if world == worlds.FIRST else worlds.FIRST
    for seed in range(20):
        text = worlds.story(world, seed)
        assert not any(worlds.breaks(world, text))
        assert all(worlds.breaks(other, text))
    assert worlds.breaks(worlds.FIRST, story_world.story(3)) == story_world.breaks(story_world.story(3))


def test_held_out_stories_are_of_their_world_and_the_teachers_corpus_takes_turns():
    tok = worlds.shared_tokenizer()
    both = worlds.both_worlds()
    starts = both.starts[:5]
    texts = [tok.decode(both.train[begin + 1:end].tolist()) for begin, end in zip(starts, starts[1:])]
    expected = [worlds.story(world, seed) for seed in (0, 1) for world in worlds.WORLDS]
    assert texts == expected
    for world in worlds.WORLDS:
        corpus = worlds.corpus_of(world)
        begin, end = stories(corpus.val, tok.bos)[:2]
        assert not any(worlds.breaks(world, tok.decode(corpus.val[begin + 1:end].tolist())))


def test_a_conversion_has_stories_of_the_first_world_unless_it_says_both():
    for row in run.ROWS:
        job = run.job_of(row, 0.01, 0, run.Options())
        expected = worlds.WORLDS if row == "stories of both worlds" else ("first",)
        assert run.learned_worlds(job) == expected
        assert job.mean_writes == row.startswith("own text")


def test_the_ar_control_is_an_ar_model():
    """Blocks of one token: the loss and the NLL of the untrained student are those of the AR model."""
    torch.manual_seed(0)
    corpus = worlds.corpus_of(worlds.FIRST)
    tok = corpus.tokenizer
    teacher = GPT(GPTConfig(vocab=tok.eot + 1, context=96, layers=1, heads=1, width=64))
    student = copy.deepcopy(teacher).init_mask()
    recipe = train_tiny.make_recipe(config_of(run.job_of(tables.AR_ROW, 0.01, 0, run.Options())), tok.eot)
    held = metrics.held_out(corpus.val, stories(corpus.val, tok.bos), 4, 96)
    ours = metrics.likelihood(student, held, recipe.layout, tok)["val_nats"]
    assert ours == pytest.approx(metrics.likelihood(teacher, held, AR, tok)["val_nats"], abs=1e-5)


def results_of(lost: dict, fast: dict) -> dict:
    """Results of one seed and rate: by row, nats lost in the second world, and `valid` at COST by world."""
    runs = []
    for row in lost:
        point = {"flops": 1e12, "seconds": 1.0}
        for world in worlds.WORLDS:
            point[world] = {"val_nats": 0.3 + (lost[row] if world == worlds.SECOND else 0.0),
                            tables.ONE_PER_PASS: {"valid": 0.9}}
            if row != tables.AR_ROW:
                point[world][tables.FAST] = {"valid": fast[row][worlds.WORLDS.index(world)]}
        teacher = {world: {"val_nats": 0.3, "valid": 1.0} for world in worlds.WORLDS}
        name = "untrained" if row == "untrained" else f"{row}, lr 0.01"
        settings = {"name": name, "flags": {"lr": 0.01}}
        runs.append({"settings": settings, "points": [point], "teacher": teacher})
    facts = {"command": "command", "commit": "0", "torch": "2", "python": "3", "device": "cpu", "threads": 1}
    return {**facts, "runs": runs}


def test_predictions_about_retention_are_judged_by_the_numbers():
    lost = {"AR fine-tune": 0.6, "SDAR": 0.9, "stories": 0.4, "own text": 0.4, "own text, no prompts": 0.01,
            "teacher's text, no prompts": 0.01, "stories of both worlds": 0.0, "untrained": 0.1}
    fast = {row: (0.8, 0.8) for row in lost} | {"stories": (0.8, 0.4)}

    def verdicts(lost_changes=None, fast_changes=None):
        results = results_of(lost | (lost_changes or {}), fast | (fast_changes or {}))
        return [" held" in line.partition("**")[2].partition("**")[0] for line in tables.verdicts(results)]

    assert verdicts() == [True] * 6
    assert verdicts({"AR fine-tune": 0.09})[0] is False
    assert verdicts({"own text, no prompts": 0.15})[1] is False
    assert verdicts({"own text": 0.2})[2] is False
    assert verdicts(None, {"stories": (0.8, 0.7)})[3] is False
    assert verdicts(None, {"own text, no prompts": (0.7, 0.8)})[4] is False
    assert verdicts({"teacher's text, no prompts": 0.03})[5] is False
    page = tables.page({"worlds": results_of(lost, fast)})
    assert "| stories | 0.01 | 0.000 | 0.400 | 0.90 | 0.90 | 0.80 | 0.40 | 1.00 | 1 |" in page
    assert "| AR fine-tune | 0.01 | 0.000 | 0.600 | 0.90 | 0.90 |  |  | 1.00 | 1 |" in page


def test_what_is_said_of_the_published_results():
    runs = tables.groups(load_results(results_path("retention", "worlds")))
    found = {row: seeds for (row, _), seeds in runs.items()}
    assert len(found) == len(runs)                               # one rate
    assert all(len(seeds) == 3 for seeds in found.values())

    def lost(row):
        return tables.losses(found[row], worlds.SECOND)

    def valid(row, world, sampler=tables.FAST):
        return tables.valid(found[row], world, sampler)

    for row in tables.DATA_ROWS:                                 # "erases", "none writes one valid story"
        assert min(lost(row)) > 1
        assert max(valid(row, worlds.SECOND, tables.ONE_PER_PASS)) == 0
    for row in (tables.OWN, tables.TEACHER):                     # "keeps it", "as much"
        assert max(lost(row)) < 0.01
        assert min(valid(row, worlds.SECOND, tables.ONE_PER_PASS)) > 0.6
        for world in worlds.WORLDS:                              # "far behind stories of both worlds"
            assert max(valid(row, world)) < min(valid(tables.BOTH_ROW, world)) - 0.3
    assert max(lost("own text")) < min(map(min, map(lost, tables.DATA_ROWS))) / 3
    assert max(valid("own text", worlds.SECOND, tables.ONE_PER_PASS)) < 0.5      # "too few for its blocks"
