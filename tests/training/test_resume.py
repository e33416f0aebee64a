"""Saved states are complete, and a resumed run is the uninterrupted one to the last bit."""
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_tiny
from data.corpus import story_world_corpus
from model import checkpoint
from training import cli
from training.optim import Muon
from training.resume import (
    check_writable,
    latest_state,
    load_state,
    previous_state,
    read_state,
    save_state,
    start_progress,
)

FORK = multiprocessing.get_context("fork")
FLAGS = ["--data=toy", "--pretrain_steps=2", "--warm_steps=2", "--updates_per_rollout=2", "--layers=1",
         "--width=64", "--batch=2", "--device=cpu", "--distill_steps=60", "--eval_every=1"]


def train_little(tiny, steps=3, seed=0):
    """A network and its optimizer after some updates."""
    net = tiny(seed=seed)
    optimizer = Muon(net)
    for i in range(steps):
        optimizer.zero_grad()
        net(torch.tensor([[i, i + 1, i + 2, net.mask_id]])).square().sum().backward()
        optimizer.step()
    return net, optimizer


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_saved_is_what_is_loaded(tiny, tmp_path):
    """The next update is the same too."""
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    save_state(path, net, optimizer, {"step": 3, "best": 0.1, "settings": {"lr": 1}})
    loaded, loaded_optimizer = train_little(tiny, 1, seed=5)
    assert load_state(path, loaded, loaded_optimizer, {"lr": 1})["step"] == 3
    assert equal(net.state_dict(), loaded.state_dict())
    for model, its_optimizer in ((net, optimizer), (loaded, loaded_optimizer)):
        its_optimizer.zero_grad()
        model(torch.tensor([[4, 4]])).square().sum().backward()
        its_optimizer.step()
    assert equal(net.state_dict(), loaded.state_dict())


def test_the_last_two_states_are_kept_and_a_new_run_deletes_them(tiny, tmp_path):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    for step in (1, 2, 3):
        save_state(path, net, optimizer, {"step": step})
    assert read_state(path)[1]["step"] == 3 and read_state(previous_state(path))[1]["step"] == 2
    path.unlink()                                                # as if killed between the two renamings
    assert latest_state(path) == previous_state(path)
    assert start_progress(path, {})["step"] == 0 and latest_state(path) is None


def test_changed_settings_are_printed(tiny, tmp_path, capsys):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    save_state(path, net, optimizer, {"step": 3, "settings": {"lr": 1, "processes": 2}})
    load_state(path, net, optimizer, {"lr": 1, "processes": 1})
    out = capsys.readouterr().out
    assert "from step 3" in out and "processes was 2 and is 1" in out and "lr" not in out


def test_any_flipped_bit_and_any_truncation_is_noticed(tiny, tmp_path):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    save_state(path, net, optimizer, {"step": 3})
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        place = rng.choice((rng.randrange(len(whole)), rng.randrange(2000)))
        flipped = whole[place] ^ 1 << rng.randrange(8)
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1:])
        with pytest.raises(ValueError, match="state is damaged .*rename before-state to state"):
            read_state(path)
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged"):
            read_state(path)


def test_another_network_is_refused_by_name(tiny, tmp_path):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    save_state(path, net, optimizer, {"step": 3})
    wide = tiny(width=24)
    deep = tiny(layers=3)
    for other, message in ((wide, r"wte.weight is \(11, 16\) there and \(11, 24\) here|.* there and .* here"),
                           (deep, "h.2.* is not in both")):
        with pytest.raises(ValueError, match=message):
            load_state(path, other, Muon(other), {})


def test_a_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize("what", ["state", "folder"])
def test_a_full_disk_destroys_nothing(tiny, tmp_path, what):
    """A limit on the size of files simulates it: the write really fails."""
    path = tmp_path / what
    net, optimizer = train_little(tiny)
    tokenizer = SimpleNamespace(eot=0, save=lambda folder: None)

    def save(step):
        if what == "state":
            save_state(path, net, optimizer, {"step": step})
        else:
            checkpoint.save(path, net, tokenizer, step=step)

    def save_on_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save(4)
        except ValueError as error:
            message = str(error).replace("can't", "cannot")
            os._exit(7 if "cannot be written" in message and "make room" in message else 1)
    save(3)
    process = FORK.Process(target=save_on_full_disk)
    process.start()
    process.join(30)
    assert process.exitcode == 7 and [p.name for p in tmp_path.iterdir()] == [what]
    saved = read_state(path)[1] if what == "state" else checkpoint.read_config(path)
    assert saved["step"] == 3


