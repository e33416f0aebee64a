import math

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import opdlm
from data import tokenizer
from decoding import reveal
from model.gpt import GPT, GPTConfig
from model.masks import AR, Layout
from report import generate, metrics

EOT = 10
LAYOUTS = [AR, Layout(4, 1, 1), Layout(4, 4, 1), Layout(4, 4, 0), Layout(3, 1, 0)]


def stories(lengths=(2, 14, 9, 5, 6, 14, 3), seed=1):
    """Random ones, each from its end-of-text to the next."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.tensor([EOT, *torch.randint(0, EOT, (n - 2,), generator=generator).tolist(), EOT]) for n in lengths]


def causal_nats(net, story):
    said = net(story[None]).float().log_softmax(-1)[:-1]
    return -said.gather(1, story[1:, None]).sum()


# likelihood ----------------------------------------------------------------------------------------------------------

def test_stories_are_cut_from_end_of_text_to_end_of_text():
    stream = np.array([9, 1, 2, 3, 9, 4, 9, 5, 6, 7, 8, 9], np.uint16)
    starts = np.array([0, 4, 6])
    cut = [s.tolist() for s in metrics.held_out(stream, starts, 3, 100)]
    assert cut == [[9, 1, 2, 3, 9], [9, 4, 9], [9, 5, 6, 7, 8, 9]]
    assert [s.tolist() for s in metrics.held_out(stream, starts, 2, 4)] == [[9, 1, 2, 3], [9, 4, 9]]
    assert [s.tolist() for s in metrics.held_out(stream, starts, 9, 100)] == cut


def test_of_the_ar_model_it_is_the_causal_loss(tiny):
    net = tiny()
    wanted = torch.stack([causal_nats(net, story) for story in stories()])
    assert torch.allclose(metrics.story_nats(net, stories(), AR, EOT), wanted, rtol=1e-5)


def chain_rule(net, story, layout):
    """One pass for each token, over the text as far as a sampler has it: to the block's end, in masks."""
    nats, K = 0.0, layout.block
    for i in range(1, len(story)):
        upto = i + K - (i - 1) % K                                                # where the slot's block ends
        tokens = torch.cat([story, torch.full((K,), EOT)])[None, :upto]
        noisy = torch.where(torch.arange(1, upto) < i, tokens[:, 1:], net.mask_id)
        logits = opdlm.student_logits(net, tokens, noisy, 1, layout, torch.tensor([0]), torch.tensor([i]))
        nats -= logits.float().log_softmax(-1)[0, story[i]]
    return nats


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_is_the_chain_rule(tiny, layout):
    net = tiny()
    wanted = torch.stack([chain_rule(net, story, layout) for story in stories()])
    assert torch.allclose(metrics.story_nats(net, stories(), layout, EOT), wanted, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_does_not_depend_on_batch_mates_nor_on_padding(tiny, layout):
    net = tiny()
    wanted = metrics.story_nats(net, stories(), layout, EOT, batch=32)
    for batch in (1, 2):
        assert torch.allclose(metrics.story_nats(net, stories(), layout, EOT, batch), wanted, rtol=1e-5)
    backwards = metrics.story_nats(net, stories()[::-1], layout, EOT, batch=3)
    assert torch.allclose(backwards.flip(0), wanted, rtol=1e-5)


def test_it_is_normalised(tiny):
    """Over all texts of three tokens the probabilities add up to one: a proper likelihood."""
    net = tiny(vocab=4)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    for layout in LAYOUTS:
        nats = metrics.story_nats(net, [torch.cat([torch.tensor([3]), text]) for text in texts], layout, 3)
        assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-5)


def test_a_story_as_long_as_the_context(tiny):
    """The last block has no room to be filled up."""
    net = tiny(context=12)
    assert metrics.story_nats(net, stories([12, 5]), Layout(4, 1, 1), EOT).isfinite().all()


def test_bits_per_byte_by_hand(tiny):
    """2 + 1 tokens after the first: é, which is two bytes, an end, which is none, and b, which is one."""
    tok = tokenizer.word_level(["é"])
    net = tiny(vocab=tok.vocab_size)
    texts = [torch.tensor([tok.eot, *tok.encode("é"), tok.eot]), torch.tensor([tok.eot, *tok.encode("b")])]
    nats = sum(causal_nats(net, text).item() for text in texts)
    numbers = metrics.likelihood(net, texts, AR, tok)
    assert numbers == pytest.approx({"val_nats": nats / 3, "bits_per_byte": nats / math.log(2) / 3}, rel=1e-5)
    one = metrics.likelihood(net, texts[:1], AR, tok)
    assert one["val_nats"] == pytest.approx(one["bits_per_byte"] * math.log(2), rel=1e-5)       # 2 tokens, 2 bytes


