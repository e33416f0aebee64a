import math
import platform
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import opdlm
from data import tokenizer
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig
from model.gpt import GPT, GPTConfig
from model.masks import AR, Layout
from report import generate, metrics

EOT = 10
LAYOUTS = [AR, Layout(4, 1, 1), Layout(4, 4, 1), Layout(4, 4, 0), Layout(3, 1, 0)]


def stories(lengths=(2, 14, 9, 5, 6, 14, 3), seed=1):
    """Random stories, each from its end-of-text to the next."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        inner = torch.randint(0, EOT, (length - 2,), generator=generator)
        found.append(torch.tensor([EOT, *inner.tolist(), EOT]))
    return found


def causal_nats(net, story):
    log_probs = net(story[None]).float().log_softmax(-1)[:-1]
    return -log_probs.gather(1, story[1:, None]).sum()


# 1. held-out likelihood -------------------------------------------------------------------------

def test_stories_are_cut_from_end_of_text_to_end_of_text():
    stream = np.array([9, 1, 2, 3, 9, 4, 9, 5, 6, 7, 8, 9], np.uint16)
    starts = np.array([0, 4, 6])
    cut = [story.tolist() for story in metrics.held_out(stream, starts, 3, 100)]
    assert cut == [[9, 1, 2, 3, 9], [9, 4, 9], [9, 5, 6, 7, 8, 9]]
    assert [story.tolist() for story in metrics.held_out(stream, starts, 2, 4)] == [[9, 1, 2, 3], [9, 4, 9]]
    assert [story.tolist() for story in metrics.held_out(stream, starts, 9, 100)] == cut


def test_a_few_long_stories_are_read_in_consecutive_windows():
    stream = np.array([9, *range(10, 33), 9, 1, 2, 9], np.uint16)
    starts = np.array([0, 24])
    pieces = [piece.tolist() for piece in metrics.held_out(stream, starts, 100, 8)]
    assert pieces == [[9, *range(10, 17)], [9, 1, 2, 9], [*range(16, 24)], [*range(23, 31)], [30, 31, 32, 9]]
    scored = [token for piece in pieces for token in piece[1:]]
    assert sorted(scored) == sorted([*range(10, 33), 9, 1, 2, 9]), "each token is scored once"
    for count in range(1, 6):
        found = [piece.tolist() for piece in metrics.held_out(stream, starts, count, 8)]
        assert found == pieces[:count]


def test_the_first_token_of_a_window_counts_no_bytes(tiny):
    class Letters:
        eot = EOT

        def decode(self, ids):
            return "".join("ab" for i in ids if i != EOT)

    net = tiny()
    middle = torch.tensor([3, 4, 5, EOT])
    numbers = metrics.likelihood(net, [middle], AR, Letters())
    nats = causal_nats(net, middle).item()
    assert numbers["val_nats"] == pytest.approx(nats / 3, rel=1e-5)
    assert numbers["bits_per_byte"] == pytest.approx(nats / np.log(2) / 4, rel=1e-5)


def test_the_nats_of_the_ar_model_are_its_causal_loss(tiny):
    net = tiny()
    expected = torch.stack([causal_nats(net, story) for story in stories()])
    assert torch.allclose(metrics.story_nats(net, stories(), AR, EOT), expected, rtol=1e-5)


def chain_rule(net, story, layout):
    """One pass per token, over the text as a sampler sees it: up to the end of the block, the rest masked."""
    nats = 0.0
    K = layout.block
    for i in range(1, len(story)):
        end = i + K - (i - 1) % K                    # the end of the block that contains i
        tokens = torch.cat([story, torch.full((K,), EOT)])[None, :end]
        noisy = torch.where(torch.arange(1, end) < i, tokens[:, 1:], net.mask_id)
        logits = opdlm.student_logits(net, tokens, noisy, 1, layout, torch.tensor([0]), torch.tensor([i]))
        nats -= logits.float().log_softmax(-1)[0, story[i]]
    return nats


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_story_nats_follow_the_chain_rule(tiny, layout):
    net = tiny()
    expected = torch.stack([chain_rule(net, story, layout) for story in stories()])
    assert torch.allclose(metrics.story_nats(net, stories(), layout, EOT), expected, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_story_nats_do_not_depend_on_the_batch_nor_on_padding(tiny, layout):
    net = tiny()
    expected = metrics.story_nats(net, stories(), layout, EOT, batch=32)
    for batch in (1, 2):
        assert torch.allclose(metrics.story_nats(net, stories(), layout, EOT, batch), expected, rtol=1e-5)
    backwards = metrics.story_nats(net, stories()[::-1], layout, EOT, batch=3)
    assert torch.allclose(backwards.flip(0), expected, rtol=1e-5)


def test_the_likelihood_is_normalized(tiny):
    """The probabilities of all texts of three tokens add up to one."""
    net = tiny(vocab=4)
    texts = torch.cartesian_prod(*[torch.arange(4)] * 3)
    for layout in LAYOUTS:
        nats = metrics.story_nats(net, [torch.cat([torch.tensor([3]), text]) for text in texts], layout, 3)
        assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-5)


def test_a_story_as_long_as_the_context_can_be_scored(tiny):
    """There the last block cannot be padded."""
    net = tiny(context=12)
    assert metrics.story_nats(net, stories([12, 5]), Layout(4, 1, 1), EOT).isfinite().all()


def test_bits_per_byte_by_hand(tiny):
    """Scored are é (two bytes) and an end-of-text (no byte) of one text, and b (one byte) of the other."""
    tok = tokenizer.word_level(["é"])
    net = tiny(vocab=tok.vocab_size)
    texts = [torch.tensor([tok.eot, *tok.encode("é"), tok.eot]), torch.tensor([tok.eot, *tok.encode("b")])]
    nats = sum(causal_nats(net, text).item() for text in texts)
    both = metrics.likelihood(net, texts, AR, tok)
    assert both == pytest.approx({"val_nats": nats / 3, "bits_per_byte": nats / math.log(2) / 3}, rel=1e-5)
    first = metrics.likelihood(net, texts[:1], AR, tok)  # 2 tokens, 2 bytes
    assert first["val_nats"] == pytest.approx(first["bits_per_byte"] * math.log(2), rel=1e-5)


# 2. generated text ------------------------------------------------------------------------------

def example_batch():
    """Two texts of five tokens with prompts of two and one; the first ends early, the second has no end."""
    tokens = torch.tensor([[EOT, 1, 2, 3, EOT], [EOT, 2, 3, 2, 3]])
    response_mask = torch.tensor([[False, False, True, True, True], [False, True, True, True, False]])
    order = torch.full_like(tokens, -1)
    rollout = opdlm.Rollout(tokens, order, response_mask, torch.tensor([2, 2]), torch.tensor([7, 8]))
    return rollout, torch.tensor([2, 1])


class Letters:
    """Decodes ids to letters."""
    eot = EOT
    ends = EOT

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids if i != EOT)


def test_nats_of_generated_text_by_hand(tiny):
    net = tiny()
    rollout, _ = example_batch()
    log_probs = net(rollout.tokens).view(2, 5, -1).float().log_softmax(-1)
    expected = []
    for row, response in enumerate([(2, 3, 4), (1, 2, 3)]):
        expected.append(-sum(log_probs[row, i - 1, rollout.tokens[row, i]].item() for i in response))
    assert metrics.nats_of(net, rollout).tolist() == pytest.approx(expected, rel=1e-6)


def argmax_share(net, rollout):
    """The share of the responses' tokens that the model finds most likely, each after the text before it."""
    num_right = 0
    num_tokens = 0
    for tokens, response_mask in zip(rollout.tokens, rollout.response_mask):
        for i in response_mask.nonzero().flatten().tolist():
            logits = net(tokens[None, :i])[-1]
            num_right += int(logits.argmax() == tokens[i])
            num_tokens += 1
    return num_right / num_tokens


