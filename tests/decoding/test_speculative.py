import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opdlm
from data import tokenizer
from decoding import reveal, speculative
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, uniforms
from model import checkpoint
from model.masks import AR, Layout

EOT, V, ROOT = 10, 11, Path(__file__).parents[2]
LAYOUTS = [Layout(K, clean, shift) for K in (1, 2, 3, 4) for clean in {1, K} for shift in (0, 1)]
ITSELF = [layout for layout in LAYOUTS if (layout.context_block, layout.logit_shift) == (1, 1)]


def prompts(lens, seed=0):
    return torch.randint(0, EOT, (len(lens), max(lens)), generator=torch.Generator().manual_seed(seed))


def ar_text(net, prompt, length, u, sampling, lens=None):
    return opdlm.rollout(Denoiser(net, AR), prompt, length, reveal.parse("static:1"), u, EOT, sampling, lens)


class Spy:
    """A network, and what it was called with."""

    def __init__(self, net):
        self.net, self.h, self.mask_id, self.calls = net, net.h, net.mask_id, []

    def __call__(self, tokens, *args, **how):
        self.calls.append(tokens)
        return self.net(tokens, *args, **how)


# the text is the verifier's ------------------------------------------------------------------------------------------

@settings(max_examples=60, suppress_health_check=["function_scoped_fixture"])
@given(layout=st.sampled_from(LAYOUTS), own=st.booleans(), length=st.integers(1, 20), seed=st.integers(0, 50),
       lens=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_greedy_text_is_the_verifier_s_own(tiny, layout, own, length, seed, lens):
    """Token for token, whoever drafts, however it is wired, for any prompts and lengths."""
    student, teacher = tiny(seed=seed % 7), tiny(seed=90)
    own, prompt, begin = own and layout in ITSELF, prompts(lens, seed), torch.tensor(lens)
    u = uniforms(seed, 0, range(len(lens)), (max(lens) + length, 3))
    tokens, when, forwards, _ = speculative.verified(student, layout, prompt, length, u, EOT, SamplingConfig(0),
                                                None if own else teacher, begin)
    text = ar_text(student if own else teacher, prompt, length, u, SamplingConfig(0), begin)
    assert torch.equal(tokens, text.tokens) and torch.equal(when >= 0, text.response_mask)
    assert (forwards <= (1 if own else 2) * text.response_mask.sum(1)).all()


@pytest.mark.parametrize("shape", [(0,), (0, 2), ()], ids=str)
def test_a_block_of_one_that_verifies_itself_is_the_ar_model(tiny, shape):
    """From the same numbers the same text, at the same cost."""
    net, prompt, u = tiny(seed=4), prompts([3] * 5), uniforms(0, 0, range(5), (23, 3))
    tokens, _, *cost = speculative.verified(net, AR, prompt, 20, u, EOT, SamplingConfig())
    text = ar_text(net, prompt, 20, u[..., speculative.INSTEAD:], SamplingConfig())
    assert torch.equal(tokens, text.tokens)
    assert torch.equal(cost[0], text.forwards) and torch.equal(cost[1], text.positions)


def joint(net, L):
    """(V ** L,) probabilities of all texts of L tokens behind a 0."""
    texts = torch.tensor(list(itertools.product(range(3), repeat=L)))
    logits = net(torch.nn.functional.pad(texts, (1, 0))).view(len(texts), L + 1, -1)[:, :-1].log_softmax(-1)
    return logits.gather(2, texts[..., None])[..., 0].sum(1).exp().detach()


@pytest.mark.parametrize("layout, own", [(Layout(2, 1, 1), True), (Layout(3, 1, 1), True), (Layout(3, 1, 1), False),
                                         (Layout(2, 2, 0), False), (Layout(3, 3, 1), False)], ids=str)
def test_sampled_text_has_the_verifier_s_distribution(tiny, layout, own):
    """Pearson's chi-square over all 27 texts of three tokens; with 26 degrees of freedom above 60 once in 6,000."""
    rows, L = 30_000, 3
    student, teacher = tiny(vocab=3, seed=1, scale=0.15), tiny(vocab=3, seed=2, scale=0.15)
    u = torch.rand(rows, 1 + L, 3, generator=torch.Generator().manual_seed(0))
    tokens, *_ = speculative.verified(student, layout, torch.zeros(rows, 1, dtype=torch.long), L, u, 99, SamplingConfig(),
                                 None if own else teacher)
    found = torch.bincount(tokens[:, 1:] @ torch.tensor([9, 3, 1]), minlength=27)
    wanted = joint(student if own else teacher, L) * rows
    assert ((found - wanted) ** 2 / wanted).sum() < 60


@pytest.fixture(scope="module")
def story_world(tmp_path_factory):
    """A teacher that has learnt a little of the story world, and its student, who has begun to draft."""
    out, small = tmp_path_factory.mktemp("run"), ["--layers=1", "--width=64", "--eval_every=40", "--length=64"]
    few = ["--pretrain_steps=80", "--warm_steps=40", "--distill_steps=41"]
    run = [sys.executable, str(ROOT / "train_tiny.py"), "--data=toy", "--device=cpu", f"--out={out}", *small, *few]
    subprocess.run(run, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return checkpoint.load(out / "opdlm")[0], checkpoint.load(out / "ar")[0], tokenizer.load(out / "ar")


def unlike(a, b):
    """Chi-square of two samples of texts (B, L), token by token at each position, rare ones in one heap; in standard
    deviations from what it is of two samples of one distribution."""
    found, degrees = 0.0, 0
    for x, y in zip(a.unbind(1), b.unbind(1)):
        x, y = (torch.bincount(tokens, minlength=int(max(a.max(), b.max())) + 1) for tokens in (x, y))
        often = x + y >= 20
        x, y = (torch.cat([some[often], some[~often].sum()[None]]) for some in (x, y))
        found, degrees = found + ((x - y) ** 2 / (x + y).clamp(min=1)).sum(), degrees + len(x) - 1
    return (found - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize("own", [True, False])
def test_stories_have_the_verifier_s_distribution(story_world, own):
    """4,000 stories' first 16 tokens against as many of the plain sampler's. That drafts kept 1.3 times as willingly
    as they may be would be 3 to 5 deviations, a student taken for its teacher hundreds."""
    (student, teacher, tok), rows, L = story_world, 4000, 16
    prompt, source = torch.tensor([tok.encode("Once upon a time")] * rows), torch.Generator().manual_seed(7)
    u = torch.rand(rows, prompt.size(1) + L, 4, generator=source)
    tokens, _, forwards, _ = speculative.verified(student, Layout(4, 1, 1), prompt, L, u[..., :3], tok.eot, SamplingConfig(),
                                             None if own else teacher)
    verifier = student if own else teacher
    wanted = opdlm.rollout(Denoiser(verifier, AR), prompt, L, reveal.parse("static:1"), u[..., 3:], tok.eot).tokens
    assert (forwards.sum() < rows * L / 1.2 or not own) and unlike(tokens[:, -L:], wanted[:, -L:]) < 3
    assert unlike(tokens[:, -L:], tokens[:, -L:].roll(1, 1)) > 100


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.5, top_k=3), SamplingConfig(top_p=0.7)], ids=str)
def test_a_token_has_the_verifier_s_probability(sampling):
    """Whatever q is: over a fine grid of the numbers, for every draft, so that only the grid's step is lost."""
    generator, n = torch.Generator().manual_seed(3), 200
    p, q = (sampling(torch.rand(2, 5, generator=generator).pow(3).softmax(-1)) for _ in range(2))    # of A + 1 = 2 slots
    q[1] = 0                                                                            # nothing is drafted behind
    grid = torch.cartesian_prod((torch.arange(n) + 0.5) / n, (torch.arange(n) + 0.5) / n)
    u = torch.cat([torch.zeros(n * n, 2, 1), grid[:, None].expand(-1, 2, -1)], 2)
    share = torch.zeros(5)
    for token in range(5):
        draft = torch.tensor([[token, 0]]).expand(n * n, 2)
        count, instead = speculative.accept(p.expand(n * n, 2, 5), q.expand(n * n, 2, 5), draft, u)
        first = torch.where(count > 0, token, instead)
        share += q[0, token] * torch.bincount(first, minlength=5) / (n * n)
        behind = torch.bincount(instead[count > 0], minlength=5) / max((count > 0).sum(), 1)
        assert (count <= 1).all() and (not (count > 0).any() or (behind - p[1]).abs().max() < 2 / n)
    assert (share - p[0]).abs().max() < 2 / n


