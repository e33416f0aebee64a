"""A long run survives: what is saved is whole, and what goes on from it is what would have been."""
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
from training.resume import before, begin_states, latest_state, load_state, read_state, save_state

FORK = multiprocessing.get_context("fork")
FLAGS = ["--data=toy", "--pretrain_steps=2", "--warm_steps=2", "--updates_per_rollout=2", "--layers=1", "--width=64", "--batch=2",
         "--device=cpu", "--distill_steps=60", "--eval_every=1"]


def trained(tiny, steps=3, seed=0):
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


def test_what_is_saved_is_what_is_restored(tiny, tmp_path):
    """And the next update is the same."""
    path, (net, optimizer), (other, its) = tmp_path / "state", trained(tiny), trained(tiny, 1, seed=5)
    save_state(path, net, optimizer, {"step": 3, "best": 0.1, "settings": {"lr": 1}})
    assert load_state(path, other, its, {"lr": 1})["step"] == 3 and equal(net.state_dict(), other.state_dict())
    for a, b in ((net, optimizer), (other, its)):
        b.zero_grad()
        a(torch.tensor([[4, 4]])).square().sum().backward()
        b.step()
    assert equal(net.state_dict(), other.state_dict())


def test_the_last_two_are_kept_and_a_new_run_forgets_them(tiny, tmp_path):
    path, (net, optimizer) = tmp_path / "state", trained(tiny)
    for step in (1, 2, 3):
        save_state(path, net, optimizer, {"step": step})
    assert read_state(path)[1]["step"] == 3 and read_state(before(path))[1]["step"] == 2
    path.unlink()                                                    # killed between two renamings
    assert latest_state(path) == before(path)
    assert begin_states(path, {})["step"] == 0 and latest_state(path) is None


def test_settings_that_are_others_are_said(tiny, tmp_path, capsys):
    path, (net, optimizer) = tmp_path / "state", trained(tiny)
    save_state(path, net, optimizer, {"step": 3, "settings": {"lr": 1, "processes": 2}})
    load_state(path, net, optimizer, {"lr": 1, "processes": 1})
    said = capsys.readouterr().out
    assert "from step 3" in said and "processes was 2 and is 1" in said and "lr" not in said


def test_any_flipped_bit_and_any_cut_is_noticed(tiny, tmp_path):
    path, (net, optimizer) = tmp_path / "state", trained(tiny)
    save_state(path, net, optimizer, {"step": 3})
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(60):
        place = draw.choice((draw.randrange(len(whole)), draw.randrange(2000)))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1:])
        with pytest.raises(ValueError, match="state is damaged .*rename before-state to state"):
            read_state(path)
    for size in (0, 5, 1000, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged"):
            read_state(path)


def test_another_network_is_refused_by_name(tiny, tmp_path):
    path, (net, optimizer) = tmp_path / "state", trained(tiny)
    save_state(path, net, optimizer, {"step": 3})
    wide, deep = tiny(width=24), tiny(layers=3)
    for other, said in ((wide, r"wte.weight is \(11, 16\) there and \(11, 24\) here|.* there and .* here"),
                        (deep, "h.2.* is not in both")):
        with pytest.raises(ValueError, match=said):
            load_state(path, other, Muon(other), {})


@pytest.mark.parametrize("what", ["state", "folder"])
def test_a_full_disk_costs_nothing(tiny, tmp_path, what):
    """A limit on the size of files stands for it: the write really fails."""
    path, (net, optimizer) = tmp_path / what, trained(tiny)
    words = SimpleNamespace(eot=0, save=lambda folder: None)

    def save(step):
        if what == "state":
            save_state(path, net, optimizer, {"step": step})
        else:
            checkpoint.save(path, net, words, step=step)

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save(4)
        except ValueError as error:
            os._exit(7 if "can't be written" in str(error) and "make room" in str(error) else 1)
    save(3)
    child = FORK.Process(target=full)
    child.start()
    child.join(30)
    assert child.exitcode == 7 and [p.name for p in tmp_path.iterdir()] == [what]
    assert (read_state(path)[1] if what == "state" else checkpoint.read_config(path))["step"] == 3


# whole runs -----------------------------------------------------------------------------------------------------------

@pytest.fixture
def little(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    world = story_world_corpus(stories=100, held_out=4)
    monkeypatch.setattr(train_tiny, "open_corpus", lambda *_: world)
    monkeypatch.setattr(train_tiny.measure, "matmul_rate", lambda _: 1.0)              # a second, each time


def child(*flags):
    """A run in a process of its own."""
    def run():
        sys.stdout = open(os.devnull, "w")
        os._exit(cli.run(train_tiny.main, [*FLAGS, *flags]))
    process = FORK.Process(target=run)
    process.start()
    return process


def losses(out):
    """By step; of one that was taken twice, both."""
    made, log = {}, Path(out, "log.jsonl")
    for line in log.read_text().splitlines() if log.exists() else ():
        if '"distil"' in line and line.endswith("}"):
            record = json.loads(line)
            made.setdefault(record["step"], set()).add(record["loss"])
    return made


def steps_in(out):
    log = Path(out, "log.jsonl")
    return log.read_text().count('"distil"') if log.exists() else 0


def test_kills_at_any_moment(little):
    """Twenty of them: never more is lost than the steps since the last save, and the losses are the uninterrupted
    run's, to the last bit."""
    run = child("--out=whole")
    run.join(120)
    assert run.exitcode == 0
    state, kills, done, took, draw = Path("parts/state.safetensors"), 0, 0, 1.0, random.Random(1)
    while kills < 20 and not Path("parts/summary.json").exists():
        run = child("--out=parts", *(["--resume"] if latest_state(state) else []))
        if kills % 4:                                                # most of them while it trains and saves
            begun, seen = time.perf_counter(), steps_in("parts")
            while run.is_alive() and steps_in("parts") == seen:
                time.sleep(0.02)
            took = time.perf_counter() - begun
        run.join(draw.uniform(0, 0.2 if kills % 4 else took))
        run.kill()
        run.join()
        kills += 1
        step = read_state(latest_state(state))[1]["step"] if latest_state(state) else 0
        assert done <= step and max(losses("parts"), default=0) - step <= 2              # a rollout's updates
        done = step
    assert done
    run = child("--out=parts", "--resume")
    run.join(120)
    assert run.exitcode == 0 and losses("parts") == losses("whole")
    assert Path("parts/opdlm/model.safetensors").read_bytes() == Path("whole/opdlm/model.safetensors").read_bytes()


def test_sigterm_saves_and_is_143(little):
    flags = "--out=run", "--eval_every=1000"
    run = child(*flags)
    for _ in range(600):
        time.sleep(0.05)
        if Path("run/log.jsonl").exists() and len(losses("run")) > 3:
            break
    run.terminate()
    run.join(60)
    assert run.exitcode == 143
    assert read_state(Path("run/state.safetensors"))[1]["step"] == max(losses("run")) < 60


def test_a_state_knows_the_best_look_so_far(little):
    """Its own included, or what goes on from it could put a worse student in the best one's place."""
    run = child("--out=run", "--distill_steps=4")
    run.join(120)
    assert run.exitcode == 0
    looks = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines() if '"of": "student"' in line]
    looks = [look for look in looks if "gen_nats" not in look]                           # of the conversion itself
    for path in (Path("run/state.safetensors"), before(Path("run/state.safetensors"))):
        noted = read_state(path)[1]
        assert noted["best"] == min(look["val_nats"] for look in looks if look["tokens"] <= noted["tokens"])
