import itertools

import pytest
import torch

import opdlm
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, uniforms
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from unmasking import policy as unmask
from unmasking.grpo import (
    RecordingRule,
    Settings,
    Trajectory,
    additive,
    imitated,
    learn,
    mixture,
    reward,
    soften,
    surrogate,
    train,
)
from unmasking.policy import Policy, PolicyConfig, PolicyRule, WindowRule, load, save

EOT, GREEDY = 10, SamplingConfig(temperature=0)


def policy(block=4, width=16, seed=0, loud=1.0):
    """Random, and as loud as asked for where it begins silent."""
    generator = torch.Generator().manual_seed(seed)
    made = Policy(PolicyConfig(block, width)).init_weights(generator)
    with torch.no_grad():
        for layer in (made.modulate, made.head):
            layer.weight.normal_(0, loud * width ** -0.5, generator=generator)
    return made


@pytest.fixture(scope="module")
def net():
    generator = torch.Generator().manual_seed(3)
    made = GPT(GPTConfig(11, 24, 2, 2, 16)).init_weights(generator)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
    return made.requires_grad_(False)


def write(net, rule, layout=Layout(4, 1, 1), rows=6, R=14, eot=EOT, seed=0):
    prompt = torch.randint(0, EOT, (rows, 2), generator=torch.Generator().manual_seed(1))
    u = uniforms(seed, 0, range(rows), (2 + R, rule.numbers(layout.block)))
    return opdlm.rollout(Denoiser(net, layout), prompt, R, rule, u, eot, GREEDY)


class Given:
    """A policy that says what it was told to."""
    config = PolicyConfig(4)

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, sure, masked, time):
        return self.logits(sure, masked, time)


# the rule ------------------------------------------------------------------------------------------------------------

def test_the_paper_s_size_has_the_paper_s_parameters():
    assert sum(p.numel() for p in Policy(PolicyConfig(32, width=128)).parameters()) == 331_265


def test_a_policy_that_asks_for_the_surer_than_p_is_the_threshold_rule(net):
    for level in (0.2, 0.35, 0.5, 0.9):
        forced = PolicyRule(Given(lambda sure, masked, time, level=level: (sure - level) * 1e9))
        for layout in (Layout(4, 1, 1), Layout(4, 4, 0)):
            ours, theirs = (write(net, rule, layout) for rule in (forced, reveal.parse(f"threshold:{level}")))
            for what in vars(ours):
                assert torch.equal(getattr(ours, what), getattr(theirs, what))


def test_with_zero_weights_masks_come_off_at_the_rate_of_the_bias():
    plain = Policy(PolicyConfig(8, 16)).init_weights(torch.Generator())
    with torch.no_grad():
        for p in plain.parameters():
            p.zero_()
        plain.head.bias.fill_(-0.7)
    masked, source = torch.ones(20_000, 8, dtype=torch.bool), torch.Generator().manual_seed(0)
    u = torch.rand(20_000, 8, 9, generator=source)
    for beta in (1.0, 0.5):
        show = PolicyRule(plain, beta, explore=True)(torch.rand(20_000, 8), masked, torch.zeros(20_000).long(), u)
        rate = beta * torch.sigmoid(torch.tensor(-0.7))
        assert (show.float().mean(0) - rate).abs().max() < 4 * (rate * (1 - rate) / 20_000).sqrt()
        assert torch.corrcoef(show.float().T).fill_diagonal_(0).abs().max() < 0.03          # each slot for itself


def test_the_first_bias_leaves_one_slot_in_a_hundred():
    for block, bias in ((4, 0.77), (8, -0.25), (16, -1.1), (32, -1.87), (64, -2.6)):
        assert PolicyConfig(block).bias == pytest.approx(bias, abs=0.01)
        assert (1 - 1 / (1 + 2.718281828 ** -PolicyConfig(block).bias)) ** block == pytest.approx(0.01)


def test_a_policy_that_reveals_nothing_still_writes_its_text(net):
    """One a step, the likeliest first; while it explores, all at the last step of the block."""
    silent = policy(loud=0.0)
    with torch.no_grad():
        silent.head.bias.fill_(-60)
    for explore in (False, True):
        text = write(net, PolicyRule(silent, explore=explore), Layout(4, 4, 0), eot=-1)
        steps = [[3] * 14] if explore else [[0, 1, 2, 3] * 3 + [0, 1]]
        assert (text.tokens != net.mask_id).all() and text.response_mask.sum() == 6 * 14
        for row in text.order[:, 2:]:
            assert row.tolist() == steps[0] if explore else sorted(row.tolist()) == sorted(steps[0])