def test_text_metrics_by_hand(tiny):
    """The responses are 2 3 end and 2 3 2.

    Three of the four pairs 23, 3e, 23, 32 are distinct. Three tokens are 2, two are 3, one is the end.
    """
    net = tiny()
    texts = [example_batch()]
    once = metrics.text_metrics(net, texts, 3.0, Letters(), None)
    assert once == pytest.approx({
        "gen_nats": metrics.nats_of(net, example_batch()[0]).sum().item() / 6,
        "distinct2": 3 / 4,
        "entropy": math.log(6) - (3 * math.log(3) + 2 * math.log(2)) / 6,
        "agreement": argmax_share(net, example_batch()[0]),
        "tok_per_fwd": 6 / 4,
        "bytes_per_fwd": 5 / 4,                      # the end of a text has no bytes
        "positions_per_tok": 15 / 6,
        "tok_s": 2.0,
    }, rel=1e-6)
    twice = metrics.text_metrics(net, texts * 2, 6.0, Letters(), None)
    assert twice == pytest.approx({**once, "distinct2": 3 / 8}, rel=1e-6)


def test_gen_nats_is_a_mean_over_tokens(tiny):
    """Of all texts together: a text of three tokens counts three times as much as one of a single token."""
    net = tiny()
    rollout, prompt_lens = example_batch()
    rollout.response_mask[1] = torch.tensor([False, True, False, False, False])
    long, short = metrics.nats_of(net, rollout).tolist()
    assert abs(short - long / 3) > 0.1
    together = metrics.text_metrics(net, [(rollout, prompt_lens)], 1.0, Letters(), None)
    assert together["gen_nats"] == pytest.approx((short + long) / 4, rel=1e-6)
    one_each = []
    for row in (0, 1):
        fields = {name: value[row:row + 1] for name, value in vars(rollout).items()}
        one_each.append((opdlm.Rollout(**fields), prompt_lens[row:row + 1]))
    in_two_batches = metrics.text_metrics(net, one_each, 1.0, Letters(), None)
    assert in_two_batches == pytest.approx(together, rel=1e-6)


