"""Invariants of opdlm.py, in its order: rollout, state, target and loss, step; then golden losses."""
import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, inverse_cdf
from decoding.speculative import speculative_decode
from model import masks
from model.masks import AR, Layout

EOT = 10
RESPONSE = 18
LAYOUTS = [
    Layout(block, context_block, logit_shift)
    for block in (1, 2, 3, 4, 18, 21)
    for context_block in sorted({1, block})
    for logit_shift in (0, 1)
]


class RecordingDenoiser(Denoiser):
    """Keeps what the sampler saw: the text, the blocks' starts and the logits of every denoising step."""

    def reset(self, prompt_len, end):
        super().reset(prompt_len, end)
        self.steps = []

    def __call__(self, tokens, start, masked):
        logits = super().__call__(tokens, start, masked)
        self.steps.append((tokens.clone(), start.clone(), logits.clone()))
        return logits


def prompts(P, rows=4, seed=2):
    """(rows, P) random tokens without an end-of-text."""
    return torch.randint(0, EOT, (rows, P), generator=torch.Generator().manual_seed(seed))


def generate(net, layout, P=3, R=RESPONSE, rows=4, spec="threshold:0.3", confidence=None, numbers=None,
             make_denoiser=Denoiser):
    """A rollout and its denoiser. `numbers`: random numbers per position; None: as many as the rule needs."""
    denoiser = make_denoiser(net, layout)
    rule = reveal.parse(spec, confidence)
    S = numbers or rule.numbers(layout.block)
    u = opdlm.uniforms(0, opdlm.ROLLOUT, range(rows), (P + R, S))
    return opdlm.rollout(denoiser, prompts(P, rows), R, rule, u, EOT), denoiser


# rollout ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("P", [1, 3, 6])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_on_policy_means_exactly_on_policy(tiny, layout, P):
    """The training pass on a visited state gives the logits that the sampler saw at that state."""
    net = tiny()
    T = P + RESPONSE
    text, denoiser = generate(net, layout, P, make_denoiser=RecordingDenoiser)
    num_compared = 0
    for tokens, start, logits in denoiser.steps:
        for row in range(len(start)):
            begin = int(start[row])
            end = min(begin + layout.block, T)
            block = tokens[row, begin:end]
            position = begin + (block == net.mask_id).nonzero()[:, 0]
            finished = text.tokens[row:row + 1]
            noisy = finished[:, P:].clone()
            noisy[0, begin - P:end - P] = block
            rows = torch.zeros_like(position)
            of_training = opdlm.student_logits(net, finished, noisy, P, layout, rows, position)
            assert torch.allclose(of_training, logits[row, position - begin], atol=1e-10, rtol=0)
            num_compared += len(position)
    assert num_compared > 30


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tokens_and_order_hold_every_state_of_the_sampler(tiny, layout):
    """At step k of a block the sampler saw its finished tokens with all positions of order >= k masked."""
    net = tiny()
    P = 3
    text, denoiser = generate(net, layout, P, make_denoiser=RecordingDenoiser)
    step = torch.zeros(4, dtype=torch.long)
    previous_start = None
    for tokens, start, _ in denoiser.steps:
        if previous_start is not None:
            step = torch.where(start == previous_start, step + 1, 0)
        previous_start = start
        for row in range(4):
            begin = int(start[row])
            block = slice(begin, min(begin + layout.block, P + RESPONSE))
            state = torch.where(text.order[row, block] >= step[row], net.mask_id, text.tokens[row, block])
            assert torch.equal(state, tokens[row, block])


def test_block_1_with_ar_alignment_is_the_ar_sampler(tiny):
    """Token by token with whole passes, and at a cost of one position per token: none for [MASK]."""
    net = tiny()
    text, denoiser = generate(net, AR)
    u = opdlm.uniforms(0, opdlm.ROLLOUT, range(4), (21, 1))
    for row in range(4):
        tokens = prompts(3)[row]
        while len(tokens) < 21 and (len(tokens) == 3 or tokens[-1] != EOT):
            probs = net(tokens[None])[-1:].float().softmax(-1)
            token = inverse_cdf(probs, u[row, len(tokens)])
            tokens = torch.cat([tokens, token])
        assert torch.equal(text.tokens[row][:len(tokens)], tokens)
        assert denoiser.forwards[row] == len(tokens) - 3
        assert denoiser.positions[row] == len(tokens) - 1


