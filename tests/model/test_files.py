"""Invariants of model/files.py: a folder is the old one or the new one, whole; only own files are removed."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from model import files

ROOT = Path(__file__).parents[2]
OWN = ("own-*", "config.json")


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def write(folder, text, **options):
    with files.replace_folder(folder, OWN, **options) as new:
        (new / "config.json").write_text(text)
        (new / "own-weights").write_text(text)


def hidden(folder, pid, kind, name="run", host=None):
    return folder / f".{name}.{host or files.host()}.{pid}.0123abcd.{kind}"


@pytest.fixture
def dead_pid():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_another_process_runs_and_an_ended_one_does_not(dead_pid):
    assert files.is_running(os.getppid())
    assert files.is_running(10 ** 30)                            # the system cannot say: its files stay
    assert not files.is_running(os.getpid()) and not files.is_running(dead_pid)


def test_folders_of_others_stay(tmp_path):
    """Names that a careless writer would take for its temporary ones belong to the user."""
    for name in ("run.old", "run.new", "run.old2", ".run", ".run.old", ".run.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("dear")
    before = sorted(os.listdir(tmp_path))
    for text in ("one", "two"):
        write(tmp_path / "run", text)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "run"])
    assert all((tmp_path / name / "letter.txt").read_text() == "dear" for name in before)
    assert content(tmp_path / "run") == {"config.json": "two", "own-weights": "two"}


def test_files_of_others_in_a_replaced_folder_stay(tmp_path):
    write(tmp_path / "run", "one")
    (tmp_path / "run" / "own-other").write_text("one")
    (tmp_path / "run" / "notes.txt").write_text("dear")
    (tmp_path / "run" / "pictures").mkdir()
    (tmp_path / "run" / "pictures" / "own-cat").write_text("meow")
    write(tmp_path / "run", "two")
    expected = {"config.json": "two", "own-weights": "two", "notes.txt": "dear"}
    assert content(tmp_path / "run") == expected
    assert content(tmp_path / "run" / "pictures") == {"own-cat": "meow"}
    assert os.listdir(tmp_path) == ["run"]


KILLED = """
import os, sys
from functools import partial
calls = []
def counted(function, *args, **kwargs):
    calls.append(function)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    return function(*args, **kwargs)
functions = {name: getattr(os, name) for name in ("rename", "mkdir", "unlink", "rmdir")}
for name, function in functions.items():
    setattr(os, name, partial(counted, function))                # before pathlib, which has copies in 3.10
from pathlib import Path
from model import files
calls.clear()
with files.replace_folder(Path(sys.argv[1]), ("own-*", "config.json")) as new:
    for name in ("config.json", "own-weights"):
        Path(new, name).write_text("two")
        counted(id, 0)
