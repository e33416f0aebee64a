import copy
import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import inverse_cdf
from model import masks
from model.masks import AR, Layout

EOT = 10
LAYOUTS = [Layout(block, clean, shift)
           for block in (1, 2, 3, 4, 18, 21) for clean in sorted({1, block}) for shift in (0, 1)]


class Spy(Denoiser):
    """Keeps what the sampler saw: each state and the logits it was answered with."""

    def reset(self, prompt, end):
        super().reset(prompt, end)
        self.seen = []

    def __call__(self, tokens, start, masked):
        logits = super().__call__(tokens, start, masked)
        self.seen.append((tokens.clone(), start.clone(), logits.clone()))
        return logits


def prompts(P, rows=4, seed=2):
    return torch.randint(0, EOT, (rows, P), generator=torch.Generator().manual_seed(seed))


def write(net, layout, P=3, R=18, rows=4, spec="threshold:0.3", seed=0, spy=Denoiser, **how):
    denoiser, rule = spy(net, layout), reveal.parse(spec, how.pop("confidence", None))
    u = opdlm.uniforms(seed, opdlm.ROLLOUT, range(rows), (P + R, how.pop("numbers", rule.numbers(layout.block))))
    return opdlm.rollout(denoiser, prompts(P, rows), R, rule, u, EOT, **how), denoiser


# rollout -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("P", [1, 3, 6])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_policy_means_exactly_on_policy(tiny, layout, P):
    """The training pass on a visited state gives the sampler's own logits at that state."""
    net, R = tiny(), 18
    text, spy = write(net, layout, P, R, spy=Spy)
    compared = 0
    for tokens, start, logits in spy.seen:
        for row in range(len(start)):
            block = range(int(start[row]), min(int(start[row]) + layout.block, P + R))
            at = torch.tensor([i for i in block if tokens[row, i] == net.mask_id], dtype=torch.long)
            noisy = text.tokens[row:row + 1, P:].clone()
            noisy[0, [i - P for i in block]] = tokens[row, list(block)]
            again = opdlm.student_logits(net, text.tokens[row:row + 1], noisy, P, layout, torch.zeros_like(at), at)
            assert torch.allclose(again, logits[row, at - block.start], atol=1e-10, rtol=0)
            compared += len(at)
    assert compared > 30


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_visited_states_are_the_sampler_s(tiny, layout):
    """Rebuilt from tokens and order, a state of a block is what the sampler had before it at that step."""
    net, P = tiny(), 3
    text, spy = write(net, layout, P, spy=Spy)
    steps = torch.zeros(4, dtype=torch.long)
    before = None
    for tokens, start, _ in spy.seen:
        steps = torch.where(start == before, steps + 1, 0) if before is not None else steps
        before = start
        for row in range(4):
            block = slice(int(start[row]), min(int(start[row]) + layout.block, P + 18))
            rebuilt = torch.where(text.order[row, block] >= steps[row], net.mask_id, text.tokens[row, block])
            assert torch.equal(rebuilt, tokens[row, block])


def test_block_1_with_ar_alignment_is_the_ar_sampler(tiny):
    net = tiny()
    text, denoiser = write(net, AR)
    u = opdlm.uniforms(0, opdlm.ROLLOUT, range(4), (21, 1))
    for row in range(4):
        tokens = prompts(3)[row]
        while len(tokens) < 21 and tokens[3:].tolist()[-1:] != [EOT]:
            probs = net(tokens[None])[-1:].float().softmax(-1)
            tokens = torch.cat([tokens, inverse_cdf(probs, u[row, len(tokens)])])
        assert torch.equal(text.tokens[row][:len(tokens)], tokens)
        assert denoiser.forwards[row] == len(tokens) - 3
        assert denoiser.positions[row] == len(tokens) - 1           # one position a token, and nothing for [MASK]