# what is drafted -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layout, own", [(layout, False) for layout in LAYOUTS if layout.block > 1] +
                         [(layout, True) for layout in ITSELF if layout.block > 1], ids=str)
def test_drafts_are_the_student_s_at_a_state_it_learnt(tiny, layout, own, monkeypatch):
    """A wrong draft changes no text, only the speed: so q itself is compared, with the training pass's logits behind
    the text accepted so far."""
    student, teacher, real, begin = tiny(seed=5), tiny(seed=6), speculative.accept, torch.tensor([3, 2])
    said = []

    def accept(p, q, draft, u):
        said.append((p, q, *real(p, q, draft, u)))
        return said[-1][2:]
    monkeypatch.setattr(speculative, "accept", accept)
    u = uniforms(1, 0, range(2), (20, 3))
    tokens, *_ = speculative.verified(student, layout, prompts([3, 2]), 16, u, 99, SamplingConfig(), None if own else teacher, begin)
    compared = 0
    for row in range(2):
        P = size = int(begin[row])
        for _, q, count, _ in said:
            drafted = int((q[row].sum(-1) > 0).sum())
            state = size - own if own else size                     # itself: the token at size - 1 was masked as well
            start = P if layout.context_block > 1 else state
            end = min(start + (state - start) // layout.block * layout.block + layout.block, P + 16)
            clean = tokens[row:row + 1, :end]
            noisy = clean[:, start:].masked_fill(torch.arange(start, end) >= state, student.mask_id)
            for j in range(min(drafted, P + 16 - size)):
                at = torch.tensor([size + j])
                logits = opdlm.student_logits(student, clean, noisy, start, layout, torch.tensor([0]), at)
                assert torch.allclose(logits.float().softmax(-1)[0], q[row, j], atol=1e-5)
                compared += 1
            size = size + int(count[row]) + 1
            if size >= P + 16:
                break
    assert compared > 10


# cost ----------------------------------------------------------------------------------------------------------------

def test_cost_is_what_was_pushed(tiny):
    """One row alone: every call and every position of both networks, none but those."""
    for layout, own in ((Layout(4, 1, 1), True), (Layout(4, 1, 1), False), (Layout(3, 3, 0), False)):
        student, teacher, u = Spy(tiny(seed=5)), Spy(tiny(seed=5)), uniforms(1, 0, range(1), (20, 3))
        _, _, forwards, positions = speculative.verified(student, layout, prompts([3]), 16, u, 99, SamplingConfig(),
                                                    None if own else teacher)
        calls = student.calls + teacher.calls
        assert forwards.item() == len(calls)
        late = sum(tokens.numel() for tokens in calls) - positions.item()
        assert 0 <= late < 40                                       # at the end blocks are cut, the tensors are not


@pytest.mark.parametrize("layout, own", [(Layout(4, 1, 1), True), (Layout(4, 1, 1), False), (Layout(4, 4, 0), False)])
def test_a_text_may_fill_the_context(tiny, layout, own):
    """Blocks and drafts that hang over the end have no position there."""
    net, u = tiny(context=20), uniforms(1, 0, range(3), (20, 3))
    tokens, *_ = speculative.verified(net, layout, prompts([3] * 3), 17, u, 99, SamplingConfig(), None if own else net)
    assert (tokens != net.mask_id).all()


def test_a_perfect_draft_is_accepted_whole(tiny):
    """At temperature 0 a network whose text is one token over and over accepts all drafts: K tokens a forward."""
    net = tiny(seed=1)
    with torch.no_grad():
        net.ln_f.weight.zero_()
        net.ln_f.bias.copy_(net.wte.weight[4] * 50)
    u = uniforms(1, 0, range(3), (23, 3))
    tokens, when, forwards, _ = speculative.verified(net, Layout(4, 1, 1), prompts([3] * 3), 20, u, EOT, SamplingConfig(0))
    assert (tokens[:, 3:] == 4).all() and (forwards == 6).all()     # the prompt's gives one token, five give four each
    assert torch.equal(when[0, 3:], (torch.arange(20) + 3) // 4)
    _, _, forwards, _ = speculative.verified(net, Layout(4, 1, 1), prompts([3] * 3), 20, u, EOT, SamplingConfig(0), net)
    assert (forwards == 8).all()                                    # two forwards give five


def test_a_row_does_not_depend_on_its_batch_mates(tiny):
    lens, u = [3, 1, 4], uniforms(2, 0, range(3), (24, 3))
    for layout, teacher in ((Layout(3, 1, 1), None), (Layout(3, 1, 1), tiny(seed=8)), (Layout(3, 3, 0), tiny(seed=8))):
        made = speculative.verified(tiny(seed=7), layout, prompts(lens), 20, u, EOT, SamplingConfig(), teacher, torch.tensor(lens))
        for row, n in enumerate(lens):
            alone = speculative.verified(tiny(seed=7), layout, prompts(lens)[row:row + 1, :n], 20, u[row:row + 1], EOT,
                                    SamplingConfig(), teacher)
            assert torch.equal(alone[0][0, n:], made[0][row, n:n + 20])
            assert alone[2:] == tuple(x[row] for x in made[2:])


def test_a_student_that_is_no_ar_model_cannot_verify_itself(tiny):
    for layout in (Layout(4, 4, 1), Layout(4, 1, 0)):
        with pytest.raises(ValueError, match="--align=ar --context=causal"):
            speculative.verified(tiny(), layout, prompts([3]), 4, uniforms(0, 0, range(1), (7, 3)), EOT)