class ExactDenoiser:
    """The exact conditional distributions of a joint distribution of three tokens, as a denoiser."""
    mask_id = 3
    layout = Layout(3, 1, 0)
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(7)) ** 3
    joint /= joint.sum()

    def reset(self, prompt_len, end):
        self.forwards = torch.zeros_like(prompt_len)
        self.positions = self.forwards

    def __call__(self, tokens, start, masked):
        block = tokens[:, 1:4]                                   # (B, 3)
        possible = torch.ones(len(block), 3, 3, 3, dtype=torch.bool)
        for axis in range(3):
            token = block[:, axis, None]
            allowed = (token == torch.arange(3)) | (token == self.mask_id)   # (B, V)
            shape = [3 if a == axis else 1 for a in range(3)]
            possible &= allowed.view(-1, *shape)
        weight = self.joint * possible
        marginals = []
        for axis in range(3):
            others = [1 + a for a in range(3) if a != axis]
            marginals.append(weight.sum(others))                 # (B, V)
        return torch.stack(marginals, 1).clamp(min=1e-30).log()  # (B, 3, V)


def frequencies(text):
    """(27,) how often each text of three tokens was generated."""
    index = text.tokens[:, 1:] @ torch.tensor([9, 3, 1])
    return torch.bincount(index, minlength=27) / len(index)


ONE_PER_STEP = [("static:1", None), ("leftmost:1", None), ("static:1", "margin"), ("static:1", "entropy"),
                ("eb:0", None), ("random:1", None)]


@pytest.mark.parametrize("spec, confidence", ONE_PER_STEP)
def test_exact_conditionals_revealed_one_at_a_time_sample_the_joint(spec, confidence):
    """The random numbers are a fine grid, not a sample, so that only the step of the grid is lost."""
    axis = (torch.arange(48) + 0.5) / 48
    grid = torch.cartesian_prod(axis, axis, axis)
    u = F.pad(grid, (1, 0))[..., None]
    rule = reveal.parse(spec, confidence)
    if rule.rolls:
        own = torch.rand(u.shape, generator=torch.Generator().manual_seed(0))
        u = torch.cat([u, own], -1)
    prompt = torch.full((len(grid), 1), 0)
    text = opdlm.rollout(ExactDenoiser(), prompt, 3, rule, u, eot=99)
    assert (frequencies(text) - ExactDenoiser.joint.flatten()).abs().max() < 0.01