def test_blocks_inside_a_block(net):
    """A model of whole texts, kept to the leftmost slots with a mask: each part is done before the next begins."""
    layout = Layout(16, 16, 0)
    text = write(net, WindowRule(reveal.parse("threshold:0.3"), 5), layout, eot=-1)
    for row in text.order[:, 2:]:
        parts = row.split(5)
        assert all(a.max() < b.min() for a, b in zip(parts, parts[1:]))
    static = reveal.parse("static:2")
    whole, same = (write(net, rule, layout) for rule in (WindowRule(static, 16), static))
    assert torch.equal(whole.tokens, same.tokens) and torch.equal(whole.order, same.order)


def test_a_window_slides(net):
    """From the first mask on, wherever that is; what is far to the right waits."""
    text = write(net, WindowRule(reveal.parse("static:1"), 3, slides=True), Layout(16, 16, 0), eot=-1)
    for row in text.order[:, 2:]:
        for step in range(int(row.max()) + 1):
            first = int((row >= step).nonzero()[0])
            assert first <= int((row == step).nonzero()[0]) < first + 3


@pytest.mark.parametrize("spec", ["threshold:0.3", "factor:1", "static:2"])
def test_over_a_whole_block_a_window_has_nowhere_to_slide(net, spec):
    rule = reveal.parse(spec)
    slid, stood = (write(net, WindowRule(rule, 4, slides)) for slides in (True, False))
    assert torch.equal(slid.tokens, stood.tokens) and torch.equal(slid.order, stood.order)
    assert not torch.equal(stood.order, write(net, WindowRule(rule, 2)).order)


def test_how_sure_a_slot_is_can_be_attended_to():
    """From the first: a norm of one number's multiples would leave its sign alone."""
    made = Policy(PolicyConfig(8)).init_weights(torch.Generator().manual_seed(0))
    odds = torch.tensor([[0.6, 0.9, 0.99]]).logit()[..., None] / 2
    low, middle, high = made.norm1(made.sure(odds))[0]
    assert (low - middle).abs().max() > 0.3 and (middle - high).abs().max() > 0.1


@pytest.mark.parametrize("slots", [1, 12, 50])
def test_how_many_states_go_through_together_does_not_matter(slots, monkeypatch):
    """Nor to gradients."""
    generator = torch.Generator().manual_seed(0)
    sure, masked, time = torch.rand(7, 6, generator=generator), torch.rand(7, 6, generator=generator) < 0.5, torch.rand(
        7, generator=generator)

    def said():
        made = policy(6).double()
        logits = made(sure.double(), masked, time.double())
        return logits, *torch.autograd.grad(logits.square().sum(), list(made.parameters()))
    together = said()
    monkeypatch.setattr(unmask, "SLOTS", slots)
    assert all(torch.allclose(a, b, atol=1e-10, rtol=1e-10) for a, b in zip(together, said()))


def test_saved_and_loaded_it_does_the_same(net, tmp_path):
    made = policy()
    save(tmp_path / "policy", made)
    a, b, c = (write(net, rule) for rule in (PolicyRule(made), reveal.parse(f"policy:{tmp_path}/policy"),
                                             reveal.parse(f"policy:{tmp_path}/policy,0.1")))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.order, b.order) and c.forwards.sum() > a.forwards.sum()
    (tmp_path / "policy" / "config.json").write_text("{}")
    for folder in ("policy", "nowhere"):
        with pytest.raises(ValueError, match=f"{folder} holds no unmasking policy .*--stage=policy"):
            load(tmp_path / folder)
    with pytest.raises(ValueError, match="^--reveal=policy:nowhere: nowhere holds no unmasking policy"):
        reveal.parse("policy:nowhere")
    save(tmp_path, made)
    rule = reveal.parse(f"policy:{tmp_path},2,0.5")
    assert (rule.beta, rule.temperature) == (2, 0.5) and str(reveal.parse(str(rule))) == str(rule)
    for numbers in ("0", "1,0", "1,1,1", "nan", "fast"):
        with pytest.raises(ValueError, match="^--reveal=policy:.*(two numbers above 0|convert)"):
            reveal.parse(f"policy:{tmp_path},{numbers}")