class Exact:
    """The exact conditionals of a joint distribution of three tokens, as a denoiser."""
    mask_id, layout = 3, Layout(3, 1, 0)
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(7)) ** 3
    joint /= joint.sum()

    def reset(self, prompt, end):
        self.forwards = self.positions = torch.zeros_like(prompt)

    def __call__(self, tokens, start, masked):
        block = tokens[:, 1:4]                                                            # (B, 3)
        fits = torch.ones(len(block), 3, 3, 3, dtype=torch.bool)
        for axis in range(3):
            known = (block[:, axis, None] == torch.arange(3)) | (block[:, axis, None] == self.mask_id)
            fits &= known.view(-1, *[3 if a == axis else 1 for a in range(3)])
        weight = self.joint * fits
        sums = [weight.sum([1 + a for a in range(3) if a != axis]) for axis in range(3)]
        return torch.stack(sums, 1).clamp(min=1e-30).log()                                # (B, 3, V)


ONE_A_STEP = [("static:1", None), ("leftmost:1", None), ("static:1", "margin"), ("static:1", "entropy"), ("eb:0", None),
              ("random:1", None)]


@pytest.mark.parametrize("spec, confidence", ONE_A_STEP)
def test_exact_conditionals_one_at_a_time_sample_the_joint(spec, confidence):
    """Over a fine grid of the three uniform numbers, not a sample, so that only the grid's step is lost."""
    grid = torch.cartesian_prod(*[(torch.arange(48) + 0.5) / 48] * 3)
    u, rule = F.pad(grid, (1, 0))[..., None], reveal.parse(spec, confidence)
    if rule.rolls:
        u = torch.cat([u, torch.rand(u.shape, generator=torch.Generator().manual_seed(0))], -1)
    text = opdlm.rollout(Exact(), torch.full((len(grid), 1), 0), 3, rule, u, eot=99)
    share = torch.bincount(text.tokens[:, 1:] @ torch.tensor([9, 3, 1]), minlength=27) / len(grid)
    assert (share - Exact.joint.flatten()).abs().max() < 0.01