def test_the_confidence_of_the_sampled_token_does_not_sample_the_joint():
    """The paper's rule prefers likely tokens, so the same conditionals give biased text."""
    u = torch.rand(40_000, 4, 3, generator=torch.Generator().manual_seed(0))
    prompt = torch.full((40_000, 1), 0)
    text = opdlm.rollout(ExactDenoiser(), prompt, 3, reveal.parse("static:1", "drawn"), u, 99)
    assert (frequencies(text) - ExactDenoiser.joint.flatten()).abs().max() > 0.03


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_static_order_is_a_permutation_and_no_mask_is_left(tiny, layout):
    net = tiny(seed=3)
    K = layout.block
    text, denoiser = generate(net, layout, spec="static:1")
    assert not (text.tokens == net.mask_id).any()
    for row in range(4):
        length = int(text.response_mask[row].sum())
        for begin in range(3, 3 + length - K + 1, K):            # finished blocks
            assert sorted(text.order[row, begin:begin + K].tolist()) == list(range(K))
        assert length <= RESPONSE
        assert denoiser.forwards[row] <= -(-length // K) * K


def test_n_tokens_cost_at_most_n_forward_passes(tiny):
    """Prefill and commits need no passes of their own. The end-of-text is made unlikely here."""
    net = tiny()
    with torch.no_grad():
        net.wte.weight[EOT] = 0
        net.ln_f.weight.mul_(3)
    for layout in LAYOUTS:
        text, denoiser = generate(net, layout, spec="static:1")
        full_length = text.response_mask.sum(1) == RESPONSE
        assert full_length.any()
        assert (denoiser.forwards[full_length] <= RESPONSE).all()


@pytest.mark.parametrize("layout", [AR, Layout(4, 1, 1), Layout(4, 4, 0)], ids=str)
def test_a_row_depends_neither_on_other_rows_nor_on_padding(tiny, layout):
    net = tiny()
    lens = torch.tensor([2, 5, 1, 4])
    R = 15
    prompt = prompts(5)
    u = opdlm.uniforms(0, 0, range(4), (20, 1))
    rule = reveal.parse("threshold:0.3")
    together = opdlm.rollout(Denoiser(net, layout), prompt, R, rule, u, EOT, prompt_len=lens)
    for row, n in enumerate(lens.tolist()):
        own_prompt = prompt[row:row + 1, :n]
        alone = opdlm.rollout(Denoiser(net, layout), own_prompt, R, rule, u[row:row + 1], EOT)
        for name in ("tokens", "order", "response_mask"):
            assert torch.equal(getattr(together, name)[row, :n + R], getattr(alone, name)[0]), name
        assert together.forwards[row] == alone.forwards[0]
        assert together.positions[row] == alone.positions[0]


def test_an_end_of_text_stops_its_row_inside_the_block(tiny):
    text, _ = generate(tiny(scale=0.1), Layout(6, 1, 1), rows=32, spec="leftmost:0.3")
    inside = []  # rows whose end-of-text is not in the last slot of its block
    for row, kept in enumerate(text.response_mask):
        last = int(kept.nonzero()[-1])
        if text.tokens[row, last] == EOT and (last - 3) % 6 < 5:
            inside.append((row, last))
    assert len(inside) > 5
    for row, last in inside:
        assert (text.tokens[row, last:] == EOT).all()
        assert not text.response_mask[row, last + 1:].any()
        step_after = text.order[row, last] + 1
        assert (text.order[row, last + 1:] != step_after).all()


@pytest.mark.parametrize("spec", ["static:1", "threshold:0.2", "leftmost:0.3"])
def test_every_token_of_the_response_was_revealed(tiny, spec):
    """An end-of-text that has a mask before it does not stop the row."""
    text, _ = generate(tiny(scale=0.1), Layout(6, 6, 0), rows=64, spec=spec)
    assert (text.tokens[text.response_mask] == EOT).sum() > 20
    assert (text.order[text.response_mask] >= 0).all()
    assert (text.order[text.response_mask] < 6).all()


class RevealNothing(reveal.Rule):
    def __call__(self, confidence, masked, step, u):
        return torch.zeros_like(masked)


def test_the_last_step_reveals_all_masks(tiny):
    """Even under a rule that never reveals anything, a block takes K steps."""
    rule = RevealNothing("static", 1)
    u = opdlm.uniforms(0, 0, range(4), (21, 1))
    text = opdlm.rollout(Denoiser(tiny(), Layout(4, 1, 0)), prompts(3), RESPONSE, rule, u, EOT)
    assert (text.order[text.response_mask] == 3).all()
    assert (text.forwards <= 20).all()


def test_random_numbers_depend_on_seed_stream_and_row_only():
    u = opdlm.uniforms(5, 1, range(3, 6), (7, 2))
    assert torch.equal(u[1], opdlm.uniforms(5, 1, range(4, 5), (7, 2))[0])
    assert torch.equal(u[:, :4], opdlm.uniforms(5, 1, range(3, 6), (4, 2)))      # nor on the length asked for
    for seed, stream, row in ((6, 1, 3), (5, 2, 3), (5, 1, 2)):
        assert not torch.equal(u[:1], opdlm.uniforms(seed, stream, range(row, row + 1), (7, 2)))


def test_new_samples_at_each_step_differ_from_one_sample_per_position(tiny):
    """The paper samples masked positions anew at each step; one random number would repeat its token."""
    net = tiny(seed=4)
    once, _ = generate(net, Layout(4, 4, 0), spec="static:1", confidence="drawn", numbers=1)
    anew, _ = generate(net, Layout(4, 4, 0), spec="static:1", confidence="drawn")
    assert not torch.equal(once.tokens, anew.tokens)


# state ------------------------------------------------------------------------------------------------

def state_frequencies(states, order, response_mask, block, rows=20_000):
    """How often a state function masks each set of positions."""
    u = torch.rand(rows, order.size(1), 2, generator=torch.Generator().manual_seed(0))
    masked = states(order.expand(rows, -1), response_mask.expand(rows, -1), u, block)
    sets, counts = masked.unique(dim=0, return_counts=True)
    frequency = {}
    for members, count in zip(sets, counts.tolist()):
        positions = members.nonzero()[:, 0].tolist()
        frequency[tuple(positions)] = count / rows
    return frequency


def test_visited_chooses_each_state_that_has_a_loss_equally_often():
    order = torch.tensor([[0, 2, 1, 1]])
    everything = torch.tensor([[True] * 4])
    thirds = {(0, 1, 2, 3): 1 / 3, (1, 2, 3): 1 / 3, (1,): 1 / 3}
    assert state_frequencies(opdlm.visited, order, everything, 4) == pytest.approx(thirds, abs=0.02)
    first_only = torch.tensor([[True, False, False, False]])
    assert state_frequencies(opdlm.visited, order, first_only, 4) == {(0, 1, 2, 3): 1.0}
    order = torch.tensor([[0, 4, 4, 4, -1, -1]])                 # an end-of-text in slot 0 stopped the row
    first_only = torch.tensor([[True] + [False] * 5])
    assert state_frequencies(opdlm.visited, order, first_only, 4) == {(0, 1, 2, 3): 1.0}


def test_prefix_shown_masks_everything_from_a_random_slot_on():
    order = torch.zeros(1, 6).long()
    everything = torch.tensor([[True] * 6])
    quarters = {tuple(range(first, 4)): 0.25 for first in range(4)}
    frequency = state_frequencies(opdlm.prefix_shown, order[:, :4], everything[:, :4], 4)
    assert frequency == pytest.approx(quarters, abs=0.02)
    with_short_block = state_frequencies(opdlm.prefix_shown, order, everything, 4)
    assert all(len(masked) and masked[-1] == 5 for masked in with_short_block)


def test_random_masks_with_weight_1_over_t_are_the_diffusion_bound():
    """P(set) x weight = the integral over t of (1/t) t^n (1-t)^(K-n), for each set of n of K positions."""
    K = 3
    order = torch.zeros(1, K).long()
    everything = order == 0
    for positions, share in state_frequencies(opdlm.random_mask, order, everything, K, 60_000).items():
        masked = torch.zeros(1, K, dtype=torch.bool).index_fill(1, torch.tensor(positions), True)
        weight = opdlm.inverse_t(masked, everything, K).amax().item() * K
        n = len(positions)
        integral = math.gamma(n) * math.gamma(K - n + 1) / math.gamma(K + 1)
        assert share * weight == pytest.approx(integral, rel=0.04)


def test_blocks_are_counted_from_the_end_of_the_prompt():
    for P, K in itertools.product((1, 4, 5), (1, 3, 4)):
        position = torch.arange(P, P + 9)
        assert masks.block_of(position, P, K).unique().tolist() == list(range(-(-9 // K)))


# target and loss --------------------------------------------------------------------------------------

def test_kl_by_hand():
    target = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0, 0]])
    logits = torch.zeros(2, 3)
    expected = [0.5 * math.log(1.5) + 0.5 * math.log(0.75), math.log(3)]
    assert opdlm.distill_loss(target, logits).tolist() == pytest.approx(expected)
    same = target[:1].log() + 5                                  # logits up to a constant
    assert opdlm.distill_loss(target[:1], same).item() == pytest.approx(0, abs=1e-6)


def test_one_hot_targets_give_cross_entropy(tiny):
    net = tiny()
    tokens = prompts(9)
    rows = torch.arange(4)
    position = torch.tensor([3, 4, 5, 6])
    logits = torch.randn(4, 11)
    expected = F.cross_entropy(logits, tokens[rows, position], reduction="none")
    target = opdlm.one_hot(net, tokens, rows, position)
    assert torch.allclose(opdlm.distill_loss(target, logits), expected, atol=1e-6)


def test_the_kl_of_equal_models_is_0(tiny):
    """A student under the AR layout is its teacher."""
    teacher = tiny().float()
    text, _ = generate(teacher, AR)
    rows, position = text.response_mask.nonzero(as_tuple=True)
    noisy = torch.full((4, RESPONSE), teacher.mask_id)
    target = opdlm.teacher_probs(teacher, text.tokens, rows, position)
    logits = opdlm.student_logits(teacher, text.tokens, noisy, 3, AR, rows, position)
    kl = opdlm.distill_loss(target, logits)
    assert len(kl)
    assert kl.abs().max() < 1e-5


def test_first_slots_equal_the_teacher_under_a_causal_context(tiny):
    """Before training, a student with a causal context predicts the first slot of a block as its teacher."""
    net = tiny()
    layout = Layout(4, 1, 1)
    text, _ = generate(net, layout)
    rows, position = text.response_mask.nonzero(as_tuple=True)
    is_first = (position - 3) % 4 == 0
    rows = rows[is_first]
    position = position[is_first]
    noisy = torch.full((4, RESPONSE), net.mask_id)
    logits = opdlm.student_logits(net, text.tokens, noisy, 3, layout, rows, position).float()
    target = opdlm.teacher_probs(net, text.tokens, rows, position)
    assert torch.allclose(logits.softmax(-1), target, atol=1e-6)


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if x.block in (2, 4)], ids=str)
def test_noisy_logits_do_not_see_clean_tokens_of_their_block_or_later(tiny, layout):
    net = tiny()
    P = 3
    tokens = prompts(21)
    rows = torch.arange(4)
    position = torch.tensor([7, 8, 9, 10])
    noisy = torch.full((4, RESPONSE), net.mask_id)
    block_start = P + (position - P) // layout.block * layout.block          # (4,)

    def logits(changed):
        """The logits if the clean tokens at `changed` (4, T) are replaced."""
        text = torch.where(changed, (tokens + 1) % EOT, tokens)
        return opdlm.student_logits(net, text, noisy, P, layout, rows, position)

    nowhere = torch.zeros(4, 21, dtype=torch.bool)
    in_block_or_later = torch.arange(21) >= block_start[:, None]
    just_before = torch.arange(21) == block_start[:, None] - 1
    assert torch.allclose(logits(nowhere), logits(in_block_or_later), atol=1e-10, rtol=0)
    assert (logits(nowhere) - logits(just_before)).abs().amax(1).min() > 1e-6


