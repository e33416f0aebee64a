"""One run at a time in a folder; the lock of a run that has ended does not stop the next."""
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from training import lock
from training.lock import FILE, FolderLock

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FORK = multiprocessing.get_context("fork")
PROGRAM = """
import signal, sys, time
from training import cli, dist
from training.lock import FolderLock
from training.resume import SigtermFlag
signal.signal(signal.SIGINT, signal.default_int_handler)    # jobs in the background begin by ignoring it
def main(argv):
    dist.start("cpu")
    with SigtermFlag() as sigterm, FolderLock(argv[0]):
        dist.print0("locked")
        time.sleep(60 if "wait" in argv else 0)
    return sigterm.exit_code
dist.end(cli.run(main))
"""


def start(folder, *args):
    """A process that locks a folder."""
    words = [sys.executable, "-c", PROGRAM, str(folder), *args]
    return subprocess.Popen(words, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_holder(folder):
    process = start(folder, "wait")
    assert process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_is_refused_and_the_first_not_disturbed(tmp_path):
    first = start_holder(tmp_path)
    second = start(tmp_path)
    out, error = second.communicate(timeout=120)
    assert second.returncode == 2 and out == "" and error.count("\n") == 1
    message = f"another run writes to {tmp_path} (process {first.pid} on {socket.gethostname()})"
    assert message in error and "use another --out" in error
    assert json.loads((tmp_path / FILE).read_text())["pid"] == first.pid
    first.kill()
    first.communicate()


@pytest.mark.parametrize("sent, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_removes_its_lock(sent, code, tmp_path):
    run = start_holder(tmp_path / "run")
    run.send_signal(sent)
    _, error = run.communicate(timeout=120)
    assert run.returncode == code and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []                        # the folder was made by the run, and empty


def test_a_killed_run_leaves_a_lock_that_the_next_takes_over(tmp_path, capsys):
    run = start_holder(tmp_path)
    run.kill()
    deadline = time.perf_counter() + 20
    while lock.start_time(run.pid) not in ("ended", None) and time.perf_counter() < deadline:
        time.sleep(0.01)                                         # its parent has not waited for it
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "takes over" in said
    run.communicate()
    assert list(tmp_path.iterdir()) == []


def write_lock(folder, **changes):
    content = json.dumps(lock.describe_process() | changes)
    (folder / FILE).write_text(content)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times need /proc")
def test_another_program_with_the_same_number_is_not_the_run(tmp_path):
    write_lock(tmp_path, started="another boot 123")             # our own number, but another start
    with FolderLock(tmp_path):
        pass
    write_lock(tmp_path)
    with pytest.raises(ValueError, match="another run writes"), FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("pid", [0, -1, 2**22 + 1, 2**40, 10**30])
def test_a_process_that_does_not_exist(pid, tmp_path):
    write_lock(tmp_path, pid=pid)
    with FolderLock(tmp_path):
        pass


def test_a_run_on_another_machine_may_still_run(tmp_path):
    write_lock(tmp_path, host="elsewhere", pid=2**22 + 1)
    with pytest.raises(ValueError, match=rf"on elsewhere\).*If it no longer runs, delete .*{FILE}"):
        FolderLock(tmp_path).__enter__()


def test_a_file_of_the_user_is_not_removed_and_an_empty_lock_is(tmp_path):
    for content in ("my notes", "[]", "{}", '{"pid": null, "host": "a", "started": null}'):
        (tmp_path / FILE).write_text(content)
        with pytest.raises(ValueError, match="is not the lock file of a run"):
            FolderLock(tmp_path).__enter__()
        assert (tmp_path / FILE).read_text() == content
    (tmp_path / FILE).write_text("")                             # of a machine that crashed
    with FolderLock(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def test_a_lock_that_is_not_ours_stays(tmp_path):
    with FolderLock(tmp_path):
        (tmp_path / FILE).write_text("of another run")
    assert (tmp_path / FILE).read_text() == "of another run"


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")
    monkeypatch.setattr(os, "link", refuse)
    with FolderLock(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [FILE]
        with pytest.raises(ValueError, match="another run writes"):
            FolderLock(tmp_path).__enter__()
    assert list(tmp_path.iterdir()) == []


def hold(folder, results):
    try:
        with FolderLock(folder):
            results.put(1)
            time.sleep(1)
    except ValueError:
        results.put(0)


def test_of_many_runs_that_start_at_once_one_gets_a_stale_lock(tmp_path):
    for _ in range(5):
        write_lock(tmp_path, pid=2**22 + 1)
        results = FORK.Queue()
        runs = [FORK.Process(target=hold, args=(tmp_path, results)) for _ in range(6)]
        for run in runs:
            run.start()
        got = [results.get(timeout=120) for _ in runs]
        for run in runs:
            run.join(30)
        assert sorted(got) == [0] * 5 + [1]
        assert list(tmp_path.iterdir()) == []


def test_all_processes_of_a_group_learn_of_a_refusal(tmp_path):
    script = tmp_path / "locks.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script,
               tmp_path / "run"]
    options = {"env": ENV, "text": True, "capture_output": True, "timeout": 200}
    with FolderLock(tmp_path / "run"):
        run = subprocess.run(command, **options)
        assert run.returncode and "locked" not in run.stdout
        assert run.stderr.count("error: another run writes to") >= 1
    run = subprocess.run(command, **options)
    assert run.returncode == 0 and run.stdout.count("locked") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["locks.py"]
