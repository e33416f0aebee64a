import json
import math
from dataclasses import replace

import pytest
import torch

import opdlm
from decoding import reveal
from experiments.ablations import run as ablations
from experiments.ablations.rows import ROWS, job_name
from experiments.common import changes, conversion
from experiments.common.job import Job, config_of
from experiments.common.results import (
    gap_to_teacher,
    interpolate_at_cost,
    load_results,
    run_info,
    spent_to_reach,
    tokens_cell,
)
from experiments.decoding.tables import aup
from experiments.methods import run as methods
from model.masks import Layout
from report.compare import write_json


def point(tokens, *samplers):
    """An evaluation after so many tokens; a sampler is (name, tokens per forward pass, gen_nats)."""
    return {"tokens": tokens} | {
        name: {"tok_per_fwd": cost, "gen_nats": nats} for name, cost, nats in samplers
    }


# 1. numbers read off evaluations --------------------------------------------------------------------------

def test_a_bound_is_reached_between_two_points():
    points = [{"tokens": 100, "gap": 0.4}, {"tokens": 400, "gap": 0.2}, {"tokens": 800, "gap": 0.1}]

    def gap(point):
        return point["gap"]
    tokens, reached = spent_to_reach(points, gap, 0.3)
    assert reached and tokens == pytest.approx(200)                        # the middle, over the logarithm
    assert spent_to_reach(points, gap, 0.5) == (100, True)
    assert spent_to_reach(points, gap, 0.05) == (800, False)
    assert spent_to_reach(points, gap, 0.1)[0] == pytest.approx(800)


def test_a_row_with_a_seed_that_does_not_reach_the_bound_is_a_lower_bound():
    assert tokens_cell([(1000, True), (3000, True)]) == "2k (1 to 3)"
    assert tokens_cell([(1000, True), (3000, False)]) == "> 2k"


def test_numbers_at_equal_cost_lie_between_their_neighbours():
    evaluation = point(1, ("a", 1.0, 0.3), ("b", 2.0, 0.5), ("c", 4.0, 0.9), ("other", 1.5, 9.0))
    assert interpolate_at_cost(evaluation, "gen_nats", 1.5, ("c", "b", "a")) == pytest.approx(0.4)
    assert interpolate_at_cost(evaluation, "gen_nats", 2.0, ("a", "b", "c")) == 0.5
    assert interpolate_at_cost(evaluation, "gen_nats", 9.0, ("a", "b")) == 0.5
    assert interpolate_at_cost(evaluation, "gen_nats", 0.5, ("b", "a")) == 0.3
    gap = gap_to_teacher({"teacher": {"gen_nats": 0.1}}, "gen_nats", 1.5, ("a", "b"))
    assert gap(evaluation) == pytest.approx(0.3)


def test_aup_by_hand():
    """80 % from 0 to 1 token per forward pass, then a trapezoid; points more than 5 below the slowest do
    not count."""
    assert aup([(1, 80)], 80) == 80
    assert aup([(2, 80), (1, 80)], 80) == pytest.approx(160)
    less = 76 * math.exp(-3 * (1 - 76 / 80))
    assert aup([(1, 80), (2, 76), (4, 74.9)], 80) == pytest.approx(80 + (80 + less) / 2)
    assert aup([(1, 80), (2, 90)], 80) == pytest.approx(80 + (80 + 90) / 2)  # above the best: not weighted


# 2. results files -----------------------------------------------------------------------------------------

