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
    RunState,
    SigtermFlag,
    check_results,
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
    (tmp_path / "state.123.part").write_text("")                 # of a run killed while it wrote
    (tmp_path / "state.notes.part").write_text("")               # not ours
    path.unlink()                                                # as if killed between the two renamings
    assert latest_state(path) == previous_state(path)
    assert start_progress(path, {})["step"] == 0 and latest_state(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["state.notes.part"]


def test_a_state_has_the_permissions_of_any_new_file(tiny, tmp_path):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny, 1)
    for umask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        save_state(path, net, optimizer, {"step": 1})
        os.umask(before)
        assert path.stat().st_mode & 0o777 == mode
    assert read_state(path)[1] == {"step": 1}


def resume_step(path, tiny):
    net, optimizer = train_little(tiny, 1, seed=5)
    return load_state(path, net, optimizer, {})["step"]


@pytest.mark.parametrize("damage", ["", "x", "half"])
def test_a_damaged_state_is_replaced_by_the_one_before(damage, tiny, tmp_path, capsys):
    """In one line. The whole state stays the one before the next, whenever the resumed run is killed."""
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    for step in (1, 2):
        save_state(path, net, optimizer, {"step": step, "settings": {}})
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2] if damage == "half" else damage.encode())
    assert resume_step(path, tiny) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "state is damaged (" in lines[0] and f"{previous_state(path)}" in lines[0]
    assert lines[1].startswith("resuming from step 1;")
    assert latest_state(path) == previous_state(path)            # killed now, it is resumed again
    save_state(path, net, optimizer, {"step": 2, "settings": {}})
    assert read_state(path)[1]["step"] == 2 and read_state(previous_state(path))[1]["step"] == 1


def test_without_a_whole_state_the_files_are_named(tiny, tmp_path):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    for step in (1, 2):
        save_state(path, net, optimizer, {"step": step, "settings": {}})
    advice = "Restore one of these files from a copy, or start again without --resume"
    previous_state(path).write_text("")
    assert resume_step(path, tiny) == 2                          # the one before is not even read
    path.unlink()
    with pytest.raises(ValueError, match=rf"state does not exist, and .*before-state is damaged .*{advice}"):
        resume_step(path, tiny)
    path.write_text("")
    with pytest.raises(ValueError, match=rf"state is damaged .*, and .*before-state is damaged .*{advice}"):
        resume_step(path, tiny)
    previous_state(path).unlink()
    with pytest.raises(ValueError, match=rf"state is damaged .*before-state does not exist.*{advice}"):
        resume_step(path, tiny)
    assert path.exists()


def test_a_state_that_may_not_be_read_is_not_called_damaged(tiny, tmp_path):
    path = tmp_path / "state"
    path.mkdir()
    with pytest.raises(OSError):
        resume_step(path, tiny)
    assert path.is_dir()


@pytest.mark.parametrize("linked", [["state"], ["before-state"], ["state", "before-state"]])
def test_a_linked_state_is_written_through_the_link(linked, tiny, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "state"
    for name in linked:
        path.with_name(name).symlink_to(disk / name)
    net, optimizer = train_little(tiny)
    assert start_progress(path, {}) and path.with_name(linked[0]).is_symlink()
    for step in (1, 2, 3):
        save_state(path, net, optimizer, {"step": step, "settings": {}})
    assert all(path.with_name(name).is_symlink() for name in linked)
    assert read_state(disk / linked[0])[1]["step"] == (3 if "state" in linked else 2)
    assert resume_step(path, tiny) == 3
    path.resolve().write_text("")
    assert resume_step(path, tiny) == 2


def test_results_that_could_not_be_written_are_refused(tmp_path):
    out = tmp_path / "out"
    disk = tmp_path / "disk"
    (out / "whole").mkdir(parents=True)
    (disk / "empty").mkdir(parents=True)
    (out / "whole/config.json").write_text("{}")
    (out / "mine").mkdir()
    (out / "mine/notes.txt").write_text("")
    (out / "file").write_text("")
    for name, target in (("link", disk / "empty"), ("new", disk / "later"), ("broken", disk / "no/where"),
                         ("loop", out / "loop"), ("mount", "/proc")):
        (out / name).symlink_to(target)
    check_results(out, ("whole", "link", "new", "missing"), ("file", "new", "missing"))
    for name, message in (("mine", "it is not a checkpoint"), ("file", "is not a folder"),
                          ("broken", "no does not exist or cannot be written"), ("mount", ""),
                          ("loop", "")):
        with pytest.raises(ValueError, match=f"^{out / name} .*{message}"):
            check_results(out, (name,), ())
    for name, message in (("mine", "is a folder"), ("broken", "no does not exist or cannot be written")):
        with pytest.raises(ValueError, match=f"^{out / name} .*{message}"):
            check_results(out, (), (name,))


def test_changed_settings_are_printed(tiny, tmp_path, capsys):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    save_state(path, net, optimizer, {"step": 3, "settings": {"lr": 1, "processes": 2}})
    load_state(path, net, optimizer, {"lr": 1, "processes": 1})
    out = capsys.readouterr().out
    assert "from step 3" in out and "processes was 2 and is 1" in out and "lr" not in out


def test_a_resumed_run_continues_in_its_phase_with_the_new_settings(tiny, tmp_path):
    path = tmp_path / "state"
    net, optimizer = train_little(tiny)
    run = RunState(path, {"lr": 1}, resume=False)
    assert run.saved_phase is None
    run.start()
    run.start_phase("pretrain", net, optimizer)
    run.save(net, optimizer)
    resumed = RunState(path, {"lr": 2}, resume=True)
    assert resumed.saved_phase == "pretrain"
    for phase in ("distil", "pretrain"):                         # only the saved phase is loaded
        other, other_optimizer = train_little(tiny, 1, seed=5)
        resumed.start_phase(phase, other, other_optimizer)
        assert equal(net.state_dict(), other.state_dict()) == (phase == "pretrain")
        resumed.save(other, other_optimizer)
        progress = read_state(path)[1]
        assert progress["phase"] == phase and progress["settings"] == {"lr": 2}
        save_state(path, net, optimizer, {**progress, "settings": {"lr": 1}})
    save_state(path, net, optimizer, {"step": 3})                # an older state has no phase
    older = RunState(path, {}, resume=True)
    assert older.saved_phase == older.progress["phase"] == "distil"


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
        with pytest.raises(ValueError, match=r"state is damaged \(.+\)$"):
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
    for other, message in ((wide, r"mask_vector is \(16,\) there and \(24,\) here"),
                           (deep, r"h\.2\.\S+ is not in both")):
        with pytest.raises(ValueError, match=f"^{path} is of another network, {message}"):
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
    tokenizer = SimpleNamespace(bos=0, eos=(0,), save=lambda folder: None)

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
            advice = "make room" if what == "state" else "free some space"
            os._exit(7 if "cannot be written" in message and advice in message else 1)
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


def test_a_run_that_saves_first_says_that_it_received_the_signal(capfd):
    with SigtermFlag() as sigterm:
        sigterm.saves_first = True
        assert not sigterm
        os.kill(os.getpid(), signal.SIGTERM)
        assert sigterm
    assert capfd.readouterr().err == "SIGTERM: the run stops at its next save point\n"
    assert sigterm.exit_code == 0