def test_loss_weights_by_hand():
    """A row of 4 + 2 positions, the last of them not in the response; and a row without masks."""
    masked = torch.tensor([[False, True, True, True, True, True], [False] * 6])
    response_mask = torch.tensor([[True] * 5 + [False], [True] * 6])
    mean, first, inverse_t = (weight(masked, response_mask, 4) for weight in opdlm.WEIGHTS.values())
    assert mean.tolist() == [[0, 0.25, 0.25, 0.25, 0.25, 0], [0] * 6]
    assert first[0].tolist() == pytest.approx([0, 8 / 18, 1 / 18, 1 / 18, 8 / 18, 0])
    assert inverse_t[0].tolist() == pytest.approx([0, 4 / 15, 4 / 15, 4 / 15, 1 / 5, 0])
    assert not first[1].any()
    assert not inverse_t[1].any()


def test_where_a_causal_teacher_sees_more_than_the_student():
    """A student that is exact has KL 0 to a causal teacher at the first masked position of a block only.

    At later positions the teacher also sees the tokens before them. `first_masked_x8` rests on this.
    """
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0)).double() ** 2
    joint /= joint.sum()
    p_0 = joint.sum((1, 2))
    p_01 = joint.sum(2)
    student = [p_0, joint.sum((0, 2)), joint.sum((0, 1))]        # it sees no token of the block
    kl = [0.0, 0.0, 0.0]
    for a, b, c in itertools.product(range(3), repeat=3):
        teacher = [p_0, p_01[a] / p_0[a], joint[a, b] / p_01[a, b]]
        for i in range(3):
            loss = opdlm.distill_loss(teacher[i][None], student[i].log()[None])
            kl[i] += joint[a, b, c].item() * loss.item()
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert min(kl[1:]) > 0.01


