import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data import story_world
from tests.training import worker
from training.dist import Log, SkipNonFinite, find_device
from training.optim import SHAPES, lr_schedule
from training.resume import writable

ROOT = Path(__file__).parents[2]


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
        find_device("cuda")
    assert find_device("auto").type in ("cpu", "mps")


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written"):
        writable(tmp_path / "file" / "run")


@pytest.mark.parametrize("shape, half, last", [("linear", 0.5, 0.01), ("trapezoid", 1.0, 0.02), ("cosine", 0.55, 0.1),
                                               ("constant", 1.0, 1.0)])
def test_schedules(shape, half, last):
    """From a warm-up to the peak, down to the end; two groups keep their ratio."""
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 4.0}, {"params": [torch.zeros(1)], "lr": 1.0}])
    rate = lr_schedule(optimizer, shape, 100, warmup=10)

    def at(step):
        rate(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(4 * optimizer.param_groups[1]["lr"])
        return optimizer.param_groups[1]["lr"]
    assert at(0) == pytest.approx(0.1 * SHAPES[shape](0)) and at(4) == pytest.approx(0.5 * SHAPES[shape](0.04))
    assert at(50) == pytest.approx(half) and at(99) == pytest.approx(last, abs=2e-3)
    assert all(at(i) >= at(i + 1) for i in range(10, 99))


# several processes ----------------------------------------------------------------------------------------------------

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(processes, script):
    """What runs a script in so many processes of this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*torchrun, str(script)] if processes > 1 else [sys.executable, str(script)]


def torchrun(processes, script, *args, **how):
    """The finished run."""
    run = [*command(processes, script), *map(str, args)]
    return subprocess.run(run, capture_output=True, text=True, env=ENV, **how)


def converted(folder, passes=1, start=0, stop=4):
    folder.mkdir(exist_ok=True)
    run = torchrun(2, ROOT / "tests/training/worker.py", folder, passes, start, stop, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return worker.convert(tmp_path_factory.mktemp("one"))


def assert_same(a, b):
    for x, y in zip(a["records"], b["records"], strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    for name, grad in a["grads"].items():
        assert torch.allclose(torch.tensor(grad), torch.tensor(b["grads"][name]), atol=1e-6, rtol=1e-4), name


def test_two_processes_are_one(one, two):
    """The same texts, losses and gradients; and their rollouts did take different numbers of forwards."""
    assert_same(one, two)
    (alone,), (left, right) = one["processes"], two["processes"]
    for rows, a, b in zip(alone, left, right, strict=True):          # of two updates: each process has half of each
        both = [a["tokens"][:2], b["tokens"][:2], a["tokens"][2:], b["tokens"][2:]]
        assert [row for part in both for row in part] == rows["tokens"]
    assert any(a["calls"] != b["calls"] for a, b in zip(left, right))


def test_passes_do_not_matter(one, tmp_path):
    assert_same(one, worker.convert(tmp_path, passes=2))
    assert_same(one, worker.convert(tmp_path, passes=4))


def test_passes_in_two_processes(one, tmp_path):
    assert_same(one, converted(tmp_path, passes=2))


def test_a_state_of_two_processes_is_gone_on_from_in_one_and_in_two(one, tmp_path):
    converted(tmp_path, stop=2)
    shutil.copytree(tmp_path, tmp_path / "b")
    assert_same(worker.convert(tmp_path, steps=range(2, 4)), {**one, "records": one["records"][2:]})
    assert_same(converted(tmp_path / "b", start=2), {**one, "records": one["records"][2:]})


SHORT = ("--data=stories.txt", "--vocab=300", "--pretrain_steps=30", "--pretrain_batch=4", "--warm_steps=32", "--updates_per_rollout=2",
         "--layers=1", "--width=64", "--length=64", "--batch=4", "--eval_every=2", "--distill_steps=40", "--device=cpu",
         "--sample_prompt=One day")


def distilled(folder):
    """The log's records, without a half line at its end."""
    log = folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [record for record in map(json.loads, lines) if record.get("phase") == "distil"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with stories, and the whole command's run on them in one process, called 1."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "stories.txt").write_text("<|endoftext|>".join(story_world.story(seed) for seed in range(300)))
    made = torchrun(1, ROOT / "train_tiny.py", *SHORT, "--out=1", cwd=folder, timeout=200)
    assert made.returncode == 0, made.stderr
    return folder


def assert_same_runs(a, b):
    """They have learnt the same, and something: on stories to rounding; then a token drawn otherwise is enough."""
    one, two = ({r["step"]: r["loss"] for r in distilled(folder)} for folder in (a, b))
    assert one.keys() == two.keys() == set(range(1, 41))
    assert [two[i] for i in range(1, 33)] == pytest.approx([one[i] for i in range(1, 33)], rel=0.01)
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (a, b))
    for name in one:
        assert two[name]["val_nats"] == pytest.approx(one[name]["val_nats"], abs=0.005)
    assert abs(one["after"]["val_nats"] - one["before"]["val_nats"]) > 0.02


def test_the_whole_command_in_two_processes(alone):
    made = torchrun(2, ROOT / "train_tiny.py", *SHORT, "--out=2", cwd=alone, timeout=200)
    assert made.returncode == 0, made.stderr
    assert_same_runs(alone / "1", alone / "2")
    looks = [(alone / name / "log.jsonl").read_text().count('"watch"') for name in "12"]
    assert made.stdout.count("forwards | One day") == looks[0] == looks[1] > 10          # only the first process speaks


def test_from_a_checkpoint_one_of_two_killed_and_gone_on_with(alone):
    """From GPT-2's layout; what it leaves can be sampled."""
    script = [*command(2, ROOT / "train_tiny.py"), *SHORT, "--init=1/ar", "--lr=0.02", "--out=3"]
    how = {"cwd": alone, "env": ENV, "capture_output": True, "text": True, "timeout": 200}
    run = subprocess.Popen(script, cwd=alone, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and len(distilled(alone / "3")) < 9:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert "SIGKILL" in run.communicate(timeout=60)[1] and run.returncode
    again = subprocess.run([*script, "--resume"], **how)
    assert again.returncode == 0 and "going on from step" in again.stdout
    assert_same_runs(alone / "1", alone / "3")
    said = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt=3", "--prompt=One day", "--length=8"], **how)
    assert said.returncode == 0 and said.stdout.startswith("One day")


def test_a_process_that_dies_ends_the_run(tmp_path):
    """With a message, and soon: nobody waits for it."""
    script = tmp_path / "dies.py"
    script.write_text("import os, signal, torch, torch.distributed as d\nfrom model import dist\ndist.start('cpu')\n"
                      "if not dist.is_first():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
                      "dist.from_all(1)\nprint('went on')\n")
    run = torchrun(2, script, timeout=60)
    assert run.returncode and "went on" not in run.stdout and "SIGKILL" in run.stderr


def test_rows_that_can_t_be_shared(tmp_path):
    script = tmp_path / "shares.py"
    script.write_text("from model import dist\ndist.start('cpu')\ndist.share(range(3))\n")
    assert "3 rows can't be shared evenly by 2 processes" in torchrun(2, script, timeout=60).stderr


# gradients ------------------------------------------------------------------------------------------------------------

def careful(passes=1):
    p = torch.nn.Parameter(torch.zeros(2))
    return p, SkipNonFinite(torch.optim.SGD([p], 1.0), passes)


def backward(p, optimizer, gradient):
    optimizer.zero_grad()
    (p * torch.tensor(gradient)).sum().backward()
    optimizer.step()


def test_a_gradient_that_is_not_finite_is_left_out(capsys):
    p, optimizer = careful()
    for gradient in ([1.0, 2.0], [float("nan"), 1.0], [1.0, float("inf")], [1.0, 1.0]):
        backward(p, optimizer, gradient)
    assert p.tolist() == [-2.0, -3.0] and optimizer.skipped == 2
    assert capsys.readouterr().out.count("not finite") == 2


def test_ten_in_a_row_stop_the_run():
    p, optimizer = careful()
    for _ in range(2):
        for _ in range(9):
            backward(p, optimizer, [float("nan"), 0.0])
        if optimizer.skipped == 9:
            backward(p, optimizer, [0.0, 0.0])                       # one that is finite begins the count anew
    with pytest.raises(ValueError, match="ten steps in a row"):
        backward(p, optimizer, [float("nan"), 0.0])


def test_passes_are_summed():
    p, optimizer = careful(passes=3)
    for gradient in ([1.0, 0.0], [2.0, 0.0], [0.0, 5.0], [1.0, 1.0]):
        backward(p, optimizer, gradient)
    assert p.tolist() == [-3.0, -5.0]


# compiled blocks ------------------------------------------------------------------------------------------------------

def test_compiled_blocks_are_the_same_and_share_what_is_compiled(monkeypatch, tmp_path, caplog):
    """However many there are. By the compiler's front end alone, which counts, and needs no C++."""
    import torch._dynamo as dynamo
    plain = worker.convert(tmp_path)["records"]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counts = []
    for layers in (2, 12):
        dynamo.reset()
        dynamo.utils.counters.clear()
        monkeypatch.setattr(worker, "LAYERS", layers)
        made = worker.convert(tmp_path, compile=True)["records"]
        counts.append(dynamo.utils.counters["stats"]["unique_graphs"])
        if layers == 2:
            assert all(a == pytest.approx(b, rel=1e-9) for a, b in zip(plain, made, strict=True))
    assert max(counts) < 2 * 8, counts                              # two kinds of blocks
    assert "recompile_limit" not in caplog.text                     # of one kind, at 8 it gives up
