"""The unmasking policy, the reveal rules made of it, and its training: invariants."""
import itertools
import json
import os

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, uniforms
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from unmasking import policy as policy_module
from unmasking.grpo import (
    DAGGER_START,
    IMITATION_EPOCHS,
    IMITATION_MINIBATCHES,
    RecordingRule,
    Settings,
    Trajectory,
    additive,
    grpo_update,
    imitate,
    imitation_update,
    mixture,
    reward,
    scale_logits,
    surrogate,
    train,
)
from unmasking.policy import Policy, PolicyConfig, PolicyRule, WindowRule, load_policy, save_policy

EOT = 10
GREEDY = SamplingConfig(temperature=0)


def make_policy(block=4, width=16, seed=0, scale=1.0):
    """A random policy. Layers that are zero at first have random weights of this scale."""
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(PolicyConfig(block, width)).init_weights(generator)
    with torch.no_grad():
        for layer in (policy.modulate, policy.head):
            layer.weight.normal_(0, scale * width ** -0.5, generator=generator)
    return policy


@pytest.fixture(scope="module")
def net():
    generator = torch.Generator().manual_seed(3)
    net = GPT(GPTConfig(11, 24, 2, 2, 16)).init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return net.requires_grad_(False)


def generate(net, rule, layout=Layout(4, 1, 1), rows=6, R=14, eot=EOT, seed=0):
    prompt = torch.randint(0, EOT, (rows, 2), generator=torch.Generator().manual_seed(1))
    u = uniforms(seed, 0, range(rows), (2 + R, rule.numbers(layout.block)))
    return opdlm.rollout(Denoiser(net, layout), prompt, R, rule, u, eot, GREEDY)


class FixedPolicy:
    """A policy whose logits are a given function of its inputs."""
    config = PolicyConfig(4)

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, confidence, masked, time):
        return self.logits(confidence, masked, time)


# the rule ------------------------------------------------------------------------------------------------

def test_the_paper_s_size_has_the_paper_s_parameters():
    assert sum(p.numel() for p in Policy(PolicyConfig(32, width=128)).parameters()) == 331_265


def test_a_policy_that_reveals_above_a_confidence_is_the_threshold_rule(net):
    for level in (0.2, 0.35, 0.5, 0.9):
        def logits(confidence, masked, time, level=level):
            return (confidence - level) * 1e9
        for layout in (Layout(4, 1, 1), Layout(4, 4, 0)):
            ours = generate(net, PolicyRule(FixedPolicy(logits)), layout)
            expected = generate(net, reveal.parse(f"threshold:{level}"), layout)
            for field in vars(ours):
                assert torch.equal(getattr(ours, field), getattr(expected, field))


def test_with_zero_weights_masks_are_revealed_at_the_rate_of_the_bias():
    policy = Policy(PolicyConfig(8, 16)).init_weights(torch.Generator())
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
        policy.head.bias.fill_(-0.7)
    masked = torch.ones(20_000, 8, dtype=torch.bool)
    u = torch.rand(20_000, 8, 9, generator=torch.Generator().manual_seed(0))
    for beta in (1.0, 0.5):
        rule = PolicyRule(policy, beta, explore=True)
        revealed = rule(torch.rand(20_000, 8), masked, torch.zeros(20_000).long(), u).float()
        rate = beta * torch.sigmoid(torch.tensor(-0.7))
        assert (revealed.mean(0) - rate).abs().max() < 4 * (rate * (1 - rate) / 20_000).sqrt()
        assert torch.corrcoef(revealed.T).fill_diagonal_(0).abs().max() < 0.03      # slots are independent