# whole runs -----------------------------------------------------------------------------------------

@pytest.fixture
def small_world(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    corpus = story_world_corpus(stories=100, held_out=4)
    monkeypatch.setattr(train_tiny, "open_corpus", lambda *_: corpus)
    monkeypatch.setattr(train_tiny.metrics, "matmul_rate", lambda _: 1.0)    # takes a second each time


def start_run(*flags):
    """train_tiny.py in a process of its own."""
    def run():
        sys.stdout = open(os.devnull, "w")
        os._exit(cli.run(train_tiny.main, [*FLAGS, *flags]))
    process = FORK.Process(target=run)
    process.start()
    return process


def losses_by_step(out):
    """{step: set of losses}; two losses if a step that was done twice gave different ones."""
    losses = {}
    log = Path(out, "log.jsonl")
    for line in log.read_text().splitlines() if log.exists() else ():
        if '"distil"' in line and line.endswith("}"):
            record = json.loads(line)
            losses.setdefault(record["step"], set()).add(record["loss"])
    return losses


def num_distill_records(out):
    log = Path(out, "log.jsonl")
    return log.read_text().count('"distil"') if log.exists() else 0


def test_kills_at_any_moment(small_world):
    """Twenty kills lose only the steps since the last save, and the losses stay equal to the last bit."""
    run = start_run("--out=whole")
    run.join(120)
    assert run.exitcode == 0
    state = Path("parts/state.safetensors")
    rng = random.Random(1)
    kills = 0
    saved_step = 0
    seconds_to_first_step = 1.0
    while kills < 20 and not Path("parts/summary.json").exists():
        run = start_run("--out=parts", *(["--resume"] if latest_state(state) else []))
        if kills % 4:                                            # mostly while it trains and saves
            started = time.perf_counter()
            seen = num_distill_records("parts")
            while run.is_alive() and num_distill_records("parts") == seen:
                time.sleep(0.02)
            seconds_to_first_step = time.perf_counter() - started
        run.join(rng.uniform(0, 0.2 if kills % 4 else seconds_to_first_step))
        run.kill()
        run.join()
        kills += 1
        step = read_state(latest_state(state))[1]["step"] if latest_state(state) else 0
        lost = max(losses_by_step("parts"), default=0) - step
        assert saved_step <= step and lost <= 2                  # a rollout has two updates
        saved_step = step
    assert saved_step
    run = start_run("--out=parts", "--resume")
    run.join(120)
    assert run.exitcode == 0 and losses_by_step("parts") == losses_by_step("whole")
    weights = Path("parts/opdlm/model.safetensors").read_bytes()
    assert weights == Path("whole/opdlm/model.safetensors").read_bytes()


def test_sigterm_saves_and_exits_with_143(small_world):
    run = start_run("--out=run", "--eval_every=1000")
    for _ in range(600):
        time.sleep(0.05)
        if Path("run/log.jsonl").exists() and len(losses_by_step("run")) > 3:
            break
    run.terminate()
    run.join(60)
    assert run.exitcode == 143
    assert read_state(Path("run/state.safetensors"))[1]["step"] == max(losses_by_step("run")) < 60


def test_a_state_knows_the_best_evaluation_so_far(small_world):
    """Including that of its own step: else a resumed run could replace the best student by a worse one."""
    run = start_run("--out=run", "--distill_steps=4")
    run.join(120)
    assert run.exitcode == 0
    lines = Path("run/log.jsonl").read_text().splitlines()
    evaluations = [json.loads(line) for line in lines if '"of": "student"' in line]
    evaluations = [record for record in evaluations if "gen_nats" not in record]     # of distillation only
    state = Path("run/state.safetensors")
    for path in (state, previous_state(state)):
        progress = read_state(path)[1]
        so_far = [record["val_nats"] for record in evaluations if record["tokens"] <= progress["tokens"]]
        assert progress["best"] == min(so_far)
