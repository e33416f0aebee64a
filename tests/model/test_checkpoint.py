import ast
import functools
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import weakref
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
from data import tokenizer
from model import checkpoint, files
from model.gpt import GPT, GPTConfig
from model.masks import AR, Layout
from report import metrics
from tests.model import test_llama
from training import cli

TOK = tokenizer.word_level(["One", " ball", "."])
STUDENT = Layout(4, 4, 0)
ROOT = Path(__file__).parents[2]
FOLDERS = (".", "model", "decoding", "unmasking", "training", "report", "data")
SOURCES = [path for folder in FOLDERS for path in ROOT.glob(f"{folder}/*.py")]


def network(seed=0):
    net = GPT(GPTConfig(TOK.vocab_size, 16, 2, 2, 8)).init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        net.mask_vector.normal_(generator=torch.Generator().manual_seed(seed + 1))
    return net


def same(a, b, but=()):
    """Whether two networks have the same tensors, except those named in `but`."""
    a = a.state_dict()
    b = b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a if name not in but)


@pytest.fixture
def student(tmp_path):
    checkpoint.save(tmp_path / "run", network(), TOK, STUDENT, reveal="leftmost:0.9")
    return tmp_path / "run"


def test_a_student_comes_back_bit_for_bit(student):
    net, layout = checkpoint.load(student)
    assert same(net, network()) and net.config == network().config and layout == STUDENT
    assert checkpoint.read_config(student)["reveal"] == "leftmost:0.9"
    assert tokenizer.load(student).to_json() == TOK.to_json()
    assert list(load_file(student / "mask.safetensors")) == ["mask_vector"]
    assert "mask_vector" not in load_file(student / "model.safetensors")
    with safe_open(student / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}      # older versions of transformers need it


def test_an_ar_model_comes_back_and_has_no_mask(tmp_path):
    checkpoint.save(tmp_path / "ar", network(), TOK)
    net, layout = checkpoint.load(tmp_path / "ar")
    assert same(net, network(), but=["mask_vector"]) and layout is None
    assert not (tmp_path / "ar" / "mask.safetensors").exists()
    assert "student" not in checkpoint.read_config(tmp_path / "ar")


@pytest.mark.parametrize("layout", [Layout(4, 1, 1), Layout(4, 4, 0), Layout(16, 16, 1)], ids=str)
def test_an_older_checkpoint_has_the_same_layout(tmp_path, layout):
    """Its config.json has older names for two of the three integers of a layout."""
    checkpoint.save(tmp_path / "run", network(), TOK, layout)
    older = {"block": layout.block, "clean_block": layout.context_block, "shift": layout.logit_shift}
    edit_config(tmp_path / "run", student=older)
    assert checkpoint.read_config(tmp_path / "run")["student"].keys() == {"block", "clean_block", "shift"}
    net, loaded = checkpoint.load(tmp_path / "run")
    assert loaded == layout and same(net, network())
    checkpoint.save(tmp_path / "again", net, TOK, loaded)
    newer = {"block": layout.block, "context_block": layout.context_block, "logit_shift": layout.logit_shift}
    assert checkpoint.read_config(tmp_path / "again")["student"] == newer


def test_gpt2_runs_no_code_of_llama(student):
    """Neither importing train_tiny.py nor loading a GPT-2 checkpoint imports model/llama.py."""
    program = f"""if True:
        import sys
        import train_tiny
        from model import checkpoint
        assert "model.llama" not in sys.modules
        checkpoint.load({str(student)!r})
        checkpoint.export({str(student)!r}, {str(student.with_name("out"))!r})
        assert "model.llama" not in sys.modules
        """
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_network_in_use_is_not_changed_by_saving(student, tmp_path):
    net = network()
    checkpoint.save(tmp_path / "again", net, TOK, STUDENT)
    assert same(net, network())