@pytest.mark.parametrize("explore", [False, True])
def test_every_step_uses_random_numbers_of_its_own(explore):
    """At each step half of the slots that are still masked are revealed. If the numbers of two steps were the
    same, a slot that was not revealed at the first of them would not be revealed at the second."""
    rows = 20_000
    rule = PolicyRule(FixedPolicy(lambda confidence, masked, time: torch.zeros_like(confidence)),
                      explore=explore)
    u = torch.rand(rows, 8, rule.numbers(8), generator=torch.Generator().manual_seed(0))
    masked = torch.ones(rows, 8, dtype=torch.bool)
    for step in range(4):
        revealed = rule(torch.rand(rows, 8), masked, torch.full((rows,), step), u)
        num_masked = masked.sum().item()
        share = revealed.sum().item() / num_masked
        forced = 0 if explore else (0.5 ** masked.sum(1))[masked.any(1)].sum().item() / num_masked
        assert share == pytest.approx(0.5 + forced, abs=4 * 0.5 / num_masked ** 0.5)
        masked = masked & ~revealed


def test_the_confidence_of_a_revealed_slot_is_ignored():
    """It is that of an earlier step. The confidence of a masked slot is not ignored."""
    generator = torch.Generator().manual_seed(0)
    policy = make_policy()
    confidence = torch.rand(40, 4, generator=generator)
    other = torch.rand(40, 4, generator=generator)
    masked = torch.rand(40, 4, generator=generator) < 0.5
    time = torch.rand(40, generator=generator)
    logits = policy(confidence, masked, time)
    assert torch.equal(policy(torch.where(masked, confidence, other), masked, time), logits)
    moved = (policy(torch.where(masked, other, confidence), masked, time) != logits).any(1)
    assert torch.equal(moved, masked.any(1))


def test_the_initial_bias_leaves_one_slot_in_a_hundred_masked():
    for block, bias in ((4, 0.77), (8, -0.25), (16, -1.1), (32, -1.87), (64, -2.6)):
        initial = PolicyConfig(block).initial_bias
        assert initial == pytest.approx(bias, abs=0.01)
        assert (1 - 1 / (1 + 2.718281828 ** -initial)) ** block == pytest.approx(0.01)


def test_a_policy_that_reveals_nothing_still_generates_its_text(net):
    """One slot per step, the most likely one first; while it explores, all at the last step of the block."""
    silent = make_policy(scale=0.0)
    with torch.no_grad():
        silent.head.bias.fill_(-60)
    for explore in (False, True):
        text = generate(net, PolicyRule(silent, explore=explore), Layout(4, 4, 0), eot=-1)
        assert (text.tokens != net.mask_id).all() and text.response_mask.sum() == 6 * 14
        for row in text.order[:, 2:]:
            if explore:
                assert row.tolist() == [3] * 14
            else:
                assert sorted(row.tolist()) == sorted([0, 1, 2, 3] * 3 + [0, 1])


def test_windows_inside_a_block_are_finished_from_left_to_right(net):
    """A full-sequence model with a rule that sees only the leftmost window with a mask."""
    layout = Layout(16, 16, 0)
    text = generate(net, WindowRule(reveal.parse("threshold:0.3"), 5), layout, eot=-1)
    for row in text.order[:, 2:]:
        parts = row.split(5)
        assert all(a.max() < b.min() for a, b in zip(parts, parts[1:]))
    static = reveal.parse("static:2")
    in_window = generate(net, WindowRule(static, 16), layout)
    plain = generate(net, static, layout)
    assert torch.equal(in_window.tokens, plain.tokens) and torch.equal(in_window.order, plain.order)


def test_a_sliding_window_begins_at_the_first_mask(net):
    text = generate(net, WindowRule(reveal.parse("static:1"), 3, slides=True), Layout(16, 16, 0), eot=-1)
    for row in text.order[:, 2:]:
        for step in range(int(row.max()) + 1):
            first = int((row >= step).nonzero()[0])
            assert first <= int((row == step).nonzero()[0]) < first + 3


@pytest.mark.parametrize("spec", ["threshold:0.3", "factor:1", "static:2"])
def test_a_window_of_a_whole_block_cannot_slide(net, spec):
    rule = reveal.parse(spec)
    sliding = generate(net, WindowRule(rule, 4, True))
    fixed = generate(net, WindowRule(rule, 4, False))
    assert torch.equal(sliding.tokens, fixed.tokens) and torch.equal(sliding.order, fixed.order)
    assert not torch.equal(fixed.order, generate(net, WindowRule(rule, 2)).order)


