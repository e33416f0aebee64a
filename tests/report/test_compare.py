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
