import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import opdlm
from data import tokenizer
from decoding import reveal, speculative
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, uniforms
from decoding.speculative import speculative_decode
from model import checkpoint
from model.masks import AR, Layout

EOT = 10
ROOT = Path(__file__).parents[2]
LAYOUTS = [Layout(K, context, shift) for K in (1, 2, 3, 4) for context in {1, K} for shift in (0, 1)]
SELF_VERIFYING = [layout for layout in LAYOUTS if (layout.context_block, layout.logit_shift) == (1, 1)]


def prompts(lens, seed=0):
    return torch.randint(0, EOT, (len(lens), max(lens)), generator=torch.Generator().manual_seed(seed))


def ar_text(net, prompt, length, u, sampling, lens=None):
    """A text of the AR model, one token at a time."""
    return opdlm.rollout(Denoiser(net, AR), prompt, length, reveal.parse("static:1"), u, EOT, sampling, lens)


class RecordingNet:
    """A network that keeps the tokens of each call."""

    def __init__(self, net):
        self.net = net
        self.h = net.h
        self.mask_id = net.mask_id
        self.calls = []

    def __call__(self, tokens, *args, **kwargs):
        self.calls.append(tokens)
        return self.net(tokens, *args, **kwargs)


# the text is the verifier's -----------------------------------------------------------------------

@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=st.sampled_from(LAYOUTS), self_verify=st.booleans(), length=st.integers(1, 20),
       seed=st.integers(0, 50), lens=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_greedy_text_is_the_verifier_s_own(tiny, layout, self_verify, length, seed, lens):
    """Equal token by token, for any drafter, layout, prompts and length."""
    student = tiny(seed=seed % 7)
    teacher = tiny(seed=90)
    self_verify = self_verify and layout in SELF_VERIFYING
    prompt = prompts(lens, seed)
    prompt_len = torch.tensor(lens)
    greedy = SamplingConfig(0)
    u = uniforms(seed, 0, range(len(lens)), (max(lens) + length, 3))
    found = speculative_decode(student, layout, prompt, length, u, EOT, greedy,
                               None if self_verify else teacher, prompt_len)
    expected = ar_text(student if self_verify else teacher, prompt, length, u, greedy, prompt_len)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.accepted_in >= 0, expected.response_mask)
    assert (found.forwards <= (1 if self_verify else 2) * expected.response_mask.sum(1)).all()


@pytest.mark.parametrize("shape", [(0,), (0, 2), ()], ids=str)
def test_a_block_of_one_that_verifies_itself_is_the_ar_model(tiny, shape):
    """The same random numbers give the same text, at the same cost."""
    net = tiny(seed=4)
    prompt = prompts([3] * 5)
    u = uniforms(0, 0, range(5), (23, 3))
    found = speculative_decode(net, AR, prompt, 20, u, EOT, SamplingConfig())
    expected = ar_text(net, prompt, 20, u[..., speculative.RESAMPLE:], SamplingConfig())
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.forwards, expected.forwards)
    assert torch.equal(found.positions, expected.positions)


def joint(net, L):
    """(V ** L,) probabilities of all texts of L tokens after the token 0."""
    texts = torch.tensor(list(itertools.product(range(3), repeat=L)))
    logits = net(torch.nn.functional.pad(texts, (1, 0))).view(len(texts), L + 1, -1)[:, :-1]
    log_probs = logits.log_softmax(-1).gather(2, texts[..., None])[..., 0]
    return log_probs.sum(1).exp().detach()


@pytest.mark.parametrize("layout, self_verify", [
    (Layout(2, 1, 1), True), (Layout(3, 1, 1), True), (Layout(3, 1, 1), False),
    (Layout(2, 2, 0), False), (Layout(3, 3, 1), False)], ids=str)
def test_sampled_text_has_the_verifier_s_distribution(tiny, layout, self_verify):
    """Pearson's chi-square over all 27 texts of three tokens. With 26 degrees of freedom it exceeds 60 in one
    of 6,000 samples."""
    rows = 30_000
    L = 3
    student = tiny(vocab=3, seed=1, scale=0.15)
    teacher = tiny(vocab=3, seed=2, scale=0.15)
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    u = torch.rand(rows, 1 + L, 3, generator=torch.Generator().manual_seed(0))
    text = speculative_decode(student, layout, prompt, L, u, 99, SamplingConfig(),
                              None if self_verify else teacher)
    found = torch.bincount(text.tokens[:, 1:] @ torch.tensor([9, 3, 1]), minlength=27)
    expected = joint(student if self_verify else teacher, L) * rows
    assert ((found - expected) ** 2 / expected).sum() < 60


