"""What measurements of memory and speed are of."""
import pytest
import torch

from experiments.common.timing import greedy_ar
from experiments.memory import run as memory
from experiments.speed import run as speed
from model.gpt import GPTConfig
from model.masks import AR, Layout


def test_a_peak_is_what_is_allocated_at_once():
    """Bytes, of two steps that allocate the same in all."""
    def one_after_the_other():
        for n in (1000, 3000):
            torch.zeros(n)

    def together():
        kept = [torch.zeros(n) for n in (1000, 3000)]
        del kept[0]
        torch.zeros(500)
    assert memory.peak(one_after_the_other) == 12_000 and memory.peak(together) == 16_000


def test_the_steps_compared_are_the_same_step():
    """With the same text, states and weights; without head and KL the table has a gradient, of zeros."""
    config = GPTConfig(vocab=300, context=48, layers=1, heads=1, width=16)
    records = {key: step() for key, step in memory.steps_of(config).items()}
    for record in records.values():
        assert record["loss_positions"] == records["plain", False]["loss_positions"] > 10
    losses = [
        records[kind, checkpointing]["kl"] for kind in ("plain", "full") for checkpointing in (False, True)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5) and losses[0] > 0


def test_the_plain_ar_loop_generates_what_the_sampler_generates():
    """So the loop that speeds are compared with is AR itself."""
    net = speed.random_network(*speed.TINY["tiny"])
    prompt = torch.randint(64, (3, speed.PROMPT), generator=torch.Generator().manual_seed(0))
    text = speed.generate(net, AR, prompt, "static:1")
    assert torch.equal(greedy_ar(net, prompt, speed.response_length(net)), text.tokens)
    assert len(text.tokens[:, speed.PROMPT:].unique()) > 5


def test_a_threshold_reveals_two_tokens_per_step():
    net = speed.random_network(*speed.TINY["tiny"])
    layout = Layout(4, 4, 0)
    prompt = torch.randint(64, (1, speed.PROMPT), generator=torch.Generator().manual_seed(0))
    threshold = speed.two_token_threshold(net, layout, prompt)
    text = speed.generate(net, layout, prompt, f"threshold:{threshold}")
    assert 1.6 < (text.response_mask.sum() / text.forwards.sum()).item() < 2.4
