import json

import pytest
import torch

from model.dist import Log, device_named, writable
from model.muon import SHAPES, schedule


def test_a_resumed_log_drops_the_half_line_that_a_kill_left(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"config": {}}\n{"step": 1}\n{"step": 2, "lo')
    Log(path, {"config": "another"}, go_on=True).write({"step": 2})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"config": {}}, {"step": 1}, {"step": 2}]


def test_a_new_log_begins_with_its_header(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("of another run\n")
    Log(path, {"config": 1}, go_on=False).write({"step": 1})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"config": 1}, {"step": 1}]


def test_lines_in_a_pipe(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl", {}, go_on=False)
    log.step({"phase": "distil", "step": 7, "kl": 1.0}, 120, "kl 1.000 nats")
    assert capsys.readouterr().out == "distil      7/120 | kl 1.000 nats\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(ValueError, match="--device=cuda: torch finds no such device"):
        device_named("cuda")
    assert device_named("auto").type in ("cpu", "mps")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        writable(tmp_path / "file" / "run")


@pytest.mark.parametrize("shape, half, last", [("linear", 0.5, 0.01), ("trapezoid", 1.0, 0.02), ("cosine", 0.55, 0.1),
                                               ("constant", 1.0, 1.0)])
def test_schedules(shape, half, last):
    """From a warm-up to the peak, down to the end; two groups keep their ratio."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 4.0}, {"params": [torch.zeros(1)], "lr": 1.0}])
    rate = schedule(optimizer, shape, 100, warmup=10)

    def at(step):
        rate(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(4 * optimizer.param_groups[1]["lr"])
        return optimizer.param_groups[1]["lr"]
    assert at(0) == pytest.approx(0.1 * SHAPES[shape](0)) and at(4) == pytest.approx(0.5 * SHAPES[shape](0.04))
    assert at(50) == pytest.approx(half) and at(99) == pytest.approx(last, abs=2e-3)
    assert all(at(i) >= at(i + 1) for i in range(10, 99))
