import ast
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import tokenizer
from model import hub
from model.gpt import GPT, GPTConfig
from model.masks import Layout

TOK = tokenizer.word_level(["One", " ball", "."])
STUDENT = Layout(4, 4, 0)
SOURCES = [p for folder in (".", "model", "report", "data") for p in Path(__file__).parents[1].glob(f"{folder}/*.py")]


def network(seed=0):
    net = GPT(GPTConfig(TOK.vocab_size, 16, 2, 2, 8)).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        net.mask_vector.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return net


def same(a, b, but=()):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if name not in but)


@pytest.fixture
def student(tmp_path):
    hub.save(tmp_path / "run", network(), TOK, STUDENT, reveal="leftmost:0.9")
    return tmp_path / "run"


def test_a_student_comes_back_bit_for_bit(student):
    net, layout = hub.load(student)
    assert same(net, network()) and net.config == network().config and layout == STUDENT
    assert hub.read_config(student)["reveal"] == "leftmost:0.9"
    assert tokenizer.load(student).to_json() == TOK.to_json()
    assert list(load_file(student / "mask.safetensors")) == ["mask_vector"]
    assert "mask_vector" not in load_file(student / "model.safetensors")


def test_an_ar_model_comes_back_and_has_no_mask(tmp_path):
    hub.save(tmp_path / "ar", network(), TOK)
    net, layout = hub.load(tmp_path / "ar")
    assert same(net, network(), but=["mask_vector"]) and layout is None
    assert not (tmp_path / "ar" / "mask.safetensors").exists() and "student" not in hub.read_config(tmp_path / "ar")


def test_a_network_in_use_is_not_changed_by_saving(student, tmp_path):
    net = network()
    hub.save(tmp_path / "again", net, TOK, STUDENT)
    assert same(net, network())


def test_saving_replaces_the_whole_folder(student):
    """An AR model over a student: nothing of the student is left, nor of the way there."""
    (student.with_name("run.new")).mkdir()
    (student.with_name("run.new") / "mask.safetensors").write_text("of a save that was killed")
    hub.save(student, network(5), TOK)
    net, layout = hub.load(student)
    assert layout is None and same(net, network(5), but=["mask_vector"])
    assert {p.name for p in student.iterdir()} == {"config.json", "model.safetensors", "bpe.json"}
    assert [p.name for p in student.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("after", [0, 1], ids=["before the weights", "before the mask"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(student, monkeypatch, after):
    before, done = {p.name: p.read_bytes() for p in student.iterdir()}, []

    def full(state, path):
        if len(done) == after:
            raise OSError("no space left on device")
        done.append(save_file(state, path))
    monkeypatch.setattr(hub, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        hub.save(student, network(5), TOK, STUDENT)
    assert {p.name: p.read_bytes() for p in student.iterdir()} == before and same(hub.load(student)[0], network())
    monkeypatch.undo()
    hub.save(student, network(5), TOK, STUDENT)
    assert same(hub.load(student)[0], network(5))


def test_a_crash_after_a_kill_between_the_two_renames_leaves_what_there_is(student, monkeypatch):
    old = student.rename(student.with_name("run.old"))
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(hub, "save_file", lambda state, path: (_ for _ in ()).throw(OSError("no space left on device")))
        hub.save(student, network(5), TOK, STUDENT)
    assert same(hub.load(old)[0], network())
    hub.save(student, network(5), TOK, STUDENT)
    assert [p.name for p in student.parent.iterdir()] == ["run"] and same(hub.load(student)[0], network(5))


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def recast(folder, **values):
    config = {**hub.read_config(folder), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


BROKEN = {
    "no config": (lambda d: (d / "config.json").unlink(), "no readable config.json"),
    "no JSON": (lambda d: (d / "config.json").write_text("width: 8"), "no readable config.json"),
    "no UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "no readable config.json"),
    "a JSON list": (lambda d: (d / "config.json").write_text("[]"), "can be read"),
    "no width": (lambda d: recast(d, width=None), "width"),
    "a width that is text": (lambda d: recast(d, width="8"), "can be read"),
    "another width": (lambda d: recast(d, width=16), "size mismatch"),
    "a width no heads share": (lambda d: recast(d, heads=3), "heads"),
    "an unknown layout": (lambda d: recast(d, student={"blocks": 4}), "blocks"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "model.safetensors"),
    "no mask": (lambda d: (d / "mask.safetensors").unlink(), "mask.safetensors"),
    "a missing tensor": (lambda d: edit(d, lambda s: s.pop("wpe.weight")), "wpe.weight"),
    "a tensor too many": (lambda d: edit(d, lambda s: s.update(odd=torch.zeros(2))), "odd"),
    "another shape": (lambda d: edit(d, lambda s: s.update({"wpe.weight": torch.zeros(3, 8)})), "wpe.weight"),
    "a cut file": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), ""),
    "an empty file": (lambda d: (d / "model.safetensors").write_bytes(b""), ""),
    "text for weights": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs"), ""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_sentence_that_names_it(student, what):
    harm, said = BROKEN[what]
    harm(student)
    with pytest.raises(ValueError, match=f"^{student} is no checkpoint") as caught:
        hub.load(student)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_is_one_sentence_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path / 'none'} is no checkpoint.*train_tiny.py$"):
        hub.load(tmp_path / "none")


def pickles(source):
    """What in a source reads or writes pickles: a checkpoint from a stranger must not be a program."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (name for name in names if name.split(".")[0] in ("pickle", "dill", "joblib", "shelve"))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            yield from [name] * (name in ("torch.load", "torch.save"))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.arg


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_pickle(path):
    assert not list(pickles(path.read_text(encoding="utf-8")))


def test_pickle_would_be_found():
    for source in ("import pickle", "from pickle import loads", "torch.load(f)", "np.load(f, allow_pickle=True)"):
        assert list(pickles(source))
