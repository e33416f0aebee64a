import math
from dataclasses import replace

import pytest
import torch

import opdlm
from decoding import reveal
from experiments.ablations import run as ablations
from experiments.common import changes, conversion
from experiments.common.job import Job, options_of
from experiments.common.results import at_cost, gap, reached, tokens_cell
from experiments.decoding import tables as frontier
from experiments.memory import run as memory
from experiments.methods import run as methods
from experiments.speed import run as speed
from experiments.unmasking import hull, worlds
from experiments.unmasking import tables as gains
from model.gpt import GPTConfig
from model.masks import AR, Layout
from report.compare import write_json


def point(tokens, *looks):
    return {"tokens": tokens} | {name: {"tok_per_fwd": cost, "gen_nats": nats} for name, cost, nats in looks}


def test_a_target_is_reached_between_two_points():
    points = [{"tokens": 100, "gap": 0.4}, {"tokens": 400, "gap": 0.2}, {"tokens": 800, "gap": 0.1}]
    found, there = reached(points, lambda p: p["gap"], 0.3)
    assert there and found == pytest.approx(200)                           # the middle, over the logarithm
    assert reached(points, lambda p: p["gap"], 0.5) == (100, True)
    assert reached(points, lambda p: p["gap"], 0.05) == (800, False)
    assert reached(points, lambda p: p["gap"], 0.1)[0] == pytest.approx(800)


def test_a_row_that_never_comes_there_is_a_lower_bound():
    assert tokens_cell([(1000, True), (3000, True)]) == "2k (1 to 3)"
    assert tokens_cell([(1000, True), (3000, False)]) == "> 2k"


def test_numbers_at_equal_cost_lie_between_their_neighbours():
    some = point(1, ("a", 1.0, 0.3), ("b", 2.0, 0.5), ("c", 4.0, 0.9), ("other", 1.5, 9.0))
    assert at_cost(some, "gen_nats", 1.5, ("c", "b", "a")) == pytest.approx(0.4)
    assert at_cost(some, "gen_nats", 2.0, ("a", "b", "c")) == 0.5
    assert at_cost(some, "gen_nats", 9.0, ("a", "b")) == 0.5 and at_cost(some, "gen_nats", 0.5, ("b", "a")) == 0.3
    assert gap({"teacher": {"gen_nats": 0.1}}, "gen_nats", 1.5, ("a", "b"))(some) == pytest.approx(0.3)


def test_the_mean_of_weights_is_the_weighted_mean():
    """Of n updates the k-th has about the weight 10 (k / n)^9 / n: the power mean's."""
    net, mean, n = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), 400
    for step in range(1, n + 1):
        torch.nn.init.constant_(net.weight, step / n)
        conversion.take_in(mean, net, step)
    assert mean.weight.item() == pytest.approx(10 / 11, abs=2e-3)          # the integral of 10 x^9 x
    conversion.take_in(mean, net, 1)
    assert mean.weight.item() == net.weight.item()                         # the first update replaces what was there


@pytest.mark.parametrize("divergence", [changes.reverse_kl, changes.jensen_shannon])
def test_divergences_by_hand(divergence):
    q, p = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    middle = (p + q) / 2
    def kl(a, b):
        return (a * (a / b).log()).sum().item()
    want = kl(p, q) if divergence is changes.reverse_kl else (kl(p, middle) + kl(q, middle)) / 2
    assert divergence(q, p.log() + 3).item() == pytest.approx(want, rel=1e-5)
    assert divergence(q, q.log()).item() == pytest.approx(0, abs=1e-6)
    assert divergence(torch.tensor([[1.0, 0, 0]]), p.log()).isfinite().all()


def recipe(**more):
    return opdlm.Recipe(opdlm.student_text, opdlm.visited, opdlm.teacher_probs, opdlm.mean_of_masked, Layout(3), 10,
                        reveal.parse("static:1"), batch=2, prompt=2, **more)