# step -------------------------------------------------------------------------------------------------

def make_recipe(method="opdlm", layout=Layout(4, 1, 1), **more):
    source, states, target, weight = opdlm.METHODS[method]
    settings = {"batch": 4, "max_prompt": 4, **more}
    return opdlm.Recipe(opdlm.SOURCES[source], opdlm.STATES[states], opdlm.TARGETS[target],
                        opdlm.WEIGHTS[weight], layout, EOT, **settings)


def training_texts(row_ids):
    """Rows of random tokens, among them end-of-text."""
    return (opdlm.uniforms(1, 9, row_ids, (22,)) * 11).long()


def response_length(step):
    return RESPONSE


def train(tiny, steps=10, recipe=None, lr=0.01):
    """The records of a short conversion, the student after it, the teacher."""
    recipe = recipe or make_recipe()
    teacher = tiny()
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr)
    updates = opdlm.train(student, teacher, training_texts, recipe, optimizer, response_length, range(steps))
    return list(updates), student, teacher


def take_rows(text, rows):
    """A part of a rollout."""
    return opdlm.Rollout(text.tokens[rows], text.order[rows], text.response_mask[rows], text.forwards[rows],
                         text.positions[rows])


def test_the_gradient_of_a_batch_is_the_sum_of_its_parts(tiny):
    """Rows without a loss included."""
    teacher = tiny()
    recipe = make_recipe()
    recipe.states = opdlm.random_mask
    text = opdlm.data_text(None, None, training_texts(range(4)), 3, RESPONSE, None, recipe)
    text.response_mask[2] = False
    u = opdlm.uniforms(0, 2, range(4), (21, 2))

    def gradient(rows):
        student = copy.deepcopy(teacher)
        optimizer = torch.optim.SGD(student.parameters(), 0.0)
        opdlm.train_step(student, teacher, take_rows(text, rows), 3, u[rows], recipe, optimizer)
        return [p.grad for p in student.parameters()]

    batch = gradient(slice(None))
    left = gradient(slice(0, 3))
    right = gradient(slice(3, 4))
    for grad, grad_left, grad_right in zip(batch, left, right):
        assert torch.allclose(grad, grad_left + grad_right, atol=1e-7)       # the loss is float32