def test_saving_replaces_the_whole_folder(student):
    """Saving an AR model to the folder of a student leaves no file of the student and no temporary folder."""
    killed = student.with_name(f".run.{files.host()}.{os.getpid()}.0123abcd.new")
    killed.mkdir()
    (killed / "mask.safetensors").write_text("from a save that was killed")
    checkpoint.save(student, network(5), TOK)
    net, layout = checkpoint.load(student)
    assert layout is None and same(net, network(5), but=["mask_vector"])
    assert {p.name for p in student.iterdir()} == {"config.json", "model.safetensors", "bpe.json"}
    assert [p.name for p in student.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("after", [0, 1], ids=["before the weights", "before the mask"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(student, monkeypatch, after):
    before = {p.name: p.read_bytes() for p in student.iterdir()}
    saved = []

    def save_until_full(state, *rest):
        if len(saved) == after:
            raise OSError("no space left on device")
        saved.append(save_file(state, *rest))
    monkeypatch.setattr(files, "save_file", save_until_full)
    message = "run cannot be written .*no space left.*previous content is unchanged"
    with pytest.raises(ValueError, match=message):
        checkpoint.save(student, network(5), TOK, STUDENT)
    assert {p.name: p.read_bytes() for p in student.iterdir()} == before
    assert same(checkpoint.load(student)[0], network())
    monkeypatch.undo()
    checkpoint.save(student, network(5), TOK, STUDENT)
    assert same(checkpoint.load(student)[0], network(5))


def test_a_crash_after_a_kill_between_the_two_renames_leaves_what_there_is(student, monkeypatch):
    old = student.rename(student.with_name(f".run.{files.host()}.{os.getpid()}.0123abcd.old"))

    def no_space(*_):
        raise OSError("no space left on device")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no space left"):
        patch.setattr(files, "save_file", no_space)
        checkpoint.save(student, network(5), TOK, STUDENT)
    assert same(checkpoint.load(student)[0], network()) and not old.exists()
    checkpoint.save(student, network(5), TOK, STUDENT)
    assert [p.name for p in student.parent.iterdir()] == ["run"]
    assert same(checkpoint.load(student)[0], network(5))


def edit_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def edit_config(folder, **values):
    """Change these keys of config.json; None removes a key."""
    config = {**checkpoint.read_config(folder), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def reshape(name):
    return lambda state: state.update({name: torch.zeros(3, 8)})


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


BROKEN = {      # what is done to a checkpoint's folder, and a part of the message
    "no config": (lambda d: (d / "config.json").unlink(), "no readable config.json"),
    "no JSON": (lambda d: (d / "config.json").write_text("width: 8"), "no readable config.json"),
    "no UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "no readable config.json"),
    "a JSON list": (lambda d: (d / "config.json").write_text("[]"), "no readable config.json"),
    "no width": (lambda d: edit_config(d, n_embd=None), "n_embd"),
    "a width that is text": (lambda d: edit_config(d, n_embd="8"),
                             "n_embd in config.json: expected a positive integer, got '8'"),
    "another width": (lambda d: edit_config(d, n_embd=16), "mask_vector: expected shape (16,), got (8,)"),
    "a width no heads share": (lambda d: edit_config(d, n_head=3), "width=8: must be a multiple of heads=3"),
    "an unknown layout": (lambda d: edit_config(d, student={"blocks": 4}), "blocks"),
    "a layout that is text": (lambda d: edit_config(d, student="paper"),
                              "student in config.json: expected an object, got 'paper'"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "it has no model.safetensors"),
    "no mask": (lambda d: (d / "mask.safetensors").unlink(), "mask.safetensors"),
    "a missing tensor": (lambda d: edit_tensors(d, lambda s: s.pop("transformer.wpe.weight")),
                         "transformer.wpe.weight is missing: expected a tensor of shape (16, 8)"),
    "a tensor too many": (lambda d: edit_tensors(d, lambda s: s.update(odd=torch.zeros(2))),
                          "unexpected tensor transformer.odd: gpt2 with this config.json has none"),
    "another shape": (lambda d: edit_tensors(d, reshape("transformer.wpe.weight")),
                      "wpe.weight: expected shape (16, 8), got (3, 8)"),
    "a matrix not transposed": (lambda d: edit_tensors(d, reshape("transformer.h.0.attn.c_attn.weight")),
                                "c_attn.weight: expected shape (8, 24), got (3, 8)"),
    "a cut file": (lambda d: cut(d / "model.safetensors"), ""),
    "an empty file": (lambda d: (d / "model.safetensors").write_bytes(b""), ""),
    "text for weights": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs"), ""),
    "another family": (lambda d: edit_config(d, model_type="mistral"),
                       "model_type in config.json: expected one of gpt2, qwen2, qwen3, llama, a2d-qwen2, "
                       "a2d-qwen3, a2d-llama, got 'mistral'"),
    "another family of students": (lambda d: edit_config(d, model_type="a2d-gpt2"), "got 'a2d-gpt2'"),
    "no family": (lambda d: edit_config(d, model_type=None), "a2d-llama, got None"),
    "another GELU": (lambda d: edit_config(d, activation_function="gelu"),
                     "activation_function in config.json: expected 'gelu_new', got 'gelu'"),
    "a narrow MLP": (lambda d: edit_config(d, n_inner=16), "n_inner in config.json: expected None, got 16"),
    "another epsilon": (lambda d: edit_config(d, layer_norm_epsilon=1e-6),
                        "layer_norm_epsilon in config.json: expected 1e-05, got 1e-06"),
    "scaled by the layer": (lambda d: edit_config(d, scale_attn_by_inverse_layer_idx=True),
                            "scale_attn_by_inverse_layer_idx in config.json: expected False, got True"),
    "a head of its own": (
        lambda d: edit_tensors(d, lambda s: s.update({"lm_head.weight": torch.ones(259, 8)})),
        "lm_head.weight is not the embedding, but config.json ties the two"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_sentence_that_names_it(student, what):
    damage, message = BROKEN[what]
    damage(student)
    with pytest.raises(ValueError, match=f"^{student} is not a (readable )?checkpoint: ") as caught:
        checkpoint.load(student)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_is_one_sentence_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path / 'none'} is not a checkpoint: .*train_tiny.py$"):
        checkpoint.load(tmp_path / "none")


# the Llama family ---------------------------------------------------------------------------------------

def llama_folder(folder, dtype=torch.float32, **kind):
    """A checkpoint of a random AR model of this kind."""
    net = test_llama.llama(vocab=TOK.vocab_size, **kind).to(dtype)
    checkpoint.save(folder, net, TOK)
    return folder, net


UNKNOWN = {     # changes to config.json, and a part of the message
    "RoPE of Llama 3": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
                        "rope_type in config.json: expected 'default', got 'llama3'"),
    "YaRN": ({"rope_scaling": {"type": "yarn", "factor": 4.0}},
             "rope_type in config.json: expected 'default', got 'yarn'"),
    "linear, with the newer key": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
                                   "rope_type in config.json: expected 'default', got 'linear'"),
    "a part of each head": ({"rope_parameters": {"partial_rotary_factor": 0.5}},
                            "partial_rotary_factor in config.json: expected 1.0, got 0.5"),
    "a window": ({"use_sliding_window": True, "sliding_window": 4096},
                 "use_sliding_window in config.json: expected False, got True"),
    "layers with a window": ({"layer_types": ["full_attention", "sliding_attention"]},
                             "layer_types in config.json: expected full_attention, got sliding_attention"),
    "GELU": ({"hidden_act": "gelu"}, "hidden_act in config.json: expected 'silu', got 'gelu'"),
    "biases": ({"attention_bias": True}, "attention_bias in config.json: expected False, got True"),
    "no hidden size": ({"intermediate_size": None},
                       "intermediate_size in config.json: expected a positive integer, got None"),
    "no heads": ({"num_attention_heads": None},
                 "num_attention_heads in config.json: expected a positive integer, got None"),
    "heads that cannot share": ({"num_key_value_heads": 3}, "heads=4: must be a multiple of kv_heads=3"),
    "no norms of queries": ({"model_type": "llama"}, "_norm.weight: llama with this config.json has none"),
    "biases missing": ({"model_type": "qwen2"}, "q_proj.bias is missing: expected a tensor of shape (16,)"),
    "a head missing": ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_the_networks_do_not_have_is_named(tmp_path, what):
    change, message = UNKNOWN[what]
    folder, _ = llama_folder(tmp_path / "net", family="qwen3")
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=f"^{folder} is not a readable checkpoint: ") as caught:
        checkpoint.load(folder)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", test_llama.KINDS)
def test_any_family_comes_back_bit_for_bit(tmp_path, kind):
    kind = {**test_llama.KINDS[kind], "vocab": TOK.vocab_size}
    net = test_llama.llama(**kind).float()
    checkpoint.save(tmp_path / "run", net, TOK, STUDENT)
    again, layout = checkpoint.load(tmp_path / "run")
    assert same(again, net) and again.config == net.config and layout == STUDENT
    assert (tmp_path / "run" / "mask.safetensors").exists() == (net.config.mask is None)
    mask_file = "mask.safetensors" if net.config.mask is None else None
    assert checkpoint.read_config(tmp_path / "run").get("mask_file") == mask_file


def test_missing_keys_of_a_config_have_the_defaults_of_transformers(tmp_path):
    """As many key-value heads as heads, head size width / heads (Qwen3: 128), and RoPE base 10,000."""
    folder, net = llama_folder(tmp_path / "net", kv_heads=4)
    edit_config(folder, num_key_value_heads=None, head_dim=None, rope_theta=None, tie_word_embeddings=None)
    assert checkpoint.load(folder)[0].config == net.config
    edit_config(folder, model_type="qwen3", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    config, _ = checkpoint.read_layout_and_config(folder)
    assert (config.head_size, config.theta) == (128, 500.0)


# released students --------------------------------------------------------------------------------------

def released(folder, files=None, **config):
    """A checkpoint like those of OPDLM and dllm: Qwen3, [MASK] in its vocabulary, model_type a2d-qwen3."""
    _, net = llama_folder(folder, family="qwen3", tied=True)
    edit_config(folder, model_type="a2d-qwen3", architectures=["A2DQwen3LMHeadModel"],
           auto_map={"AutoModel": "modeling.A2DQwen3"}, **config)
    for name, content in (files or {}).items():
        (folder / name).write_text(json.dumps(content))
    return net


NAMED = {
    "by the config": ({}, {"mask_token_id": 7}),
    "by tokenizer_config": ({"tokenizer_config.json": {"mask_token": "<|M|>", "added_tokens_decoder": {
        "3": {"content": "<|x|>"}, "7": {"content": "<|M|>"}}}}, {}),
    "by tokenizer.json": ({"tokenizer_config.json": {"mask_token": {"content": "<|M|>"}}, "tokenizer.json": {
        "added_tokens": [{"content": "<|x|>", "id": 3}, {"content": "<|M|>", "id": 7}]}}, {}),
}


@pytest.mark.parametrize("named", NAMED)
def test_a_released_checkpoint_is_a_student_of_the_paper_s(tmp_path, named):
    files, config = NAMED[named]
    plain = released(tmp_path / "a2d", files, **config)
    net, layout = checkpoint.load(tmp_path / "a2d")
    assert layout == Layout.of(4, "paper", "block") and net.mask_id == 7
    ours = net(torch.arange(12)[None])
    theirs = plain(torch.arange(12)[None])
    others = torch.arange(TOK.vocab_size) != 7
    assert torch.equal(ours[:, others], theirs[:, others]) and (ours[:, 7] < -999).all()
    checkpoint.save(tmp_path / "again", net, TOK, layout)
    again, layout_again = checkpoint.load(tmp_path / "again")
    assert same(again, net) and again.config == net.config and layout_again == layout
    assert checkpoint.read_config(tmp_path / "again")["model_type"] == "qwen3"


def test_a_released_checkpoint_that_names_no_mask_has_qwen3_s(tmp_path):
    released(tmp_path / "a2d")
    with pytest.raises(ValueError, match=r"mask id 151669 is outside the vocabulary: expected 0 to 258"):
        checkpoint.load(tmp_path / "a2d")
    edit_config(tmp_path / "a2d", vocab_size=151936)
    assert checkpoint.read_layout_and_config(tmp_path / "a2d")[0].mask == 151669


def test_a_released_checkpoint_s_block_is_what_one_says(tmp_path):
    released(tmp_path / "a2d", mask_token_id=7, block_size=32)
    assert checkpoint.load(tmp_path / "a2d")[1] == Layout(32, 32, 0)


def test_a_student_is_a_teacher_only_if_it_is_an_ar_model(tmp_path):
    checkpoint.save(tmp_path / "ar", network(), TOK)
    checkpoint.save(tmp_path / "run", network(), TOK, Layout(4, 1, 1))
    for folder in (tmp_path / "ar", tmp_path / "run"):
        assert checkpoint.ar_folder(folder) == folder
    assert checkpoint.is_student(tmp_path / "run") and not checkpoint.is_student(tmp_path / "ar")
    message = r"other is a student already \(block 4\).* give the AR model .* a run's ar"
    for layout in (Layout(4, 4, 1), Layout(4, 1, 0), Layout(4, 4, 0)):
        checkpoint.save(tmp_path / "other", network(), TOK, layout)
        with pytest.raises(ValueError, match=message):
            checkpoint.ar_folder(tmp_path / "other")


def test_a_conversion_s_length_is_at_most_the_checkpoint_s(tmp_path):
    checkpoint.save(tmp_path / "ar", network(), TOK)
    for length, default, expected in ((None, 9, 9), (None, 99, 16), (5, 9, 5), (16, 9, 16)):
        assert checkpoint.sizes_from_checkpoint(tmp_path / "ar", length, default)["length"] == expected
    config = network().config
    sizes = {"pretrain_steps": 0, "layers": config.layers, "width": config.width, "length": 16}
    assert checkpoint.sizes_from_checkpoint(tmp_path / "ar", None, 16) == sizes
    with pytest.raises(ValueError, match="--length=17 is more than the 16 positions of"):
        checkpoint.sizes_from_checkpoint(tmp_path / "ar", 17, 9)


# export: the same bytes ---------------------------------------------------------------------------------

def foreign(folder, dtype=torch.float32, prefix="transformer.", more=()):
    """A GPT-2 checkpoint like those on the hub. Returns its tensors."""
    config = {"model_type": "gpt2", "vocab_size": 31, "n_positions": 20, "n_embd": 12, "n_layer": 2,
              "n_head": 3, "n_ctx": 20, "bos_token_id": 30, "eos_token_id": 30, "resid_pdrop": 0.1}
    net = GPT(GPTConfig(31, 20, 2, 3, 12))
    tensors = {}
    for i, (key, x) in enumerate(net.state_dict().items()):
        if key != checkpoint.MASK:
            shape = x.T.shape if ".c_" in key and x.dim() == 2 else x.shape
            tensors[prefix + key] = torch.randn(shape, generator=torch.Generator().manual_seed(i))
    tensors.update(more)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: x.to(dtype) for key, x in tensors.items()}, folder / "model.safetensors")
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_gpt2_goes_in_and_out_with_every_byte_of_its_tensors(tmp_path, dtype, prefix):
    before = foreign(tmp_path / "in", dtype, prefix)
    checkpoint.export(tmp_path / "in", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(key.startswith("transformer.") for key in after)
    assert {"transformer." + key.removeprefix(prefix) for key in before} == after.keys()
    for key, x in after.items():
        old = before[prefix + key.removeprefix("transformer.")]
        assert x.dtype == old.dtype == dtype and x.shape == old.shape and torch.equal(x, old), key
    config = checkpoint.read_config(tmp_path / "out")
    assert checkpoint.read_config(tmp_path / "in").items() <= config.items()
    assert config["architectures"] == ["GPT2LMHeadModel"]


def test_another_dtype_is_the_same_numbers_rounded(student, tmp_path):
    checkpoint.export(student, tmp_path / "out", torch.bfloat16)
    for name in ("model.safetensors", "mask.safetensors"):
        before = load_file(student / name)
        after = load_file(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(x.bfloat16(), after[key]) for key, x in before.items())
        assert {x.dtype for x in after.values()} == {torch.bfloat16}
    assert checkpoint.load(tmp_path / "out")[0].wte.weight.dtype == torch.float32


def test_buffers_and_a_tied_head_in_a_file_do_not_matter(tmp_path):
    foreign(tmp_path / "a")
    table = load_file(tmp_path / "a" / "model.safetensors")["transformer.wte.weight"]
    more = {
        "h.0.attn.bias": torch.ones(1, 1, 20, 20),
        "h.1.attn.masked_bias": torch.tensor(-1e4),
        "lm_head.weight": table,
    }
    foreign(tmp_path / "b", prefix="", more=more)
    assert same(checkpoint.load(tmp_path / "a")[0], checkpoint.load(tmp_path / "b")[0])


def test_a_student_is_exported_whole_and_without_code_of_others(student, tmp_path):
    checkpoint.export(student, tmp_path / "out")
    before = {p.name: p.read_bytes() for p in student.iterdir()}
    after = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    added = {"tokenizer.json", "tokenizer_config.json", "modeling_opdlm.py"}    # for transformers
    assert after.keys() - before.keys() == added
    settings = json.loads(after.pop("config.json"))
    assert settings.pop("auto_map") == {"AutoModelForCausalLM": "modeling_opdlm.Gpt2Student"}
    assert settings == json.loads(before.pop("config.json"))
    assert {name: after[name] for name in before} == before
    released(tmp_path / "a2d", mask_token_id=7)
    checkpoint.export(tmp_path / "a2d", tmp_path / "qwen3")
    config = checkpoint.read_config(tmp_path / "qwen3")
    assert config["model_type"] == "qwen3" and config["mask_token_id"] == 7
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_opdlm.Qwen3Student"}     # not theirs
    assert checkpoint.load(tmp_path / "qwen3")[1] == checkpoint.load(tmp_path / "a2d")[1]


def test_a_folder_that_is_there_is_not_written_over(student, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="mine exists already: give the name of a new folder"):
        checkpoint.export(student, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_shards_are_one_file(tmp_path):
    whole = foreign(tmp_path / "whole")
    foreign(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    weight_map = {key: names[i % 3] for i, key in enumerate(whole)}
    for name in names:
        save_file({key: whole[key] for key in whole if weight_map[key] == name}, tmp_path / "parts" / name)
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert same(checkpoint.load(tmp_path / "parts")[0], checkpoint.load(tmp_path / "whole")[0])
    (tmp_path / "parts" / names[1]).rename(tmp_path / names[1])
    with pytest.raises(ValueError, match=f"names {names[1]}, which is not in the folder"):
        checkpoint.load(tmp_path / "parts")
    weight_map["transformer.wte.weight"] = f"../{names[1]}"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=f"names ../{names[1]}"):
        checkpoint.load(tmp_path / "parts")


def test_pickled_weights_are_not_read(tmp_path):
    foreign(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").rename(tmp_path / "net" / "pytorch_model.bin")
    message = "it has no model.safetensors, and other formats of weights are not supported"
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path / "net")


# `transformers` -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gpt2", *test_llama.KINDS])
def test_what_is_saved_loads_in_transformers(tmp_path, kind):
    """The folders of a run: transformers finds every tensor, needs no other, and computes the same logits."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {**test_llama.KINDS.get(kind, {}), "vocab": TOK.vocab_size}
    net = network() if kind == "gpt2" else test_llama.llama(**sizes).float()
    tokens = torch.arange(24).view(2, 12)
    for name, layout in (("ar", None), ("opdlm", STUDENT)):
        checkpoint.save(tmp_path / name, net, TOK, layout, reveal="leftmost:0.9", trained={"seed": 0})
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        our_logits = net(tokens).view(2, 12, -1)
        their_logits = theirs.eval()(tokens).logits
        is_mask = torch.arange(our_logits.size(-1)) == net.mask_id       # we never generate it
        our_logits = torch.where(is_mask, their_logits, our_logits)
        assert torch.allclose(our_logits, their_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", *test_llama.KINDS])
def test_what_transformers_saves_is_loaded(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {**test_llama.KINDS.get(kind, {}), "mask": None}
    config = GPTConfig(31, 20, 2, 3, 12) if kind == "gpt2" else test_llama.llama(**sizes).config
    torch.manual_seed(0)
    their_config = transformers.AutoConfig.for_model(**checkpoint.to_hf_config(config), initializer_range=0.5)
    theirs = transformers.AutoModelForCausalLM.from_config(their_config).eval()
    theirs.save_pretrained(tmp_path / "net", max_shard_size="2KB")
    assert len(list((tmp_path / "net").glob("*.safetensors"))) > 1
    net, layout = checkpoint.load(tmp_path / "net")
    tokens = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(1))
    assert net.config == config and layout is None
    assert torch.allclose(net(tokens).view(2, 12, -1), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_transformers_loads_an_export_in_the_dtype_of_its_tensors(tmp_path, dtype, key):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for source in DTYPES:
        folder, _ = llama_folder(tmp_path / f"{source}-{key}", source)
        was = str(source).removeprefix("torch.")
        values = {"dtype": None, "vision_config": {"dtype": was, "torch_dtype": was}}
        if key:
            values[key] = was
        edit_config(folder, **values)
        for asked in (dtype, None):
            out = tmp_path / f"{source}-{key}-{asked}"
            checkpoint.export(folder, out, asked)
            expected = str(asked or source).removeprefix("torch.")
            config = checkpoint.read_config(out)
            assert {config["dtype"], config.get("torch_dtype", expected)} == {expected}
            assert set(config["vision_config"].values()) == {expected}
    out = tmp_path / f"{torch.float32}-{key}-{dtype}"
    # "auto" is the default only from version 5 on.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out, torch_dtype="auto")
    assert next(theirs.parameters()).dtype == dtype


def test_a_saved_checkpoint_names_its_dtype(tmp_path):
    for dtype in DTYPES:
        folder, _ = llama_folder(tmp_path / str(dtype), dtype)
        assert checkpoint.read_config(folder)["dtype"] == str(dtype).removeprefix("torch.")


def test_auto_tokenizer_of_an_export_is_the_tokenizer(student, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    checkpoint.export(student, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(theirs) == TOK.vocab_size and theirs("One ball.")["input_ids"] == TOK.encode("One ball.")
    assert tokenizer.load(tmp_path / "out").to_json() == TOK.to_json()


def test_files_of_an_export_have_the_usual_permissions(student, tmp_path):
    umask = os.umask(0o022)
    checkpoint.export(student, tmp_path / "out")
    os.umask(umask)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o644"} and len(modes) == 7


def test_an_export_deletes_no_folder_of_others(student, tmp_path):
    for name in ("out.old", "out.new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter.txt").write_text("dear")
    checkpoint.export(student, tmp_path / "out")
    assert all((tmp_path / name / "letter.txt").read_text() == "dear" for name in ("out.old", "out.new"))


# a real checkpoint --------------------------------------------------------------------------------------

def test_the_real_checkpoint_tells_its_story(stories260k, capsys):
    flags = [f"--ckpt={stories260k}", "--mode=ar", "--temperature=0", "--length=40", "--device=cpu"]
    assert cli.run(sample.main, flags) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time, there was a little girl named Lily.") and not err


def test_the_real_checkpoint_s_loss_on_stories_it_has_not_seen(stories260k):
    """Its authors report about 1.32 nats per token over all of them."""
    texts = stories260k_texts()
    tok = tokenizer.load(stories260k)
    rows = [torch.tensor([tok.bos, *tok.encode(text)][:256]) for text in texts[:24]]
    numbers = metrics.likelihood(checkpoint.load(stories260k)[0], rows, AR, tok)
    assert 1.2 < numbers["val_nats"] < 1.4 and 0.8 < numbers["bits_per_byte"] < 1.0


def stories260k_texts():
    path = Path(__file__).parents[2].parent / "shared/data/tinystories/valid.txt"
    if not path.is_file():
        pytest.skip(f"no stories in {path}, and tests use no network")
    return [text.strip() for text in path.read_text(encoding="utf-8").split("<|endoftext|>") if text.strip()]


def test_the_real_checkpoint_is_exported_byte_for_byte(stories260k, tmp_path, capsys):
    assert cli.run(sample.main, [f"--ckpt={stories260k}", f"--export={tmp_path / 'out'}"]) == 0
    before = load_file(stories260k / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert tokenizer.load(tmp_path / "out").to_json() == tokenizer.load(stories260k).to_json()
    assert str(tmp_path / "out") in capsys.readouterr().out


# hf:NAME ------------------------------------------------------------------------------------------------

class Hub(http.server.ThreadingHTTPServer):
    """Serves the folders `revisions` of the repository some/net as the Hugging Face hub does.

    The next `interrupted` times it sends only half of the weights that a client requests.
    """

    def __init__(self, revisions: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.commits = {}       # of branches
        self.folders = {}       # of branches and commits
        for i, (name, folder) in enumerate(revisions.items(), 1):
            self.commits[name] = f"{i:040x}"
            self.folders[name] = folder
            self.folders[self.commits[name]] = folder
        self.interrupted = 0
        self.requests = []      # (method, path)
        self.sent = 0           # bytes of weights
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):    # noqa: N802
        self.do_GET()

    def do_GET(self):    # noqa: N802
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.requests.append((self.command, path))
        found = re.fullmatch(r"(/api/models)?/some/net/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path)
        if not found:
            return self.answer_not_found("RepoNotFound")
        _, what, revision, name = found.groups()
        folder = self.server.folders.get(revision)
        if folder is None:
            return self.answer_not_found("RevisionNotFound")
        if name and not (folder / name).is_file():
            return self.answer_not_found("EntryNotFound")
        commit = self.server.commits.get(revision, revision)
        if what == "tree":
            return self.answer_json(self.files(folder))
        if what == "revision":
            return self.answer_json({"id": "some/net", "modelId": "some/net", "sha": commit, "private": False,
                                     "siblings": self.files(folder)})
        content = (folder / name).read_bytes()
        headers = {"ETag": f'"{self.etag(folder / name)}"', "X-Repo-Commit": commit}
        begin = 0
        if "Range" in self.headers:
            begin = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        return self.answer(content[begin:], 206 if begin else 200, **headers)

    def files(self, folder):
        entries = []
        for path in sorted(folder.iterdir()):
            entries.append({"type": "file", "path": path.name, "rfilename": path.name,
                            "size": path.stat().st_size, "oid": self.etag(path)})
        return entries

    def answer_json(self, content):
        self.answer(json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def answer_not_found(self, code):
        self.answer(b"", 404, **{"X-Error-Code": code, "X-Error-Message": "not found"})

    def etag(self, path):
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            if self.path.endswith(".safetensors"):
                if self.server.interrupted:
                    self.server.interrupted -= 1
                    body = body[:len(body) // 2]
                self.server.sent += len(body)
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub with two revisions of a network, which `checkpoint.fetch` uses during a test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for seed, name in enumerate(("main", "v2")):
        checkpoint.save(tmp_path / name, network(seed), TOK)
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"a program")
        (tmp_path / name / "README.md").write_text("a card")
    server = Hub({name: tmp_path / name for name in ("main", "v2")})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    connect(monkeypatch, server.endpoint, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


def connect(monkeypatch, endpoint, cache_dir):
    """Let `fetch` use this hub, and forget what it has fetched, as in a new process."""
    fetch = getattr(checkpoint.fetch, "func", checkpoint.fetch)
    fetch.cache_clear()
    connected = functools.partial(fetch, endpoint=endpoint, cache_dir=str(cache_dir))
    monkeypatch.setattr(checkpoint, "fetch", connected)


def downloads(hub):
    """The names of the files that were requested from the hub."""
    return [path.rsplit("/")[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path]


def test_a_name_is_a_folder_of_the_files_needed(hub):
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])
    files = {p.name for p in checkpoint.fetch("hf:some/net").iterdir()}
    assert files == {"config.json", "model.safetensors", "bpe.json"}
    assert not [path for _, path in hub.requests if path.endswith((".bin", ".md"))]


@pytest.mark.parametrize("revision", ["v2", f"{2:040x}"])
def test_a_revision_is_another_network(hub, revision):
    assert same(checkpoint.load(f"hf:some/net@{revision}")[0], network(1), but=["mask_vector"])
    assert not same(checkpoint.load("hf:some/net")[0], network(1), but=["mask_vector"])


def test_files_in_the_cache_are_not_downloaded_again(hub, tmp_path, monkeypatch):
    checkpoint.load("hf:some/net")
    hub.requests.clear()
    checkpoint.load("hf:some/net")
    assert hub.requests == []
    connect(monkeypatch, hub.endpoint, tmp_path / "cache")
    checkpoint.load("hf:some/net")
    assert downloads(hub) == []
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    connect(monkeypatch, f"http://127.0.0.1:{port}", tmp_path / "cache")    # no network: the cache is used
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])


def test_an_interrupted_download_is_resumed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)                              # between the attempts
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)      # the unit that is kept
    hub.interrupted = 2
    if int(huggingface_hub.__version__.split(".")[0]) == 0:      # there each attempt is a call
        for _ in range(2):
            with pytest.raises(ValueError, match="^hf:some/net cannot be fetched"):
                checkpoint.load("hf:some/net")
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])
    size = (tmp_path / "main" / "model.safetensors").stat().st_size
    assert hub.interrupted == 0 and hub.sent < 1.1 * size


def test_complete_files_are_kept_after_a_failure(hub, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.interrupted = 99
    with pytest.raises(ValueError, match="^hf:some/net cannot be fetched"):
        checkpoint.load("hf:some/net")
    hub.interrupted = 0
    hub.requests.clear()
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])
    assert downloads(hub) == ["model.safetensors"]


@pytest.mark.parametrize("name", ["hf:some/other", "hf:some/net@v3", "hf:", "hf:a/b/c", "hf:../net"])
def test_an_unknown_name_is_one_sentence(hub, name):
    sentence = r"cannot be fetched \(.*\): expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, and a network"
    with pytest.raises(ValueError, match=f"^{re.escape(name)} {sentence}") as caught:
        checkpoint.load(name)
    assert "\n" not in str(caught.value)


def test_sampling_from_a_name_is_sampling_from_its_folder(hub, capsys):
    texts = []
    for name in ("hf:some/net@v2", str(hub.folders["v2"])):
        flags = [f"--ckpt={name}", "--mode=ar", "--length=5", "--device=cpu"]
        assert cli.run(sample.main, flags) == 0
        texts.append(capsys.readouterr().out.splitlines()[:-1])
    assert texts[0] == texts[1]


# no code in checkpoints --------------------------------------------------------------------------------

PICKLERS = ("pickle", "dill", "joblib", "shelve")


def pickles(source):
    """Whatever reads or writes pickles in a source: a pickle can run code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            yield from (name for name in names if name.split(".")[0] in PICKLERS)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = f"{node.value.id}.{node.attr}"
            yield from [name] * (name in ("torch.load", "torch.save"))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield node.arg


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_no_pickle(path):
    assert not list(pickles(path.read_text(encoding="utf-8")))


def test_pickle_would_be_found():
    for source in ("import pickle", "from pickle import loads", "torch.load(f)",
                   "np.load(f, allow_pickle=True)"):
        assert list(pickles(source))


def test_shards_are_converted_one_tensor_at_a_time(tmp_path, monkeypatch, tiny):
    """So a checkpoint is never in memory in two number formats, nor all of its files at once."""
    net = tiny(vocab=TOK.vocab_size, layers=4).bfloat16()
    checkpoint.save(tmp_path, net, TOK)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: state[name] for name in names[i::3]}, tmp_path / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    alive = weakref.WeakSet()
    most = [0]

    class Counting:
        """A file whose tensors are counted while they are in memory."""
        def __init__(self, *args):
            self.content = real(*args)

        def __enter__(self):
            self.inner = self.content.__enter__()
            return self

        def __exit__(self, *error):
            return self.content.__exit__(*error)

        def keys(self):
            return self.inner.keys()

        def get_tensor(self, key):
            x = self.inner.get_tensor(key)
            alive.add(x)
            most[0] = max(most[0], len(alive))
            return x

    real = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", Counting)
    loaded, _ = checkpoint.load(tmp_path)
    assert 1 <= most[0] <= 2 and len(names) > 40                 # the one before it is still in a variable
    for name, p in net.state_dict().items():
        assert name == "mask_vector" or torch.equal(loaded.state_dict()[name], p.float())