def test_every_state_of_every_text(tiny):
    """Each text K times; its copies mask the slots of step k and later, k = 0 .. K - 1: the union of all states."""
    made, net = changes.every_state(recipe(), 1)[0], tiny()
    rows = torch.randint(0, 10, (6, 12), generator=torch.Generator().manual_seed(0))
    text = made.text(net, net, rows, 2, 9, opdlm.uniforms(0, 1, range(6), (11, 1)), made)
    assert made.batch == 6 and len(text.tokens) == 6
    assert torch.equal(text.tokens[0], text.tokens[2]) and not torch.equal(text.tokens[2], text.tokens[3])
    masked = made.states(text.order[:, 2:], text.response_mask[:, 2:], None, 3)
    order = text.order[:, 2:]
    for row in range(6):
        assert torch.equal(masked[row], order[row] >= row % 3)


def test_every_left_part_of_every_text(tiny):
    """As many rows as before, of a third of the texts; together a block's copies mask its slots once, twice, thrice."""
    plain, net = replace(recipe(), source=opdlm.data_text, states=opdlm.prefix_shown, batch=6), tiny()
    made = changes.every_prefix(plain, 1)[0]
    rows = torch.randint(0, 10, (6, 11), generator=torch.Generator().manual_seed(0))
    text = made.text(net, net, rows, 2, 9, opdlm.uniforms(0, 1, range(6), (11, 1)), made)
    assert torch.equal(text.tokens, rows[[0, 0, 0, 3, 3, 3]]) and made.batch == 6
    masked = made.states(text.order[:, 2:], text.response_mask[:, 2:], None, 3)
    assert masked[:3].sum(0).tolist() == masked[3:].sum(0).tolist() == [1, 2, 3] * 3
    assert not (masked[:, 1:] < masked[:, :-1])[:, [0, 1, 3, 4, 6, 7]].any()        # nothing is shown right of a mask


def test_part_of_the_rollouts_on_stories():
    made = changes.stories_first(0.25, recipe(), 8)
    assert [r.text is opdlm.data_text for r in made] == [True] * 2 + [False] * 6
    assert made[0].states is opdlm.prefix_shown


def test_recipes_take_turns(tiny, monkeypatch):
    seen, net = [], tiny()
    monkeypatch.setattr(opdlm, "train", lambda *a: seen.append((a[3].layout.block, list(a[6]))) or
                        iter([{"step": step + 1} for step in a[6]]))
    options = options_of(Job("", 0, {"updates": 2}, (7,)))
    class corpus:                                                          # not looked at
        pass
    list(conversion.updates(net, net, corpus, [recipe(updates_per_rollout=2), changes.mixed(recipe(updates_per_rollout=2), 4)[1]], options))
    assert seen == [(3, [0, 1]), (8, [2, 3]), (3, [4, 5]), (8, [6])]


