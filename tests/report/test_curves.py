"""The curves show exactly what the log holds, also for runs that were killed or resumed."""
import json
import warnings

import pytest

from report import curves

HEADER = {"config": {"block": 4}, "commit": "abc", "device": "cpu", "parameters": 812544}
PRETRAIN = [{"phase": "pretrain", "step": s, "tokens": 64 * s, "loss": 5.0 / s + 1} for s in range(1, 200)]
DISTIL = [{"phase": "distil", "step": s, "tokens": 48 * s, "kl": 2.0 / s, "text_nats": 2.0}
          for s in range(1, 100)]
SCORES = [("ar", 64, 1.5), ("ar", 12800, 1.25), ("student", 0, 4.0), ("student", 480, 1.375)]
EVALS = [{"phase": "eval", "of": of, "tokens": tokens, "val_nats": nats} for of, tokens, nats in SCORES]


def write(path, records, end="\n"):
    path.write_text("\n".join(map(json.dumps, records)) + end, encoding="utf-8")
    return path


def plotted_lines(axes) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def column(records, name):
    return [record["tokens"] for record in records], [record[name] for record in records]


def test_the_figure_shows_what_was_logged(tmp_path):
    header, records = curves.read(write(tmp_path / "log.jsonl", [HEADER, *PRETRAIN, *EVALS, *DISTIL]))
    assert header == HEADER
    assert records == [*PRETRAIN, *EVALS, *DISTIL]

    left, right = curves.figure(header, records).axes
    left_lines = plotted_lines(left)
    right_lines = plotted_lines(right)
    assert left_lines[0] == column(PRETRAIN, "loss")
    assert left_lines[2] == column(EVALS[:2], "val_nats")
    assert right_lines[0] == column(DISTIL, "kl")
    assert right_lines[2] == column(EVALS[2:], "val_nats")
    assert right_lines[3][1] == [1.25, 1.25], "the AR model's last score is the dashed line"
    assert (left.get_yscale(), right.get_yscale()) == ("linear", "log")

    for axes, last_score in (left, "1.25"), (right, "1.38"):
        assert "tokens" in axes.get_xlabel()
        assert "nats/token" in axes.get_ylabel()
        assert axes.get_title(loc="left")
        assert any(last_score in text.get_text() for text in axes.get_legend().get_texts())


@pytest.mark.parametrize("phases, panels", [
    ([PRETRAIN], 1), ([DISTIL], 1), ([PRETRAIN, DISTIL], 2), ([DISTIL, EVALS], 1)])
def test_each_phase_in_the_log_has_a_panel(phases, panels):
    records = [record for phase in phases for record in phase]
    axes = curves.figure(HEADER, records).axes
    assert len(axes) == panels
    assert ("distil" in axes[-1].get_xlabel()) == (DISTIL in phases)


def test_after_a_kill_only_the_incomplete_last_line_is_skipped(tmp_path):
    whole = write(tmp_path / "log.jsonl", [HEADER, *PRETRAIN]).read_text()
    last = json.dumps(PRETRAIN[-1])
    for cut in range(1, len(last) + 1):
        (tmp_path / "cut.jsonl").write_text(whole[:-1 - cut])
        assert curves.read(tmp_path / "cut.jsonl") == (HEADER, PRETRAIN[:-1])
    assert curves.read(write(tmp_path / "whole.jsonl", [HEADER, *PRETRAIN], end="")) == (HEADER, PRETRAIN)


def test_a_step_repeated_after_a_resume_counts_once():
    repeated = [{**record, "loss": 9.0} for record in PRETRAIN[50:60]]
    tokens, losses = curves.series([*PRETRAIN[:60], *repeated, *PRETRAIN[60:]], "loss", phase="pretrain")
    assert tokens == column(PRETRAIN, "loss")[0]
    assert losses == [*column(PRETRAIN[:50], "loss")[1], *[9.0] * 10, *column(PRETRAIN[60:], "loss")[1]]


@pytest.mark.parametrize("text", [
    "", "\n", "Once upon a time\n", '{"phase": "distil"}\n', "[1, 2]\n3\n", '{"config": {', "\0\xff",
    '{"config": {}}\n{"pha\n{"phase": "distil"}\n', '{"config": {}}\n[]\n'])
def test_a_file_that_is_not_a_log_is_refused(text, tmp_path):
    (tmp_path / "file").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="file.*expected a run's log.jsonl") as refused:
        curves.read(tmp_path / "file")
    assert "\n" not in str(refused.value)


def test_a_missing_log_and_a_log_without_steps_are_refused(tmp_path):
    for path in tmp_path / "log.jsonl", tmp_path:
        with pytest.raises(ValueError, match="cannot be read"):
            curves.read(path)
    with pytest.raises(ValueError, match="no training step"):
        curves.draw(write(tmp_path / "log.jsonl", [HEADER, *EVALS]), tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_smoothing_is_a_local_mean():
    values = [float((7 * i) % 13) for i in range(50)]
    assert curves.smooth(values, 0) == values
    assert curves.smooth([2.0] * 9, 3) == [2.0] * 9
    smoothed = curves.smooth(values, 5)
    assert smoothed[20] == sum(values[15:26]) / 11
    assert smoothed[0] == sum(values[:4]) / 4
    assert smoothed[49] == sum(values[44:]) / 6
    assert all(min(values) <= value <= max(values) for value in smoothed)


@pytest.mark.parametrize("kl", [0.0, float("nan"), float("inf"), 1e-9, -1e-8])
def test_unusual_values_are_drawn_without_a_warning(kl, tmp_path):
    records = [HEADER, *DISTIL[:5], *({**record, "kl": kl} for record in DISTIL[5:9])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        curves.draw(write(tmp_path / "log.jsonl", records), tmp_path / "curves.png")
        curves.draw(write(tmp_path / "log.jsonl", [HEADER, {**DISTIL[0], "kl": kl}]), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.jsonl"]
