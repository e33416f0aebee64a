"""python -m unmasking.train: one run at a time in a folder, and numbers that cannot be."""
from pathlib import Path

import pytest

from tests.unmasking.test_train import records, run, student  # noqa: F401
from training.lock import FILE, FolderLock
from unmasking import train


def test_a_second_run_in_the_folder_is_refused(student, capsys):     # noqa: F811
    assert run("--updates=1", "--length=22") == 0
    before = Path("run/policy.jsonl").read_text()
    with FolderLock("run"):
        assert run("--updates=1", "--length=22") == 2
        assert "another run writes to run" in capsys.readouterr().err
        assert run("--updates=1", "--length=22", "--out=other") == 0
    assert Path("run/policy.jsonl").read_text() == before and len(records("other")) == 1
    assert not Path("run", FILE).exists()


@pytest.mark.parametrize("flag, message", [
    ("--lr=-1", "--lr=-1: expected a number above 0"),
    ("--alpha=-2", "--alpha=-2: expected a number from 0.0 to 1000.0"),
    ("--seed=-1", "--seed=-1: expected an integer from 0 to"),
    ("--out=", "--out=: expected a name"),
])
def test_numbers_and_names_that_cannot_be(flag, message, student, capsys):   # noqa: F811
    assert run(flag) == 2
    assert message in capsys.readouterr().err


def test_results_that_cannot_be_written_are_refused_at_once(student, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "train_policy", lambda *_: pytest.fail("training began"))
    Path("run/policy").write_text("")
    assert run() == 2
    Path("run/policy.jsonl").mkdir()
    assert run() == 2
    assert "policy.jsonl is a folder" in capsys.readouterr().err