def test_the_drawn_token_s_confidence_does_not():
    """The paper's rule prefers what is likely: the same draws, biased."""
    u = torch.rand(40_000, 4, 3, generator=torch.Generator().manual_seed(0))
    text = opdlm.rollout(Exact(), torch.full((40_000, 1), 0), 3, reveal.parse("static:1", "drawn"), u, 99)
    share = torch.bincount(text.tokens[:, 1:] @ torch.tensor([9, 3, 1]), minlength=27) / 40_000
    assert (share - Exact.joint.flatten()).abs().max() > 0.03


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_static_order_is_a_permutation_and_no_mask_is_left(tiny, layout):
    net = tiny(seed=3)
    text, denoiser = write(net, layout, spec="static:1")
    assert not (text.tokens == net.mask_id).any()
    for row in range(4):
        length = int(text.response_mask[row].sum())
        for begin in range(3, 3 + length - layout.block + 1, layout.block):               # blocks that were finished
            assert sorted(text.order[row, begin:begin + layout.block].tolist()) == list(range(layout.block))
        assert length <= 18 and denoiser.forwards[row] <= -(-length // layout.block) * layout.block


def test_n_tokens_in_n_forwards(tiny):
    """Prefill and commits ride along: no end-of-text comes, since its logit is far away."""
    net = tiny()
    with torch.no_grad():
        net.wte.weight[EOT] = 0
        net.ln_f.weight.mul_(3)
    for layout in LAYOUTS:
        text, denoiser = write(net, layout, spec="static:1")
        full = text.response_mask.sum(1) == 18
        assert full.any() and (denoiser.forwards[full] <= 18).all()


@pytest.mark.parametrize("layout", [AR, Layout(4, 1, 1), Layout(4, 4, 0)], ids=str)
def test_a_row_depends_neither_on_batch_mates_nor_on_padding(tiny, layout):
    net = tiny()
    lens, R = torch.tensor([2, 5, 1, 4]), 15
    prompt, u = prompts(5), opdlm.uniforms(0, 0, range(4), (20, 1))
    together = opdlm.rollout(Denoiser(net, layout), prompt, R, reveal.parse("threshold:0.3"), u, EOT, prompt_len=lens)
    for row, n in enumerate(lens.tolist()):
        alone = opdlm.rollout(Denoiser(net, layout), prompt[row:row + 1, :n], R, reveal.parse("threshold:0.3"),
                              u[row:row + 1], EOT)
        for name in ("tokens", "order", "response_mask"):
            assert torch.equal(getattr(together, name)[row, :n + R], getattr(alone, name)[0]), name
        assert (together.forwards[row], together.positions[row]) == (alone.forwards[0], alone.positions[0])


def test_an_end_of_text_stops_its_row_inside_the_block(tiny):
    text, _ = write(tiny(scale=0.1), Layout(6, 1, 1), rows=32, spec="leftmost:0.3")
    ended = [(row, int(keep.nonzero()[-1])) for row, keep in enumerate(text.response_mask) if text.tokens[row][keep][-1] == EOT]
    inside = [(row, last) for row, last in ended if (last - 3) % 6 < 5]
    assert len(inside) > 5
    for row, last in inside:
        assert (text.tokens[row, last:] == EOT).all() and not text.response_mask[row, last + 1:].any()
        assert (text.order[row, last + 1:] != text.order[row, last] + 1).all()     # no step after the one that ended it


@pytest.mark.parametrize("spec", ["static:1", "threshold:0.2", "leftmost:0.3"])
def test_everything_kept_was_revealed(tiny, spec):
    """An end-of-text right of a mask ends nothing: what is before it is still to be written."""
    text, _ = write(tiny(scale=0.1), Layout(6, 6, 0), rows=64, spec=spec)
    assert (text.tokens[text.response_mask] == EOT).sum() > 20
    assert (text.order[text.response_mask] >= 0).all() and (text.order[text.response_mask] < 6).all()


class Nothing(reveal.Rule):
    def __call__(self, confidence, masked, step, numbers):
        return masked & False


def test_the_last_step_reveals_what_is_left(tiny):
    """Even under a rule that never reveals anything, a block takes K steps."""
    u = opdlm.uniforms(0, 0, range(4), (21, 1))
    text = opdlm.rollout(Denoiser(tiny(), Layout(4, 1, 0)), prompts(3), 18, Nothing("", 0), u, EOT)
    assert (text.order[text.response_mask] == 3).all() and (text.forwards <= 20).all()


def test_uniforms_know_their_row_only():
    some = opdlm.uniforms(5, 1, range(3, 6), (7, 2))
    assert torch.equal(some[1], opdlm.uniforms(5, 1, range(4, 5), (7, 2))[0])
    assert torch.equal(some[:, :4], opdlm.uniforms(5, 1, range(3, 6), (4, 2)))            # nor the length drawn
    for seed, stream, row in ((6, 1, 3), (5, 2, 3), (5, 1, 2)):
        assert not torch.equal(some[:1], opdlm.uniforms(seed, stream, range(row, row + 1), (7, 2)))


# states --------------------------------------------------------------------------------------------------------------

def shares(states, order, kept, block, rows=20_000):
    """How often each set of masked slots comes."""
    u = torch.rand(rows, order.size(1), 2, generator=torch.Generator().manual_seed(0))
    masked = states(order.expand(rows, -1), kept.expand(rows, -1), u, block)
    sets, counts = masked.unique(dim=0, return_counts=True)
    return {tuple(s.nonzero()[:, 0].tolist()): n / rows for s, n in zip(sets, counts.tolist())}


def test_visited_draws_each_state_that_has_a_loss():
    order, kept = torch.tensor([[0, 2, 1, 1]]), torch.tensor([[True] * 4])
    thirds = {(0, 1, 2, 3): 1 / 3, (1, 2, 3): 1 / 3, (1,): 1 / 3}
    assert shares(opdlm.visited, order, kept, 4) == pytest.approx(thirds, abs=0.02)
    kept = torch.tensor([[True, False, False, False]])
    assert shares(opdlm.visited, order, kept, 4) == {(0, 1, 2, 3): 1.0}
    order = torch.tensor([[0, 4, 4, 4, -1, -1]])                              # stopped at slot 0: the others never came
    assert shares(opdlm.visited, order, torch.tensor([[True] + [False] * 5]), 4) == {(0, 1, 2, 3): 1.0}


def test_prefix_hides_all_from_some_slot_on():
    order, kept = torch.zeros(1, 6).long(), torch.tensor([[True] * 6])
    got = shares(opdlm.prefix_shown, order[:, :4], kept[:, :4], 4)
    assert got == pytest.approx({tuple(range(j, 4)): 0.25 for j in range(4)}, abs=0.02)
    assert all(len(s) and s[-1] == 5 for s in shares(opdlm.prefix_shown, order, kept, 4))       # the last block is shorter


def test_random_states_with_weight_1_over_t_are_the_diffusion_bound():
    """P(set) x weight = the integral over t of (1/t) t^n (1-t)^(K-n), for each set of n of K slots."""
    K, order = 3, torch.zeros(1, 3).long()
    kept = order == 0
    for masked, share in shares(opdlm.random_mask, order, kept, K, 60_000).items():
        hidden = torch.zeros(1, K, dtype=torch.bool).index_fill(1, torch.tensor(masked), True)
        weight = opdlm.inverse_t(hidden, kept, K).amax().item() * K
        n = len(masked)
        integral = math.gamma(n) * math.gamma(K - n + 1) / math.gamma(K + 1)
        assert share * weight == pytest.approx(integral, rel=0.04)


def test_weights_of_a_row():
    masked = torch.tensor([[False, True, True, True, True, True], [False] * 6])        # blocks of 4, the last of 2
    kept = torch.tensor([[True] * 5 + [False], [True] * 6])
    mean, first, share = (weight(masked, kept, 4) for weight in opdlm.WEIGHTS.values())
    assert mean.tolist() == [[0, 0.25, 0.25, 0.25, 0.25, 0], [0] * 6]
    assert first[0].tolist() == pytest.approx([0, 8 / 18, 1 / 18, 1 / 18, 8 / 18, 0])
    assert share[0].tolist() == pytest.approx([0, 4 / 15, 4 / 15, 4 / 15, 1 / 5, 0])
    assert not first[1].any() and not share[1].any()


def test_where_a_causal_teacher_sees_more_than_the_student():
    """A student that is the conditional of a known joint has KL 0 to a causal teacher at a block's first masked slot,
    and more behind it: what `first_most` rests on."""
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0)).double() ** 2
    joint /= joint.sum()
    p0, p01 = joint.sum((1, 2)), joint.sum(2)
    kl = [0.0, 0.0, 0.0]
    for a, b, c in itertools.product(range(3), repeat=3):
        teacher = [p0, p01[a] / p0[a], joint[a, b] / p01[a, b]]
        student = [p0, joint.sum((0, 2)), joint.sum((0, 1))]                             # nothing of the block is shown
        for i in range(3):
            kl[i] += joint[a, b, c].item() * opdlm.distill_loss(teacher[i][None], student[i].log()[None]).item()
    assert kl[0] == pytest.approx(0, abs=1e-6) and min(kl[1:]) > 0.01


