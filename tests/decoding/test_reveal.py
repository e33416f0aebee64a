import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opdlm
from decoding import reveal
from decoding import reveal as sure
from decoding.denoiser import Denoiser
from decoding.sampling import uniforms
from model.gpt import GPT, GPTConfig
from model.masks import Layout

CONFIDENCE = torch.tensor([[0.95, 0.2, 0.92, 0.99], [0.1, 0.2, 0.3, 0.4], [0.99, 0.98, 0.97, 0.96]])
ALL = torch.ones(3, 4, dtype=torch.bool)


EOT = 10


@functools.cache
def network(seed):
    """A small random network, loud enough that it is sometimes sure."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(11, 48, 1, 2, 16)).init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    return net


RULES = ["leftmost:0.5", "leftmost:1", "threshold:0.5", "static:1", "static:3", "random:1", "random:2", "factor:0.7",
         "eb:0.5", "eb:0", "ancestral:5", "ancestral:1"]


def at(step, rows=len(CONFIDENCE)):
    return torch.full((rows,), step)


def shown(spec, confidence=CONFIDENCE, masked=ALL, numbers=None, step=0):
    show = reveal.parse(spec)(confidence, masked, at(step, len(masked)), numbers)
    return [[i for i, on in enumerate(row) if on] for row in show.tolist()]


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


def test_factor_by_hand():
    """2 (1 - .99), 3 (1 - .95), 4 (1 - .92), 5 (1 - .2) are .02, .15, .32, 4."""
    for bound, slots in ((0.01, [3]), (0.1, [3]), (0.2, [0, 3]), (0.4, [0, 2, 3]), (5, [0, 1, 2, 3])):
        assert shown(f"factor:{bound}")[0] == slots


def test_eb_by_hand():
    """Sum less largest: 0, -log .99 = .010, less log .95: .061, less log .92: .145."""
    for bound, slots in ((0, [3]), (0.02, [0, 3]), (0.07, [0, 2, 3]), (0.2, [0, 1, 2, 3])):
        assert shown(f"eb:{bound}")[0] == slots
    assert reveal.parse("eb:0").confidence is sure.entropy
    assert reveal.parse("eb:0", "margin").confidence is sure.margin


def test_confidences_of_nothing_and_of_everything_are_no_exception():
    some = torch.tensor([[0.0, 1, 0, 1]])
    assert shown("factor:1", some, ALL[:1]) == [[1, 3]]
    assert shown("eb:0.1", some, ALL[:1]) == [[0, 1, 3]]                   # one slot may be as open as it likes
    for spec in ("eb:0.1", "factor:1"):
        assert len(shown(spec, torch.zeros(1, 4), ALL[:1])[0]) == 1


def test_ancestral_reveals_one_over_the_steps_left():
    """Its law, step by step, of those that are still masked: 1/4, 1/3, 1/2, all; and slots are independent."""
    numbers = torch.rand(100_000, 2, 1, generator=torch.Generator().manual_seed(0))
    masked, rule = torch.ones(100_000, 2, dtype=torch.bool), reveal.parse("ancestral:4")
    for step, share in enumerate((1 / 4, 1 / 3, 1 / 2, 1)):
        show = rule(torch.zeros(100_000, 2), masked, at(step, 100_000), numbers)
        of_both = show[masked.all(1)].float()
        assert show.sum() / masked.sum() == pytest.approx(share, abs=0.006)
        assert of_both.prod(1).mean() == pytest.approx(share ** 2, abs=0.01)
        masked = masked & ~show


def test_random_reveals_every_order_alike():
    numbers = torch.rand(60_000, 3, 1, generator=torch.Generator().manual_seed(0))
    masked, said = torch.ones(60_000, 3, dtype=torch.bool), torch.zeros(60_000, dtype=torch.long)
    for step in range(3):
        show = reveal.parse("random:1")(torch.zeros(60_000, 3), masked, at(step, 60_000), numbers)
        masked, said = masked & ~show, said * 3 + show.long().argmax(1)
    orders, count = said.unique(return_counts=True)
    assert len(orders) == 6 and (count / 60_000 - 1 / 6).abs().max() < 0.006


@given(st.sampled_from(RULES), st.integers(0, 10_000), st.integers(1, 9), st.integers(0, 4))
def test_a_part_of_what_is_masked_and_at_least_one(spec, seed, block, step):
    generator, rule = torch.Generator().manual_seed(seed), reveal.parse(spec)
    confidence, numbers = torch.rand(20, block, generator=generator), torch.rand(20, block, 1, generator=generator)
    masked = torch.rand(20, block, generator=generator) < 0.5
    show = rule(confidence, masked, at(step, 20), numbers)
    assert not (show & ~masked).any()
    assert spec.startswith("ancestral") or torch.equal(show.any(1), masked.any(1))
    assert step < rule.steps(block) - 1 or rule.name != "ancestral" or torch.equal(show, masked)


def test_nothing_is_left_masked_before_what_leftmost_reveals():
    confidence = torch.rand(500, 6, generator=torch.Generator().manual_seed(0))
    show = reveal.parse("leftmost:0.5")(confidence, torch.ones(500, 6, dtype=torch.bool), at(0, 500), None)
    assert torch.equal(show, show.cumprod(1).bool())


@settings(max_examples=60)
@given(spec=st.sampled_from(RULES), confidence=st.sampled_from([None, *reveal.CONFIDENCE]), block=st.integers(1, 9),
       clean=st.booleans(), shift=st.integers(0, 1), length=st.integers(1, 20), seed=st.integers(0, 1000),
       lens=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_every_rule_writes_whole_texts(spec, confidence, block, clean, shift, length, seed, lens):
    """Any prompts, block and length: no mask is left, an end-of-text ends a row inside its block, a block takes no more
    steps than its rule says, and what a row gets does not depend on its batch mates."""
    net, rule = network(seed % 5), reveal.parse(spec, confidence)
    layout, P = Layout(block, block if clean else 1, shift), max(lens)
    prompt = torch.randint(0, EOT, (len(lens), P), generator=torch.Generator().manual_seed(seed))
    u, begin = uniforms(seed, 0, range(len(lens)), (P + length, rule.numbers(block))), torch.tensor(lens)
    text = opdlm.rollout(Denoiser(net, layout), prompt, length, rule, u, EOT, prompt_len=begin)
    assert (text.tokens != net.mask_id).all() and (text.order[text.response_mask] >= 0).all()
    assert (text.order[text.response_mask] < rule.steps(block)).all()
    for row, (kept, n) in enumerate(zip(text.response_mask, lens)):
        size = int(kept.sum())
        assert torch.equal(kept.nonzero()[:, 0], torch.arange(n, n + size)) and 1 <= size <= length
        said = text.tokens[row, n:n + length]
        assert EOT not in said[:size - 1] and (size == length or said[size - 1] == EOT)
        assert (said[-(-size // block) * block:] == EOT).all()            # in its block, what was revealed before stays
        assert rule.name == "ancestral" or text.forwards[row] <= size + block               # at least one a step
    alone = opdlm.rollout(Denoiser(net, layout), prompt[:1, :lens[0]], length, rule, u[:1], EOT)
    assert torch.equal(alone.tokens[0, lens[0]:], text.tokens[0, lens[0]:lens[0] + length])
    assert alone.forwards[0] == text.forwards[0]


def test_confidences():
    probs, tokens = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]), torch.tensor([2, 1])
    assert torch.equal(sure.largest(probs, tokens), torch.tensor([0.5, 0.8]))
    assert torch.equal(sure.drawn(probs, tokens), torch.tensor([0.2, 0.8]))
    assert torch.allclose(sure.margin(probs, tokens), torch.tensor([0.2, 0.7]))
    assert torch.allclose(sure.entropy(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]]), tokens),
                          torch.tensor([0.25, 1, 0.5]))


@pytest.mark.parametrize("spec, said", [("best", "no reveal rule 'best'"), ("static:x", "'x' is no int"),
                                        ("static:0", "of at least 1"), ("threshold:1.5", "from 0 to 1"),
                                        ("eb:-1", "at least 0"),
                                        ("ancestral:2.5", "no int"),
                                        ("leftmost:nan", "from 0 to 1")])
def test_rules_that_are_none(spec, said):
    with pytest.raises(ValueError, match=said):
        reveal.parse(spec)
