import pytest
import torch

from model import reveal

CONFIDENCE = torch.tensor([[0.95, 0.2, 0.92, 0.99], [0.1, 0.2, 0.3, 0.4], [0.99, 0.98, 0.97, 0.96]])
ALL = torch.ones(3, 4, dtype=torch.bool)


def shown(spec, confidence=CONFIDENCE, masked=ALL):
    return [[i for i, on in enumerate(row) if on] for row in reveal.parse(spec)(confidence, masked).tolist()]


def test_by_hand():
    assert shown("static:1") == [[3], [3], [0]]
    assert shown("static:2") == [[0, 3], [2, 3], [0, 1]]
    assert shown("threshold:0.9") == [[0, 2, 3], [3], [0, 1, 2, 3]]
    assert shown("leftmost:0.9") == [[0], [0], [0, 1, 2, 3]]
    assert shown("leftmost:0") == [[0, 1, 2, 3]] * 3 and shown("leftmost:1") == [[0]] * 3


def test_revealed_slots_are_passed_over():
    masked = torch.tensor([[False, True, True, True], [True, False, False, True], [False, False, False, False]])
    assert shown("static:1", masked=masked) == [[3], [3], []]
    assert shown("threshold:0.9", masked=masked) == [[2, 3], [3], []]
    assert shown("leftmost:0.9", masked=masked) == [[1], [0], []]
    assert shown("leftmost:0.9", 1 - CONFIDENCE[1:2] / 8, masked[1:2]) == [[0, 3]]


@pytest.mark.parametrize("spec", ["static:1", "static:3", "threshold:0.5", "leftmost:0.5", "leftmost:1"])
def test_a_part_of_what_is_masked_and_at_least_one(spec):
    generator = torch.Generator().manual_seed(0)
    confidence, masked = torch.rand(500, 6, generator=generator), torch.rand(500, 6, generator=generator) < 0.5
    show = reveal.parse(spec)(confidence, masked)
    assert not (show & ~masked).any() and torch.equal(show.any(1), masked.any(1))


def test_nothing_is_left_masked_before_what_leftmost_reveals():
    confidence = torch.rand(500, 6, generator=torch.Generator().manual_seed(0))
    show = reveal.parse("leftmost:0.5")(confidence, torch.ones(500, 6, dtype=torch.bool))
    assert torch.equal(show, show.cumprod(1).bool())


def test_confidences():
    probs, tokens = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([2, 1])
    assert torch.equal(reveal.largest(probs, tokens), torch.tensor([0.5, 0.8]))
    assert torch.equal(reveal.drawn(probs, tokens), torch.tensor([0.2, 0.8]))


@pytest.mark.parametrize("spec, said", [("best", "no reveal rule 'best'"), ("static:x", "'x' is no int"),
                                        ("static:0", "at least 1"), ("threshold:1.5", "from 0 to 1"),
                                        ("leftmost:nan", "from 0 to 1")])
def test_rules_that_are_none(spec, said):
    with pytest.raises(ValueError, match=said):
        reveal.parse(spec)
