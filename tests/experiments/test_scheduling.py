import statistics

import pytest

from experiments.scheduling.placements import placements, predicted_cost, segment_pairs, spearman
from experiments.scheduling.tables import paired_error

HILL = {"t": [0.125, 0.375, 0.625, 0.875], "kl": [0.0, 2.0, 4.0, 1.5]}


def test_every_placement_has_its_share_of_light_steps():
    for steps, share in ((32, 0.25), (128, 0.25), (32, 0.5)):
        plans = placements(steps, share, HILL, 0)
        assert len(plans) == 7 and len(set(plans.values())) >= 6       # derived may equal all late
        assert all(len(p.steps()) == steps and p.steps().count("L") == share * steps for p in plans.values())


def test_placements_by_hand():
    plans = {name: "".join(plan.steps()) for name, plan in placements(8, 0.25, HILL, 0).items()}
    assert plans["sandwich (paper)"] == "LHHHHHHL" and plans["middle"] == "HHHLLHHH"
    assert (
        plans["all early"] == "LLHHHHHH" and plans["all late"] == "HHHHHHLL" and plans["evenly"] == "HHLHHHLH"
    )
    assert plans["derived"] == "HHHHHHLL"  # at t = 1/8 and 1/4, which cost 0 and 1; at t = 1 it is 1.5


def test_the_search_is_28_schedules_and_predicts_best_what_is_derived():
    found = {name: predicted_cost(plan.steps(), HILL) for name, plan in segment_pairs(32).items()}
    derived = predicted_cost(placements(32, 0.25, HILL, 0)["derived"].steps(), HILL)
    assert len(found) == 28 and min(found.values()) >= derived - 1e-12
    assert found["6 7"] == min(found.values()) and found["2 3"] == max(found.values())
    assert predicted_cost(["L"] * 4, HILL) == pytest.approx(
        (1.5 + 2.75 + 3 + 1) / 4
    )  # at t = 1, 3/4, 1/2 and 1/4


def test_spearman_by_hand():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == 1 and spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)


def test_the_error_of_a_difference_is_that_of_its_pairs():
    """If all texts have one length, it is the standard error of their differences. What all texts have in
    common does not matter, nor texts without a pair. If all texts have the same rate, there is no error,
    whatever their lengths."""
    a = [[30.0, 10], [20.0, 10], [55.0, 10], [41.0, 10]]
    b = [[28.0, 10], [25.0, 10], [50.0, 10], [39.0, 10], [9.0, 1]]
    by_hand = statistics.stdev(x - y for (x, _), (y, _) in zip(a, b)) / 10 / 2
    assert paired_error(a, b) == pytest.approx(by_hand) and paired_error(a, a) == 0
    assert paired_error([[x + 7, n] for x, n in a], b) == pytest.approx(by_hand)
    assert paired_error(
        [[3.0 * n, n] for n in (4, 9, 17)], [[2.0 * n, n] for n in (5, 8, 17)]
    ) == pytest.approx(0)