def test_older_results_are_read_with_the_names_of_today(tmp_path):
    settings = {
        "name": "ours x4, ar, lr 0.01",
        "seed": 0,
        "flags": {"text": "data", "updates": 1},
        "points": [4],
        "looks": ["reveal=leftmost:1"],
        "recipes": None,
        "start": None,
        "stories": 8,
        "pretrain": None,
    }
    point = {"step": 4, "places": 12, "reveal=leftmost:1": {"valid": 0.5}}
    file = tmp_path / "old.json"
    write_json(file, {"command": "python -m experiments.methods --name=methods",
                      "runs": [{"settings": settings, "points": [point]}]})
    results = load_results(file)
    run, = results["runs"]
    assert results["command"] == "python -m experiments.methods.run"
    assert run["points"] == [{"step": 4, "loss_positions": 12, "reveal=leftmost:1": {"valid": 0.5}}]
    assert run["settings"]["name"] == "warm_start_x4, ar, lr 0.01"
    assert run["settings"]["flags"] == {"source": "data", "updates_per_rollout": 1}
    assert run["settings"]["eval_steps"] == [4] and run["settings"]["samplers"] == ["reveal=leftmost:1"]
    assert set(run["settings"]) == {
        "name",
        "seed",
        "flags",
        "eval_steps",
        "samplers",
        "recipes",
        "prepare_student",
        "stories",
        "teacher_flags",
    }


def test_a_results_file_names_the_command_without_paths():
    info = run_info("methods", methods.Options(data="/home/me/stories.txt", rows="opdlm,kd", seeds=1))
    assert info["command"] == "python -m experiments.methods.run --data=FILE.txt --rows=opdlm,kd --seeds=1"
    assert "stories.txt" not in json.dumps(info) and info["options"]["updates"] == 480


# 3. conversions -------------------------------------------------------------------------------------------

def test_the_mean_of_weights_is_the_weighted_mean():
    """Of n updates the k-th has about the weight 10 (k / n)^9 / n: the power mean's."""
    net = torch.nn.Linear(1, 1)
    mean = torch.nn.Linear(1, 1)
    n = 400
    for step in range(1, n + 1):
        torch.nn.init.constant_(net.weight, step / n)
        conversion.update_mean(mean, net, step)
    assert mean.weight.item() == pytest.approx(10 / 11, abs=2e-3)          # the integral of 10 x^9 x
    conversion.update_mean(mean, net, 1)
    assert mean.weight.item() == net.weight.item()  # the first update replaces what was there


def recipe(**more):
    return opdlm.Recipe(
        opdlm.student_text,
        opdlm.visited,
        opdlm.teacher_probs,
        opdlm.mean_of_masked,
        Layout(3),
        10,
        reveal.parse("static:1"),
        batch=2,
        max_prompt=2,
        **more,
    )


def test_recipes_take_turns(tiny, monkeypatch):
    """One per rollout of two updates; the last rollout has one."""
    seen = []

    def train(student, teacher, data, recipe, optimizer, length, steps):
        seen.append((recipe.layout.block, list(steps)))
        return iter([{"step": step + 1} for step in steps])
    monkeypatch.setattr(opdlm, "train", train)
    net = tiny()
    config = config_of(Job("", 0, {"updates_per_rollout": 2}, (7,)))
    two_updates = recipe(updates_per_rollout=2)
    recipes = [two_updates, changes.mixed_blocks(two_updates, 4)[1]]
    list(conversion.train_updates(net, net, None, recipes, config))
    assert seen == [(3, [0, 1]), (8, [2, 3]), (3, [4, 5]), (8, [6])]


