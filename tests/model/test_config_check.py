"""Invariants of model/config_check.py: a value of config.json is possible, or one sentence names its key."""
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sample
from data import tokenizer
from model import checkpoint, config_check
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from tests.model import test_llama

TOK = tokenizer.word_level(["One", " ball", "."])
FAMILIES = {
    "gpt2": {},
    "llama": {"family": "llama"},
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3"},
    "a2d-qwen3": {"family": "qwen3", "mask": 11},
}
ABSURD = [
    None, True, 0, -1, 1.5, 8.0, 10 ** 9, 10 ** 30, float("nan"), float("inf"), -0.0, 1e-320,
    "4", "", "x" * 9999, "two\nlines", [], [4], [[]], {}, {"a": {"b": [1]}},
]
NOT_IN_THE_FILE = ("head_dim", "num_key_value_heads", "rope_theta", "rope_parameters", "rope_scaling",
                   "layer_types", "mask_token_id", "block_size", "quantization_config", "auto_map",
                   "trained", "unknown")


def make(folder, family, student=True):
    kind = FAMILIES[family]
    if family == "gpt2":
        net = GPT(GPTConfig(TOK.vocab_size, 16, 2, 2, 8)).init_weights(torch.Generator().manual_seed(0))
    else:
        net = test_llama.llama(vocab=TOK.vocab_size, context=16, **kind).float()
    layout = Layout(4, 4, 0) if student else None
    checkpoint.save(folder, net, TOK, layout, reveal="leftmost:0.9", confidence="largest",
                    trained={"seed": 0})
    if family.startswith("a2d"):
        change(folder, model_type=family, student=..., mask_token_id=11, block_size=4)


def change(folder, **values):
    """Change keys of config.json; ... removes one."""
    path = Path(folder, "config.json")
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def load(folder):
    """What sample.py reads of a checkpoint before it generates."""
    options = sample.Options(ckpt=str(folder))
    net, layout = checkpoint.load(folder)
    tokenizer.load(folder)
    rule = sample.load_rule(options, folder)
    assert 1 <= layout.block <= net.config.context and rule.steps(layout.block) >= 1


@pytest.mark.parametrize("family", FAMILIES)
def test_any_value_of_any_key_is_taken_or_refused_in_one_sentence(tmp_path, family):
    make(tmp_path / "net", family)
    load(tmp_path / "net")
    original = (tmp_path / "net" / "config.json").read_text()
    config = json.loads(original)
    keys = [*config, *NOT_IN_THE_FILE, *[("student", key) for key in config.get("student", ())],
            ("rope_parameters", "rope_theta"), ("rope_parameters", "rope_type"), ("rope_scaling", "type")]
    refused = set()
    for key in keys:
        for value in ABSURD:
            changed = json.loads(original)
            if isinstance(key, tuple):
                changed.setdefault(key[0], {})[key[1]] = value
            else:
                changed[key] = value
            (tmp_path / "net" / "config.json").write_text(json.dumps(changed))
            try:
                load(tmp_path / "net")
            except ValueError as error:
                name = key[1] if isinstance(key, tuple) else key
                text = str(error)
                assert name in text, f"{key}: {value!r} is refused by {text!r}, which does not name the key"
                assert "\n" not in text and len(text) < 600, f"{key}: {value!r} is refused by {text!r}"
                refused.add(key)
    sizes = checkpoint.GPT2_SIZES if family == "gpt2" else checkpoint.LLAMA_SIZES
    assert {*sizes.values(), "model_type", "reveal", "confidence"} <= refused


@pytest.mark.parametrize("text", ["[]", "[" * 200_000, "5", '"x"', "null", "", '{"model_type": "gpt2"', "{}"])
def test_a_config_that_is_no_object_is_one_sentence(tmp_path, text):
    make(tmp_path / "net", "gpt2")
    (tmp_path / "net" / "config.json").write_text(text)
    for read in (checkpoint.load, tokenizer.load, checkpoint.read_layout_and_config):
        with pytest.raises(ValueError) as caught:
            read(tmp_path / "net")
            assert read is tokenizer.load            # which can do without
            raise ValueError("config.json")
        assert "config.json" in str(caught.value) and "\n" not in str(caught.value)


