"""Which held-out stories are scored; summary.json is valid JSON and is written through a link."""
import json
import math

import pytest
import torch

from data.corpus import story_world_corpus
from decoding import reveal
from model.masks import Layout
from report import compare, generate, metrics
from report.compare import write_json
from training import log

EOT = 10


class Letters:
    """Decodes ids to letters."""
    eot = EOT
    ends = EOT

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

    def pieces(self, ids):
        return [self.decode([i]) for i in ids]


@pytest.mark.parametrize("block, num_scored", [(32, 70), (33, 64)])
def test_a_model_of_long_blocks_is_scored_on_the_first_64_stories(tiny, block, num_scored):
    """Text is generated after all of them nevertheless."""
    net = tiny(layers=1, context=34).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    inner = torch.randint(0, EOT, (70, 8), generator=generator)
    held_out = list(torch.nn.functional.pad(inner, (1, 1), value=EOT))
    layout = Layout(block, 1, 1)
    judged = []

    def judge(story):
        judged.append(story)
        return []
    generator = generate.diffusion_generator(net, layout, reveal.parse("leftmost:0"))
    numbers, _ = compare.evaluate_model(net, net, layout, generator, held_out, Letters(), length=34, seed=0,
                                        judge=judge)
    scored = metrics.likelihood(net, held_out[:num_scored], layout, Letters())
    assert numbers["val_nats"] == pytest.approx(scored["val_nats"], rel=1e-9)
    fewer = metrics.likelihood(net, held_out[:num_scored - 1], layout, Letters())
    assert numbers["val_nats"] != pytest.approx(fewer["val_nats"], rel=1e-6)
    assert len(judged) == 70
    assert 0 < numbers["valid"] < 1 and numbers["broken"] == pytest.approx(1 - numbers["valid"])


def test_numbers_that_are_not_finite_become_null(tmp_path):
    numbers = {"ar": {"val_nats": math.nan, "tok_s": 2.5}, "after": [math.inf]}
    write_json(tmp_path / "new/summary.json", numbers)
    text = (tmp_path / "new/summary.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"ar": {"val_nats": None, "tok_s": 2.5}, "after": [None]}


def test_a_linked_file_is_written_on_its_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "summary.json"
    link.symlink_to(tmp_path / "disk/target.json")
    for value in (1, 2):
        write_json(link, value)
        assert link.is_symlink() and json.loads((tmp_path / "disk/target.json").read_text()) == value
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target.json"]


def test_the_number_of_held_out_texts_can_be_given(tiny):
    corpus = story_world_corpus(stories=2, held_out=20)
    for count, expected in ((None, 20), (3, 3)):
        evaluator = compare.Evaluator(tiny(), corpus, 96, 0, None, count=count)
        assert len(evaluator.held_out) == expected


def test_the_columns_of_the_table_are_apart():
    names = ["ar", "before", "after", "speculative"]
    header, row = compare.table({name: {"tok_s": 1_000_000.0} for name in names}).splitlines()
    assert header.split() == names and row.split() == ["tok_s", *["1000000"] * 4]


# the size of an evaluation ------------------------------------------------------------------------

def share_of_a_run(update_tokens, updates, eval_every, block, texts, tokens):
    """The share of evaluation in the positions of a run, with the estimates of report/compare.py."""
    columns = compare.diffusion_positions(1) + 2 * compare.diffusion_positions(block)
    columns += compare.speculative_positions(block)
    quick = updates // eval_every * min(texts, 32) * tokens * compare.likelihood_positions(block)
    evaluation = columns * texts * tokens + quick
    return evaluation / (evaluation + 7 * updates * update_tokens)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("updates", [12, 100, 246, 5000])
def test_evaluation_takes_at_most_a_tenth_of_a_run(updates, block):
    run = (16 * 256, updates, 40, block)
    texts, tokens = compare.affordable_size(*run)
    assert 4 <= texts <= 128 and 32 <= tokens <= 128
    is_smallest = (texts, tokens) == (4, 32)
    assert is_smallest or share_of_a_run(*run, texts, tokens) <= 0.1
    is_largest = (texts, tokens) == (128, 128)
    assert is_largest or share_of_a_run(*run, texts + 32, tokens + 32) > 0.1


def test_a_given_length_of_texts_is_kept():
    run = (16 * 256, 246, 40, 4)
    texts, tokens = compare.affordable_size(*run, 64)
    assert tokens == 64 and share_of_a_run(*run, texts, 64) <= 0.1
    assert texts > compare.affordable_size(*run, 256)[0] > 4


@pytest.mark.parametrize("column", ["ar", "diffusion", "speculative"])
def test_the_positions_of_a_column_are_estimated(column, tiny, monkeypatch):
    """The bar of an evaluation ends near its total, if no text ends early."""
    net = tiny(context=48).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    held_out = list(torch.randint(0, EOT, (8, 40), generator=generator))
    block = 1 if column == "ar" else 4
    layout = Layout(block, 1, 1)
    estimate = compare.diffusion_positions(block)
    text = generate.diffusion_generator(net, layout, reveal.parse("leftmost:0.98"))
    if column == "speculative":
        estimate = compare.speculative_positions(block)
        text = generate.speculative_generator(net, layout)
        layout = Layout(1)
    done = []
    monkeypatch.setattr(log.Progress, "add", lambda self, amount: done.append(amount))
    letters = Letters()
    letters.ends = EOT + 1                                       # never generated
    with log.progress_of_passes("evaluation", 1, net):
        compare.evaluate_model(net, net, layout, text, held_out, letters, length=40, seed=0)
    assert 0.7 < sum(done) / (8 * 40 * estimate) < 1.5