@pytest.fixture(scope="module")
def story_world(tmp_path_factory):
    """A student that has begun to draft, its teacher that has learned a little of the story world, and their
    tokenizer."""
    out = tmp_path_factory.mktemp("run")
    flags = ["--data=toy", "--device=cpu", f"--out={out}", "--layers=1", "--width=64", "--length=64",
             "--eval_every=40", "--pretrain_steps=80", "--warm_steps=40", "--distill_steps=41"]
    command = [sys.executable, str(ROOT / "train_tiny.py"), *flags]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    student, _ = checkpoint.load(out / "opdlm")
    teacher, _ = checkpoint.load(out / "ar")
    return student, teacher, tokenizer.load(out / "ar")


def chi_square_deviations(a, b):
    """How much two samples of texts (B, L) differ: chi-square of the token counts at each position, the rare
    tokens in one class, in standard deviations from its mean for two samples of one distribution."""
    vocab = int(max(a.max(), b.max())) + 1
    chi_square = 0.0
    degrees = 0
    for x, y in zip(a.unbind(1), b.unbind(1)):
        x = torch.bincount(x, minlength=vocab)
        y = torch.bincount(y, minlength=vocab)
        frequent = x + y >= 20
        x = torch.cat([x[frequent], x[~frequent].sum()[None]])
        y = torch.cat([y[frequent], y[~frequent].sum()[None]])
        chi_square = chi_square + ((x - y) ** 2 / (x + y).clamp(min=1)).sum()
        degrees = degrees + len(x) - 1
    return (chi_square - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize("self_verify", [True, False])
def test_stories_have_the_verifier_s_distribution(story_world, self_verify):
    """The first 16 tokens of 4,000 stories against as many of the plain sampler. Drafts accepted 1.3 times
    too often would give 3 to 5 standard deviations; the student instead of its teacher gives hundreds."""
    student, teacher, tok = story_world
    rows = 4000
    L = 16
    prompt = torch.tensor([tok.encode("Once upon a time")] * rows)
    generator = torch.Generator().manual_seed(7)
    u = torch.rand(rows, prompt.size(1) + L, 4, generator=generator)
    text = speculative_decode(student, Layout(4, 1, 1), prompt, L, u[..., :3], tok.eot, SamplingConfig(),
                              None if self_verify else teacher)
    verifier = Denoiser(student if self_verify else teacher, AR)
    expected = opdlm.rollout(verifier, prompt, L, reveal.parse("static:1"), u[..., 3:], tok.eot)
    found_tokens = text.tokens[:, -L:]
    expected_tokens = expected.tokens[:, -L:]
    assert text.forwards.sum() < rows * L / 1.2 or not self_verify
    assert chi_square_deviations(found_tokens, expected_tokens) < 3
    assert chi_square_deviations(found_tokens, found_tokens.roll(1, 1)) > 100


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.5, top_k=3),
                                      SamplingConfig(top_p=0.7)], ids=str)
def test_a_token_has_the_verifier_s_probability(sampling):
    """For any q and every draft, over a fine grid of random numbers. The error is at most the grid's step."""
    generator = torch.Generator().manual_seed(3)
    n = 200
    p = sampling(torch.rand(2, 5, generator=generator).pow(3).softmax(-1))  # (A + 1, V) with A = 1
    q = sampling(torch.rand(2, 5, generator=generator).pow(3).softmax(-1))
    q[1] = 0  # no draft at the last position
    grid = (torch.arange(n) + 0.5) / n
    u_accept_resample = torch.cartesian_prod(grid, grid)  # (n * n, 2)
    u_draft = torch.zeros(n * n, 2, 1)
    u = torch.cat([u_draft, u_accept_resample[:, None].expand(-1, 2, -1)], 2)
    share = torch.zeros(5)
    for token in range(5):
        drafts = torch.tensor([[token, 0]]).expand(n * n, 2)
        count, next_token = speculative.accept(p.expand(n * n, 2, 5), q.expand(n * n, 2, 5), drafts, u)
        first = torch.where(count > 0, token, next_token)
        share += q[0, token] * torch.bincount(first, minlength=5) / (n * n)
        accepted = count > 0
        second = torch.bincount(next_token[accepted], minlength=5) / max(accepted.sum(), 1)
        assert (count <= 1).all()
        assert not accepted.any() or (second - p[1]).abs().max() < 2 / n
    assert (share - p[0]).abs().max() < 2 / n


def test_a_draft_that_the_verifier_excludes_is_never_accepted():
    """Not even with the smallest random number, 0: its p is 0 after top-k, top-p or at temperature 0."""
    p = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    q = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    drafts = torch.tensor([[0, 0]])
    count, next_token = speculative.accept(p, q, drafts, torch.zeros(1, 2, 3))
    assert count.tolist() == [0]
    assert next_token.tolist() == [1]


# how many drafts are accepted ---------------------------------------------------------------------

