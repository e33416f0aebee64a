"""Invariant of the two denoisers: opdlm.PlainDenoiser and the cached Denoiser generate the same text.

A recording subclass keeps the masks and the logits of every denoising step, so that a step is compared with
its twin: the same masked positions, and the same logits there to 1e-10 in float64.
"""
import pytest
import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import uniforms
from model.masks import AR, Layout

EOT = 10
RESPONSE = 18
ROWS = 5
LAYOUTS = [
    Layout(block, context_block, logit_shift)
    for block in (1, 2, 3, 4, 18, 21)
    for context_block in sorted({1, block})
    for logit_shift in (0, 1)
]
RULES = ["static:1", "threshold:0.3", "leftmost:0.3", "random:2", "ancestral:5"]
PROMPT_LENS = {"equal": [4, 4, 4, 4, 4], "ragged": [2, 6, 1, 4, 3]}


class Recording:
    """Keeps what the sampler saw at each step: the masked positions (B, K) and the logits (B, K, V)."""

    def reset(self, prompt_len, end):
        super().reset(prompt_len, end)
        self.steps = []

    def __call__(self, tokens, start, masked):
        logits = super().__call__(tokens, start, masked)
        self.steps.append((masked.clone(), logits.clone()))
        return logits


class RecordingPlain(Recording, opdlm.PlainDenoiser):
    pass


class RecordingCached(Recording, Denoiser):
    pass


def generate(denoiser, spec, lens):
    """A rollout of `denoiser` from prompts of the lengths `lens`."""
    rule = reveal.parse(spec)
    prompt_len = torch.tensor(lens)
    P = max(lens)
    prompt = torch.randint(0, EOT, (ROWS, P), generator=torch.Generator().manual_seed(2))
    u = uniforms(0, 0, range(ROWS), (P + RESPONSE, rule.numbers(denoiser.layout.block)))
    return opdlm.rollout(denoiser, prompt, RESPONSE, rule, u, EOT, prompt_len=prompt_len)


@pytest.mark.parametrize("lens", PROMPT_LENS.values(), ids=PROMPT_LENS)
@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_cached_denoiser_equals_the_plain_one(tiny, layout, spec, lens):
    """Also, no row costs more with the cache, neither in forward passes nor in positions."""
    net = tiny().requires_grad_(False)
    plain = RecordingPlain(net, layout)
    cached = RecordingCached(net, layout)
    expected = generate(plain, spec, lens)
    text = generate(cached, spec, lens)

    assert torch.equal(text.tokens, expected.tokens)
    assert torch.equal(text.order, expected.order)
    assert torch.equal(text.response_mask, expected.response_mask)
    assert len(cached.steps) == len(plain.steps)
    num_compared = 0
    for (masked, logits), (expected_masked, expected_logits) in zip(cached.steps, plain.steps):
        assert torch.equal(masked, expected_masked)
        assert torch.allclose(logits[masked], expected_logits[masked], atol=1e-10, rtol=0)
        num_compared += int(masked.sum())
    assert num_compared >= int(text.response_mask.sum())

    assert (text.forwards <= expected.forwards).all()
    assert (text.positions <= expected.positions).all()
    assert (text.positions < expected.positions).any()


def test_what_the_example_of_the_denoiser_costs(tiny):
    """A prompt of 3 and two blocks of 4, two tokens per step: four passes, over 7, 4, 8 and 4 positions."""
    net = tiny().requires_grad_(False)
    rule = reveal.parse("static:2")
    prompt = torch.ones(2, 3).long()
    for logit_shift in (0, 1):
        u = uniforms(0, 0, range(2), (11, 1))
        text = opdlm.rollout(Denoiser(net, Layout(4, 1, logit_shift)), prompt, 8, rule, u, eot=-1)
        assert text.forwards.tolist() == [4, 4]
        assert text.positions.tolist() == [23, 23]


def test_ar_text_costs_one_position_per_token(tiny):
    """The prompt once, then every generated token but the last, whose logits are not needed."""
    net = tiny().requires_grad_(False)
    u = uniforms(0, 0, range(2), (11, 1))
    prompt = torch.ones(2, 3).long()
    text = opdlm.rollout(Denoiser(net, AR), prompt, 8, reveal.parse("static:1"), u, eot=-1)
    assert text.forwards.tolist() == [8, 8]
    assert text.positions.tolist() == [3 + 7, 3 + 7]


def test_a_step_that_reveals_nothing_costs_nothing(tiny):
    """With far more steps than tokens, most steps of the ancestral rule leave the block as it was."""
    net = tiny().requires_grad_(False)
    layout = Layout(4, 4, 0)
    cached = RecordingCached(net, layout)
    text = generate(cached, "ancestral:60", PROMPT_LENS["equal"])
    assert len(cached.steps) > 3 * RESPONSE
    assert (text.forwards <= text.response_mask.sum(1) + layout.block).all()


@pytest.mark.parametrize("layout", [Layout(4, 1, 1), Layout(4, 4, 0)], ids=str)
def test_a_row_that_was_not_requested_is_computed_when_it_is(tiny, layout):
    """Row 1 changes while only row 0 is requested. When row 1 is requested too, nothing has changed since the
    last call, but its last logits are those of the state before."""
    net = tiny().requires_grad_(False)
    P = 3
    start = torch.tensor([P, P])
    end = start + 4
    cached = Denoiser(net, layout)
    plain = opdlm.PlainDenoiser(net, layout)
    cached.reset(start, end)
    plain.reset(start, end)
    before = torch.full((2, P + 4), net.mask_id)
    before[:, :P] = torch.tensor([[5, 1, 2], [3, 4, 0]])
    after = before.clone()
    after[:, P + 1] = torch.tensor([7, 8])

    cached(before, start, before[:, P:] == net.mask_id)
    masked = after[:, P:] == net.mask_id
    only_row_0 = cached(after, start, masked, torch.tensor([True, False])).clone()
    both = cached(after, start, masked, torch.tensor([True, True]))
    expected = plain(after, start, masked)
    assert torch.allclose(only_row_0[0, masked[0]], expected[0, masked[0]], atol=1e-10, rtol=0)
    assert torch.allclose(both[masked], expected[masked], atol=1e-10, rtol=0)
    assert cached.forwards.tolist() == [2, 2]                # each row: one per state that it was asked in