# target and loss -----------------------------------------------------------------------------------------------------

def test_kl_by_hand():
    q, logits = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0, 0]]), torch.tensor([[0.0, 0, 0], [0, 0, 0]])
    want = [0.5 * math.log(1.5) + 0.5 * math.log(0.75), math.log(3)]
    assert opdlm.distill_loss(q, logits).tolist() == pytest.approx(want)
    assert opdlm.distill_loss(q[:1], q[:1].log() + 5).item() == pytest.approx(0, abs=1e-6)


def test_kl_of_equal_models_is_0(tiny):
    """A student under the AR layout is its teacher."""
    teacher = tiny().float()
    text, _ = write(teacher, AR)
    rows, at = text.response_mask.nonzero(as_tuple=True)
    noisy = torch.full((4, 18), teacher.mask_id)
    target = opdlm.teacher_probs(teacher, text.tokens, rows, at)
    kl = opdlm.distill_loss(target, opdlm.student_logits(teacher, text.tokens, noisy, 3, AR, rows, at))
    assert len(kl) and kl.abs().max() < 1e-5


def test_a_first_slot_is_the_teacher_s_under_a_causal_context(tiny):
    net, layout = tiny(), Layout(4, 1, 1)
    text, _ = write(net, layout)
    rows, at = text.response_mask.nonzero(as_tuple=True)
    rows, at = rows[(at - 3) % 4 == 0], at[(at - 3) % 4 == 0]
    noisy = torch.full((4, 18), net.mask_id)
    logits = opdlm.student_logits(net, text.tokens, noisy, 3, layout, rows, at).float()
    assert torch.allclose(logits.softmax(-1), opdlm.teacher_probs(net, text.tokens, rows, at), atol=1e-6)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.block in (2, 4)], ids=str)