@pytest.mark.parametrize("laws, valid, broken", [(set(), 0.5, 0.5), ({"plot"}, 0.0, 1.0)])
def test_valid_is_a_share_of_all_texts_and_needs_an_end(tiny, laws, valid, broken):
    judged = []

    def judge(story):
        judged.append(story)
        return [laws]
    found = metrics.text_metrics(tiny(), [example_batch()], 1.0, Letters(), judge)
    assert (found["valid"], found["broken"]) == (valid, broken)
    assert judged == ["bcd", "cdc"]                  # with their prompts; the second one has no end


def test_greedy_text_of_a_model_agrees_with_it_and_other_text_less(tiny):
    net = tiny()
    prompt = torch.tensor([[EOT], [3], [5]])
    u = opdlm.uniforms(0, 0, range(3), (13, 1))
    shares = []
    for temperature in (0, 3):
        denoiser = Denoiser(net, AR)
        sampling = SamplingConfig(temperature)
        text = opdlm.rollout(denoiser, prompt, 12, reveal.parse("static:1"), u, EOT, sampling)
        texts = [(text, torch.ones(3, dtype=torch.long))]
        shares.append(metrics.text_metrics(net, texts, 1.0, Letters(), None)["agreement"])
    assert shares[0] == 1 and shares[1] < 0.8


def test_recovery_by_hand():
    """Up to the first error: 1 of 2 sentences, 1 of 1 and 0 of 3. After it: 1 of 2, and 2 of 3."""
    laws = {"a": [set(), {"name"}, set(), {"name", "place"}], "b": [{"plot"}, {"plot"}, set(), {"place"}],
            "c": [set(), set(), set()]}
    scores = metrics.story_scores([("a", True), ("b", True), ("c", True)], laws.get)
    assert scores == pytest.approx({"valid": 1 / 3, "broken": 6 / 3, "recovery": (3 / 5) / (2 / 6)})
    cut = metrics.story_scores([("c", False)], laws.get)
    assert cut == {"valid": 0, "broken": 1}          # the missing end is an error, and nothing follows it


def test_where_errors_are_independent_recovery_is_one():
    rng = random.Random(0)
    stories = [[{"name"} if rng.random() < 0.2 else set() for _ in range(7)] for _ in range(20_000)]
    scores = metrics.story_scores([(number, True) for number in range(len(stories))], stories.__getitem__)
    assert scores["recovery"] == pytest.approx(1, abs=0.03)
    assert scores["broken"] == pytest.approx(1.4, abs=0.02)


def test_texts_continue_one_to_eight_tokens_of_their_stories(tiny):
    net = tiny()
    originals = stories([14] * 10)
    generator = generate.diffusion_generator(net, Layout(4, 1, 1), reveal.parse("static:1"))
    texts, seconds = generate.generate_texts(generator, originals, EOT, 20, seed=0, batch=8)
    assert seconds > 0
    rows = []
    for rollout, prompt_lens in texts:
        rows += zip(rollout.tokens, rollout.response_mask, prompt_lens.tolist())
    assert [prompt_len for _, _, prompt_len in rows] == [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]
    for (tokens, response_mask, prompt_len), story in zip(rows, originals):
        assert torch.equal(tokens[:prompt_len], story[:prompt_len])
        assert not response_mask[:prompt_len].any()
        assert response_mask[prompt_len]
        assert (tokens < net.mask_id).all()