@pytest.mark.parametrize("method", opdlm.METHODS)
@pytest.mark.parametrize("layout", [Layout(1, 1, 1), Layout(4, 1, 1), Layout(18, 18, 0)], ids=str)
def test_every_method_runs_and_leaves_the_teacher_alone(tiny, method, layout):
    before = list(tiny().parameters())
    records, student, teacher = train(tiny, 2, make_recipe(method, layout))
    for record in records:
        assert math.isfinite(record["loss"])
        assert record["loss_positions"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters()))
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters()))


def test_training_lowers_the_kl(tiny):
    records, *_ = train(tiny, 60, make_recipe(batch=16), lr=0.3)
    kl = [record["kl"] for record in records]
    assert sum(kl[-10:]) < 0.7 * sum(kl[:10])


def test_only_a_full_sequence_model_learns_the_padding(tiny):
    """With a block as long as the text, end-of-text after the first one is text like any other."""
    rows = torch.tensor([[EOT, 1, 2, 3, EOT, 4, 5, 6, EOT], [EOT, 1, 2, 3, 4, 5, 6, 7, 8]])
    full_sequence = replace(make_recipe("sdar"), layout=Layout(9, 9, 0))
    in_blocks = replace(make_recipe("sdar"), layout=Layout(7, 7, 0))
    full = opdlm.data_text(None, None, rows, 2, 7, None, full_sequence)
    blocks = opdlm.data_text(None, None, rows, 2, 7, None, in_blocks)
    assert torch.equal(full.tokens, blocks.tokens)
    assert full.tokens[0].tolist() == [EOT, 1, 2, 3, *[EOT] * 5]
    assert torch.equal(full.response_mask, torch.arange(9).expand(2, 9) >= 2)
    until_eot = [False] * 2 + [True] * 3 + [False] * 4
    assert blocks.response_mask.tolist() == [until_eot, full.response_mask[1].tolist()]


def test_several_updates_per_rollout_take_their_rows_in_turn(tiny):
    """With a learning rate of 0, four updates on one rollout equal four rollouts of a quarter of the rows."""
    shared, *_ = train(tiny, 4, make_recipe(updates_per_rollout=4, max_prompt=1), lr=0.0)
    separate, *_ = train(tiny, 4, make_recipe(updates_per_rollout=1, max_prompt=1), lr=0.0)
    assert [r["kl"] for r in shared] == pytest.approx([r["kl"] for r in separate], rel=1e-5)


@pytest.mark.parametrize("layout", [Layout(4, 1, 1), Layout(4, 4, 0)], ids=str)
def test_a_rollout_at_temperature_0_is_the_greedy_text_of_the_sampler(tiny, layout):
    """Token for token, whatever the random numbers are; the teacher's text alike."""
    student = tiny(seed=1)
    teacher = tiny(seed=2)
    greedy = SamplingConfig(temperature=0)
    recipe = make_recipe(layout=layout, sampling=greedy)
    texts = training_texts(range(4))
    u = opdlm.uniforms(0, opdlm.ROLLOUT, range(4), (3 + RESPONSE, 1))
    other_u = torch.full_like(u, 0.5)
    sources = (
        (opdlm.student_text, Denoiser(student, layout), recipe.rule),
        (opdlm.teacher_text, Denoiser(teacher, AR), reveal.parse("static:1")),
        (opdlm.student_ar_text, Denoiser(student, AR), reveal.parse("static:1")),
    )
    if layout.logit_shift == 0:
        sources = sources[:2]                                    # this student is not an AR model
    for source, denoiser, rule in sources:
        text = source(student, teacher, texts, 3, RESPONSE, u, recipe)
        sampled = opdlm.rollout(denoiser, texts[:, :3], RESPONSE, rule, other_u, EOT, greedy)
        assert torch.equal(text.tokens, sampled.tokens)
        expected_order = sampled.order.clamp(max=0) if source is opdlm.student_ar_text else sampled.order
        assert torch.equal(text.order, expected_order)
        warm = source(student, teacher, texts, 3, RESPONSE, u, replace(recipe, sampling=SamplingConfig()))
        assert not torch.equal(text.tokens, warm.tokens)