def test_noisy_logits_do_not_see_clean_tokens_of_their_block_or_later(tiny, layout):
    net, P = tiny(), 3
    tokens = prompts(21)
    rows, at = torch.arange(4), torch.tensor([7, 8, 9, 10])
    noisy = torch.full((4, 18), net.mask_id)
    one = opdlm.student_logits(net, tokens, noisy, P, layout, rows, at)
    begin = P + (at - P) // layout.block * layout.block
    other = torch.where(torch.arange(21) >= begin[:, None], (tokens + 1) % EOT, tokens)
    assert torch.allclose(one, opdlm.student_logits(net, other, noisy, P, layout, rows, at), atol=1e-10, rtol=0)
    before = torch.where(torch.arange(21) == begin[:, None] - 1, (tokens + 1) % EOT, tokens)
    assert (one - opdlm.student_logits(net, before, noisy, P, layout, rows, at)).abs().amax(1).min() > 1e-6


def test_one_hot_is_cross_entropy(tiny):
    net, tokens = tiny(), prompts(9)
    rows, at, logits = torch.arange(4), torch.tensor([3, 4, 5, 6]), torch.randn(4, 11)
    want = F.cross_entropy(logits, tokens[rows, at], reduction="none")
    assert torch.allclose(opdlm.distill_loss(opdlm.one_hot(net, tokens, rows, at), logits), want, atol=1e-6)


# step ----------------------------------------------------------------------------------------------------------------

def recipe(method="opdlm", layout=Layout(4, 1, 1), **more):
    text, states, target, weight = opdlm.METHODS[method]
    dials = opdlm.SOURCES[text], opdlm.STATES[states], opdlm.TARGETS[target], opdlm.WEIGHTS[weight]
    return opdlm.Recipe(*dials, layout, EOT, **{"batch": 4, "max_prompt": 4, **more})


def stories(numbers):
    """Rows of random tokens with an end-of-text here and there."""
    return (opdlm.uniforms(1, 9, numbers, (22,)) * 11).long()


def run(tiny, steps=10, recipe=recipe(), lr=0.01, seed=0):
    teacher = tiny(seed=seed)
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr)
    records = list(opdlm.train(student, teacher, stories, recipe, optimizer, lambda step: 18, range(steps)))
    return records, student, teacher