def test_attention_can_tell_confidences_apart():
    """From the start: a norm of multiples of one vector would leave only the sign."""
    policy = Policy(PolicyConfig(8)).init_weights(torch.Generator().manual_seed(0))
    log_odds = torch.tensor([[0.6, 0.9, 0.99]]).logit()[..., None] / 2
    low, middle, high = policy.norm1(policy.confidence(log_odds))[0]
    assert (low - middle).abs().max() > 0.3 and (middle - high).abs().max() > 0.1


@pytest.mark.parametrize("slots", [1, 12, 50])
def test_how_many_states_go_through_together_does_not_matter(slots, monkeypatch):
    """Neither to the logits nor to their gradients."""
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(7, 6, generator=generator).double()
    masked = torch.rand(7, 6, generator=generator) < 0.5
    time = torch.rand(7, generator=generator).double()

    def logits_and_gradients():
        policy = make_policy(6).double()
        logits = policy(confidence, masked, time)
        return logits, *torch.autograd.grad(logits.square().sum(), list(policy.parameters()))
    together = logits_and_gradients()
    monkeypatch.setattr(policy_module, "MAX_SLOTS", slots)
    assert all(torch.allclose(a, b, atol=1e-10, rtol=1e-10) for a, b in zip(together, logits_and_gradients()))


def test_saved_and_loaded_it_does_the_same(net, tmp_path):
    policy = make_policy()
    save_policy(tmp_path / "policy", policy)
    original = generate(net, PolicyRule(policy))
    loaded = generate(net, reveal.parse(f"policy:{tmp_path}/policy"))
    slower = generate(net, reveal.parse(f"policy:{tmp_path}/policy,0.1"))
    assert torch.equal(original.tokens, loaded.tokens) and torch.equal(original.order, loaded.order)
    assert slower.forwards.sum() > original.forwards.sum()

    (tmp_path / "policy" / "config.json").write_text("{}")
    for folder in ("policy", "nowhere"):
        message = f"{folder} is not an unmasking policy .*python -m unmasking.train"
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path / folder)
    with pytest.raises(ValueError, match="^--reveal=policy:nowhere: nowhere is not an unmasking policy"):
        reveal.parse("policy:nowhere")

    save_policy(tmp_path, policy)
    rule = reveal.parse(f"policy:{tmp_path},2,0.5")
    assert (rule.beta, rule.temperature) == (2, 0.5) and str(reveal.parse(str(rule))) == str(rule)
    for numbers in ("0", "1,0", "1,1,1", "nan", "fast"):
        with pytest.raises(ValueError, match="^--reveal=policy:.*at most two numbers above 0"):
            reveal.parse(f"policy:{tmp_path},{numbers}")


def test_older_files_are_read(tmp_path):
    """They call the layer that reads the confidence "sure"."""
    policy = make_policy()
    save_policy(tmp_path, policy)
    weights = {name.replace("confidence.", "sure."): tensor for name, tensor in policy.state_dict().items()}
    assert "sure.weight" in weights
    save_file(weights, tmp_path / "policy.safetensors")
    loaded = load_policy(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in policy.state_dict().items())


# its training --------------------------------------------------------------------------------------------

def sample_trajectory(policy, net, rows=6, explore=True):
    rule = RecordingRule(PolicyRule(policy, explore=explore))
    text = generate(net, rule, rows=rows)
    return rule.trajectory(), text


def test_probabilities_of_all_actions_add_up_to_one(net):
    """Over all sets of masked slots; slots without a mask have no influence."""
    masked = torch.tensor([[True, False, True, True]]).expand(8, 4)
    subsets = itertools.product([False, True], repeat=3)
    actions = torch.tensor([[a, True, b, c] for a, b, c in subsets])
    confidence = torch.rand(1, 4, generator=torch.Generator().manual_seed(0)).expand(8, 4)
    trajectory = Trajectory(confidence[None], masked[None], torch.full((1, 8), 0.25), actions[None])
    assert trajectory.log_prob(make_policy()).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_slots_without_a_mask_get_no_gradient():
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masked = torch.tensor([[[True, False, True, False]]])
    action = torch.ones(1, 1, 4, dtype=torch.bool)
    trajectory = Trajectory(torch.rand(1, 1, 4), masked, torch.zeros(1, 1), action)
    trajectory.log_prob(FixedPolicy(lambda *_: logits)).sum().backward()
    assert torch.equal(logits.grad != 0, masked[0])


