import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import opdlm
from decoding import reveal
from decoding import scheduling as schedule
from decoding.denoiser import Denoiser
from decoding.sampling import uniforms
from decoding.scheduling import ScheduledDenoiser, derived, parse, placed
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from unmasking.policy import Policy, PolicyConfig, PolicyRule

EOT, P, R = 10, 3, 14
LAYOUTS = [Layout(block, clean, shift) for block in (2, 4, 17) for clean in sorted({1, block}) for shift in (0, 1)]
RULES = ("static:1", "threshold:0.3", "leftmost:0.4", "ancestral:40", "random:2", "factor:1", "eb:0.5", "policy")
POLICY = Policy(PolicyConfig(17, 16)).init_weights(torch.Generator().manual_seed(0))


def network(layers, vocab=11):
    """Loud and random."""
    generator = torch.Generator().manual_seed(layers)
    net = GPT(GPTConfig(vocab, 24, layers, 2, 16)).double().init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.requires_grad_(False)


NETS = {"H": network(3), "L": network(1)}


def write(denoiser, spec, rows=12):
    rule = PolicyRule(POLICY) if spec == "policy" else reveal.parse(spec)
    prompt = torch.randint(0, EOT, (rows, P), generator=torch.Generator().manual_seed(rows))
    u = uniforms(0, 0, range(rows), (P + R, rule.numbers(denoiser.layout.block)))
    lens = 1 + torch.arange(rows) % P
    return opdlm.rollout(denoiser, prompt, R, rule, u, EOT, prompt_len=lens)


class Spy(Denoiser):
    """Keeps each state and what it was answered with, if it was asked."""
    def reset(self, prompt, end):
        super().reset(prompt, end)
        self.seen = []

    def __call__(self, tokens, start, masked, asked=None):
        logits = super().__call__(tokens, start, masked, asked)
        self.seen.append((tokens.clone(), start.clone(), asked, None if logits is None else logits.clone()))
        return logits


