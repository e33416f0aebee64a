"""How policies are compared with heuristics."""
import pytest
import torch

from experiments.unmasking import comparison
from experiments.unmasking.worlds import BlindRule


def test_the_hull_is_what_no_mixture_beats():
    corners = [(10, 0.2), (20, 0.6), (40, 0.8)]
    below = [(30, 0.65), (20, 0.5), (50, 0.8), (15, 0.39)]
    assert comparison.hull(below + corners) == corners
    assert comparison.mixture_at(below + corners, 30) == pytest.approx(0.7)
    assert comparison.mixture_at(corners, 99) == 0.8
    assert comparison.mixture_at(corners, 10) == pytest.approx(
        0.3
    )  # half of the texts by (20, 0.6), no others


def test_the_dominated_area_by_hand():
    """Of 100 forward passes: from 20 on 0.5, from 60 on 0.9; a point that another beats adds nothing."""
    two = [(60, 0.9), (20, 0.5)]
    area = comparison.dominated_area(two, 100)
    assert area == pytest.approx((40 * 0.5 + 40 * 0.9) / 100)
    assert comparison.dominated_area([*two, (30, 0.4), (120, 1.0)], 100) == pytest.approx(area)


def evaluation(nfe, valid, length=100):
    share = sum(valid) / len(valid)
    return {
        "nfe": sum(nfe) / len(nfe),
        "valid": share,
        "valid_each": valid,
        "nfe_each": nfe,
        "length": length,
        "reward": {"0": share},
    }


def test_areas_and_gains_by_hand():
    """Two heuristics, and policies of two seeds: one as good as the better of them, faster by 20 on every
    story, the other the better one itself. All stories are alike, so that the bootstrap over them does not
    matter."""
    slow = evaluation([60] * 8, [1] * 8)
    poor = evaluation([20] * 8, [0] * 8)
    fast = evaluation([40] * 8, [1] * 8)
    rules = {"threshold:0.8 in 4, sliding": slow, "random:1 in 2": poor}
    policies = [{"policy": "alpha 0", "alpha": 0, "seed": seed, "evaluations": {"": x}}
                for seed, x in enumerate((fast, slow))]
    results = {"world": "blocks", "policies": policies,
               "heuristics": [{"rule": name, "dev": x, "test": x} for name, x in rules.items()]}
    assert comparison.best_rule(results, 0) == "threshold:0.8 in 4, sliding"
    assert [rule["rule"] for rule in comparison.rules_to_test(results)] == list(rules)
    areas = comparison.areas(results)
    assert areas["heuristics"] == pytest.approx([0.4] * 3 + [0]) and areas["random"] == [0, 0, 0, 0]
    assert areas["policies"][:3] == pytest.approx([0.5, 0.4, 0.6])
    assert areas["policies less heuristics"][:3] == pytest.approx([0.1, 0, 0.2])
    assert areas["policies less chosen"] == areas["policies less heuristics"]
    gain, = comparison.gains(results)
    assert gain["reward"] == [0, 0, 0, 0]  # at alpha 0 speed does not count
    assert gain["thresholds"][:3] == pytest.approx(
        [(1 / 3 + 0) / 2, 0, 1 / 3]
    )  # 40 of 60 steps: 2 of 3 texts
    assert gain["heuristics"] == gain["chosen"] == gain["thresholds"]
    assert gain["random"] == pytest.approx([1.0] * 3 + [0])


def test_a_policy_is_worth_more_than_itself_blind():
    """Valid twice as often, in half the time: a reward of 0.51 minus 0.005; stories and seeds alike but for
    which are valid. The standard deviation is that of the share of stories."""
    sees = evaluation([50] * 8, [1] * 8)
    blind = evaluation([100] * 8, [1, 0] * 4)
    rule = {"rule": "random:1 in 2", "dev": blind, "test": blind}
    for numbers in (sees, blind):
        numbers["reward"]["1"] = numbers["valid"] * (101 - numbers["nfe"]) / 100
    policy = {"policy": "alpha 1", "alpha": 1, "seed": 0, "evaluations": {"": sees, "mean": blind}}
    gain, = comparison.gains({"world": "blocks", "heuristics": [rule], "policies": [policy]})
    assert gain["mean"] == gain["reward"] and gain["mean"][0] == pytest.approx(0.505)
    assert gain["mean"][3] == pytest.approx(0.01 * 0.5 / 8**0.5, rel=0.1)  # of a share of 8, half of them


def test_a_blind_rule_sees_the_same_numbers_at_other_positions():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(50, 6, generator=generator)
    masked = torch.rand(50, 6, generator=generator) < 0.6
    u = torch.rand(50, 6, 2, generator=generator)
    seen = []
    for how in ("mean", "shuffled"):
        rule = BlindRule(lambda *arguments: seen.append(arguments[0]), how)
        rule(confidence, masked, torch.zeros(50), u)
    for row, (m, original, mean, shuffled) in enumerate(zip(masked, confidence, *seen)):
        assert torch.equal(original[~m], mean[~m]) and torch.equal(original[~m], shuffled[~m])
        assert original[m].sort()[0].equal(shuffled[m].sort()[0]), row
        assert not m.any() or torch.allclose(mean[m], original[m].mean())
    assert (confidence != seen[1]).sum() > masked.sum() / 2
