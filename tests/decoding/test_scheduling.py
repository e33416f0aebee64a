import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opdlm
from decoding import reveal, scheduling
from decoding.denoiser import Denoiser
from decoding.sampling import uniforms
from decoding.scheduling import (
    ScheduledDenoiser,
    bound_gap,
    derive_schedule,
    importance_curves,
    light_model_costs,
    pad_to_length,
    parse_schedule,
    sample_masks,
    schedule_from_steps,
)
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from unmasking.policy import Policy, PolicyConfig, PolicyRule

EOT = 10
P = 3
R = 14
LAYOUTS = [Layout(block, context, shift)
           for block in (2, 4, 17) for context in sorted({1, block}) for shift in (0, 1)]
RULES = ("static:1", "threshold:0.3", "leftmost:0.4", "ancestral:40", "random:2", "factor:1", "eb:0.5",
         "policy")
POLICY = Policy(PolicyConfig(17, 16)).init_weights(torch.Generator().manual_seed(0))


def network(layers, seed, vocab=11, context=24):
    """A random network in float64, with weights so large that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    net = GPT(GPTConfig(vocab, context, layers, 2, 16)).double().init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.requires_grad_(False)


NETS = {"H": network(3, seed=3), "L": network(1, seed=1)}


def generate(denoiser, spec, rows=12):
    rule = PolicyRule(POLICY) if spec == "policy" else reveal.parse(spec)
    prompt = torch.randint(0, EOT, (rows, P), generator=torch.Generator().manual_seed(rows))
    u = uniforms(0, 0, range(rows), (P + R, rule.numbers(denoiser.layout.block)))
    prompt_len = 1 + torch.arange(rows) % P
    return opdlm.rollout(denoiser, prompt, R, rule, u, EOT, prompt_len=prompt_len)


# the denoiser -------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_model_at_all_steps_is_that_model(layout, spec):
    for name, net in NETS.items():
        alone = generate(Denoiser(net, layout), spec)
        for plan in (f"{name}9", f"{name}1,{name}40", f"mask:1-0.5={name},0.5-0={name}"):
            text = generate(ScheduledDenoiser(NETS, layout, parse_schedule(plan)), spec)
            for field in vars(alone):
                assert torch.equal(getattr(text, field), getattr(alone, field)), (plan, field)


class RecordingDenoiser(Denoiser):
    """Keeps the arguments of each call, and the logits that it returned."""

    def reset(self, prompt_len, end):
        super().reset(prompt_len, end)
        self.calls = []

    def __call__(self, tokens, start, masked, rows=None):
        logits = super().__call__(tokens, start, masked, rows)
        returned = None if logits is None else logits.clone()
        self.calls.append((tokens.clone(), start.clone(), rows, returned))
        return logits


@pytest.mark.parametrize("plan", ["L1,H1", "H1,L1,H20", "mask:1-0.6=L,0.6-0.3=H,0.3-0=L",
                                  "mask:1-0.5=H,0.5-0=L"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_model_reads_exactly_what_all_have_generated(layout, plan, monkeypatch):
    """At every state in which a model takes a step, its logits are those of its own training pass."""
    monkeypatch.setattr(scheduling, "Denoiser", RecordingDenoiser)
    scheduled = ScheduledDenoiser(NETS, layout, parse_schedule(plan))
    text = generate(scheduled, "threshold:0.35")
    compared = dict.fromkeys(scheduled.denoisers, 0)
    for name, denoiser in scheduled.denoisers.items():
        for tokens, start, rows, logits in denoiser.calls:
            for row in rows.nonzero()[:, 0].tolist():
                end = int(scheduled.end[row])
                begin = end - R
                block_start = int(start[row])
                block = list(range(block_start, min(block_start + layout.block, end)))
                masked = [i for i in block if tokens[row, i] == scheduled.mask_id]
                position = torch.tensor(masked, dtype=torch.long)
                clean = text.tokens[row:row + 1, :end]
                noisy = text.tokens[row:row + 1, begin:end].clone()
                noisy[0, [i - begin for i in block]] = tokens[row, block]
                expected = opdlm.student_logits(NETS[name], clean, noisy, begin, layout,
                                                torch.zeros_like(position), position)
                if len(position):
                    found = logits[row, position - block_start]
                    assert torch.allclose(expected, found, atol=1e-10, rtol=0)
                compared[name] += len(position)
    assert min(compared.values()) > 10


def test_each_model_pays_for_reading_what_was_finished():
    """Block 4, two tokens per step: L takes the first step of a block, H the second. Each of them processes
    the prompt once, each finished block once, and the 4 positions of a block at each of its steps."""
    layout = Layout(4, 1, 0)
    rows = 3
    scheduled = ScheduledDenoiser(NETS, layout, parse_schedule("L1,H1"))
    prompt = torch.zeros(rows, 5, dtype=torch.long)
    u = uniforms(0, 0, range(rows), (17, 1))
    text = opdlm.rollout(scheduled, prompt, 12, reveal.parse("static:2"), u, eot=-1)
    for denoiser in scheduled.denoisers.values():
        assert denoiser.forwards.tolist() == [3] * rows
        assert denoiser.positions.tolist() == [5 + 2 * 4 + 3 * 4] * rows
    assert text.forwards.tolist() == [6] * rows
    assert text.positions.tolist() == [50] * rows


def test_a_model_that_is_never_needed_costs_nothing():
    """Blocks take one step, so L has no part in them, also not for rows that are finished."""
    layout = Layout(4, 1, 1)
    scheduled = ScheduledDenoiser(NETS, layout, parse_schedule("mask:1-0.5=H,0.5-0=L"))
    text = generate(scheduled, "static:4")
    alone = generate(Denoiser(NETS["H"], layout), "static:4")
    assert torch.equal(text.tokens, alone.tokens)
    assert scheduled.denoisers["L"].forwards.sum() == 0


class RecomputingDenoiser(Denoiser):
    """Makes a forward pass at each step, also if nothing has changed."""

    def __call__(self, tokens, start, masked, rows=None):
        self.masked = ~masked
        return super().__call__(tokens, start, masked, rows)


@settings(max_examples=30)
@given(spec=st.sampled_from(["ancestral:3", "ancestral:17", "ancestral:60"]), seed=st.integers(0, 99),
       block=st.sampled_from([4, 17]), shift=st.integers(0, 1))
def test_a_pass_that_changes_nothing_is_skipped_without_effect(spec, seed, block, shift):
    """After a step that reveals nothing, the same logits are used again, and the text is the same."""
    layout = Layout(block, block, shift)
    rule = reveal.parse(spec)
    prompt = torch.zeros(4, 2, dtype=torch.long)
    u = uniforms(seed, 0, range(4), (2 + R, rule.numbers(block)))
    skipping = opdlm.rollout(Denoiser(NETS["H"], layout), prompt, R, rule, u, -1)
    recomputing = opdlm.rollout(RecomputingDenoiser(NETS["H"], layout), prompt, R, rule, u, -1)
    assert torch.equal(skipping.tokens, recomputing.tokens)
    assert torch.equal(skipping.order, recomputing.order)
    for row in range(4):
        blocks = skipping.order[row, 2:].split(block)
        steps = sum(len(order.unique()) for order in blocks)  # steps that revealed something
        assert skipping.forwards[row] <= min(steps, int(recomputing.forwards[row]))
        assert shift or skipping.forwards[row] == steps


# schedules ----------------------------------------------------------------------------------------

def test_schedules_by_hand():
    by_step = parse_schedule("L2,H3,L1")
    by_mask = parse_schedule("mask:1.0-0.8=L,0.8-0.2=H,0.2-0=L")
    assert by_step.steps() == ["L", "L", "H", "H", "H", "L"]
    assert by_step.names == by_mask.names == ["H", "L"]
    step = torch.tensor([0, 1, 2, 4, 5, 9])
    share = torch.tensor([1.0, 0.81, 0.8, 0.25, 0.2, 0.1])
    for plan in (by_step, by_mask):
        assert [plan.parts[i][0] for i in plan(step, share).tolist()] == list("LLHHLL")
    assert schedule_from_steps([True, True, False, True]) == parse_schedule("L2,H1,L1")


def test_a_derived_schedule_takes_the_cheapest_steps():
    """Eight steps at t = 1, 7/8, ..., 1/8. The cost of a light step rises with t or is least halfway."""
    rising = {"t": [0.125, 0.375, 0.625, 0.875], "kl": [0.0, 1.0, 2.0, 3.0]}
    assert derive_schedule(rising, 8, 0.25) == parse_schedule("H6,L2")
    hollow = {"t": [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12], "kl": [3.0, 1.0, 0.0, 0.0, 1.0, 3.0]}
    assert derive_schedule(hollow, 8, 0.375) == parse_schedule("H3,L3,H2")
    peak = {"t": [0.2, 0.5, 0.8], "kl": [1.0, 5.0, 2.0]}
    for share in (0, 0.25, 0.5, 1):
        assert derive_schedule(peak, 16, share).steps().count("L") == 16 * share
    free_start = {"t": [0.2, 0.8, 1.0], "kl": [1.0, 5.0, 0.0]}
    assert derive_schedule(free_start, 4, 0.25) == parse_schedule("L1,H3")


@pytest.mark.parametrize("spec", ["", "fast", "L4;H4", "l4,H4", "L,H", "mask:1-0.5=L", "mask:1-0.5=L,0.4-0=H",
                                  "mask:", "mask:0.5-0=L,1-0.5=H", "mask:1-1=L,1-0=H", "mask:1..0-0=L"])
def test_invalid_schedules(spec):
    with pytest.raises(ValueError, match=f"^--schedule={spec}: expected steps"):
        parse_schedule(spec)


def test_unknown_models_and_different_vocabularies():
    with pytest.raises(ValueError, match="--schedule=X4,H4 names a model X: expected H or L"):
        parse_schedule("X4,H4")
    nets = {"H": NETS["H"], "L": network(1, seed=1, vocab=12)}
    expected = r"one vocabulary .* H has 11 tokens, \[MASK\] is 11, L has 12 tokens"
    with pytest.raises(ValueError, match=expected):
        ScheduledDenoiser(nets, LAYOUTS[0], parse_schedule("H1,L1"))


# what a light step costs, measured: texts of five tokens from a vocabulary of five --------------------

END = 4
STORY = torch.tensor([END, 1, 3, 0, END])
HEAVY = network(2, seed=1, vocab=5, context=8)
LIGHT = network(2, seed=2, vocab=5, context=8)


def nats(net, known, position):
    """-log p of STORY[position] if only the first token and those at `known` are seen, from a plain pass with
    attention in both directions, except that the first token sees only itself."""
    tokens = torch.full((1, 5), net.mask_id)
    tokens[0, [0, *known]] = STORY[[0, *known]]
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[0, 1:] = False
    logits = net(tokens, mask, torch.arange(5)).float().view(5, -1)
    return -logits.log_softmax(-1)[position, STORY[position]].item()


def any_order_nats(net):
    """Nats per token of the story: the mean over all 24 orders in which its tokens may be revealed."""
    orders = list(itertools.permutations(range(1, 5)))
    total = sum(nats(net, order[:k], order[k]) for order in orders for k in range(4))
    return total / len(orders) / 4


def test_the_mean_over_all_states_is_the_gap_of_the_bounds():
    """All 15 states of 4 tokens, equally many for each n, against all orders of revealing one at a time."""
    mean = 0
    for n in range(1, 5):
        subsets = itertools.combinations(range(4), n)
        masked = torch.tensor([[i in subset for i in range(4)] for subset in subsets])
        ce, _ = light_model_costs(HEAVY, LIGHT, STORY.expand(len(masked), 5), masked)
        mean += ce.mean().item() / 4
    assert mean == pytest.approx(any_order_nats(LIGHT) - any_order_nats(HEAVY), abs=1e-6)


class ConstantNet:
    """A network of two tokens that predicts the same distribution at every position."""
    mask_id = 2

    def __init__(self, *probs):
        self.log_probs = torch.tensor(probs).log()

    def __call__(self, tokens, mask, position, read):
        return self.log_probs.expand(len(read), 2)


def test_the_costs_of_a_light_step_by_hand():
    """The heavy model expects 3/4, 1/4, the light one 1/2, 1/2. KL is KL(heavy || light)."""
    heavy = ConstantNet(0.75, 0.25)
    light = ConstantNet(0.5, 0.5)
    tokens = torch.tensor([[0, 0, 1, 0], [0, 1, 0, 0]])
    masked = torch.tensor([[True, True, True], [True, False, False]])
    ce, kl = light_model_costs(heavy, light, tokens, masked)
    of_token_0 = math.log(0.75 / 0.5)
    of_token_1 = math.log(0.25 / 0.5)
    heavy_light = 0.75 * of_token_0 + 0.25 * of_token_1          # 0.131; KL(light || heavy) is 0.144
    assert kl.tolist() == pytest.approx([heavy_light, heavy_light], abs=1e-6)
    assert ce.tolist() == pytest.approx([(2 * of_token_0 + of_token_1) / 3, of_token_1], abs=1e-6)


def test_the_curves_and_the_gap_are_estimates_of_it():
    expected = any_order_nats(LIGHT) - any_order_nats(HEAVY)
    stories = [STORY] * 1500
    curves = importance_curves(HEAVY, LIGHT, stories, 5, END, stretches=4)
    gap = bound_gap(HEAVY, LIGHT, stories, 5, END, draws=4, seed=9)
    error = math.hypot(*curves["ce_error"][:4]) / 4
    assert abs(sum(curves["ce"][:4]) / 4 - expected) < 4 * error < 0.1
    assert abs(gap["nats"] - expected) < 4 * gap["error"] < 0.1
    assert min(curves["kl"]) > 0


def test_all_masked_is_one_state():
    """With four stretches of four tokens it is the only state of the last one; with two, the point t = 1."""
    fine = importance_curves(HEAVY, LIGHT, [STORY] * 3, 5, END, stretches=4)
    coarse = importance_curves(HEAVY, LIGHT, [STORY] * 3, 5, END, stretches=2)
    by_hand = sum(nats(LIGHT, (), i) - nats(HEAVY, (), i) for i in range(1, 5)) / 4
    assert fine["t"] == [0.125, 0.375, 0.625, 0.875, 1]
    assert coarse["t"] == [0.25, 0.75, 1]
    for curves, k in ((fine, 3), (coarse, 2)):
        assert curves["ce"][k] == pytest.approx(by_hand, abs=1e-6)
        assert curves["ce_error"][k] == pytest.approx(0, abs=1e-12)


def test_costs_of_rows_do_not_depend_on_their_batch():
    tokens = STORY.expand(5, 5)
    whole = scheduling.costs_in_stretch(HEAVY, LIGHT, tokens, (0.2, 0.9), 7, seed=0, batch=64)
    parts = scheduling.costs_in_stretch(HEAVY, LIGHT, tokens, (0.2, 0.9), 7, seed=0, batch=2)
    for costs, costs_in_parts in zip(whole, parts):
        assert len(costs) == 5 and torch.allclose(costs, costs_in_parts)


def test_a_model_costs_nothing_against_itself():
    curves = importance_curves(HEAVY, HEAVY, [STORY] * 5, 5, END, stretches=3)
    assert set(curves["ce"] + curves["kl"]) == {0.0}


def test_states_have_their_share_masked_and_all_positions_equally_often():
    for k in range(4):
        masked = sample_masks(range(4000), 8, (k / 4, (k + 1) / 4), seed=0)
        assert masked.sum(1).unique().tolist() == [2 * k + 1, 2 * k + 2]
        assert (masked.float().mean(0) - (2 * k + 1.5) / 8).abs().max() < 0.03


def test_texts_are_padded_and_cut():
    assert pad_to_length([STORY, STORY[:2]], 4, END).tolist() == [[END, 1, 3, 0], [END, 1, END, END]]
    assert pad_to_length([STORY], 7, END).tolist() == [[END, 1, 3, 0, END, END, END]]


CURVES = {"t": [0.25, 0.5, 1.0], "kl": [0.1, 0.2, 0.3]}
BAD_CURVES = ["", "[", "[" * 200_000, "[]", "5", "{}", json.dumps({**CURVES, "t": 5}),
              json.dumps({**CURVES, "t": [1, 0.5, 0.25]}), json.dumps({**CURVES, "t": [0.25, 0.5]}),
              json.dumps({**CURVES, "kl": [0.1, float("nan"), 0.3]}),
              json.dumps({**CURVES, "kl": ["a", 1, 2]}),
              json.dumps({"t": [0.0, 0.6, 0.5, 1.0], "kl": [0.1, 0.2, 0.3, 0.4]}),
              json.dumps({"t": [1], "kl": [1]}), json.dumps({**CURVES, "kl": [0.1, 10 ** 400, 0.3]}),
              json.dumps({**CURVES, "kl": [[0.1], 0.2, 0.3]}), '{"t": [0, 1], "t": [0, 0.5], "kl": [1, 2]}']


@pytest.mark.parametrize("content", BAD_CURVES, ids=range(len(BAD_CURVES)))
def test_measured_costs_that_cannot_be_used_are_one_sentence(tmp_path, content):
    rule = reveal.parse("ancestral:4")
    (tmp_path / scheduling.IMPORTANCE_FILE).write_text(json.dumps(CURVES), encoding="utf-8-sig")
    assert scheduling.load_schedule("auto:0.5", tmp_path, rule).names == ["H", "L"]
    (tmp_path / scheduling.IMPORTANCE_FILE).write_text(content)
    with pytest.raises(ValueError, match="importance.json.*measure them again") as caught:
        scheduling.load_schedule("auto:0.5", tmp_path, rule)
    assert "\n" not in str(caught.value)