# its training --------------------------------------------------------------------------------------------------------

def seen(made, net, rows=6, explore=True):
    rule = RecordingRule(PolicyRule(made, explore=explore))
    text = write(net, rule, rows=rows)
    return rule.stacked(), text


def test_probabilities_of_all_actions_add_up_to_one(net):
    """Over every set of masked slots; what is not masked takes no part, whatever is said of it."""
    made = policy()
    masked = torch.tensor([[True, False, True, True]]).expand(8, 4)
    actions = torch.tensor([[a, True, b, c] for a, b, c in itertools.product([False, True], repeat=3)])
    sure = torch.rand(1, 4, generator=torch.Generator().manual_seed(0)).expand(8, 4)
    some = Trajectory(sure[None], masked[None], torch.full((1, 8), 0.25), actions[None])
    assert some.logprob(made).exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_what_is_not_masked_gets_no_gradient():
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    masked = torch.tensor([[[True, False, True, False]]])
    Trajectory(torch.rand(1, 1, 4), masked, torch.zeros(1, 1), torch.ones(1, 1, 4, dtype=torch.bool)).logprob(
        Given(lambda *_: logits)).sum().backward()
    assert torch.equal(logits.grad != 0, masked[0])


def test_nfe_is_each_row_s_own(net):
    """The steps at which it had a mask: of every block those up to the last slot that came off."""
    some, text = seen(policy(), net, rows=8)
    for row in range(8):
        size = int(text.response_mask[row].sum())
        blocks = [part[part < 4] for part in text.order[row, 2:2 + -(-size // 4) * 4].split(4)]
        assert some.alive.sum(0)[row] >= sum(int(part.max()) + 1 for part in blocks if len(part)) - 1
        if not (text.tokens[row, 2:] == EOT).any():
            assert some.alive.sum(0)[row] == sum(int(part.max()) + 1 for part in text.order[row, 2:].split(4))


def test_what_is_learnt_from_has_the_probability_it_was_done_with(net):
    """So the first ratio is 1 by the state and the action that were noted, not by saying one number twice."""
    made, said = policy(loud=3.0), []
    hook = made.register_forward_hook(lambda *x: said.append(x[-1]))
    some, _ = seen(made, net)
    hook.remove()
    right = torch.where(some.action, 1, -1) * torch.stack(said)                          # (S, B, K)
    wanted = (torch.nn.functional.logsigmoid(right) * some.masked).sum(-1)
    assert len({*some.time[some.alive].tolist()}) == 4
    assert torch.allclose((some.logprob(made) - wanted)[some.alive].exp(), torch.ones(()), atol=1e-5)


def test_the_first_inner_step_is_the_policy_gradient(net):
    """That of minus the advantage times the log-probability, mean over steps, then over texts."""
    made, gain = policy(), torch.tensor([1.0, -0.5, 0.2, 0.3, -2.0, 1.0])
    some, _ = seen(made, net)
    logp = some.logprob(made)
    wanted = -((logp * some.alive).sum(0) / some.alive.sum(0) * gain).mean()
    wanted = torch.autograd.grad(wanted, list(made.parameters()))
    still = torch.optim.SGD(made.parameters(), 0.0)
    record = learn(made, [some], [gain], Settings(length=14, inner=1, clip=1e9), still)
    for p, grad in zip(made.parameters(), wanted):
        assert torch.allclose(p.grad, grad, atol=1e-6)
    assert record["loss"] == pytest.approx(-gain.mean().item(), abs=1e-6)


def test_a_ratio_outside_the_bounds_pulls_no_further():
    new, alive = torch.tensor([[0.0, 1.0, 0.0, 1.0]], requires_grad=True), torch.ones(1, 4, dtype=torch.bool)
    old, gain = torch.tensor([[0.0, 0.0, 0.0, 0.0]]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    value = surrogate(new, old, gain, alive, 0.5)
    value.backward()
    assert value.item() == pytest.approx((1 + 1.5 - 1 - 2.718281828) / 4)
    assert (new.grad[0] != 0).tolist() == [True, False, True, True]


def test_an_expert_s_ratio_is_bounded():
    never, often = torch.tensor(-200.0), torch.tensor(0.0)
    assert mixture(never, 8, 1).exp().item() == pytest.approx(1 / 9)
    assert mixture(often, 8, 1).exp().item() == pytest.approx(1)


def test_rewards_by_hand():
    quality, nfe = torch.tensor([1.0, 1.0, 0.0, 0.5]), torch.tensor([1, 10, 5, 12])
    assert reward(quality, nfe, 10, 2.0).tolist() == pytest.approx([1, 0.01, 0, 0.005])
    assert additive(quality, nfe, 10, 2.0).tolist() == pytest.approx([0.8, -1, -1, -1.9])


def test_imitation_makes_the_expert_s_choices_likely(net):
    """Of a rule that goes by the mask and the confidence alone, nearly all of them are learnt."""
    made, rule = policy(), reveal.parse("threshold:0.35")
    noted = RecordingRule(rule)
    write(net, noted, rows=40)
    some = noted.stacked()
    optimizer, settings = torch.optim.AdamW(made.parameters(), 0.005), Settings(length=14, inner=1, clip=1.0)
    before = some.logprob(made)[some.alive].mean().item()
    for _ in range(40):
        imitated(made, [some.relabelled(rule)], settings, optimizer)
    assert some.logprob(made)[some.alive].mean().item() > 0.25 * before


def test_less_sure_it_would_do_the_same_and_try_more(net):
    """Half of the logits: the likelier choice stays so, at each slot. How much it tries is counted by hand."""
    made = policy(loud=6.0)
    some, _ = seen(made, net)
    before, doubts = made(*some.states()).detach(), some.doubts(made)
    p = before.sigmoid()[some.masked[some.alive]]
    assert doubts == pytest.approx(torch.minimum(p, 1 - p).sum().item() / 6, rel=1e-5)
    soften(made, 0.5)
    assert torch.allclose(made(*some.states()), before / 2) and some.doubts(made) > 1.1 * doubts


def test_what_an_expert_would_have_done_is_what_it_does(net):
    """In the states of its own texts."""
    rule = RecordingRule(reveal.parse("threshold:0.35"))
    write(net, rule, rows=20)
    some = rule.stacked()
    again = some.relabelled(reveal.parse("threshold:0.35"))
    assert torch.equal(again.action[0], some.action[some.alive]) and again.action.any() and not again.action.all()
    assert not torch.equal(some.relabelled(reveal.parse("static:1")).action, again.action)


class World:
    """Texts of one token, 1, with a known best order. Free: it is always right. Chain: right behind what is known."""
    mask_id, layout = 3, Layout(4, 1, 0)

    def __init__(self, chain):
        self.chain = chain

    def reset(self, prompt, end):
        self.forwards = self.positions = torch.zeros_like(prompt)

    def __call__(self, tokens, start, masked):
        block = tokens.gather(1, start[:, None] + torch.arange(4))                      # (B, 4)
        known = torch.cat([torch.ones_like(block[:, :1]), (block != self.mask_id).long()], 1).cumprod(1)[:, :4].bool()
        right = known if self.chain else torch.ones_like(known)
        return torch.where(right[..., None], torch.tensor([0.0, 3.0, 0.0]), torch.tensor([0.0, 0.0, 1.0]))


@pytest.mark.parametrize("chain", [False, True], ids=["free", "chain"])
def test_where_the_best_is_known_it_is_found(chain):
    """All at once where slots don't depend on each other, one by one where each does on the one before."""
    world, settings = World(chain), Settings(length=8, alpha=0.2, group=8, prompts=4)
    made = Policy(PolicyConfig(4, 16)).init_weights(torch.Generator().manual_seed(0))

    def text(rule, update, count):
        rows = range(update * 100, update * 100 + 4 * count)
        u = uniforms(0, 0, rows, (1 + 8, rule.numbers(4)))
        return opdlm.rollout(world, torch.zeros(len(rows), 1, dtype=torch.long), 8, rule, u, -1, GREEDY)

    def quality(made):
        return (made.tokens[:, 1:] == 1).float().mean(1)
    optimizer = torch.optim.AdamW(made.parameters(), 0.01)
    for _ in train(made, text, quality, settings, optimizer, range(150)):
        pass
    rule = RecordingRule(PolicyRule(made))
    got = reward(quality(text(rule, 999, 8)), rule.stacked().alive.sum(0), 8, 0.2).mean().item()
    best = reward(torch.ones(1), torch.tensor([8 if chain else 2]), 8, 0.2).item()
    assert got >= 0.95 * best