"""


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path):
    whole = [{"config.json": text, "own-weights": text, "notes.txt": "dear"} for text in ("one", "two")]
    seen = []
    for moment in range(1, 30):
        folder = tmp_path / str(moment) / "run"
        write(folder, "one")
        (folder / "notes.txt").write_text("dear")
        command = [sys.executable, "-c", KILLED, str(folder), str(moment)]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        assert code in (0, -9)
        files.finish_swap(folder)                                # what a reader does first
        left = content(folder)
        seen.append(left["config.json"])
        assert left in whole or {**left, "notes.txt": "dear"} in whole
        write(folder, "three")
        assert os.listdir(folder.parent) == ["run"]
        assert content(folder) == {"config.json": "three", "own-weights": "three", "notes.txt": "dear"}
        if code == 0:
            break
    assert code == 0 and len(seen) > 6 and set(seen) == {"one", "two"} and seen == sorted(seen)


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path, dead_pid):
    write(tmp_path / "run", "one")
    gone = [hidden(tmp_path, dead_pid, "new"), hidden(tmp_path, dead_pid, "old")]
    stay = [
        hidden(tmp_path, os.getppid(), "new"), hidden(tmp_path, os.getppid(), "old"),    # of a living process
        hidden(tmp_path, dead_pid, "new", name="other"),         # of another folder
        hidden(tmp_path, dead_pid, "new", host="elsewhere"),     # of another machine
        tmp_path / f".run.{files.host()}.{dead_pid}.new",
    ]
    for path in gone + stay:
        path.mkdir()
        (path / "own-weights").write_text("half")
    write(tmp_path / "run", "two")
    assert not any(path.exists() for path in gone)
    assert all(content(path) == {"own-weights": "half"} for path in stay)


def test_an_error_leaves_the_old_folder_and_no_trace(tmp_path):
    write(tmp_path / "run", "one")
    with pytest.raises(ValueError, match="run cannot be written .*disk full.*content is unchanged"):
        with files.replace_folder(tmp_path / "run", OWN) as new:
            (new / "config.json").write_text("half")
            raise OSError("disk full")
    with pytest.raises(KeyboardInterrupt):
        with files.replace_folder(tmp_path / "run", OWN) as new:
            (new / "config.json").write_text("half")
            raise KeyboardInterrupt
    assert content(tmp_path / "run")["config.json"] == "one" and os.listdir(tmp_path) == ["run"]


def test_a_folder_that_cannot_take_its_place_is_one_sentence(tmp_path, monkeypatch):
    write(tmp_path / "run", "one")
    rename = os.rename

    def busy(source, target):
        if str(source).endswith(".new"):
            raise OSError("device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    with pytest.raises(ValueError, match="run cannot be written .*busy.*content is unchanged"):
        write(tmp_path / "run", "two")
    assert content(tmp_path / "run")["config.json"] == "one" and os.listdir(tmp_path) == ["run"]


def test_a_file_in_the_way_is_not_removed(tmp_path):
    (tmp_path / "run").write_text("dear")
    with pytest.raises(ValueError, match="run is not a folder: give another name"):
        write(tmp_path / "run", "one")
    with pytest.raises(ValueError, match="run/below cannot be written"):
        write(tmp_path / "run" / "below", "one")
    assert (tmp_path / "run").read_text() == "dear"


def test_a_folder_that_appears_meanwhile_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="run cannot be written .*exists already"):
        with files.replace_folder(tmp_path / "run", OWN, may_exist=False) as new:
            (new / "config.json").write_text("mine")
            (tmp_path / "run").mkdir()
    assert os.listdir(tmp_path) == ["run"] and os.listdir(tmp_path / "run") == []


@pytest.mark.parametrize("target", ["there", "missing"])
def test_a_symbolic_link_is_followed(tmp_path, target):
    disk = tmp_path / "disk" / "best"
    if target == "there":
        write(disk, "one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "best").symlink_to(disk)
    write(tmp_path / "out" / "best", "two")
    assert (tmp_path / "out" / "best").is_symlink() and content(disk)["config.json"] == "two"
    assert os.listdir(tmp_path / "out") == os.listdir(disk.parent) == ["best"]


def test_a_link_to_itself_is_one_sentence(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "run")
    with pytest.raises(ValueError, match="run cannot be written"):
        write(tmp_path / "run", "one")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, dead_pid):
    path = tmp_path / "run"
    for name in ("run.new", "run.old"):
        (tmp_path / name).write_text("dear")
    hidden(tmp_path, dead_pid, "new").write_text("half")
    with files.replace_file(path) as new:
        new.write_text("one")
    with pytest.raises(OSError, match="full"):
        with files.replace_file(path) as new:
            new.write_text("half")
            raise OSError("full")
    assert content(tmp_path) == {"run": "one", "run.new": "dear", "run.old": "dear"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_weights_have_the_permissions_of_any_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        (tmp_path / "config.json").write_text("")
        files.write_tensors(tmp_path / "weights", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()}
    assert modes == {"config.json": oct(0o666 & ~umask), "weights": oct(0o666 & ~umask)}
    assert torch.equal(load_file(tmp_path / "weights")["x"], torch.ones(2))


BAD_JSON = {
    "nested": ("[" * 200_000, "is nested too deeply"),
    "nested objects": ('{"a":' * 200_000, "is nested too deeply"),
    "said twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' twice, with different values"),
    "two files in one": ('{"a": 1}{"a": 1}', "is not JSON"),
    "a huge number": ("9" * 10_000, "is not JSON"),
    "empty": ("", "is not JSON"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "git lfs pull"),
}


@pytest.mark.parametrize("what", BAD_JSON)
def test_json_that_cannot_be_used_is_one_sentence(tmp_path, what):
    text, message = BAD_JSON[what]
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        files.read_json(tmp_path / "x.json")
    assert str(caught.value).startswith("x.json") and len(str(caught.value)) < 200


def test_a_huge_json_file_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(1 << 40)                                   # takes no space
    with pytest.raises(ValueError, match="x.json has more than"):
        files.read_json(tmp_path / "x.json")


def test_a_byte_order_mark_and_equal_repeats_do_not_matter(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "a": 1}', encoding="utf-8-sig")
    assert files.read_json(tmp_path / "x.json") == {"a": 1}