# 3. FLOPs ---------------------------------------------------------------------------------------

def test_flops_are_what_torch_counts():
    """One pass over T positions, each attending to all T keys. Torch does not count fused CPU attention."""
    config = GPTConfig(31, 20, 3, 2, 16)
    B = 2
    T = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        GPT(config)(torch.zeros(B, T, dtype=torch.long))
    per_position = metrics.body_flops(config, T) + metrics.head_flops(config)
    assert counter.get_total_flops() == B * T * per_position


def test_distill_flops_by_hand():
    """Rollout, teacher and the student's two streams, forward and backward.

    That is 8 bodies per token, 1 head per token and 4 heads per position in the loss.
    """
    config = GPTConfig(31, 20, 3, 2, 16)
    record = {"len": 10.0, "tokens": 70, "loss_positions": 30, "positions": 400}
    body = 3 * (24 * 256 + 4 * 5 * 16)
    head = 2 * 16 * 31
    assert metrics.distill_flops(config, record) == 70 * 8 * body + (70 + 4 * 30) * head
    on_training_text = metrics.distill_flops(config, {**record, "positions": 0})
    assert on_training_text == 70 * 7 * body + 4 * 30 * head


# 5. memory --------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_large_vocabulary_is_read_in_parts_with_the_same_numbers(layout, tiny, monkeypatch):
    net = tiny()
    letters = Letters()
    texts = [example_batch()]

    def measure():
        numbers = metrics.likelihood(net, stories(), layout, letters)
        return numbers | metrics.text_metrics(net, texts, 1.0, letters, None)

    whole = measure()
    largest = []
    monkeypatch.setattr(metrics, "MAX_LOGITS", 8 * net.config.vocab)
    net.register_forward_hook(lambda net, inputs, logits: largest.append(logits.numel()))
    assert measure() == pytest.approx(whole, rel=1e-6)
    assert max(largest) <= 14 * net.config.vocab                 # a story of 14 tokens is not divided
    assert len(largest) > 8


# the machine ---------------------------------------------------------------------------------------------

def test_facts_name_what_a_number_depends_on(monkeypatch):
    monkeypatch.setattr(metrics, "commit", lambda: "abc")
    facts = metrics.facts(torch.device("cpu"))
    device = facts.pop("device")
    assert device.startswith("cpu (")
    assert facts == {"commit": "abc", "torch": torch.__version__, "python": platform.python_version(),
                     "threads": torch.get_num_threads(), "processes": 1}


def test_the_commit_is_unknown_without_git(monkeypatch):
    done = SimpleNamespace(stdout="abc-dirty\n")
    monkeypatch.setattr(metrics.subprocess, "run", lambda *_, **__: done)
    monkeypatch.setattr(metrics.shutil, "which", lambda name: "/usr/bin/git")
    assert metrics.commit() == "abc-dirty"
    done.stdout = ""                                                     # a folder that is no repository
    assert metrics.commit() == "unknown"
    done.stdout = "abc"
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    assert metrics.commit() == "unknown"


def test_the_matmul_rate_is_the_median_of_five(monkeypatch):
    """A product of two n x n matrices has 2 n^3 FLOPs; the first of six is a warm-up."""
    clock = [0.0]
    for seconds in (9, 5, 1, 4, 2, 3):
        clock += [clock[-1] + seconds, clock[-1] + seconds]
    monkeypatch.setattr(metrics.time, "perf_counter", iter(clock).__next__)
    assert metrics.matmul_rate("cpu", size=8) == pytest.approx(2 * 8 ** 3 / 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matmul_rate_is_that_of_a_number_format(monkeypatch, dtype):
    formats = []
    randn = torch.randn

    def spy(*size, device, dtype):
        formats.append(dtype)
        return randn(*size, device=device, dtype=dtype)
    monkeypatch.setattr(metrics.torch, "randn", spy)
    metrics.matmul_rate("cpu", 8, dtype)
    assert formats == [dtype]
