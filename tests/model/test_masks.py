import itertools

import pytest
import torch

from model.masks import AR, Layout, block_of, context_mask, sampler_mask, training_mask

CASES = [(7, 3, Layout(2, 1, 1)), (9, 1, Layout(4, 4, 0)), (8, 5, Layout(3, 3, 1)), (6, 2, Layout(4, 1, 0))]


def test_block_1_is_causal():
    for prompt in (0, 4):
        assert torch.equal(context_mask(9, prompt, 1), torch.ones(9, 9).tril().bool())


def test_block_of_the_length_is_full():
    assert context_mask(8, 0, 8).all()


def test_prompt_blocks_are_counted_backwards_from_its_end():
    assert block_of(torch.arange(7), 5, 2).tolist() == [-3, -2, -2, -1, -1, 0, 0]


@pytest.mark.parametrize("length, prompt, layout", CASES)
def test_two_stream_is_the_triple_loop(length, prompt, layout):
    """Every query, every key, the rule in words."""
    def number(i, size):
        return (i - prompt) // size
    seats = [(i, False) for i in range(length)] + [(i, True) for i in range(prompt, length)]
    got = training_mask(length, prompt, layout)
    for (q, (i, query_noisy)), (k, (j, key_noisy)) in itertools.product(enumerate(seats), repeat=2):
        if not query_noisy:
            may = not key_noisy and number(j, layout.context_block) <= number(i, layout.context_block)
        elif key_noisy:
            may = number(j, layout.block) == number(i, layout.block)
        else:
            may = number(j, layout.block) < number(i, layout.block)
        assert got[q, k] == may, (i, query_noisy, j, key_noisy)


@pytest.mark.parametrize("length, prompt, layout", CASES)
def test_nobody_looks_at_the_last_block_s_clean_text(length, prompt, layout):
    """Leaving it out removes rows and columns of the mask; only itself has attended to it."""
    last = prompt + (length - prompt - 1) // layout.block * layout.block
    whole = training_mask(length, prompt, layout)
    others = [i for i in range(2 * length - prompt) if not last <= i < length]
    assert torch.equal(training_mask(length, prompt, layout, upto=last), whole[others][:, others])
    assert not whole[others, last:length].any()


@pytest.mark.parametrize("length, prompt, layout", CASES)
def test_the_sampler_sees_what_the_trainer_sees(length, prompt, layout):
    """A noisy query's cache slots are the clean text before its block and the noisy slots of its block."""
    both = training_mask(length, prompt, layout)
    for i in range(prompt, length):
        for noisy in (True, False):
            query = torch.tensor([[i]])
            got = sampler_mask(query, torch.tensor([[noisy]]), torch.tensor([prompt]), torch.tensor([length]),
                               layout, length)[0, 0, 0]
            row = both[length + i - prompt if noisy else i]
            seen = row[:length] | torch.cat([torch.zeros(prompt, dtype=torch.bool), row[length:]])
            assert torch.equal(got, seen)


def test_layout_names():
    assert Layout.of(1, "ar", "causal") == Layout.of(1, "ar", "block") == AR
    assert Layout.of(4, "paper", "block") == Layout(4, 4, 0)