def test_rows_can_be_parted(tiny):
    """The gradient of a batch is the sum of its parts', rows without a loss included."""
    teacher, made = tiny(), recipe()
    text, u = opdlm.data_text(None, None, stories(range(4)), 3, 18, None, made), opdlm.uniforms(0, 2, range(4), (21, 2))
    text.response_mask[2] = False
    made.states = opdlm.random_mask

    def gradient(part):
        student = copy.deepcopy(teacher)
        some = opdlm.Rollout(*(x[part] for x in (text.tokens, text.order, text.response_mask, text.forwards, text.positions)))
        opdlm.train_step(student, teacher, some, 3, u[part], made, torch.optim.SGD(student.parameters(), 0.0))
        return [p.grad for p in student.parameters()]
    for whole, left, right in zip(gradient(slice(None)), gradient(slice(0, 3)), gradient(slice(3, 4))):
        assert torch.allclose(whole, left + right, atol=1e-7)                             # the loss is float32


@pytest.mark.parametrize("method", opdlm.METHODS)
@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(4, 1, 1), Layout(18, 18, 0)], ids=str)
def test_every_method_runs_and_leaves_the_teacher_alone(tiny, method, layout):
    before = tiny()
    records, student, teacher = run(tiny, 2, recipe(method, layout))
    assert all(math.isfinite(r["loss"]) and r["loss_positions"] > 0 for r in records)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), teacher.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), student.parameters()))


def test_it_learns(tiny):
    records, *_ = run(tiny, 60, recipe(batch=16), lr=0.3)
    first, last = (sum(r["kl"] for r in part) / 10 for part in (records[:10], records[-10:]))
    assert last < 0.7 * first


def test_only_a_model_of_whole_texts_learns_what_follows_their_end(tiny):
    """A block as long as the text, prompt included: end-of-text behind the first one is text like any other."""
    rows = torch.tensor([[EOT, 1, 2, 3, EOT, 4, 5, 6, EOT], [EOT, 1, 2, 3, 4, 5, 6, 7, 8]])
    how = [replace(recipe("sdar"), layout=Layout(block, block, 0)) for block in (9, 7)]
    whole, parts = (opdlm.data_text(None, None, rows, 2, 7, None, one) for one in how)
    assert torch.equal(whole.tokens, parts.tokens) and whole.tokens[0].tolist() == [EOT, 1, 2, 3, *[EOT] * 5]
    assert torch.equal(whole.response_mask, torch.arange(9).expand(2, 9) >= 2)
    assert parts.response_mask.tolist() == [[False] * 2 + [True] * 3 + [False] * 4, whole.response_mask[1].tolist()]


def test_several_updates_take_their_rows_in_turn(tiny):
    """With a learning rate of 0, four updates on one rollout are four rollouts of a quarter of the rows."""
    fixed = {"max_prompt": 1}
    one = [r["kl"] for r in run(tiny, 4, recipe(updates_per_rollout=4, **fixed), lr=0.0)[0]]
    assert one == pytest.approx([r["kl"] for r in run(tiny, 4, recipe(updates_per_rollout=1, **fixed), lr=0.0)[0]], rel=1e-5)


def test_steps_go_on_where_they_stopped(tiny):
    whole, *_ = run(tiny, 6)
    teacher = tiny()
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    parts = [r for part in (range(0, 2), range(2, 6))
             for r in opdlm.train(student, teacher, stories, recipe(), optimizer, lambda step: 18, part)]
    assert [r["loss"] for r in parts] == [r["loss"] for r in whole]


GOLDEN = {
    "opdlm": [0.4296046, 0.2959694, 0.05981071, 0.1267433, 0.2551391,
              0.1947654, 0.04417254, 0.1304345, 0.179448, 0.1075493],
    "opdlm-off": [0.3527374, 0.1641457, 0.1110744, 0.05467542, 0.2393909,
                  0.3336312, 0.2373389, 0.1657459, 0.1202501, 0.1031974],
    "kd": [0.4249816, 0.1643928, 0.1399881, 0.0951754, 0.2613815,
           0.4290243, 0.2350323, 0.08766, 0.09205247, 0.05385777],
    "sft": [2.460944, 1.996288, 1.106838, 0.8635937, 2.047517,
            1.760285, 1.680908, 1.237774, 1.609467, 1.46568],
    "sdar": [3.130839, 3.250824, 3.306464, 2.763638, 2.407469,
             3.768651, 2.155751, 2.455661, 3.235426, 3.07191],
    "default": [0.1131895, 0.09852521, 0.06886735, 0.08819805, 0.08392563,
                0.09249107, 0.05654207, 0.03065622, 0.04596809, 0.121519],
    "wired as the paper": [0.4919708, 0.5107138, 0.1070108, 0.2982344, 0.3676248,
                           0.2312299, 0.2992118, 0.2738649, 0.2790167, 0.1446941],
}


