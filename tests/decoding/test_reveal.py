"""Invariants of the reveal rules: values by hand, probabilities of the random rules, whole rollouts."""
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import uniforms
from model.gpt import GPT, GPTConfig
from model.masks import Layout

EOT = 10
CONFIDENCE = torch.tensor([[0.95, 0.2, 0.92, 0.99], [0.1, 0.2, 0.3, 0.4], [0.99, 0.98, 0.97, 0.96]])
ALL = torch.ones(3, 4, dtype=torch.bool)
RULES = ["leftmost:0.5", "leftmost:1", "threshold:0.5", "static:1", "static:3", "random:1", "random:2",
         "factor:0.7", "eb:0.5", "eb:0", "ancestral:5", "ancestral:1"]


@functools.cache
def network(seed):
    """A small random network whose weights are large enough that it is sometimes confident."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(11, 48, 1, 2, 16)).init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator)
    return net


def at_step(step, rows):
    return torch.full((rows,), step)


def revealed_slots(spec, confidence=CONFIDENCE, masked=ALL):
    """Per row, the slots that a rule reveals at the first step."""
    revealed = reveal.parse(spec)(confidence, masked, at_step(0, len(masked)), None)
    return [row.nonzero()[:, 0].tolist() for row in revealed]


# values by hand ---------------------------------------------------------------------------------------

def test_rules_by_hand():
    assert revealed_slots("static:1") == [[3], [3], [0]]
    assert revealed_slots("static:2") == [[0, 3], [2, 3], [0, 1]]
    assert revealed_slots("threshold:0.9") == [[0, 2, 3], [3], [0, 1, 2, 3]]
    assert revealed_slots("leftmost:0.9") == [[0], [0], [0, 1, 2, 3]]
    assert revealed_slots("leftmost:0") == [[0, 1, 2, 3]] * 3
    assert revealed_slots("leftmost:1") == [[0]] * 3


def test_slots_revealed_before_are_skipped():
    masked = torch.tensor([[False, True, True, True], [True, False, False, True], [False] * 4])
    assert revealed_slots("static:1", masked=masked) == [[3], [3], []]
    assert revealed_slots("threshold:0.9", masked=masked) == [[2, 3], [3], []]
    assert revealed_slots("leftmost:0.9", masked=masked) == [[1], [0], []]
    assert revealed_slots("leftmost:0.9", 1 - CONFIDENCE[1:2] / 8, masked[1:2]) == [[0, 3]]


def test_factor_by_hand():
    """2 (1 - .99), 3 (1 - .95), 4 (1 - .92), 5 (1 - .2) are .02, .15, .32, 4."""
    for bound, slots in ((0.01, [3]), (0.1, [3]), (0.2, [0, 3]), (0.4, [0, 2, 3]), (5, [0, 1, 2, 3])):
        assert revealed_slots(f"factor:{bound}")[0] == slots


def test_entropy_bound_by_hand():
    """The sum minus the largest: 0, -log .99 = .010, with -log .95: .061, with -log .92: .145."""
    for bound, slots in ((0, [3]), (0.02, [0, 3]), (0.07, [0, 2, 3]), (0.2, [0, 1, 2, 3])):
        assert revealed_slots(f"eb:{bound}")[0] == slots
    assert reveal.parse("eb:0").confidence is reveal.entropy
    assert reveal.parse("eb:0", "margin").confidence is reveal.margin


def test_confidences_of_0_and_1():
    certain = torch.tensor([[0.0, 1, 0, 1]])
    assert revealed_slots("factor:1", certain, ALL[:1]) == [[1, 3]]
    assert revealed_slots("eb:0.1", certain, ALL[:1]) == [[0, 1, 3]]    # one slot may have any entropy
    for spec in ("eb:0.1", "factor:1"):
        assert len(revealed_slots(spec, torch.zeros(1, 4), ALL[:1])[0]) == 1


def test_confidence_functions_by_hand():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]])
    sampled = torch.tensor([2, 1])
    assert torch.equal(reveal.largest(probs, sampled), torch.tensor([0.5, 0.8]))
    assert torch.equal(reveal.drawn(probs, sampled), torch.tensor([0.2, 0.8]))
    assert torch.allclose(reveal.margin(probs, sampled), torch.tensor([0.2, 0.7]))
    probs = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    assert torch.allclose(reveal.entropy(probs, sampled), torch.tensor([0.25, 1, 0.5]))


# probabilities of the random rules --------------------------------------------------------------------

def test_ancestral_reveals_one_over_the_steps_left():
    """Of the masked slots it reveals 1/4, 1/3, 1/2, then all; and slots are independent of each other."""
    u = torch.rand(100_000, 2, 1, generator=torch.Generator().manual_seed(0))
    rule = reveal.parse("ancestral:4")
    masked = torch.ones(100_000, 2, dtype=torch.bool)
    for step, share in enumerate((1 / 4, 1 / 3, 1 / 2, 1)):
        revealed = rule(torch.zeros(100_000, 2), masked, at_step(step, 100_000), u)
        of_two_masks = revealed[masked.all(1)].float()
        assert revealed.sum() / masked.sum() == pytest.approx(share, abs=0.006)
        assert of_two_masks.prod(1).mean() == pytest.approx(share ** 2, abs=0.01)
        masked = masked & ~revealed


def test_random_reveals_in_every_order_with_the_same_probability():
    u = torch.rand(60_000, 3, 1, generator=torch.Generator().manual_seed(0))
    rule = reveal.parse("random:1")
    masked = torch.ones(60_000, 3, dtype=torch.bool)
    order = torch.zeros(60_000, dtype=torch.long)               # the slots in base 3
    for step in range(3):
        revealed = rule(torch.zeros(60_000, 3), masked, at_step(step, 60_000), u)
        masked = masked & ~revealed
        order = order * 3 + revealed.long().argmax(1)
    orders, count = order.unique(return_counts=True)
    assert len(orders) == 6
    assert (count / 60_000 - 1 / 6).abs().max() < 0.006


# any state --------------------------------------------------------------------------------------------

@given(st.sampled_from(RULES), st.integers(0, 10_000), st.integers(1, 9), st.integers(0, 4))
def test_a_rule_reveals_masked_slots_and_at_least_one(spec, seed, block, step):
    generator = torch.Generator().manual_seed(seed)
    rule = reveal.parse(spec)
    confidence = torch.rand(20, block, generator=generator)
    u = torch.rand(20, block, 1, generator=generator)
    masked = torch.rand(20, block, generator=generator) < 0.5
    revealed = rule(confidence, masked, at_step(step, 20), u)
    assert not (revealed & ~masked).any()
    if rule.name != "ancestral":
        assert torch.equal(revealed.any(1), masked.any(1))
    elif step >= rule.steps(block) - 1:
        assert torch.equal(revealed, masked)


def test_leftmost_leaves_no_mask_before_what_it_reveals():
    confidence = torch.rand(500, 6, generator=torch.Generator().manual_seed(0))
    masked = torch.ones(500, 6, dtype=torch.bool)
    revealed = reveal.parse("leftmost:0.5")(confidence, masked, at_step(0, 500), None)
    assert torch.equal(revealed, revealed.cumprod(1).bool())


@settings(max_examples=60)
@given(spec=st.sampled_from(RULES), confidence=st.sampled_from([None, *reveal.CONFIDENCE]),
       block=st.integers(1, 9), block_context=st.booleans(), shift=st.integers(0, 1),
       length=st.integers(1, 20), seed=st.integers(0, 1000),
       lens=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_every_rule_generates_complete_texts(spec, confidence, block, block_context, shift, length, seed,
                                             lens):
    """For any prompts, block size and length:

    no mask is left; an end-of-text ends a row inside its block; a block takes at most the steps that its rule
    says; the text of a row does not depend on the other rows.
    """
    net = network(seed % 5)
    rule = reveal.parse(spec, confidence)
    layout = Layout(block, block if block_context else 1, shift)
    P = max(lens)
    prompt = torch.randint(0, EOT, (len(lens), P), generator=torch.Generator().manual_seed(seed))
    u = uniforms(seed, 0, range(len(lens)), (P + length, rule.numbers(block)))
    text = opdlm.rollout(Denoiser(net, layout), prompt, length, rule, u, EOT, prompt_len=torch.tensor(lens))

    assert (text.tokens != net.mask_id).all()
    assert (text.order[text.response_mask] >= 0).all()
    assert (text.order[text.response_mask] < rule.steps(block)).all()
    for row, (kept, prompt_len) in enumerate(zip(text.response_mask, lens)):
        size = int(kept.sum())
        assert 1 <= size <= length
        assert torch.equal(kept.nonzero()[:, 0], torch.arange(prompt_len, prompt_len + size))
        response = text.tokens[row, prompt_len:prompt_len + length]
        assert EOT not in response[:size - 1]
        assert size == length or response[size - 1] == EOT
        next_block = -(-size // block) * block      # in its own block, tokens that were revealed before stay
        assert (response[next_block:] == EOT).all()
        if rule.name != "ancestral":                # every forward pass reveals at least one token
            assert text.forwards[row] <= size + block

    alone = opdlm.rollout(Denoiser(net, layout), prompt[:1, :lens[0]], length, rule, u[:1], EOT)
    assert torch.equal(alone.tokens[0, lens[0]:], text.tokens[0, lens[0]:lens[0] + length])
    assert alone.forwards[0] == text.forwards[0]


# parsing ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", reveal.RULES)
def test_the_text_of_a_rule_is_the_rule(name):
    assert reveal.parse(str(reveal.parse(name))) == reveal.parse(name)


@pytest.mark.parametrize("spec, message", [
    ("best", "there is no reveal rule 'best': use one of leftmost:0.98, "),
    ("static:x", r"--reveal=static:x: expected an integer, got 'x' \(e.g. --reveal=static:1\)"),
    ("static:0", "of at least 1"),
    ("threshold:1.5", "from 0 to 1"),
    ("threshold:x", "expected a number, got 'x'"),
    ("eb:-1", "at least 0"),
    ("ancestral:2.5", "expected an integer, got '2.5'"),
    ("leftmost:nan", "from 0 to 1"),
    ("factor:nan", "at least 0"),
    ("static:-1", "of at least 1"),
    ("static:99999999999999999999", "of at most 2147483647"),
    ("random:9223372036854775808", "of at most 2147483647"),
    ("ancestral:16777217", "of at most 16777216"),
    ("static:" + 5000 * "9", "static"),
])
def test_rules_that_do_not_exist_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        reveal.parse(spec)


@pytest.mark.parametrize("spec", ["static:2147483647", "random:2147483647", "factor:1e300", "factor:inf",
                                  "eb:inf"])
def test_the_largest_argument_reveals_a_block_at_once(spec):
    u = uniforms(0, 0, range(3), (4, 1))
    assert reveal.parse(spec)(CONFIDENCE, ALL, at_step(0, 3), u).all()


def test_an_external_rule_gets_its_argument_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    monkeypatch.setitem(reveal.EXTERNAL, "echo", lambda argument: argument)
    assert reveal.parse("echo:~/policy,2") == "/home/me/policy,2"
    assert reveal.parse("echo:a:~/b") == "a:~/b" and reveal.parse("echo") == ""


def test_the_rule_of_a_checkpoint_takes_the_confidence_asked_for():
    saved = {"reveal": "threshold:0.3"}
    assert reveal.parse_saved(saved, "config.json").confidence is reveal.largest
    by_entropy = reveal.parse_saved(saved, "config.json", "entropy")
    assert by_entropy == reveal.parse("threshold:0.3", "entropy") != reveal.parse("threshold:0.3")
    assert reveal.parse_saved(saved, "config.json", None, "entropy") == by_entropy
