import ast
import functools
import hashlib
import http.server
import json
import re
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
from data import tokenizer
from model import checkpoint
from model.gpt import GPT, GPTConfig
from model.masks import AR, Layout
from report import metrics
from tests.model import test_llama
from training import cli

TOK = tokenizer.word_level(["One", " ball", "."])
STUDENT = Layout(4, 4, 0)
SOURCES = [p for folder in (".", "model", "decoding", "unmasking", "training", "report", "data") for p in Path(__file__).parents[2].glob(f"{folder}/*.py")]


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
        assert file.metadata() == {"format": "pt"}                          # older transformers refuse a file without


def test_an_ar_model_comes_back_and_has_no_mask(tmp_path):
    checkpoint.save(tmp_path / "ar", network(), TOK)
    net, layout = checkpoint.load(tmp_path / "ar")
    assert same(net, network(), but=["mask_vector"]) and layout is None
    assert not (tmp_path / "ar" / "mask.safetensors").exists() and "student" not in checkpoint.read_config(tmp_path / "ar")


def test_a_network_in_use_is_not_changed_by_saving(student, tmp_path):
    net = network()
    checkpoint.save(tmp_path / "again", net, TOK, STUDENT)
    assert same(net, network())


def test_saving_replaces_the_whole_folder(student):
    """An AR model over a student: nothing of the student is left, nor of the way there."""
    (student.with_name("run.new")).mkdir()
    (student.with_name("run.new") / "mask.safetensors").write_text("of a save that was killed")
    checkpoint.save(student, network(5), TOK)
    net, layout = checkpoint.load(student)
    assert layout is None and same(net, network(5), but=["mask_vector"])
    assert {p.name for p in student.iterdir()} == {"config.json", "model.safetensors", "bpe.json"}
    assert [p.name for p in student.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("after", [0, 1], ids=["before the weights", "before the mask"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(student, monkeypatch, after):
    before, done = {p.name: p.read_bytes() for p in student.iterdir()}, []

    def full(state, *rest):
        if len(done) == after:
            raise OSError("no space left on device")
        done.append(save_file(state, *rest))
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(ValueError, match="run can.t be written .*no space left.*what was there before still is"):
        checkpoint.save(student, network(5), TOK, STUDENT)
    assert {p.name: p.read_bytes() for p in student.iterdir()} == before and same(checkpoint.load(student)[0], network())
    monkeypatch.undo()
    checkpoint.save(student, network(5), TOK, STUDENT)
    assert same(checkpoint.load(student)[0], network(5))


def test_a_crash_after_a_kill_between_the_two_renames_leaves_what_there_is(student, monkeypatch):
    old = student.rename(student.with_name("run.old"))
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="no space left"):
        patch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
        checkpoint.save(student, network(5), TOK, STUDENT)
    assert same(checkpoint.load(old)[0], network())
    checkpoint.save(student, network(5), TOK, STUDENT)
    assert [p.name for p in student.parent.iterdir()] == ["run"] and same(checkpoint.load(student)[0], network(5))


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def recast(folder, **values):
    config = {**checkpoint.read_config(folder), **values}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def shorter(name):
    return lambda state: state.update({name: torch.zeros(3, 8)})


BROKEN = {
    "no config": (lambda d: (d / "config.json").unlink(), "no readable config.json"),
    "no JSON": (lambda d: (d / "config.json").write_text("width: 8"), "no readable config.json"),
    "no UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), "no readable config.json"),
    "a JSON list": (lambda d: (d / "config.json").write_text("[]"), "no readable config.json"),
    "no width": (lambda d: recast(d, n_embd=None), "n_embd"),
    "a width that is text": (lambda d: recast(d, n_embd="8"), "n_embd is '8' in its config.json: a whole number was"),
    "another width": (lambda d: recast(d, n_embd=16), "mask_vector has the shape (8,): (16,) was wanted"),
    "a width no heads share": (lambda d: recast(d, n_head=3), "heads"),
    "an unknown layout": (lambda d: recast(d, student={"blocks": 4}), "blocks"),
    "a layout that is text": (lambda d: recast(d, student="paper"), "mapping"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "it has no model.safetensors"),
    "no mask": (lambda d: (d / "mask.safetensors").unlink(), "mask.safetensors"),
    "a missing tensor": (lambda d: edit(d, lambda s: s.pop("transformer.wpe.weight")),
                         "transformer.wpe.weight is missing: a tensor of the shape (16, 8) was wanted"),
    "a tensor too many": (lambda d: edit(d, lambda s: s.update(odd=torch.zeros(2))), "odd is one tensor too many"),
    "another shape": (lambda d: edit(d, shorter("transformer.wpe.weight")), "wpe.weight has the shape (3, 8): (16, 8)"),
    "a matrix not turned": (lambda d: edit(d, shorter("transformer.h.0.attn.c_attn.weight")),
                            "c_attn.weight has the shape (3, 8): (8, 24) was wanted"),
    "a cut file": (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]), ""),
    "an empty file": (lambda d: (d / "model.safetensors").write_bytes(b""), ""),
    "text for weights": (lambda d: (d / "model.safetensors").write_text("version https://git-lfs"), ""),
    "another family": (lambda d: recast(d, model_type="mistral"), "model_type is 'mistral': gpt2, qwen2, qwen3, llama"),
    "no family": (lambda d: recast(d, model_type=None), "model_type is None"),
    "another GELU": (lambda d: recast(d, activation_function="gelu"), "activation_function is 'gelu' in its config"),
    "a narrow MLP": (lambda d: recast(d, n_inner=16), "n_inner is 16"),
    "another epsilon": (lambda d: recast(d, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"),
    "scaled by the layer": (lambda d: recast(d, scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx is True"),
    "a head of its own": (lambda d: edit(d, lambda s: s.update({"lm_head.weight": torch.ones(259, 8)})), "ties"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_sentence_that_names_it(student, what):
    harm, said = BROKEN[what]
    harm(student)
    with pytest.raises(ValueError, match=f"^{student} is no checkpoint") as caught:
        checkpoint.load(student)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_no_folder_is_one_sentence_that_names_it(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path / 'none'} is no checkpoint.*train_tiny.py$"):
        checkpoint.load(tmp_path / "none")


# other families -------------------------------------------------------------------------------------------------------

def llama_folder(folder, dtype=torch.float32, **kind):
    """A folder as others make them: config.json and tensors, of a random network of the kind."""
    net = test_llama.llama(vocab=TOK.vocab_size, **kind).to(dtype)
    checkpoint.save(folder, net, TOK)
    return folder, net


UNKNOWN = {
    "a RoPE of Llama 3's": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE is 'llama3'"),
    "YaRN": ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE is 'yarn'"),
    "linear, as written today": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "RoPE is 'linear'"),
    "a part of each head": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "over 50% of a head"),
    "a window": ({"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is True"),
    "layers with a window": ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    "a GELU": ({"hidden_act": "gelu"}, "hidden_act is 'gelu' in its config.json: 'silu' was wanted"),
    "biases": ({"attention_bias": True}, "attention_bias is True in its config.json: False was wanted"),
    "no hidden size": ({"intermediate_size": None}, "intermediate_size is None"),
    "no heads": ({"num_attention_heads": None}, "'num_attention_heads' is missing"),
    "heads that can't share": ({"num_key_value_heads": 3}, "4 heads can't share 3"),
    "no norms of queries": ({"model_type": "llama"}, "_norm.weight is one tensor too many: llama"),
    "biases missing": ({"model_type": "qwen2"}, "q_proj.bias is missing: a tensor of the shape (16,) was wanted"),
    "a head missing": ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding"),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_the_networks_do_not_have_is_named(tmp_path, what):
    change, said = UNKNOWN[what]
    folder, _ = llama_folder(tmp_path / "net", family="qwen3")
    recast(folder, **change)
    with pytest.raises(ValueError, match=f"^{folder} is no checkpoint that can be read: ") as caught:
        checkpoint.load(folder)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", test_llama.KINDS)
def test_any_family_comes_back_bit_for_bit(tmp_path, kind):
    kind = {**test_llama.KINDS[kind], "vocab": TOK.vocab_size}
    net = test_llama.llama(**kind).float()
    checkpoint.save(tmp_path / "run", net, TOK, STUDENT)
    again, layout = checkpoint.load(tmp_path / "run")
    assert same(again, net) and again.config == net.config and layout == STUDENT
    assert (tmp_path / "run" / "mask.safetensors").exists() == (net.config.mask is None)
    named = "mask.safetensors" if net.config.mask is None else None
    assert checkpoint.read_config(tmp_path / "run").get("mask_file") == named


def test_silence_in_a_config_means_what_transformers_means(tmp_path):
    """As many key-value heads as heads, which share the width, base 10,000; Qwen3's heads have 128 channels."""
    folder, net = llama_folder(tmp_path / "net", kv_heads=4)
    recast(folder, num_key_value_heads=None, head_dim=None, rope_theta=None, tie_word_embeddings=None)
    assert checkpoint.load(folder)[0].config == net.config
    recast(folder, model_type="qwen3", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
    config, _ = checkpoint.read_layout_and_config(folder)
    assert (config.head_size, config.theta) == (128, 500.0)


# the released students -----------------------------------------------------------------------------------------------

def released(folder, files=None, **config):
    """As OPDLM's and dllm's are: a Qwen3 whose [MASK] is a row of its table, and a model_type of its own."""
    _, net = llama_folder(folder, family="qwen3", tied=True)
    recast(folder, model_type="a2d-qwen3", architectures=["A2DQwen3LMHeadModel"],
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
    ours, theirs = net(torch.arange(12)[None]), plain(torch.arange(12)[None])
    others = torch.arange(TOK.vocab_size) != 7
    assert torch.equal(ours[:, others], theirs[:, others]) and (ours[:, 7] < -999).all()
    checkpoint.save(tmp_path / "again", net, TOK, layout)
    again, wired = checkpoint.load(tmp_path / "again")
    assert same(again, net) and again.config == net.config and wired == layout
    assert checkpoint.read_config(tmp_path / "again")["model_type"] == "qwen3"


def test_a_released_checkpoint_that_names_no_mask_has_qwen3_s(tmp_path):
    released(tmp_path / "a2d")
    with pytest.raises(ValueError, match=r"mask id 151669 is not in the vocabulary: one below 259 was wanted"):
        checkpoint.load(tmp_path / "a2d")
    recast(tmp_path / "a2d", vocab_size=151936)
    assert checkpoint.read_layout_and_config(tmp_path / "a2d")[0].mask == 151669


def test_a_released_checkpoint_s_block_is_what_one_says(tmp_path):
    released(tmp_path / "a2d", mask_token_id=7, block_size=32)
    assert checkpoint.load(tmp_path / "a2d")[1] == Layout(32, 32, 0)


def test_a_student_is_no_teacher(student, tmp_path):
    checkpoint.save(tmp_path / "ar", network(), TOK)
    assert checkpoint.ar_folder(tmp_path / "ar") == tmp_path / "ar"
    with pytest.raises(ValueError, match=r"run is a student already \(block 4\): give the AR model .* a run's ar"):
        checkpoint.ar_folder(student)


def test_a_conversion_s_length_is_at_most_the_checkpoint_s(tmp_path):
    checkpoint.save(tmp_path / "ar", network(), TOK)
    assert [checkpoint.sizes_from_checkpoint(tmp_path / "ar", length, usual)["length"]
            for length, usual in ((None, 9), (None, 99), (5, 9), (16, 9))] == [9, 16, 5, 16]
    with pytest.raises(ValueError, match="--length=17 is more than the 16 positions of"):
        checkpoint.sizes_from_checkpoint(tmp_path / "ar", 17, 9)


# bytes out are bytes in ----------------------------------------------------------------------------------------------

def foreign(folder, dtype=torch.float32, prefix="transformer.", more=()):
    """A GPT-2 checkpoint as the hub has them, and its tensors."""
    config = {"model_type": "gpt2", "vocab_size": 31, "n_positions": 20, "n_embd": 12, "n_layer": 2, "n_head": 3,
              "n_ctx": 20, "bos_token_id": 30, "eos_token_id": 30, "resid_pdrop": 0.1}
    net = GPT(GPTConfig(31, 20, 2, 3, 12)).init_weights(torch.Generator().manual_seed(3))
    state = {key: torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
             for i, (key, x) in enumerate(net.state_dict().items()) if key != checkpoint.MASK}
    state = {prefix + key: x.T.contiguous() if ".c_" in key and x.dim() == 2 else x for key, x in state.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: x.to(dtype) for key, x in {**state, **dict(more)}.items()}, folder / "model.safetensors")
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_gpt2_goes_in_and_out_with_every_byte_of_its_tensors(tmp_path, dtype, prefix):
    before = foreign(tmp_path / "in", dtype, prefix)
    checkpoint.export(tmp_path / "in", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {key.removeprefix("transformer.") for key in before} == {key.removeprefix("transformer.") for key in after}
    assert all(key.startswith("transformer.") for key in after)
    for key, x in after.items():
        old = before[prefix + key.removeprefix("transformer.")]
        assert x.dtype == old.dtype == dtype and x.shape == old.shape and torch.equal(x, old), key
    config = checkpoint.read_config(tmp_path / "out")
    assert checkpoint.read_config(tmp_path / "in").items() <= config.items() and config["architectures"] == ["GPT2LMHeadModel"]


def test_another_dtype_is_the_same_numbers_rounded(student, tmp_path):
    checkpoint.export(student, tmp_path / "out", torch.bfloat16)
    for name in ("model.safetensors", "mask.safetensors"):
        before, after = load_file(student / name), load_file(tmp_path / "out" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(x.bfloat16(), after[key]) for key, x in before.items())
        assert {x.dtype for x in after.values()} == {torch.bfloat16}
    assert checkpoint.load(tmp_path / "out")[0].wte.weight.dtype == torch.float32


def test_buffers_and_a_tied_head_in_a_file_do_not_matter(tmp_path):
    foreign(tmp_path / "a")
    table = load_file(tmp_path / "a" / "model.safetensors")["transformer.wte.weight"]
    foreign(tmp_path / "b", prefix="", more={"h.0.attn.bias": torch.ones(1, 1, 20, 20), "lm_head.weight": table,
                                            "h.1.attn.masked_bias": torch.tensor(-1e4)})
    assert same(checkpoint.load(tmp_path / "a")[0], checkpoint.load(tmp_path / "b")[0])


def test_a_student_is_exported_whole_and_others_code_stays_behind(student, tmp_path):
    checkpoint.export(student, tmp_path / "out")
    assert {p.name: p.read_bytes() for p in student.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    released(tmp_path / "a2d", mask_token_id=7)
    checkpoint.export(tmp_path / "a2d", tmp_path / "qwen3")
    config = checkpoint.read_config(tmp_path / "qwen3")
    assert config["model_type"] == "qwen3" and config["mask_token_id"] == 7 and "auto_map" not in config
    assert checkpoint.load(tmp_path / "qwen3")[1] == checkpoint.load(tmp_path / "a2d")[1]


def test_a_folder_that_is_there_is_not_written_over(student, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="mine is there already: name a new folder"):
        checkpoint.export(student, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_shards_are_one_file(tmp_path):
    whole = foreign(tmp_path / "whole")
    foreign(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    where = {key: names[i % 3] for i, key in enumerate(whole)}
    for name in names:
        save_file({key: whole[key] for key in whole if where[key] == name}, tmp_path / "parts" / name)
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert same(checkpoint.load(tmp_path / "parts")[0], checkpoint.load(tmp_path / "whole")[0])
    (tmp_path / "parts" / names[1]).rename(tmp_path / names[1])
    with pytest.raises(ValueError, match=f"names {names[1]}, which is not there"):
        checkpoint.load(tmp_path / "parts")
    where["transformer.wte.weight"] = f"../{names[1]}"
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match=f"names ../{names[1]}"):
        checkpoint.load(tmp_path / "parts")


def test_pickled_weights_are_not_read(tmp_path):
    foreign(tmp_path / "net")
    (tmp_path / "net" / "model.safetensors").rename(tmp_path / "net" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="it has no model.safetensors, and other kinds of weights are not read"):
        checkpoint.load(tmp_path / "net")


# `transformers` ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["gpt2", *test_llama.KINDS])
def test_what_is_saved_loads_in_transformers(tmp_path, kind):
    """A run's folders: every tensor is found, none is left over, and the logits are ours."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {**test_llama.KINDS.get(kind, {}), "vocab": TOK.vocab_size}
    net = network() if kind == "gpt2" else test_llama.llama(**sizes).float()
    tokens = torch.arange(24).view(2, 12)
    for name, layout in (("ar", None), ("opdlm", STUDENT)):
        checkpoint.save(tmp_path / name, net, TOK, layout, reveal="leftmost:0.9", trained={"seed": 0})
        theirs, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ours, other = net(tokens).view(2, 12, -1), theirs.eval()(tokens).logits
        ours[..., net.mask_id:net.mask_id + 1] = other[..., net.mask_id:net.mask_id + 1]       # never, with us
        assert torch.allclose(ours, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", *test_llama.KINDS])
def test_what_transformers_saves_is_loaded(tmp_path, kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {**test_llama.KINDS.get(kind, {}), "mask": None}
    config = (GPTConfig(31, 20, 2, 3, 12) if kind == "gpt2" else test_llama.llama(**sizes).config)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**checkpoint.to_hf_config(config), initializer_range=0.5)).eval()
    theirs.save_pretrained(tmp_path / "net", max_shard_size="2KB")
    assert len(list((tmp_path / "net").glob("*.safetensors"))) > 1
    net, layout = checkpoint.load(tmp_path / "net")
    tokens = torch.randint(0, 11, (2, 12), generator=torch.Generator().manual_seed(1))
    assert net.config == config and layout is None
    assert torch.allclose(net(tokens).view(2, 12, -1), theirs(tokens).logits, atol=1e-5, rtol=1e-5)


# the real checkpoint -------------------------------------------------------------------------------------------------

def test_the_real_checkpoint_tells_its_story(stories260k, capsys):
    flags = [f"--ckpt={stories260k}", "--mode=ar", "--temperature=0", "--length=40", "--device=cpu"]
    assert cli.run(sample.main, flags) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Once upon a time, there was a little girl named Lily.") and not err


def test_the_real_checkpoint_s_loss_on_stories_it_has_not_seen(stories260k):
    """About 1.32 nats a token over all of them, by its origin."""
    texts = stories260k_texts()
    tok = tokenizer.load(stories260k)
    rows = [torch.tensor([tok.eot, *tok.encode(text)][:256]) for text in texts[:24]]
    numbers = metrics.likelihood(checkpoint.load(stories260k)[0], rows, AR, tok)
    assert 1.2 < numbers["val_nats"] < 1.4 and 0.8 < numbers["bits_per_byte"] < 1.0


def stories260k_texts():
    path = Path(__file__).parents[2].parent / "shared/data/tinystories/valid.txt"
    if not path.is_file():
        pytest.skip(f"no stories in {path}, and tests use no network")
    return [text.strip() for text in path.read_text(encoding="utf-8").split("<|endoftext|>") if text.strip()]


def test_the_real_checkpoint_is_exported_byte_for_byte(stories260k, tmp_path, capsys):
    assert cli.run(sample.main, [f"--ckpt={stories260k}", f"--export={tmp_path / 'out'}"]) == 0
    before, after = (load_file(d / "model.safetensors") for d in (stories260k, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert tokenizer.load(tmp_path / "out").to_json() == tokenizer.load(stories260k).to_json()
    assert str(tmp_path / "out") in capsys.readouterr().out


# hf:NAME -------------------------------------------------------------------------------------------------------------

class Hub(http.server.ThreadingHTTPServer):
    """Serves the folders `revisions` of the repository some/net as the hub does; of the weights, the next `torn` times,
    half of what is asked for."""

    def __init__(self, revisions: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders = {name: folder for i, folder in enumerate(revisions.values(), 1)
                        for name in (f"{i:040x}", list(revisions)[i - 1])}
        self.commits = {name: f"{i:040x}" for i, name in enumerate(revisions, 1)}
        self.torn, self.asked, self.sent = 0, [], 0
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):    # noqa: N802
        self.do_GET()

    def do_GET(self):    # noqa: N802
        where = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.asked.append((self.command, where))
        found = re.fullmatch(r"(/api/models)?/some/net/(revision|tree|resolve)/([^/]+)(?:/(.+))?", where)
        folder = self.server.folders.get(found[3]) if found else None
        if folder is None or found[4] and not (folder / found[4]).is_file():
            kind = "RevisionNotFound" if found and folder is None else "EntryNotFound" if found else "RepoNotFound"
            return self.answer(b"", 404, **{"X-Error-Code": kind, "X-Error-Message": "not there"})
        commit = self.server.commits.get(found[3], found[3])
        files = [{"type": "file", "path": p.name, "rfilename": p.name, "size": p.stat().st_size,
                  "oid": self.etag(p)} for p in sorted(folder.iterdir())]
        if found[2] == "tree":
            return self.answer(json.dumps(files).encode(), **{"Content-Type": "application/json"})
        if found[2] == "revision":
            info = {"id": "some/net", "modelId": "some/net", "sha": commit, "siblings": files, "private": False}
            return self.answer(json.dumps(info).encode(), **{"Content-Type": "application/json"})
        content, begin = (folder / found[4]).read_bytes(), 0
        if "Range" in self.headers:
            begin = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
        ranged = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"} if begin else {}
        return self.answer(content[begin:], 206 if begin else 200, **ranged, **{
            "ETag": f'"{self.etag(folder / found[4])}"', "X-Repo-Commit": commit})

    def etag(self, path):
        return hashlib.sha1(path.read_bytes()).hexdigest()

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            if self.path.endswith(".safetensors"):
                body = body[:len(body) // 2] if self.server.torn else body
                self.server.torn, self.server.sent = max(0, self.server.torn - 1), self.server.sent + len(body)
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A running stand-in with two revisions of a network, which `hub.fetch` uses for the time of a test."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for seed, name in enumerate(("main", "v2")):
        checkpoint.save(tmp_path / name, network(seed), TOK)
        (tmp_path / name / "pytorch_model.bin").write_bytes(b"a program")
        (tmp_path / name / "README.md").write_text("a card")
    server = Hub({name: tmp_path / name for name in ("main", "v2")})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    reach(monkeypatch, server.endpoint, tmp_path / "cache")
    yield server
    server.shutdown()
    server.server_close()


def reach(monkeypatch, endpoint, cache_dir):
    """A new process, as it were: what `fetch` has found is forgotten."""
    whole = getattr(checkpoint.fetch, "func", checkpoint.fetch)
    whole.cache_clear()
    monkeypatch.setattr(checkpoint, "fetch", functools.partial(whole, endpoint=endpoint, cache_dir=str(cache_dir)))


def test_a_name_is_a_folder_of_what_is_needed(there):
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])
    assert {p.name for p in checkpoint.fetch("hf:some/net").iterdir()} == {"config.json", "model.safetensors", "bpe.json"}
    assert not [where for _, where in there.asked if where.endswith((".bin", ".md"))]


@pytest.mark.parametrize("revision", ["v2", f"{2:040x}"])
def test_a_revision_is_another_network(there, revision):
    assert same(checkpoint.load(f"hf:some/net@{revision}")[0], network(1), but=["mask_vector"])
    assert not same(checkpoint.load("hf:some/net")[0], network(1), but=["mask_vector"])


def test_what_is_there_is_not_fetched_again(there, tmp_path, monkeypatch):
    checkpoint.load("hf:some/net")
    there.asked.clear()
    checkpoint.load("hf:some/net")
    assert there.asked == []
    reach(monkeypatch, there.endpoint, tmp_path / "cache")
    checkpoint.load("hf:some/net")
    assert not [where for command, where in there.asked if command == "GET" and "/resolve/" in where]
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    reach(monkeypatch, f"http://127.0.0.1:{port}", tmp_path / "cache")                 # no network: what is there
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])


def test_a_transfer_that_breaks_off_is_gone_on_with(there, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)                                 # between the attempts
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)         # what is kept of it
    there.torn = 2
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])
    assert there.torn == 0 and there.sent < 1.1 * (tmp_path / "main" / "model.safetensors").stat().st_size


def test_files_that_came_whole_are_kept(there, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    there.torn = 99
    with pytest.raises(ValueError, match="^hf:some/net can't be fetched"):
        checkpoint.load("hf:some/net")
    there.torn, there.asked = 0, []
    assert same(checkpoint.load("hf:some/net")[0], network(0), but=["mask_vector"])
    assert [where.rsplit("/")[-1] for command, where in there.asked if command == "GET" and "/resolve/" in where] == [
        "model.safetensors"]


@pytest.mark.parametrize("name", ["hf:some/other", "hf:some/net@v3", "hf:", "hf:a/b/c", "hf:../net"])
def test_a_name_that_is_not_there_is_one_sentence(there, name):
    sentence = r"can't be fetched \(.*\): wanted is hf:OWNER/NAME or hf:OWNER/NAME@REVISION, and a network"
    with pytest.raises(ValueError, match=f"^{re.escape(name)} {sentence}") as caught:
        checkpoint.load(name)
    assert "\n" not in str(caught.value)


def test_text_of_a_name(there, capsys):
    flags = ["--mode=ar", "--length=5", "--device=cpu"]
    said = []
    for name in ("hf:some/net@v2", str(there.folders["v2"])):
        assert cli.run(sample.main, [f"--ckpt={name}", *flags]) == 0
        said.append(capsys.readouterr().out.splitlines()[:-1])
    assert said[0] == said[1]


# no code -------------------------------------------------------------------------------------------------------------

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