def test_the_clean_weight_adds_the_student_s_loss_as_an_ar_model(tiny):
    """The loss of one update with it, less that without, is a plain causal pass's: a mean over each row."""
    net, teacher = tiny(seed=1), tiny(seed=2)
    plain = replace(recipe("opdlm"), layout=Layout(4, 1, 1))
    text = opdlm.student_text(net, teacher, prompts(3), 3, 18, opdlm.uniforms(0, 1, range(4), (21, 1)), plain)
    picks, loss = opdlm.uniforms(0, 2, range(4), (21, 2)), {}
    for weight in (0.0, 0.5):
        weighed = replace(plain, clean_weight=weight)
        step = partial(opdlm.train_step, copy.deepcopy(net), teacher, text, 3, picks, weighed)
        loss[weight] = step(torch.optim.SGD(net.parameters(), 0.0))
    own, theirs = (x(text.tokens).view(4, 21, -1)[:, 2:-1].log_softmax(-1) for x in (net, teacher))
    kl = (theirs.exp() * (theirs - own)).sum(-1) * text.response_mask[:, 3:]                      # (B, R)
    wanted = 0.5 * (kl.sum(1) / text.response_mask[:, 3:].sum(1)).sum() / plain.batch
    assert loss[0.5]["loss"] - loss[0.0]["loss"] == pytest.approx(wanted.item(), rel=1e-6)
    assert all(loss[0.5][name] == loss[0.0][name] for name in ("kl", "text_nats", "masked", "tokens"))


def test_the_clean_weight_needs_an_ar_student():
    with pytest.raises(ValueError, match="--align=ar --context=causal"):
        replace(recipe("opdlm"), layout=Layout(4, 4, 1), clean_weight=0.1)


MADE = {name: recipe(name) for name in opdlm.METHODS} | {
    "default": replace(recipe("opdlm"), source=opdlm.data_text, states=opdlm.prefix_shown, weight=opdlm.WEIGHTS["first"]),
    "wired as the paper": recipe("opdlm", Layout(4, 4, 0), rule=reveal.parse("threshold:0.9", "drawn"))}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses(tiny, name):
    """The first ten losses in float64. A change of maths changes them and says so; any other change doesn't."""
    assert [r["loss"] for r in run(tiny, 10, MADE[name])[0]] == pytest.approx(GOLDEN[name], rel=1e-5)


def test_dials_that_mean_nothing_together():
    with pytest.raises(ValueError, match="states=visited needs source=student"):
        replace(recipe("sdar"), states=opdlm.visited)


def test_the_paper_s_redraws_are_new_each_step(tiny):
    """With one number a slot the unlucky token is drawn again and again; with one a step it is not."""
    net = tiny(seed=4)
    same, _ = write(net, Layout(4, 4, 0), spec="static:1", confidence="drawn", numbers=1)
    fresh, _ = write(net, Layout(4, 4, 0), spec="static:1", confidence="drawn")
    assert not torch.equal(same.tokens, fresh.tokens)


def test_all_layouts_agree_on_how_many_blocks_there_are():
    for P, K in itertools.product((1, 4, 5), (1, 3, 4)):
        assert masks.block_of(torch.arange(P, P + 9), P, K).unique().tolist() == list(range(-(-9 // K)))