def test_a_finished_conversion_is_read_and_another_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.common.job.WORK", tmp_path)
    job = Job("a, b", 1, {"lr": 0.1}, (1,), recipes=changes.mixed)
    write_json(job.file, {"settings": job.settings, "x": 1})
    assert conversion.run(job)["x"] == 1 and [p.name for p in job.file.parent.iterdir()] == ["a,b-1.json"]
    monkeypatch.setattr(conversion, "opened", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversion.run(replace(job, flags={"lr": 0.2}))


def test_every_row_of_the_ablations_is_looked_at_as_it_is_compared():
    jobs = {job.name: job for job in ablations.jobs_of(ablations.Options())}
    for name, row in ablations.ROWS.items():
        assert set(row.by) <= set(jobs[row.job or name].looks)
        assert {**jobs[row.job or name].flags, "block": 0} == {**row.flags, "block": 0}
    files = [job.file for job in ablations.jobs_of(ablations.Options())]
    assert len(files) == len(set(files)) == 3 * len(jobs)


@pytest.mark.parametrize("name", list(methods.jobs_of(methods.Options())))
def test_every_row_of_the_methods_is_flags_of_the_command(name):
    flags = methods.jobs_of(methods.Options())[name]
    options = options_of(Job(name, 0, flags, (4,)), "reveal=leftmost:0.5 block=8")
    assert options.block == 8 and options.reveal == "leftmost:0.5" and options.warm_steps == 0
    assert [getattr(options, dial) for dial in methods.DIALS] == [flags[dial] for dial in methods.DIALS]


def test_aup_by_hand():
    """80 % from 0 to 1 token a forward, then a trapezoid; what is 5 below the slowest, or more, does not count."""
    assert frontier.aup([(1, 80)], 80) == 80
    assert frontier.aup([(2, 80), (1, 80)], 80) == pytest.approx(160)
    less = 76 * math.exp(-3 * (1 - 76 / 80))
    assert frontier.aup([(1, 80), (2, 76), (4, 74.9)], 80) == pytest.approx(80 + (80 + less) / 2)
    assert frontier.aup([(1, 80), (2, 90)], 80) == pytest.approx(80 + (80 + 90) / 2)        # above the best, as it is


def test_a_peak_is_what_stood_at_once():
    """Bytes, of two steps whose sums are the same."""
    def apart():
        for n in (1000, 3000):
            torch.zeros(n)

    def together():
        kept = [torch.zeros(n) for n in (1000, 3000)]
        del kept[0]
        torch.zeros(500)
    assert memory.peak(apart) == 12_000 and memory.peak(together) == 16_000


def test_the_steps_compared_are_the_same_step():
    """With the same text, states and weights; without head and KL there is the gradient of the table, of zeros."""
    config = GPTConfig(vocab=300, context=48, layers=1, heads=1, width=16)
    records = {key: step() for key, step in memory.steps_of(config).items()}
    for kind, kept in records:
        assert records[kind, kept]["loss_positions"] == records["plain", False]["loss_positions"] > 10
    losses = [records[kind, kept]["kl"] for kind in ("plain", "full") for kept in (False, True)]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-5) and losses[0] > 0


def test_the_plain_ar_loop_writes_what_the_sampler_writes():
    """So the one that speeds are compared with is AR itself."""
    net = speed.network(*speed.TINY["tiny"])
    prompt = torch.randint(64, (3, speed.PROMPT), generator=torch.Generator().manual_seed(0))
    text = speed.write(net, AR, prompt, "static:1")
    assert torch.equal(speed.ar(net, prompt, speed.room(net)), text.tokens)
    assert len(text.tokens[:, speed.PROMPT:].unique()) > 5


def test_a_level_reveals_two_tokens_a_step():
    net, layout = speed.network(*speed.TINY["tiny"]), Layout(4, 4, 0)
    prompt = torch.randint(64, (1, speed.PROMPT), generator=torch.Generator().manual_seed(0))
    text = speed.write(net, layout, prompt, f"threshold:{speed.level(net, layout, prompt)}")
    assert 1.6 < (text.response_mask.sum() / text.forwards.sum()).item() < 2.4


def test_the_hull_is_what_no_mixture_beats():
    corners = [(10, 0.2), (20, 0.6), (40, 0.8)]
    below = [(30, 0.65), (20, 0.5), (50, 0.8), (15, 0.39)]
    assert hull.hull(below + corners) == corners
    assert hull.at(below + corners, 30) == pytest.approx(0.7) and hull.at(corners, 99) == 0.8
    assert hull.at(corners, 10) == pytest.approx(0.3)       # half of the texts by (20, 0.6), nothing of the others


def test_the_volume_by_hand():
    """Of 100 forwards: from 20 on 0.5, from 60 on 0.9; a point that another beats adds nothing."""
    two = [(60, 0.9), (20, 0.5)]
    assert hull.volume(two, 100) == pytest.approx((40 * 0.5 + 40 * 0.9) / 100)
    assert hull.volume([*two, (30, 0.4), (120, 1.0)], 100) == pytest.approx(hull.volume(two, 100))