def next_probs(net, tokens, sampling):
    """(rows, V): the distributions from which an AR model samples the token after each of `tokens`."""
    logits = net(tokens).view(*tokens.shape, -1)[:, -1]
    return sampling(logits.softmax(-1))


def draft_probs(student, layout, accepted, length, first_draft, sampling):
    """(A, V): q of the positions `first_draft` .. , if everything from len(accepted) on is masked."""
    P = len(accepted)
    noisy = torch.full((1, length), student.mask_id)
    tokens = torch.cat([accepted[None], torch.zeros(1, length, dtype=torch.long)], 1)
    position = torch.arange(first_draft, P + length)
    logits = opdlm.student_logits(student, tokens, noisy, P, layout, torch.zeros_like(position), position)
    return sampling(logits.softmax(-1))


def share_accepted(p_first, p_second, q):
    """Probabilities that at least one and that both of two drafts are accepted, by enumeration.

    `p_first` (V,): verifier, first draft; `p_second` (V, V): verifier after each first draft; `q` (2, V).
    """
    first = torch.minimum(p_first, q[0])                                     # (V,)
    second = torch.minimum(p_second, q[1]).sum(1)                            # (V,)
    return torch.stack([first.sum(), (first * second).sum()])


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.4), SamplingConfig(2.0, top_k=2),
                                      SamplingConfig(top_p=0.6)], ids=str)
@pytest.mark.parametrize("self_verify", [False, True])
def test_drafts_are_accepted_as_often_as_the_distributions_allow(tiny, sampling, self_verify):
    """A draft is accepted with probability sum of min(p, q), p and q as temperature, top-k and top-p leave
    them. A q of another temperature would give the same text with fewer accepted drafts."""
    rows = 6000
    V = 4
    student = tiny(vocab=V, layers=1, seed=3, scale=0.2).requires_grad_(False)
    teacher = tiny(vocab=V, layers=1, seed=4, scale=0.2).requires_grad_(False)
    verifier = student if self_verify else teacher
    prompt = torch.tensor([2, 0])
    generator = torch.Generator().manual_seed(0)
    K = 3 if self_verify else 2                                              # two drafts in both cases
    L = K + 1
    layout = Layout(K, 1, 1)
    u = torch.rand(rows, 2 + L, 3, generator=generator)
    text = speculative_decode(student, layout, prompt.expand(rows, 2), L, u, 99, sampling,
                              None if self_verify else teacher)

    every = torch.arange(V)[:, None]
    one = torch.cat([prompt.expand(V, 2), every], 1)                         # (V, 3) the prompt and any token
    p = next_probs(verifier, prompt[None], sampling)[0]                      # (V,)
    p_after_one = next_probs(verifier, one, sampling)                        # (V, V)
    if self_verify:
        # The first pass gives one token and makes the drafts of the two after it; the second verifies them.
        q = draft_probs(student, layout, prompt, K, 3, sampling)
        expected = torch.zeros(2)
        for token in range(V):
            two = torch.cat([one[token].expand(V, 3), every], 1)             # (V, 4)
            p_after_two = next_probs(verifier, two, sampling)
            expected = expected + p[token] * share_accepted(p_after_one[token], p_after_two, q)
        verified = text.accepted_in[:, 4:6] == 1
    else:
        q = draft_probs(student, layout, prompt, K, 2, sampling)
        expected = share_accepted(p, p_after_one, q)
        verified = text.accepted_in[:, 3:5] == 0
    found = verified.double().mean(0)                                        # a draft is followed by a token
    error = (expected * (1 - expected) / rows).sqrt()
    assert (0.02 < expected).all() and (expected < 0.98).all()
    assert ((found - expected).abs() < 4 * error).all(), (found, expected)


# what is drafted ----------------------------------------------------------------------------------

@pytest.mark.parametrize("layout, self_verify",
                         [(layout, False) for layout in LAYOUTS if layout.block > 1] +
                         [(layout, True) for layout in SELF_VERIFYING if layout.block > 1], ids=str)