def test_a_finished_conversion_is_read_and_another_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.common.job.WORK", tmp_path)
    job = Job("a, b", 1, {"lr": 0.1}, (1,), recipes=changes.mixed_blocks)
    write_json(job.file, {"settings": job.settings, "x": 1})
    assert conversion.convert(job)["x"] == 1 and [p.name for p in job.file.parent.iterdir()] == ["a,b-1.json"]
    monkeypatch.setattr(conversion, "open_job", lambda job: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        conversion.convert(replace(job, flags={"lr": 0.2}))


# 4. changes of a recipe -----------------------------------------------------------------------------------

@pytest.mark.parametrize("divergence", [changes.reverse_kl, changes.jensen_shannon])
def test_divergences_by_hand(divergence):
    q = torch.tensor([[0.5, 0.25, 0.25]])
    p = torch.tensor([[0.25, 0.5, 0.25]])
    middle = (p + q) / 2

    def kl(a, b):
        return (a * (a / b).log()).sum().item()
    expected = kl(p, q) if divergence is changes.reverse_kl else (kl(p, middle) + kl(q, middle)) / 2
    assert divergence(q, p.log() + 3).item() == pytest.approx(expected, rel=1e-5)
    assert divergence(q, q.log()).item() == pytest.approx(0, abs=1e-6)
    assert divergence(torch.tensor([[1.0, 0, 0]]), p.log()).isfinite().all()


def test_every_state_of_every_text(tiny):
    """Each text K times; copy k masks the positions of step k and later, k = 0 .. K - 1: the union of all
    states."""
    changed = changes.every_state(recipe(), 1)[0]
    net = tiny()
    rows = torch.randint(0, 10, (6, 12), generator=torch.Generator().manual_seed(0))
    text = changed.source(net, net, rows, 2, 9, opdlm.uniforms(0, 1, range(6), (11, 1)), changed)
    assert changed.batch == 6 and len(text.tokens) == 6
    assert torch.equal(text.tokens[0], text.tokens[2]) and not torch.equal(text.tokens[2], text.tokens[3])
    order = text.order[:, 2:]
    masked = changed.states(order, text.response_mask[:, 2:], None, 3)
    for row in range(6):
        assert torch.equal(masked[row], order[row] >= row % 3)


def test_every_prefix_of_every_text(tiny):
    """As many rows as before, of a third of the texts; a block's copies mask its positions once, twice,
    three times."""
    plain = replace(recipe(), source=opdlm.data_text, states=opdlm.prefix_shown, batch=6)
    changed = changes.every_prefix(plain, 1)[0]
    net = tiny()
    rows = torch.randint(0, 10, (6, 11), generator=torch.Generator().manual_seed(0))
    text = changed.source(net, net, rows, 2, 9, opdlm.uniforms(0, 1, range(6), (11, 1)), changed)
    assert torch.equal(text.tokens, rows[[0, 0, 0, 3, 3, 3]]) and changed.batch == 6
    masked = changed.states(text.order[:, 2:], text.response_mask[:, 2:], None, 3)
    assert masked[:3].sum(0).tolist() == masked[3:].sum(0).tolist() == [1, 2, 3] * 3
    shown_after_a_mask = masked[:, 1:] < masked[:, :-1]
    assert not shown_after_a_mask[:, [0, 1, 3, 4, 6, 7]].any()


def test_part_of_the_rollouts_on_stories():
    recipes = changes.stories_first(0.25, recipe(), 8)
    assert [r.source is opdlm.data_text for r in recipes] == [True] * 2 + [False] * 6
    assert recipes[0].states is opdlm.prefix_shown


# 5. the rows of tables ------------------------------------------------------------------------------------

def test_every_row_of_the_ablations_is_evaluated_with_its_samplers():
    jobs = {job.name: job for job in ablations.jobs_of(ablations.Options())}
    for name, row in ROWS.items():
        job = jobs[job_name(name)]
        assert set(row.samplers) <= set(job.samplers)
        assert {**job.flags, "block": 0} == {**row.flags, "block": 0}
    files = [job.file for job in ablations.jobs_of(ablations.Options())]
    assert len(files) == len(set(files)) == 3 * len(jobs)


@pytest.mark.parametrize("name", list(methods.flags_of_rows(methods.Options())))
def test_every_row_of_the_methods_is_flags_of_the_command(name):
    flags = methods.flags_of_rows(methods.Options())[name]
    config = config_of(Job(name, 0, flags, (4,)), "reveal=leftmost:0.5 block=8")
    assert config.block == 8 and config.reveal == "leftmost:0.5" and config.warm_steps == 0
    assert [getattr(config, dial) for dial in methods.DIALS] == [flags[dial] for dial in methods.DIALS]