def test_text_of_the_student_as_an_ar_model_is_what_speculative_decoding_writes(tiny):
    """Token for token at temperature 0; it is learned from a block of masks, from which drafts are made."""
    student = tiny(seed=1)
    recipe = replace(make_recipe(), source=opdlm.student_ar_text, sampling=SamplingConfig(0))
    texts = training_texts(range(4))
    u = opdlm.uniforms(0, opdlm.ROLLOUT, range(4), (3 + RESPONSE, 3))
    text = opdlm.student_ar_text(student, None, texts, 3, RESPONSE, u, recipe)
    drafted = speculative_decode(student, recipe.layout, texts[:, :3], RESPONSE, u, EOT, recipe.sampling)
    assert torch.equal(text.tokens, drafted.tokens)
    assert torch.equal(text.response_mask, drafted.accepted_in >= 0)
    masked = opdlm.visited(text.order, text.response_mask, u[..., :2], 4)
    assert torch.equal(masked & text.response_mask, text.response_mask)


def test_all_positions_of_a_block_can_be_masked(tiny):
    """On any text: the state `all` is that of the denoising step 0."""
    text = opdlm.data_text(None, None, training_texts(range(4)), 2, RESPONSE, None, make_recipe("sdar"))
    order = torch.where(text.response_mask, 0, -1)
    u = torch.rand(4, order.size(1), 2)
    everything = opdlm.all_masked(text.order, text.response_mask, u, 4)
    first = opdlm.visited(order, text.response_mask, u, 4)
    assert everything.all() and torch.equal(first & text.response_mask, text.response_mask)


def test_the_clean_loss_can_read_other_text_than_the_update(tiny):
    """With clean_source, training text. Two ways to one number: the sum of both losses, each made alone."""
    def clean_part(recipe, clean_source=None):
        with_it = replace(recipe, clean_weight=0.5, clean_source=clean_source)
        (one, *_), (other, *_) = (train(tiny, 1, used)[0] for used in (with_it, recipe))
        return one["loss"] - other["loss"]
    own = replace(make_recipe(), source=opdlm.student_ar_text, target=opdlm.one_hot)
    training_text = make_recipe("sdar")
    from_data = clean_part(own, opdlm.data_text)
    assert from_data == pytest.approx(clean_part(training_text), rel=1e-5)
    assert from_data != pytest.approx(clean_part(own), rel=1e-3)


def test_a_sampled_target_is_what_the_teacher_would_be_sampled_from(tiny):
    """At temperature 0 its most likely token, so that the KL is a cross-entropy; at 1 the teacher itself."""
    losses = {}
    for name, changes in {
        "teacher": {},
        "at 1": {"sampled_target": True},
        "cold": {"sampled_target": True, "sampling": SamplingConfig(0)},
        "by hand": {"sampling": SamplingConfig(0), "target": argmax_of_teacher},
        "top 2": {"sampled_target": True, "sampling": SamplingConfig(top_k=2)},
    }.items():
        recipe = replace(make_recipe("sdar"), **{"target": opdlm.teacher_probs, **changes})
        record = train(tiny, 1, recipe)[0][0]
        losses[name] = record["loss"]
        if name != "by hand":
            assert math.isfinite(record["text_nats"])            # of a text that the target may exclude
    assert losses["at 1"] == losses["teacher"]
    assert losses["cold"] == losses["by hand"]
    assert len({losses["teacher"], losses["cold"], losses["top 2"]}) == 3


def argmax_of_teacher(teacher, tokens, rows, position):
    probs = opdlm.teacher_probs(teacher, tokens, rows, position)
    return F.one_hot(probs.argmax(-1), probs.size(-1)).to(probs)


