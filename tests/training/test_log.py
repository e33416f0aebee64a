"""log.jsonl stays valid when a run is killed and resumed; steps are plain lines in a pipe."""
import json
import math
import sys

import pytest
import torch

from training import log
from training.log import Log


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_log_drops_the_partial_line_of_a_killed_run(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"config": {}}\n{"step": 1}\n{"step": 2, "lo')
    Log(path, {"config": "another"}, resume=True).write({"step": 2})
    assert records(path) == [{"config": {}}, {"step": 1}, {"step": 2}]


def test_a_new_log_begins_with_its_header(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("of another run\n")
    Log(path, {"config": 1}, resume=False).write({"step": 1})
    assert records(path) == [{"config": 1}, {"step": 1}]


def test_lines_in_a_pipe(tmp_path, capsys):
    run = Log(tmp_path / "log.jsonl", {}, resume=False)
    run.step({"phase": "distil", "step": 7, "kl": 1.0}, 120, "kl 1.000 nats")
    assert capsys.readouterr().out == "distil      7/120 | kl 1.000 nats\n"


def test_a_phase_has_one_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = Log(tmp_path / "log.jsonl", {}, resume=False)
    bars = []
    for phase, step, total in (("pretrain", 3, 4), ("pretrain", 4, 4), ("distil", 1, 9), ("distil", 2, 9)):
        run.step({"phase": phase, "step": step}, total, f"{phase} loss {step}")
        bars.append(run.bar)
        assert (run.bar.n, run.bar.total, run.bar.desc.rstrip(": ")) == (step, total, phase)
    assert bars[0] is bars[1] is not bars[2] is bars[3]
    assert bars[0].initial == 2                                  # a resumed phase starts where it stopped
    assert bars[0].disable and not bars[2].disable               # only the finished one is closed
    bars[2].close()
    said = capsys.readouterr()
    assert "\rpretrain 4/4 |" in said.err and "left, pretrain loss 4" in said.err
    assert "pretrain loss 4" in said.err and "distil loss 2" in said.err and not said.out


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    path.write_text("of the first process\n")
    monkeypatch.setattr(log, "is_first", lambda: False)
    log.Log(path, {"config": 1}, resume=False).write({"step": 1})
    assert path.read_text() == "of the first process\n"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    """JSON does not have them; other programs could not read the log."""
    path = tmp_path / "log.jsonl"
    record = {"kl": math.nan, "loss": 1.5, "eval": {"nats": [math.inf, -math.inf, 2]}, "text": "NaN"}
    Log(path, record, resume=False).write(record)

    def refuse(name):
        raise AssertionError(name)
    for line in path.read_text().splitlines():
        found = json.loads(line, parse_constant=refuse)
        assert found == record | {"kl": None, "eval": {"nats": [None, None, 2]}}


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, in a list of one number."""
    seconds = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: seconds[0])
    return seconds


def test_progress_in_a_pipe_is_a_line_at_most_once_a_minute(clock, capsys):
    progress = log.Progress("evaluation", 400)
    for second in range(1, 151):
        clock[0] = float(second)
        progress.add(2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["evaluation: 30% after 01:00, about 02:20 left",
                     "evaluation: 60% after 02:00, about 01:20 left"]
    progress.add(1000)                                           # the total was an estimate
    assert progress.line() == "evaluation: 100% after 02:30, about 00:00 left"


def test_progress_on_a_terminal_is_a_bar(clock, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress = log.Progress("evaluation", 10)
    progress.add(4)
    assert (progress.bar.n, progress.bar.total) == (4, 10)
    progress.close()
    said = capsys.readouterr()
    assert "evaluation" in said.err and not said.out


def test_forward_passes_are_counted_only_within_the_task(tiny, monkeypatch):
    done = []
    monkeypatch.setattr(log.Progress, "add", lambda self, amount: done.append(amount))
    net = tiny()
    tokens = torch.zeros(3, 5, dtype=torch.long)
    with pytest.raises(KeyboardInterrupt):
        with log.progress_of_passes("evaluation", 100, net, net):
            net(tokens)
            raise KeyboardInterrupt
    net(tokens)
    assert done == [15]