def looked(nfe, right, length=100):
    valid = sum(right) / len(right)
    return {"nfe": sum(nfe) / len(nfe), "valid": valid, "right": right, "steps": nfe, "length": length,
            "reward": {"0": valid}}


def test_volumes_and_gains_by_hand():
    """Two heuristics, and policies of two seeds: one as good as the better of them, faster by 20 on every story, the
    other the better one itself. All stories alike, so that no draw of them matters."""
    slow, poor, fast = looked([60] * 8, [1] * 8), looked([20] * 8, [0] * 8), looked([40] * 8, [1] * 8)
    rules = {"threshold:0.8 in 4, sliding": slow, "random:1 in 2": poor}
    results = {"world": "blocks", "heuristics": [{"rule": name, "dev": x, "test": x} for name, x in rules.items()],
               "policies": [{"policy": "alpha 0", "alpha": 0, "seed": seed, "looks": {"": x}}
                            for seed, x in enumerate((fast, slow))]}
    assert hull.best_rule(results, 0) == "threshold:0.8 in 4, sliding"
    assert [rule["rule"] for rule in hull.shown(results)] == list(rules)
    found = gains.volumes(results)
    assert found["heuristics"] == pytest.approx([0.4] * 3 + [0]) and found["random"] == [0, 0, 0, 0]
    assert found["policies"][:3] == pytest.approx([0.5, 0.4, 0.6])
    assert found["policies less heuristics"][:3] == pytest.approx([0.1, 0, 0.2])
    assert found["policies less chosen"] == found["policies less heuristics"]
    gain, = gains.gains(results)
    assert gain["reward"] == [0, 0, 0, 0]                                               # at alpha 0 speed is nothing
    assert gain["thresholds"][:3] == pytest.approx([(1 / 3 + 0) / 2, 0, 1 / 3])         # 40 of 60 steps: 2 of 3 texts
    assert gain["heuristics"] == gain["chosen"] == gain["thresholds"]
    assert gain["random"] == pytest.approx([1.0] * 3 + [0])


def test_a_policy_is_worth_more_than_itself_blind():
    """Right twice as often, in half the time: a reward of 0.51 less 0.005; stories and seeds alike but for who is
    right. The error is that of the share of stories."""
    sees, blind = looked([50] * 8, [1] * 8), looked([100] * 8, [1, 0] * 4)
    rule = {"rule": "random:1 in 2", "dev": blind, "test": blind}
    for look in (sees, blind):
        look["reward"]["1"] = look["valid"] * (101 - look["nfe"]) / 100
    results = {"world": "blocks", "heuristics": [rule], "policies": [
        {"policy": "alpha 1", "alpha": 1, "seed": 0, "looks": {"": sees, "mean": blind}}]}
    gain, = gains.gains(results)
    assert gain["mean"] == gain["reward"] and gain["mean"][0] == pytest.approx(0.505)
    assert gain["mean"][3] == pytest.approx(0.01 * 0.5 / 8 ** 0.5, rel=0.1)             # of a share of 8, half of them


def test_a_blind_rule_sees_the_same_numbers_at_other_slots():
    source, seen = torch.Generator().manual_seed(0), []
    sure, masked = torch.rand(50, 6, generator=source), torch.rand(50, 6, generator=source) < 0.6
    numbers = torch.rand(50, 6, 2, generator=source)
    for how in ("mean", "shuffled"):
        worlds.Blind(lambda *x: seen.append(x[0]), how)(sure, masked, torch.zeros(50), numbers)
    mean, other = seen
    for row, (m, a, b, c) in enumerate(zip(masked, sure, mean, other)):
        assert torch.equal(a[~m], b[~m]) and torch.equal(a[~m], c[~m]) and a[m].sort()[0].equal(c[m].sort()[0]), row
        assert not m.any() or torch.allclose(b[m], a[m].mean())
    assert (sure != other).sum() > masked.sum() / 2