def test_text_for_the_clean_loss_needs_its_weight():
    with pytest.raises(ValueError, match="--clean_text=data is the text of the loss of --clean_weight"):
        replace(make_recipe(), clean_source=opdlm.data_text)


def test_text_of_the_student_as_an_ar_model_needs_one():
    with pytest.raises(ValueError, match="--source=student-ar needs --align=ar --context=causal"):
        replace(make_recipe("opdlm"), source=opdlm.student_ar_text, layout=Layout(4, 4, 1))


def test_steps_continue_where_they_stopped(tiny):
    at_once, *_ = train(tiny, 6)
    teacher = tiny()
    student = copy.deepcopy(teacher)
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    in_parts = []
    for steps in (range(0, 2), range(2, 6)):
        in_parts += opdlm.train(student, teacher, training_texts, make_recipe(), optimizer, response_length,
                                steps)
    assert [r["loss"] for r in in_parts] == [r["loss"] for r in at_once]


def test_the_clean_weight_adds_the_loss_of_the_student_as_an_ar_model(tiny):
    """The loss with it minus the loss without it is that of a plain causal pass: a mean over each row."""
    student = tiny(seed=1)
    teacher = tiny(seed=2)
    recipe = make_recipe("opdlm", Layout(4, 1, 1))
    u_rollout = opdlm.uniforms(0, 1, range(4), (21, 1))
    u_state = opdlm.uniforms(0, 2, range(4), (21, 2))
    text = opdlm.student_text(student, teacher, prompts(3), 3, RESPONSE, u_rollout, recipe)
    records = {}
    for weight in (0.0, 0.5):
        optimizer = torch.optim.SGD(student.parameters(), 0.0)
        weighted = replace(recipe, clean_weight=weight)
        net = copy.deepcopy(student)
        records[weight] = opdlm.train_step(net, teacher, text, 3, u_state, weighted, optimizer)

    response_mask = text.response_mask[:, 3:]
    of_student = student(text.tokens).view(4, 21, -1)[:, 2:-1].log_softmax(-1)
    of_teacher = teacher(text.tokens).view(4, 21, -1)[:, 2:-1].log_softmax(-1)
    kl = (of_teacher.exp() * (of_teacher - of_student)).sum(-1) * response_mask      # (B, R)
    clean_loss = (kl.sum(1) / response_mask.sum(1)).sum() / recipe.batch
    difference = records[0.5]["loss"] - records[0.0]["loss"]
    assert difference == pytest.approx(0.5 * clean_loss.item(), rel=1e-6)
    in_loss = int((recipe.states(text.order[:, 3:], response_mask, u_state[:, 3:], 4) & response_mask).sum())
    assert 0 < in_loss < response_mask.sum()
    assert records[0.0]["loss_positions"] == in_loss
    assert records[0.5]["loss_positions"] == in_loss + response_mask.sum()
    for name in ("kl", "text_nats", "masked", "tokens"):
        assert records[0.5][name] == records[0.0][name]


def test_the_clean_weight_needs_a_student_that_is_an_ar_model():
    with pytest.raises(ValueError, match="--align=ar --context=causal"):
        replace(make_recipe("opdlm"), layout=Layout(4, 4, 1), clean_weight=0.1)


def test_visited_states_need_text_of_the_student():
    with pytest.raises(ValueError, match="states=visited needs source=student"):
        replace(make_recipe("sdar"), states=opdlm.visited)


# golden losses ----------------------------------------------------------------------------------------

GOLDEN_RECIPES = {name: make_recipe(name) for name in opdlm.METHODS}
GOLDEN_RECIPES["default"] = replace(
    make_recipe("opdlm"), source=opdlm.data_text, states=opdlm.prefix_shown, weight=opdlm.first_masked_x8)
GOLDEN_RECIPES["wired as the paper"] = make_recipe(
    "opdlm", Layout(4, 4, 0), rule=reveal.parse("threshold:0.9", "drawn"))

GOLDEN_LOSSES = {
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


@pytest.mark.parametrize("name", GOLDEN_LOSSES)
def test_golden_losses(tiny, name):
    """The first ten losses in float64. A change of the mathematics changes them; no other change may."""
    records, *_ = train(tiny, 10, GOLDEN_RECIPES[name])
    assert [record["loss"] for record in records] == pytest.approx(GOLDEN_LOSSES[name], rel=1e-5)