def test_drafts_are_the_student_s_at_a_state_it_learned(tiny, layout, self_verify, monkeypatch):
    """A wrong draft changes only the speed, not the text. So q itself is compared with the logits of the
    training pass after the text accepted so far."""
    student = tiny(seed=5)
    teacher = tiny(seed=6)
    prompt_len = torch.tensor([3, 2])
    real_accept = speculative.accept
    calls = []

    def recording_accept(p, q, drafts, u):
        count, next_token = real_accept(p, q, drafts, u)
        calls.append((q, count))
        return count, next_token

    monkeypatch.setattr(speculative, "accept", recording_accept)
    u = uniforms(1, 0, range(2), (20, 3))
    tokens = speculative_decode(student, layout, prompts([3, 2]), 16, u, 99, SamplingConfig(),
                                None if self_verify else teacher, prompt_len).tokens
    compared = 0
    for row in range(2):
        P = size = int(prompt_len[row])
        for q, count in calls:
            num_drafts = int((q[row].sum(-1) > 0).sum())
            # The self-verifier drafted when the last accepted token was masked as well.
            first_masked = size - 1 if self_verify else size
            start = P if layout.context_block > 1 else first_masked
            block_start = start + (first_masked - start) // layout.block * layout.block
            end = min(block_start + layout.block, P + 16)
            clean = tokens[row:row + 1, :end]
            noisy = clean[:, start:].masked_fill(torch.arange(start, end) >= first_masked, student.mask_id)
            for j in range(min(num_drafts, P + 16 - size)):
                position = torch.tensor([size + j])
                logits = opdlm.student_logits(student, clean, noisy, start, layout, torch.tensor([0]),
                                              position)
                assert torch.allclose(logits.float().softmax(-1)[0], q[row, j], atol=1e-5)
                compared += 1
            size = size + int(count[row]) + 1
            if size >= P + 16:
                break
    assert compared > 10


# cost ---------------------------------------------------------------------------------------------

def test_cost_is_what_the_networks_processed(tiny):
    """With one row: each call and each position of both networks, and no others."""
    for layout, self_verify in ((Layout(4, 1, 1), True), (Layout(4, 1, 1), False), (Layout(3, 3, 0), False)):
        student = RecordingNet(tiny(seed=5))
        teacher = RecordingNet(tiny(seed=5))
        u = uniforms(1, 0, range(1), (20, 3))
        text = speculative_decode(student, layout, prompts([3]), 16, u, 99, SamplingConfig(),
                                  None if self_verify else teacher)
        calls = student.calls + teacher.calls
        assert text.forwards.item() == len(calls)
        padding = sum(tokens.numel() for tokens in calls) - text.positions.item()
        assert 0 <= padding < 40  # at the end of the text, blocks are cut but tensors are not


@pytest.mark.parametrize("layout, self_verify",
                         [(Layout(4, 1, 1), True), (Layout(4, 1, 1), False), (Layout(4, 4, 0), False)])
def test_a_text_may_fill_the_context(tiny, layout, self_verify):
    """Blocks and drafts that overhang the end have no positions there."""
    net = tiny(context=20)
    u = uniforms(1, 0, range(3), (20, 3))
    text = speculative_decode(net, layout, prompts([3] * 3), 17, u, 99, SamplingConfig(),
                              None if self_verify else net)
    assert (text.tokens != net.mask_id).all()


def test_all_tokens_of_a_perfect_draft_are_accepted(tiny):
    """At temperature 0, a network that repeats one token accepts all drafts: K tokens per forward pass."""
    net = tiny(seed=1)
    with torch.no_grad():
        net.ln_f.weight.zero_()
        net.ln_f.bias.copy_(net.wte.weight[4] * 50)
    layout = Layout(4, 1, 1)
    prompt = prompts([3] * 3)
    u = uniforms(1, 0, range(3), (23, 3))
    text = speculative_decode(net, layout, prompt, 20, u, EOT, SamplingConfig(0))
    assert (text.tokens[:, 3:] == 4).all()
    assert (text.forwards == 6).all()  # the pass over the prompt gives one token, the other five four each
    assert torch.equal(text.accepted_in[0, 3:], (torch.arange(20) + 3) // 4)
    text = speculative_decode(net, layout, prompt, 20, u, EOT, SamplingConfig(0), net)
    assert (text.forwards == 8).all()  # two passes give five tokens


def test_a_row_does_not_depend_on_its_batch_mates(tiny):
    lens = [3, 1, 4]
    u = uniforms(2, 0, range(3), (24, 3))
    student = tiny(seed=7)
    other = tiny(seed=8)
    for layout, teacher in ((Layout(3, 1, 1), None), (Layout(3, 1, 1), other), (Layout(3, 3, 0), other)):
        together = speculative_decode(student, layout, prompts(lens), 20, u, EOT, SamplingConfig(), teacher,
                                      torch.tensor(lens))
        for row, n in enumerate(lens):
            prompt = prompts(lens)[row:row + 1, :n]
            alone = speculative_decode(student, layout, prompt, 20, u[row:row + 1], EOT, SamplingConfig(),
                                       teacher)
            assert torch.equal(alone.tokens[0, n:], together.tokens[row, n:n + 20])
            assert alone.forwards == together.forwards[row]
            assert alone.positions == together.positions[row]


def test_a_student_that_is_not_an_ar_model_cannot_verify_itself(tiny):
    for layout in (Layout(4, 4, 1), Layout(4, 1, 0)):
        with pytest.raises(ValueError, match="--align=ar --context=causal"):
            speculative_decode(tiny(), layout, prompts([3]), 4, uniforms(0, 0, range(1), (7, 3)), EOT)