# generated text ------------------------------------------------------------------------------------------------------

def made():
    """Two texts of five tokens; prompts of two and one; the first ends early, the second never."""
    tokens = torch.tensor([[EOT, 1, 2, 3, EOT], [EOT, 2, 3, 2, 3]])
    kept = torch.tensor([[False, False, True, True, True], [False, True, True, True, False]])
    free = torch.full_like(tokens, -1)
    return opdlm.Rollout(tokens, free, kept, torch.tensor([2, 2]), torch.tensor([7, 8])), torch.tensor([2, 1])


class Letters:
    """Decodes ids to letters."""
    eot = EOT

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids if i != EOT)


def test_nats_of_generated_text_by_hand(tiny):
    net = tiny()
    text, _ = made()
    said = net(text.tokens).view(2, 5, -1).float().log_softmax(-1)
    wanted = [-sum(said[row, i - 1, text.tokens[row, i]].item() for i in kept) for row, kept in enumerate([(2, 3, 4),
                                                                                                          (1, 2, 3)])]
    assert metrics.nats_of(net, text).tolist() == pytest.approx(wanted, rel=1e-6)


def test_generated_by_hand(tiny):
    """Kept: 2 3 end and 2 3 2. Pairs 23, 3e, 23, 32: three of four are different. Singles 2: 3, 3: 2, end: 1 of six."""
    net, texts = tiny(), [made()]
    numbers = metrics.text_metrics(net, texts, 3.0, Letters(), None)
    assert numbers == pytest.approx({
        "gen_nats": metrics.nats_of(net, made()[0]).sum().item() / 6, "distinct2": 3 / 4,
        "entropy": math.log(6) - (3 * math.log(3) + 2 * math.log(2)) / 6,
        "tok_per_fwd": 6 / 4, "positions_per_tok": 15 / 6, "tok_s": 2.0}, rel=1e-6)
    twice = metrics.text_metrics(net, texts * 2, 6.0, Letters(), None)
    assert twice == pytest.approx({**numbers, "distinct2": 3 / 8}, rel=1e-6)


@pytest.mark.parametrize("law, share", [(None, 0.5), ("plot", 0.0)])
def test_valid_is_a_share_of_all_texts_and_needs_an_end(tiny, law, share):
    read = []
    numbers = metrics.text_metrics(tiny(), [made()], 1.0, Letters(), lambda story: read.append(story) or law)
    assert numbers["valid"] == share and read == ["bcd"]                          # with its prompt, and no other text


def test_texts_go_on_from_one_to_eight_tokens_of_their_stories(tiny):
    net, begun = tiny(), stories([14] * 10)
    writer = generate.diffusion_generator(net, Layout(4, 1, 1), reveal.parse("static:1"))
    texts, seconds = generate.generate_texts(writer, begun, EOT, 20, seed=0, batch=8)
    rows = [(row, kept, n) for text, lens in texts for row, kept, n in zip(text.tokens, text.response_mask, lens.tolist())]
    assert [n for _, _, n in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2] and seconds > 0
    for (row, kept, n), story in zip(rows, begun):
        assert torch.equal(row[:n], story[:n]) and not kept[:n].any() and kept[n] and (row < net.mask_id).all()


# useful arithmetic ---------------------------------------------------------------------------------------------------

def test_flops_are_what_torch_counts():
    """One full pass over T positions, each attending to all T keys. Torch counts no fused attention of CPUs."""
    config, B, T = GPTConfig(31, 20, 3, 2, 16), 2, 12
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        GPT(config)(torch.zeros(B, T, dtype=torch.long))
    assert counter.get_total_flops() == B * T * (metrics.body_flops(config, T) + metrics.head_flops(config))


def test_distill_flops_by_hand():
    """Rollout and teacher forward, two streams forward and backward: 8 bodies a token; 1 head a token, 4 a loss."""
    config, record = GPTConfig(31, 20, 3, 2, 16), {"len": 10.0, "tokens": 70, "loss_positions": 30, "positions": 400}
    body, head = 3 * (24 * 256 + 4 * 5 * 16), 2 * 16 * 31
    assert metrics.distill_flops(config, record) == 70 * 8 * body + (70 + 4 * 30) * head
    unwritten = metrics.distill_flops(config, {**record, "positions": 0})                 # a story from the data
    assert unwritten == 70 * 7 * body + 4 * 30 * head