def test_every_row_has_its_own_nfe(net):
    """The steps at which it had a mask: in each block those up to the last slot that was revealed."""
    trajectory, text = sample_trajectory(make_policy(), net, rows=8)
    assert torch.equal(trajectory.nfe, trajectory.active.sum(0))
    for row in range(8):
        size = int(text.response_mask[row].sum())
        blocks = [part[part < 4] for part in text.order[row, 2:2 + -(-size // 4) * 4].split(4)]
        nfe = trajectory.nfe[row]
        assert nfe >= sum(int(part.max()) + 1 for part in blocks if len(part)) - 1
        if not (text.tokens[row, 2:] == EOT).any():
            assert nfe == sum(int(part.max()) + 1 for part in text.order[row, 2:].split(4))


def test_recorded_actions_have_the_probability_that_they_were_sampled_with(net):
    """So the first ratio is 1 because state and action were recorded correctly."""
    policy = make_policy(scale=3.0)
    outputs = []
    hook = policy.register_forward_hook(lambda *x: outputs.append(x[-1]))
    trajectory, _ = sample_trajectory(policy, net)
    hook.remove()
    chosen = torch.where(trajectory.action, 1, -1) * torch.stack(outputs)               # (S, B, K)
    expected = (F.logsigmoid(chosen) * trajectory.masked).sum(-1)
    active = trajectory.active
    assert len({*trajectory.time[active].tolist()}) == 4
    ratio = (trajectory.log_prob(policy) - expected)[active].exp()
    assert torch.allclose(ratio, torch.ones(()), atol=1e-5)


def test_the_first_gradient_step_is_the_policy_gradient(net):
    """That of minus the advantage times the log-probability: mean over steps, then over texts."""
    policy = make_policy()
    advantage = torch.tensor([1.0, -0.5, 0.2, 0.3, -2.0, 1.0])
    trajectory, _ = sample_trajectory(policy, net)
    active = trajectory.active
    per_text = (trajectory.log_prob(policy) * active).sum(0) / active.sum(0)
    expected = torch.autograd.grad(-(per_text * advantage).mean(), list(policy.parameters()))
    no_step = torch.optim.SGD(policy.parameters(), 0.0)
    settings = Settings(length=14, num_epochs=1, max_grad_norm=1e9)
    record = grpo_update(policy, [trajectory], [advantage], settings, no_step)
    for p, gradient in zip(policy.parameters(), expected):
        assert torch.allclose(p.grad, gradient, atol=1e-6)
    assert record["loss"] == pytest.approx(-advantage.mean().item(), abs=1e-6)


def test_a_ratio_outside_the_bounds_has_no_gradient():
    new = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True)
    old = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    advantage = torch.tensor([1.0, 1.0, -1.0, -1.0])
    active = torch.ones(1, 4, dtype=torch.bool)
    value = surrogate(new, old, advantage, active, 0.5)
    value.backward()
    assert value.item() == pytest.approx((1 + 1.5 - 1 - 2.718281828) / 4)
    assert (new.grad[0] != 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize("ratio, advantage, value, has_gradient", [
    (0.3, 2.0, 0.3 * 2, True), (0.3, -2.0, -0.8 * 2, False),
    (0.9, 2.0, 0.9 * 2, True), (0.9, -2.0, -0.9 * 2, True),
    (1.5, 2.0, 1.2 * 2, False), (1.5, -2.0, -1.5 * 2, True)])
def test_both_bounds_of_the_ratio(ratio, advantage, value, has_gradient):
    """The ratio is not driven further in the direction of the advantage once it has left 1 - eps .. 1 + eps.

    In the other direction it is not bounded.
    """
    log_prob = torch.tensor([[ratio]]).log().requires_grad_()
    always = torch.ones(1, 1, dtype=torch.bool)
    objective = surrogate(log_prob, torch.zeros(1, 1), torch.tensor([advantage]), always, eps=0.2)
    objective.backward()
    assert objective.item() == pytest.approx(value)
    assert (log_prob.grad.item() != 0) == has_gradient


def test_an_expert_s_ratio_is_bounded():
    never = torch.tensor(-200.0)
    always = torch.tensor(0.0)
    assert mixture(never, 8, 1).exp().item() == pytest.approx(1 / 9)
    assert mixture(always, 8, 1).exp().item() == pytest.approx(1)


def test_rewards_by_hand():
    quality = torch.tensor([1.0, 1.0, 0.0, 0.5])
    nfe = torch.tensor([1, 10, 5, 12])
    assert reward(quality, nfe, 10, 2.0).tolist() == pytest.approx([1, 0.01, 0, 0.005])
    assert additive(quality, nfe, 10, 2.0).tolist() == pytest.approx([0.8, -1, -1, -1.9])


def test_imitation_makes_the_expert_s_choices_likely(net):
    """A rule that depends only on masks and confidences can be learned almost completely."""
    policy = make_policy()
    rule = reveal.parse("threshold:0.35")
    recorder = RecordingRule(rule)
    generate(net, recorder, rows=40)
    trajectory = recorder.trajectory()
    active = trajectory.active
    optimizer = torch.optim.AdamW(policy.parameters(), 0.005)
    settings = Settings(length=14, num_epochs=1, max_grad_norm=1.0)
    before = trajectory.log_prob(policy)[active].mean().item()
    for _ in range(20):
        imitation_update(policy, [trajectory.relabelled(rule)], settings, optimizer)
    assert trajectory.log_prob(policy)[active].mean().item() > 0.25 * before


def test_smaller_logits_keep_the_most_likely_choices_and_explore_more(net):
    """Half of the logits. The amount of exploration is computed by hand."""
    policy = make_policy(scale=6.0)
    trajectory, _ = sample_trajectory(policy, net)
    logits = policy(*trajectory.states()).detach()
    exploration = trajectory.exploration(policy)
    p = logits.sigmoid()[trajectory.masked[trajectory.active]]
    assert exploration == pytest.approx(torch.minimum(p, 1 - p).sum().item() / 6, rel=1e-5)
    scale_logits(policy, 0.5)
    assert torch.allclose(policy(*trajectory.states()), logits / 2)
    assert trajectory.exploration(policy) > 1.1 * exploration


def test_relabelling_an_expert_s_own_texts_gives_its_own_actions(net):
    recorder = RecordingRule(reveal.parse("threshold:0.35"))
    generate(net, recorder, rows=20)
    trajectory = recorder.trajectory()
    again = trajectory.relabelled(reveal.parse("threshold:0.35"))
    assert torch.equal(again.action[0], trajectory.action[trajectory.active])
    assert again.action.any() and not again.action.all()
    assert not torch.equal(trajectory.relabelled(reveal.parse("static:1")).action, again.action)


class RecordedTexts:
    """Generates texts for `train`, and keeps the rules' recorders, and the texts."""

    def __init__(self, net, prompts):
        self.net = net
        self.prompts = prompts
        self.recorders = []
        self.texts = []

    def __call__(self, rule, update, count):
        rows = self.prompts * count
        prompt = torch.arange(self.prompts)[:, None].repeat_interleave(count, 0)
        u = uniforms(count, 0, range(rows), (1 + 14, rule.numbers(4)))
        text = opdlm.rollout(Denoiser(self.net, Layout(4, 1, 1)), prompt, 14, rule, u, EOT, GREEDY)
        self.recorders.append(rule)
        self.texts.append(text)
        return text


def quality_by_prompt(text):
    """Texts of other prompts have another level, which must not influence the advantages."""
    share_of_even = ((text.tokens % 2 == 0) & text.response_mask).float().mean(1)
    return share_of_even + 3 * text.tokens[:, 0]


@pytest.mark.parametrize("mix_in_expert", [False, True])
def test_an_update_is_the_gradient_of_the_objective_by_hand(net, mix_in_expert):
    """A text's advantage is its reward minus the mean of its group, the expert's text included.

    The objective is a mean over all texts, those of the expert included, of the mean over their steps of
    advantage times probability ratio. At the first gradient step the ratio is 1, and its gradient is that of
    the log-probability. For the expert's texts, this is the one under the mixture (G p + 1) / (G + 1).
    """
    G = 3
    prompts = 2
    policy = make_policy()
    generate_recorded = RecordedTexts(net, prompts)
    settings = Settings(length=14, group_size=G, prompts=prompts, num_epochs=1, max_grad_norm=1e9,
                        expert=reveal.parse("threshold:0.35"), mix_in_expert=mix_in_expert)
    no_step = torch.optim.SGD(policy.parameters(), 0.0)
    record, = train(policy, generate_recorded, quality_by_prompt, settings, no_step, range(1))
    found = [p.grad.clone() for p in policy.parameters()]

    counts = [G, 1] if mix_in_expert else [G]
    rewards = []
    log_probs = []
    for recorder, text, count in zip(generate_recorded.recorders, generate_recorded.texts, counts):
        trajectory = recorder.trajectory()
        rewards.append(reward(quality_by_prompt(text), trajectory.nfe, 14, 1.0).view(prompts, count))
        log_prob = trajectory.log_prob(policy)
        if count == 1:
            log_prob = ((G * log_prob.exp() + 1) / (G + 1)).log()
        per_text = (log_prob * trajectory.active).sum(0) / trajectory.active.sum(0)
        log_probs.append(per_text.view(prompts, count))
    group = torch.cat(rewards, 1)                                        # (prompts, G) or (prompts, G + 1)
    advantage = group - group.mean(1, keepdim=True)
    assert (advantage.abs().amax(1) > 0.01).all()
    loss = -(advantage * torch.cat(log_probs, 1)).mean()
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    size = max(gradient.abs().max() for gradient in expected)
    for gradient, expected_gradient in zip(found, expected):
        assert torch.allclose(gradient, expected_gradient, atol=1e-4 * size, rtol=1e-4)
    assert record["loss"] == pytest.approx(0, abs=1e-6)                  # the advantages of a group sum to 0
    trajectory = generate_recorded.recorders[0].trajectory()             # of the policy's texts
    assert record["reward"] == pytest.approx(rewards[0].mean().item())
    assert record["quality"] == pytest.approx(quality_by_prompt(generate_recorded.texts[0]).mean().item())
    assert record["nfe"] == pytest.approx(trajectory.nfe.float().mean().item())
    assert record["exploration"] == pytest.approx(trajectory.exploration(policy))
    assert (record["step"], record["tied_groups"]) == (1, 0)


def test_the_expert_s_texts_are_imitated_and_after_some_updates_also_its_choices_in_the_policy_s(net):
    """The policy's texts explore. The loss of the last minibatch, by hand, has the labels of all texts."""
    G = 3
    prompts = 4
    policy = make_policy()
    expert = reveal.parse("threshold:0.35")
    settings = Settings(length=14, group_size=G, prompts=prompts, expert=expert)
    no_step = torch.optim.SGD(policy.parameters(), 0.0)
    num_steps = []
    no_step.register_step_post_hook(lambda *_: num_steps.append(1))
    rates = []
    updates = range(DAGGER_START - 1, DAGGER_START + 1)
    generate_recorded = RecordedTexts(net, prompts)
    records = list(imitate(policy, generate_recorded, quality_by_prompt, settings, no_step, updates,
                           rates.append))
    first, of_policy, of_expert = generate_recorded.recorders
    assert (first.rule, of_expert.rule) == (expert, expert)
    assert of_policy.rule.policy is policy and of_policy.rule.explore is True
    assert [len(text.tokens) for text in generate_recorded.texts] == [prompts, prompts * G, prompts]
    assert rates == list(updates)
    assert len(num_steps) == 2 * IMITATION_EPOCHS * IMITATION_MINIBATCHES
    for record, recorders, update in zip(records, ([first], [of_policy, of_expert]), updates):
        log_probs = []
        for recorder in recorders:
            log_probs.append(recorder.trajectory().relabelled(expert).log_prob(policy)[0])
        last = torch.cat(log_probs)[IMITATION_MINIBATCHES - 1::IMITATION_MINIBATCHES]
        assert record["loss"] == pytest.approx(-last.mean().item(), rel=1e-5)
        assert record["nfe"] == pytest.approx(recorders[0].trajectory().nfe.float().mean().item())
        assert record["step"] == update + 1


class World:
    """A denoiser for texts of one token, 1, with a known best order.

    Without `chain` it is always right; with it, only at slots all of whose predecessors are revealed.
    """
    mask_id = 3
    layout = Layout(4, 1, 0)

    def __init__(self, chain):
        self.chain = chain

    def reset(self, prompt, end):
        self.forwards = self.positions = torch.zeros_like(prompt)

    def __call__(self, tokens, start, masked):
        block = tokens.gather(1, start[:, None] + torch.arange(4))                      # (B, 4)
        revealed = (block != self.mask_id).long()
        before = torch.cat([torch.ones_like(block[:, :1]), revealed], 1).cumprod(1)[:, :4].bool()
        right = before if self.chain else torch.ones_like(before)
        return torch.where(right[..., None], torch.tensor([0.0, 3.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("chain", [False, True], ids=["free", "chain"])
def test_where_the_best_order_is_known_it_is_found(chain):
    """All at once if slots do not depend on each other, one by one if each depends on the one before."""
    world = World(chain)
    settings = Settings(length=8, alpha=0.2, group_size=8, prompts=4)
    policy = Policy(PolicyConfig(4, 16)).init_weights(torch.Generator().manual_seed(0))

    def generate(rule, update, count):
        rows = range(update * 100, update * 100 + 4 * count)
        u = uniforms(0, 0, rows, (1 + 8, rule.numbers(4)))
        return opdlm.rollout(world, torch.zeros(len(rows), 1, dtype=torch.long), 8, rule, u, -1, GREEDY)

    def quality(text):
        return (text.tokens[:, 1:] == 1).float().mean(1)
    optimizer = torch.optim.AdamW(policy.parameters(), 0.01)
    for _ in train(policy, generate, quality, settings, optimizer, range(150)):
        pass
    recorder = RecordingRule(PolicyRule(policy))
    text = generate(recorder, 999, 8)
    found = reward(quality(text), recorder.trajectory().nfe, 8, 0.2).mean().item()
    best = reward(torch.ones(1), torch.tensor([8 if chain else 2]), 8, 0.2).item()
    assert found >= 0.95 * best


ABSURD = [None, True, 0, -1, 1.5, 10 ** 12, float("nan"), float("inf"), "4", "", [], [4], {}, "x" * 10_000]


@pytest.mark.parametrize("key", ["block", "width", "heads", "theta", "model_type", "other"])
def test_an_absurd_size_is_one_sentence(tmp_path, key):
    save_policy(tmp_path, Policy(PolicyConfig(4)))
    config = json.loads((tmp_path / "config.json").read_text())
    for value in ABSURD:
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        if key == "model_type" or (key, value) in (("theta", 1.5), ("theta", True), ("theta", 10 ** 12)):
            continue
        with pytest.raises(ValueError, match="is not an unmasking policy") as caught:
            load_policy(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_the_files_of_a_policy_are_one_s_own(tmp_path):
    (tmp_path / "policy.safetensors.new").write_text("dear")
    umask = os.umask(0o022)
    save_policy(tmp_path, Policy(PolicyConfig(4)))
    os.umask(umask)
    assert (tmp_path / "policy.safetensors.new").read_text() == "dear"
    names = {"config.json", "policy.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"policy.safetensors.new"}
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in names} == {"0o644"}


def test_a_policy_that_is_not_downloaded_or_is_damaged_is_one_sentence(tmp_path):
    save_policy(tmp_path, Policy(PolicyConfig(4)))
    for content in (b"version https://git-lfs.github.com/spec/v1\n", b"", b"\xff" * 100):
        (tmp_path / "policy.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is not an unmasking policy"):
            load_policy(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        load_policy(tmp_path)