@pytest.mark.parametrize("spec", RULES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_model_at_all_steps_is_that_model(layout, spec):
    for name, net in NETS.items():
        alone = write(Denoiser(net, layout), spec)
        for plan in (f"{name}9", f"{name}1,{name}40", f"mask:1-0.5={name},0.5-0={name}"):
            text = write(ScheduledDenoiser(NETS, layout, parse(plan)), spec)
            for what in vars(alone):
                assert torch.equal(getattr(text, what), getattr(alone, what)), (plan, what)


@pytest.mark.parametrize("plan", ["L1,H1", "H1,L1,H20", "mask:1-0.6=L,0.6-0.3=H,0.3-0=L", "mask:1-0.5=H,0.5-0=L"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_model_reads_exactly_what_all_have_written(layout, plan, monkeypatch):
    """Its logits at every state it was asked about are those of its own training pass there."""
    monkeypatch.setattr(schedule, "Denoiser", Spy)
    both = ScheduledDenoiser(NETS, layout, parse(plan))
    text = write(both, "threshold:0.35")
    compared = dict.fromkeys(both.denoisers, 0)
    for name, spy in both.denoisers.items():
        for tokens, start, asked, logits in spy.seen:
            for row in asked.nonzero()[:, 0].tolist():
                begin, end = int(both.end[row]) - R, int(both.end[row])
                block = range(int(start[row]), min(int(start[row]) + layout.block, end))
                at = torch.tensor([i for i in block if tokens[row, i] == both.mask_id], dtype=torch.long)
                noisy = text.tokens[row:row + 1, begin:end].clone()
                noisy[0, [i - begin for i in block]] = tokens[row, list(block)]
                again = opdlm.student_logits(NETS[name], text.tokens[row:row + 1, :end], noisy, begin, layout,
                                             torch.zeros_like(at), at)
                if len(at):
                    assert torch.allclose(again, logits[row, at - block.start], atol=1e-10, rtol=0)
                compared[name] += len(at)
    assert min(compared.values()) > 10


def test_each_model_asked_writes_what_was_finished_and_pays_for_it():
    """Block 4, two a step: the first step of a block is L's, the second H's. Both push the prompt once, then each block
    that is finished, and at each step the 4 slots."""
    layout, rows = Layout(4, 1, 0), 3
    both = ScheduledDenoiser(NETS, layout, parse("L1,H1"))
    prompt, rule = torch.zeros(rows, 5, dtype=torch.long), reveal.parse("static:2")
    text = opdlm.rollout(both, prompt, 12, rule, uniforms(0, 0, range(rows), (17, 1)), eot=-1)
    for denoiser in both.denoisers.values():
        assert denoiser.forwards.tolist() == [3] * rows
        assert denoiser.positions.tolist() == [5 + 2 * 4 + 3 * 4] * rows
    assert text.forwards.tolist() == [6] * rows and text.positions.tolist() == [50] * rows


def test_a_model_that_is_never_needed_costs_nothing():
    """Blocks are written in one step, so that L has no part in them; rows that have finished ask nobody."""
    layout = Layout(4, 1, 1)
    both = ScheduledDenoiser(NETS, layout, parse("mask:1-0.5=H,0.5-0=L"))
    text, alone = write(both, "static:4"), write(Denoiser(NETS["H"], layout), "static:4")
    assert torch.equal(text.tokens, alone.tokens) and both.denoisers["L"].forwards.sum() == 0


@settings(max_examples=30)
@given(spec=st.sampled_from(["ancestral:3", "ancestral:17", "ancestral:60"]), seed=st.integers(0, 99),
       block=st.sampled_from([4, 17]), shift=st.integers(0, 1))
def test_a_pass_that_changes_nothing_is_not_made_and_not_missed(spec, seed, block, shift):
    """A step that revealed nothing leaves the state as it was: its logits are used again, the text is the same."""
    class Forgetful(Denoiser):
        def __call__(self, tokens, start, masked, asked=None):
            self.masked = ~masked
            return super().__call__(tokens, start, masked, asked)
    layout, rule = Layout(block, block, shift), reveal.parse(spec)
    prompt, u = torch.zeros(4, 2, dtype=torch.long), uniforms(seed, 0, range(4), (2 + R, rule.numbers(block)))
    kept, made = (opdlm.rollout(one(NETS["H"], layout), prompt, R, rule, u, -1) for one in (Denoiser, Forgetful))
    assert torch.equal(kept.tokens, made.tokens) and torch.equal(kept.order, made.order)
    for row in range(4):
        steps = sum(len(part.unique()) for part in kept.order[row, 2:].split(block))    # that revealed something
        assert kept.forwards[row] <= min(steps, int(made.forwards[row])) and (shift or kept.forwards[row] == steps)


def test_schedules_by_hand():
    by_step, by_mask = parse("L2,H3,L1"), parse("mask:1.0-0.8=L,0.8-0.2=H,0.2-0=L")
    assert by_step.steps() == ["L", "L", "H", "H", "H", "L"] and by_step.names == by_mask.names == ["H", "L"]
    step, share = torch.tensor([0, 1, 2, 4, 5, 9]), torch.tensor([1.0, 0.81, 0.8, 0.25, 0.2, 0.1])
    said = [[plan.parts[i][0] for i in plan(step, share).tolist()] for plan in (by_step, by_mask)]
    assert said == [list("LLHHLL"), list("LLHHLL")]
    assert placed([True, True, False, True]) == parse("L2,H1,L1")


def test_a_derived_schedule_takes_the_cheapest_steps():
    """Eight steps at t = 1, 7/8, ..., 1/8; what a light step costs rises from t = 0 on, or is least in the middle."""
    assert derived({"t": [0.125, 0.375, 0.625, 0.875], "kl": [0.0, 1.0, 2.0, 3.0]}, 8, 0.25) == parse("H6,L2")
    hollow = {"t": [1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12], "kl": [3.0, 1.0, 0.0, 0.0, 1.0, 3.0]}
    assert derived(hollow, 8, 0.375) == parse("H3,L3,H2")
    for share in (0, 0.25, 0.5, 1):
        assert derived({"t": [0.2, 0.5, 0.8], "kl": [1.0, 5.0, 2.0]}, 16, share).steps().count("L") == 16 * share
    assert derived({"t": [0.2, 0.8, 1.0], "kl": [1.0, 5.0, 0.0]}, 4, 0.25) == parse("L1,H3")


@pytest.mark.parametrize("spec", ["", "fast", "L4;H4", "l4,H4", "L,H", "mask:1-0.5=L", "mask:1-0.5=L,0.4-0=H", "mask:",
                                  "mask:0.5-0=L,1-0.5=H", "mask:1-1=L,1-0=H", "mask:1..0-0=L"])
def test_schedules_that_are_none(spec):
    with pytest.raises(ValueError, match=f"^--schedule={spec}: write steps"):
        parse(spec)


def test_models_that_are_not_there_or_speak_of_other_tokens():
    with pytest.raises(ValueError, match="--schedule=X4,H4 names a model X: there are H, L"):
        parse("X4,H4")
    with pytest.raises(ValueError, match=r"one vocabulary .* H has 11 tokens, \[MASK\] is 11, L has 12 tokens"):
        ScheduledDenoiser({"H": NETS["H"], "L": network(1, 12)}, LAYOUTS[0], parse("H1,L1"))