IMPOSSIBLE = {       # of a student with context 16: changes to "student", and a part of the message
    "no block": ({"block": 0}, 'block in "student" in config.json: expected an integer from 1 to 16, got 0'),
    "a long block": ({"block": 17}, "expected an integer from 1 to 16, got 17"),
    "text": ({"block": "4"}, "got '4'"),
    "another context": ({"context_block": 2},
                        'context_block in "student" in config.json: expected 1 or 4, got 2'),
    "true": ({"context_block": True}, "expected 1 or 4, got True"),
    "another shift": ({"logit_shift": 2},
                      'logit_shift in "student" in config.json: expected 0 or 1, got 2'),
    "the older name": ({"shift": -1}, "logit_shift in \"student\" in config.json: expected 0 or 1, got -1"),
    "no key of it": ({"blocks": 4}, "\"student\" in config.json: blocks is not a key of a layout"),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_an_impossible_layout_is_named(tmp_path, what):
    values, message = IMPOSSIBLE[what]
    make(tmp_path / "net", "llama")
    change(tmp_path / "net", student={"block": 4, **values})
    with pytest.raises(ValueError) as caught:
        checkpoint.load(tmp_path / "net")
    assert message in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_that_the_weights_do_not_have_cost_nothing(tmp_path, family):
    """They are refused before a network is made: no time, no memory."""
    make(tmp_path / "net", family)
    key = (checkpoint.GPT2_SIZES if family == "gpt2" else checkpoint.LLAMA_SIZES)["layers"]
    for layers in (1, 3, 10 ** 6):
        change(tmp_path / "net", **{key: layers})
        with pytest.raises(ValueError, match=f"{key} in config.json: expected 2, as many .* got {layers}"):
            checkpoint.load(tmp_path / "net")


UNSUPPORTED = {      # settings of related models, wherever they stand
    "logit_scale": 0.5, "logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
    "attention_multiplier": 0.01, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    "query_pre_attn_scalar": 256, "partial_rotary_factor": 0.5, "pretraining_tp": 2, "num_experts": 8,
    "num_local_experts": 8, "quantization_config": {"quant_method": "gptq", "bits": 4}, "clip_qkv": 8,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_setting_that_changes_the_computation_is_named(tmp_path, family, key):
    make(tmp_path / "net", family)
    value = UNSUPPORTED[key]
    for values in ({key: value}, {"text_config": {key: value}}, {"more": {"deep": {key: value}}}):
        make(tmp_path / "net", family)
        change(tmp_path / "net", **values)
        with pytest.raises(ValueError, match=f"{key} in config.json: expected .* \\(not supported\\)$"):
            checkpoint.load(tmp_path / "net")


LLAMA_ONLY = {
    "sliding_window": 4096, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "rope_scaling": {"factor": 4}},
    "rope_scaling": {"rope_type": "default", "factor": 4.0},
}


@pytest.mark.parametrize("key", LLAMA_ONLY)
def test_a_setting_of_llamas_that_changes_the_computation_is_named(tmp_path, key):
    make(tmp_path / "net", "llama")
    change(tmp_path / "net", **{key: LLAMA_ONLY[key]})
    with pytest.raises(ValueError, match=f"{key} in config.json"):
        checkpoint.load(tmp_path / "net")


def test_a_setting_that_changes_nothing_is_taken(tmp_path):
    for family in ("gpt2", "llama"):
        make(tmp_path / family, family)
        change(tmp_path / family, attention_dropout=0.1, resid_pdrop=0.1, pretraining_tp=1, logit_scale=1.0,
               use_cache=False, initializer_range=0.5, num_experts=None, quantization_config=None,
               max_length=20, unknown={"a": 1})
        load(tmp_path / family)


def test_two_bases_of_the_wavelengths_are_refused(tmp_path):
    make(tmp_path / "net", "llama")
    change(tmp_path / "net", rope_theta=1e4, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    with pytest.raises(ValueError, match="rope_theta in config.json: it has two values, 10000 and 500000"):
        checkpoint.load(tmp_path / "net")
    change(tmp_path / "net", rope_theta=...)
    assert checkpoint.load(tmp_path / "net")[0].config.theta == 5e5


# weights that are not what they should be -------------------------------------------------------------

def edit_tensors(folder, change_tensors):
    path = folder / "model.safetensors"
    state = load_file(path)
    changed = folder / "changed"                                 # tensors that were loaded may lie in `path`
    save_file(change_tensors(state), changed, {"format": "pt"})
    changed.replace(path)


def renamed(function):
    return lambda state: {function(key): x for key, x in state.items()}


PREFIXES = {
    "compiled": lambda key: "_orig_mod." + key,
    "compiled blocks": lambda key: key.replace(".0.", ".0._orig_mod."),
    "several processes": lambda key: "module." + key,
    "both": lambda key: "module._orig_mod." + key,
    "FSDP": lambda key: key.replace(".1.", ".1._fsdp_wrapped_module."),
    "the base model": lambda key: key.removeprefix("model.").removeprefix("transformer."),
}


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_do_not_matter(tmp_path, family, prefix):
    make(tmp_path / "net", family)
    before = copy.deepcopy(checkpoint.load(tmp_path / "net")[0].state_dict())
    edit_tensors(tmp_path / "net", renamed(PREFIXES[prefix]))
    after = checkpoint.load(tmp_path / "net")[0].state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_quantized_weights_are_named(tmp_path, dtype):
    make(tmp_path / "net", "llama")
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(tmp_path / "net", lambda state: {**state, name: state[name].to(dtype)})
    with pytest.raises(ValueError, match=f"{name}: expected floating point numbers, got {dtype} .quantized"):
        checkpoint.load(tmp_path / "net")


def test_a_tensor_that_is_there_twice_is_named(tmp_path):
    make(tmp_path / "net", "gpt2")
    edit_tensors(tmp_path / "net", lambda state: {**state, "wpe.weight": torch.zeros(16, 8)})
    with pytest.raises(ValueError, match="wpe.weight is there twice, once as (transformer.)?wpe.weight"):
        checkpoint.load(tmp_path / "net")


@pytest.mark.parametrize("file", ["model.safetensors", "mask.safetensors", "config.json", "bpe.json"])
def test_a_pointer_instead_of_a_file_is_one_sentence(tmp_path, file):
    make(tmp_path / "net", "gpt2")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"
    (tmp_path / "net" / file).write_text(pointer)
    with pytest.raises(ValueError, match=f"{file} is a Git LFS pointer, .*git lfs pull") as caught:
        load(tmp_path / "net")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    make(tmp_path / "net", "gpt2")
    for name in ("config.json", "bpe.json"):
        path = tmp_path / "net" / name
        path.write_text(path.read_text(), encoding="utf-8-sig")
    load(tmp_path / "net")


def shard(folder):
    """Put the weights in two files with an index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {key: names[i % 2] for i, key in enumerate(state)}
    for name in names:
        save_file({key: x for key, x in state.items() if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return names, weight_map


def test_an_index_leads_only_to_files_of_the_folder(tmp_path):
    make(tmp_path / "net", "llama")
    names, weight_map = shard(tmp_path / "net")
    load(tmp_path / "net")
    outside = tmp_path / "outside.safetensors"
    (tmp_path / "net" / names[0]).rename(outside)
    (tmp_path / "net" / "link.safetensors").symlink_to(outside)
    (tmp_path / "net" / "below").mkdir()
    shutil.copyfile(outside, tmp_path / "net" / "below" / "x.safetensors")
    for name in ("../outside.safetensors", str(outside), "link.safetensors", "below/x.safetensors", "..", "",
                 5, None, ["a"]):
        index = {key: name if file == names[0] else file for key, file in weight_map.items()}
        (tmp_path / "net" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        with pytest.raises(ValueError, match="is not a readable checkpoint") as caught:
            checkpoint.load(tmp_path / "net")
        assert "\n" not in str(caught.value)


def test_files_of_the_hub_s_cache_are_links(tmp_path):
    make(tmp_path / "net", "llama")
    shard(tmp_path / "net")
    snapshot = tmp_path / "models--some--net" / "snapshots" / "0123"
    blobs = tmp_path / "models--some--net" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted((tmp_path / "net").iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs", str(number)))
    load(snapshot)


def test_an_index_that_says_something_else_than_the_files_is_refused(tmp_path):
    make(tmp_path / "net", "llama")
    names, weight_map = shard(tmp_path / "net")
    path = tmp_path / "net" / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {**weight_map, "model.more": names[0]}}))
    with pytest.raises(ValueError, match=f"{names[0]} has model.more, but it does not"):
        checkpoint.load(tmp_path / "net")
    path.write_text(json.dumps({"weight_map": weight_map}))
    again = {**load_file(tmp_path / "net" / names[1]), "model.norm.weight": torch.ones(16)}
    first = {**load_file(tmp_path / "net" / names[0]), "model.norm.weight": torch.ones(16)}
    save_file(again, tmp_path / "net" / names[1])
    save_file(first, tmp_path / "net" / names[0])
    with pytest.raises(ValueError, match="model.norm.weight is in two of the files"):
        checkpoint.load(tmp_path / "net")
    for content in ("[]", "{}", '{"weight_map": []}', '{"weight_map": 5}', "[" * 200_000):
        path.write_text(content)
        with pytest.raises(ValueError, match="is not a readable checkpoint"):
            checkpoint.load(tmp_path / "net")


@pytest.mark.parametrize("name", ["../mask.safetensors", "/etc/passwd", "", ".."])
def test_the_mask_is_in_the_folder(tmp_path, name):
    make(tmp_path / "net", "gpt2")
    shutil.copyfile(tmp_path / "net" / "mask.safetensors", tmp_path / "mask.safetensors")
    change(tmp_path / "net", mask_file=name)
    with pytest.raises(ValueError, match="mask_file in config.json names .*, which is not in the folder"):
        checkpoint.load(tmp_path / "net")


def test_a_folder_that_says_two_things_is_refused(tmp_path):
    make(tmp_path / "net", "llama")
    change(tmp_path / "net", vocab_size=TOK.vocab_size + 1)
    with pytest.raises(ValueError, match="embed_tokens.weight: expected shape .*json has vocab_size=260"):
        checkpoint.load(tmp_path / "net")
    change(tmp_path / "net", vocab_size=TOK.vocab_size, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding, but config.json ties the two"):
        checkpoint.load(tmp_path / "net")
    make(tmp_path / "tied", "qwen2")
    change(tmp_path / "tied", tie_word_embeddings=False)
    with pytest.raises(ValueError, match="lm_head.weight is missing"):
        checkpoint.load(tmp_path / "tied")


@pytest.mark.parametrize("expected, sentence", [
    (config_check.Expected(int, 1, 8), "an integer from 1 to 8"),
    (config_check.Expected(float, 0, 0.5), "a number from 0 to 0.5"),
    (config_check.Expected(bool), "true or false"),
    (config_check.Expected(dict), "an object"),
    (config_check.Expected(list), "a list"),
])
def test_each_kind_of_value_is_described(expected, sentence):
    assert str(expected) == sentence


def test_a_config_may_be_nested_as_deeply_as_the_limit():
    def nested(levels):
        value = {}
        for _ in range(levels):
            value = {"extra": value}
        return value
    config_check.check_unsupported(nested(config_check.MAX_DEPTH))
    message = f"nested too deeply: expected at most {config_check.MAX_DEPTH} levels"
    with pytest.raises(ValueError, match=message):
        config_check.check_unsupported(nested(config_check.MAX_DEPTH + 1))


def test_a_student_s_layout_without_a_block_has_blocks_of_4():
    config_check.check_student({}, context=4)
    with pytest.raises(ValueError, match="block in .student. in config.json"):
        config_check.check_student({}, context=3)
