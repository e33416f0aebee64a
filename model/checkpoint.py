"""Load and save checkpoints in Hugging Face's format: a folder with config.json, safetensors and a tokenizer.

    fetch                  the folder of hf:NAME or hf:NAME@REVISION, downloaded if necessary
    load                   the network in a folder, and its layout if it is a student
    sizes_from_checkpoint  the sizes that a conversion takes from a checkpoint
    save                   write a network to a folder, which `transformers` loads too
    export                 write any checkpoint as `save` does; tensors change only if another dtype is given.
                           A student gets the code with which `transformers` runs it (model/remote/)

Safetensors contain numbers only, so loading a checkpoint never runs code from it.

Four keys of config.json are this project's own. "student" is the layout of a student. "mask_file" names the
file with its [MASK] vector. If [MASK] is a token of the vocabulary instead, "mask_token_id" is its id. "base"
is the AR model of a student that is an adapter (model/lora.py): hf:NAME, or a folder, relative to its own.
"""
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import config_check, files, lora
from model.gpt import GPT, GPTConfig
from model.masks import Layout

if TYPE_CHECKING:       # otherwise imported where it is needed: GPT-2 runs without it
    from model.llama import Llama, LlamaConfig

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"      # names the files of weights that come in several
MASK_FILE = "mask.safetensors"
ADAPTER = "adapter_model.safetensors"       # this file and the next one are those of `peft`
ADAPTER_CONFIG = "adapter_config.json"
TOKENIZER_FILES = ("bpe.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "generation_config.json")
FILES = ["config.json", WEIGHTS, "model-*-of-*.safetensors", INDEX, MASK_FILE, ADAPTER,
         ADAPTER_CONFIG, *TOKENIZER_FILES]
REMOTE_CODE = Path(__file__).parent / "remote/modeling_opdlm.py"
OWN_FILES = (*FILES, "importance.json", REMOTE_CODE.name)    # replaced with a checkpoint; others stay

MASK = "mask_vector"        # the parameter that `transformers` does not know
QWEN3_MASK = 151669         # first unused id of Qwen3: [MASK] in the checkpoints that OPDLM and dllm released
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")    # in old files; not parameters
WRAPPERS = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
LAYER = re.compile(r"^(?:h|model\.layers)\.(\d+)\.")    # the number of a block, in the name of its tensors
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RENAMED = {"clean_block": "context_block", "shift": "logit_shift"}  # keys of "student" in older checkpoints

# The sizes: our names, and the keys of config.json.
GPT2_SIZES = {
    "vocab": "vocab_size", "context": "n_positions", "layers": "n_layer", "heads": "n_head",
    "width": "n_embd",
}
LLAMA_SIZES = {
    "vocab": "vocab_size", "context": "max_position_embeddings", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "width": "hidden_size", "kv_heads": "num_key_value_heads",
    "head_size": "head_dim", "hidden": "intermediate_size",
}
# What the networks cannot vary: keys of config.json and the values allowed. The first one is the default.
GPT2_FIXED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "n_inner": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
QWEN_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
}
LLAMA_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
}
FIXED = {"gpt2": GPT2_FIXED, "qwen2": QWEN_FIXED, "qwen3": QWEN_FIXED, "llama": LLAMA_FIXED}   # by family
MODEL_TYPES = (*FIXED, "a2d-qwen2", "a2d-qwen3", "a2d-llama")   # a2d: students that OPDLM and dllm released


# 1. the folder of a checkpoint --------------------------------------------------------------------------

@cache
def fetch(name: str | Path, **hub) -> Path:
    """The folder of a checkpoint: `name` itself, or for hf:NAME its folder in the Hugging Face cache.

    If the hub can be reached, the cache is updated: an interrupted download is resumed, complete files are
    not downloaded again. `hub`: endpoint and cache_dir for `snapshot_download`.
    """
    if not str(name).startswith("hf:"):
        with suppress(OSError):  # a folder that may be read only
            files.finish_swap(Path(name))
        return Path(name)
    from huggingface_hub import snapshot_download

    repo, _, revision = str(name)[3:].partition("@")
    try:
        folder = snapshot_download(repo, revision=revision or None, allow_patterns=FILES, **hub)
    except Exception as error:  # versions of the hub raise different classes
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name} cannot be fetched ({reason}): expected hf:OWNER/NAME or "
                         "hf:OWNER/NAME@REVISION, and a network connection the first time") from error
    return Path(folder)


def read_config(name: str | Path) -> dict:
    """config.json of a checkpoint."""
    folder = fetch(name)
    try:
        config = files.read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise ValueError(f"expected an object, got a {type(config).__name__}")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} is not a checkpoint: it has no readable config.json ({reason}). Give a "
                         "folder that has one (of a run: ar or opdlm), or hf:NAME, or train one with "
                         "train_tiny.py") from None
    with one_sentence_errors(folder):
        config_check.check_values(config, config_check.OWN_KEYS, missing_allowed=True)
    return config


@contextmanager
def one_sentence_errors(folder: Path) -> Iterator[None]:
    """Turn every error in a checkpoint's content into a ValueError of one line that names the folder."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OSError, ArithmeticError, SafetensorError,
            RuntimeError) as error:
        message = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        message = " ".join(message.split())
        raise ValueError(f"{folder} is not a readable checkpoint: {message}") from None


# 2. config.json -----------------------------------------------------------------------------------------

def read_layout_and_config(name: str | Path) -> tuple["GPTConfig | LlamaConfig", Layout | None]:
    """The sizes and family of a checkpoint, and its layout if it is a student."""
    config = read_config(name)
    folder = fetch(name)
    with one_sentence_errors(folder):
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            expected = ", ".join(MODEL_TYPES)
            got = config_check.shown(model_type)
            raise ValueError(f"model_type in config.json: expected one of {expected}, got {got}")
        config_check.check_unsupported(config)
        if model_type == "gpt2":
            sizes = gpt2_config(config)
        else:
            sizes = llama_config(config, read_mask_id(folder, config))
        return sizes, read_layout(config, sizes.context)


def is_a2d(config: dict) -> bool:
    """Whether a checkpoint is a student that OPDLM or dllm released."""
    return config["model_type"].startswith("a2d-")


def read_layout(config: dict, context: int) -> Layout | None:
    """The layout of a student, None for an AR model. A released student has blocks of 4 by default."""
    if "student" in config:
        layout = {RENAMED.get(key, key): value for key, value in config["student"].items()}
        config_check.check_student(layout, context)
        return Layout(**layout)
    if is_a2d(config):
        block = config.get("block_size", 4)
        allowed = config_check.Expected(int, 1, context)
        config_check.check_values({"block_size": block}, {"block_size": allowed})
        return Layout.of(block, "paper", "block")
    return None


def read_mask_id(folder: Path, config: dict) -> int | None:
    """The id of a student's [MASK], None if it is not in the vocabulary."""
    if "student" in config:
        return config.get("mask_token_id")
    if not is_a2d(config):
        return None
    mask_id = config.get("mask_token_id", tokenizer_mask_id(folder))
    mask_id = QWEN3_MASK if mask_id is None else mask_id
    config_check.check_values({"mask_token_id": mask_id}, config_check.LLAMA_KEYS, missing_allowed=True)
    return mask_id


def tokenizer_mask_id(folder: Path) -> int | None:
    """The id of the mask token, from the tokenizer's files."""
    settings = {}
    tokenizer = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = files.read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        tokenizer = files.read_json(folder / "tokenizer.json")

    ids = {}
    for token in tokenizer.get("added_tokens", []):
        ids[token["content"]] = token["id"]
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        ids[token["content"]] = int(token_id)

    mask_token = settings.get("mask_token")
    if isinstance(mask_token, dict):
        mask_token = mask_token["content"]
    return ids.get(mask_token)


def gpt2_config(config: dict) -> GPTConfig:
    """The sizes in a config.json of GPT-2."""
    config_check.check_values(config, config_check.GPT2_KEYS)
    if config.get("n_inner") == 4 * config["n_embd"]:  # the default width of the MLP, written out
        config = {**config, "n_inner": None}
    check_fixed(config, GPT2_FIXED)
    return GPTConfig(**read_sizes(config, GPT2_SIZES))


def llama_config(config: dict, mask_id: int | None = None) -> "LlamaConfig":
    """The sizes in a config.json of the Llama family, with the defaults of `transformers`."""
    from model.llama import LlamaConfig

    family = config["model_type"].removeprefix("a2d-")
    config = dict(config)
    config_check.check_values(config, config_check.LLAMA_KEYS)
    heads = config["num_attention_heads"]
    check_fixed(config, FIXED[family])
    default_head_size = 128 if family == "qwen3" else config["hidden_size"] // heads
    config["head_dim"] = config.get("head_dim") or default_head_size
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    return LlamaConfig(
        **read_sizes(config, LLAMA_SIZES),
        family=family,
        theta=read_rope_theta(config),
        eps=float(config.get("rms_norm_eps") or 1e-6),
        tied=bool(config.get("tie_word_embeddings")),
        mask=mask_id,
    )


def read_rope_theta(config: dict) -> float:
    """The base of the RoPE wavelengths. ValueError for scaled or partial RoPE and for sliding windows."""
    config_check.check_rope(config)
    config_check.check_layer_types(config)
    for settings in (config, config.get("rope_parameters"), config.get("rope_scaling")):
        if settings and settings.get("rope_theta") is not None:
            return float(settings["rope_theta"])
    return 1e4


def check_fixed(config: dict, fixed: dict) -> None:
    """ValueError if config.json asks for something that the network does not have."""
    for key, allowed in fixed.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            got = config_check.shown(value)
            raise ValueError(f"{key} in config.json: expected {allowed[0]!r}, got {got} (not supported)")


def read_sizes(config: dict, names: dict) -> dict:
    """The sizes in config.json, by our names."""
    return {name: config[key] for name, key in names.items()}


def to_hf_config(config: "GPTConfig | LlamaConfig") -> dict:
    """config.json as `transformers` reads it."""
    is_gpt2 = config.family == "gpt2"
    architecture = "GPT2LMHeadModel" if is_gpt2 else f"{config.family.capitalize()}ForCausalLM"
    result = {"architectures": [architecture], "model_type": config.family}
    for name, key in (GPT2_SIZES if is_gpt2 else LLAMA_SIZES).items():
        result[key] = getattr(config, name)
    for key, allowed in FIXED[config.family].items():
        result[key] = allowed[0]
    if not is_gpt2:
        result["rms_norm_eps"] = config.eps
        result["tie_word_embeddings"] = config.tied
        result["rope_theta"] = config.theta
    return result


def ar_folder(name: str) -> Path:
    """The folder of the AR model `name`: also of a student that is one under a causal mask, whose conversion
    then goes on. ValueError for other students.
    """
    _, layout = read_layout_and_config(name)
    if base := base_of(name):
        raise ValueError(f"--init={name} is a student that is an adapter of {base}: give that checkpoint")
    if layout and not layout.is_ar_model:
        raise ValueError(f"--init={name} is a student already (block {layout.block}), and not an AR model "
                         "under a causal mask: give the AR model that it was converted from, for example a "
                         "run's ar folder")
    return fetch(name)


def is_student(name: str | Path) -> bool:
    """Whether a checkpoint is a student, so that its [MASK] vector has been trained."""
    _, layout = read_layout_and_config(name)
    return layout is not None


def sizes_from_checkpoint(name: str, length: int | None, default_length: int) -> dict:
    """The settings that a conversion takes from the checkpoint `name`.

    Its length is `length`, by default `default_length` or, if less, the maximum number of positions.
    """
    config, _ = read_layout_and_config(name)
    if length and length > config.context:
        raise ValueError(f"--length={length} is more than the {config.context} positions of --init={name}")
    return {
        "pretrain_steps": 0,
        "layers": config.layers,
        "width": config.width,
        "length": length or min(default_length, config.context),
    }


# 3. load ------------------------------------------------------------------------------------------------

def load(name: str | Path,
         dtype: torch.dtype | None = torch.float32) -> tuple["GPT | Llama", Layout | None]:
    """The network of a checkpoint, and its layout if it is a student. `dtype` None: that of the files."""
    config, layout = read_layout_and_config(name)
    folder = fetch(name)
    if base := base_of(name):
        return load_adapted(folder, base, dtype), layout
    with one_sentence_errors(folder):
        state = rename_tensors(read_tensors(folder, dtype), config)
        check_layers(config, state)
        net = network_without_weights(config)
        state = from_hf(net, state)
        if MASK in net.state_dict():
            state[MASK] = torch.zeros(config.width)
            if layout:
                mask_file = read_config(name).get("mask_file", MASK_FILE)
                state[MASK] = read_file(folder, mask_file, "mask_file in config.json")[MASK]
        check_shapes(net, state)
        if dtype:
            state = {key: x.to(dtype) for key, x in state.items()}
        net.load_state_dict(state, assign=True)
    return net, layout


def base_of(name: str | Path) -> str | None:
    """The AR model that a student is an adapter of: hf:NAME or a folder. None if it has all its weights."""
    base = read_config(name).get("base")
    if base is None or base.startswith("hf:"):
        return base
    return os.path.normpath(fetch(name).resolve() / base)


def load_adapted(folder: Path, base: str, dtype: torch.dtype | None) -> "GPT | Llama":
    """The AR model `base` with the adapter in the folder, which has float32 numbers."""
    if not base.startswith("hf:") and not Path(base, "config.json").exists():
        raise ValueError(f"{folder} is an adapter of the AR model in {base}, which is not there: copy it "
                         "there, or write its place into base in config.json")
    with one_sentence_errors(folder):
        if base_of(base):
            raise ValueError(f"base in config.json: {base} is an adapter itself")
        settings = files.read_json(folder / ADAPTER_CONFIG)
        config_check.check_values(settings, config_check.ADAPTER_KEYS)
        frozen, _ = load(base, dtype)
        net = lora.adapt(frozen, settings["r"])
        tensors = read_file(folder, ADAPTER, "the folder")
        if net.mask_vector is not None:
            mask_file = read_config(folder).get("mask_file", MASK_FILE)
            tensors |= read_file(folder, mask_file, "mask_file in config.json")
        expected = net.state_dict()
        state = {}
        for key in lora.adapter_names(net):
            name = key if key == MASK else lora.peft_name(to_hf_name(net.config, key))
            if name not in tensors:
                raise ValueError(f"{name} is missing in {ADAPTER}")
            if tensors[name].shape != expected[key].shape:
                raise ValueError(f"{name}: expected shape {tuple(expected[key].shape)}, got "
                                 f"{tuple(tensors[name].shape)}; is {base} its AR model?")
            state[key] = tensors[name]
        net.load_state_dict(state, strict=False)                 # the other tensors are those of the base
    return net


def network_without_weights(config: "GPTConfig | LlamaConfig") -> "GPT | Llama":
    """A network on the meta device, which takes no memory until tensors are assigned."""
    with torch.device("meta"):
        if config.family == "gpt2":
            return GPT(config)
        from model.llama import Llama

        return Llama(config)


def read_tensors(folder: Path, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint in this number format, from one file or from several with an index."""
    if (folder / WEIGHTS).exists():
        return read_file(folder, WEIGHTS, "the folder", dtype)
    if not (folder / INDEX).exists():
        raise ValueError(f"it has no {WEIGHTS}, and other formats of weights are not supported")
    weight_map = files.read_json(folder / INDEX)["weight_map"]
    tensors = {}
    for file in sorted(set(weight_map.values())):
        for key, x in read_file(folder, file, INDEX, dtype).items():
            if key in tensors:
                raise ValueError(f"{key} is in two of the files that {INDEX} names")
            tensors[key] = x
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise ValueError(f"{INDEX} says that {weight_map[missing[0]]} has {missing[0]}, but it does not")
    return tensors


def read_file(folder: Path, file: str, named_by: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors in a file of the folder. ValueError if it leads out of the folder or was not downloaded.

    They are converted to `dtype` one by one, so that no file is in memory twice. Those in a format that is
    not supported stay in it.
    """
    path = folder / file
    if Path(file).name != file or not path.is_file() or not is_within(path, folder):
        raise ValueError(f"{named_by} names {file}, which is not in the folder: download it again")
    files.refuse_lfs_pointer(path)
    tensors = {}
    with safe_open(path, "pt") as content:
        for key in content.keys():
            x = content.get_tensor(key)
            tensors[key] = x.to(dtype) if dtype and x.dtype in DTYPES else x
    return tensors


def is_within(path: Path, folder: Path) -> bool:
    """Whether a file is in this folder, or a link into the blobs of the Hugging Face cache that it is in."""
    folder = folder.resolve()
    blobs = folder.parent.parent / "blobs"
    file = path.resolve()
    return path.name == WEIGHTS or file.is_relative_to(folder) or file.is_relative_to(blobs)


def rename_tensors(tensors: dict[str, Tensor], config: "GPTConfig | LlamaConfig") -> dict[str, Tensor]:
    """The tensors by our names: without prefixes of wrappers; those of a base model get their prefix."""
    state = {}
    for key, x in tensors.items():
        if BUFFERS.search(key):
            continue
        name = WRAPPERS.sub("", key).removeprefix("transformer.")
        if config.family != "gpt2" and not name.startswith(("model.", "lm_head.")):
            name = f"model.{name}"
        if name in state:
            raise ValueError(f"{name} is there twice, once as {key}")
        state[name] = x
    return state


def check_layers(config: "GPTConfig | LlamaConfig", state: dict[str, Tensor]) -> None:
    """ValueError if the weights have another number of layers: before a network of that size is made."""
    matches = [LAYER.match(name) for name in state]
    found = len({match[1] for match in matches if match})
    if found != config.layers:
        key = (GPT2_SIZES if config.family == "gpt2" else LLAMA_SIZES)["layers"]
        raise ValueError(f"{key} in config.json: expected {found}, as many as the weights have, got "
                         f"{config.layers}")


def from_hf(net, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by our names, as a state dict of this network."""
    head = state.get("lm_head.weight")
    table = state.get("wte.weight", state.get("model.embed_tokens.weight"))
    is_tied = "lm_head.weight" not in net.state_dict()
    if is_tied and head is not None and table is not None:
        if not torch.equal(head, table):
            raise ValueError("lm_head.weight is not the embedding, but config.json ties the two "
                             "(tie_word_embeddings)")
        del state["lm_head.weight"]

    for key, x in state.items():
        if is_transposed(net.config, key) and x.dim() == 2:
            state[key] = x.T.contiguous()
    return state


def to_hf_name(config: "GPTConfig | LlamaConfig", key: str) -> str:
    """The name of a tensor in `transformers`."""
    if config.family == "gpt2" and key != MASK:
        return f"transformer.{key}"
    return key


def is_transposed(config: "GPTConfig | LlamaConfig", key: str) -> bool:
    """Whether files contain this matrix transposed, as they do for GPT-2's linear layers."""
    return config.family == "gpt2" and ".c_" in key and key.endswith(".weight")


def check_shapes(net, state: dict[str, Tensor]) -> None:
    """ValueError for the first tensor that is missing, unexpected or of another shape.

    It states name and shape as they are in the file.
    """
    config = net.config
    expected = net.state_dict()
    for key in {**expected, **state}:
        name = to_hf_name(config, key)
        if key not in expected:
            raise ValueError(f"unexpected tensor {name}: {config.family} with this config.json has none")
        expected_shape = shape_in_file(config, key, expected[key])
        if key not in state:
            hint = ", or tie_word_embeddings in config.json" if key == "lm_head.weight" else ""
            raise ValueError(f"{name} is missing: expected a tensor of shape {expected_shape}{hint}")
        if state[key].shape != expected[key].shape:
            shape = shape_in_file(config, key, state[key])
            raise ValueError(f"{name}: expected shape {expected_shape}, got {shape}; config.json has "
                             f"{describe_sizes(config)}")
        if state[key].dtype not in DTYPES:
            raise ValueError(f"{name}: expected floating point numbers, got {state[key].dtype} (quantized "
                             "weights are not supported)")


def describe_sizes(config: "GPTConfig | LlamaConfig") -> str:
    """The sizes as config.json has them: n_embd=192, n_layer=3, ..."""
    names = GPT2_SIZES if config.family == "gpt2" else LLAMA_SIZES
    return ", ".join(f"{key}={getattr(config, name)}" for name, key in names.items())


def shape_in_file(config: "GPTConfig | LlamaConfig", key: str, x: Tensor) -> tuple[int, ...]:
    """The shape of a tensor in the file, from its shape in the network."""
    shape = tuple(x.shape)
    return shape[::-1] if is_transposed(config, key) else shape


# 4. save ------------------------------------------------------------------------------------------------

def save(folder: str | Path, net: "GPT | Llama", tokenizer, layout: Layout | None = None,
         state: dict[str, Tensor] | None = None, base: str | None = None, **extra) -> None:
    """Write a checkpoint. If that fails, the previous content of the folder stays.

    `layout`: of a student. `state`: the state dict, if the network is sharded. `base`: the AR model of an
    adapter, which alone is written. `extra`: keys for config.json.
    """
    if state is None:
        state = {name: p.detach().cpu().contiguous() for name, p in net.state_dict().items()}
    if base:
        extra["base"] = base
    eos = list(tokenizer.eos)
    special_ids = {"bos_token_id": tokenizer.bos, "eos_token_id": eos if len(eos) > 1 else eos[0]}
    with files.replace_folder(Path(folder), OWN_FILES) as new_folder:
        write_files(new_folder, net, state, layout, {**special_ids, **extra})
        tokenizer.save(new_folder)


def export(name: str | Path, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write the checkpoint `name` to a new folder, with its tokenizer and the other keys of its config.json.

    Tensors keep their bytes, unless `dtype` is given. An adapter is exported as one, without its AR model.
    Any other student gets a copy of model/remote/modeling_opdlm.py.
    """
    source = fetch(name)
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"--export={folder} exists already: give the name of a new folder")
    base = base_of(name)
    if base and dtype:
        raise ValueError(f"--dtype has no effect on {name}: it is an adapter of {base}; leave it out")
    net, layout = load(name, dtype)
    config = dict(read_config(name))
    config.pop("auto_map", None)  # names code that is not exported
    has_code = layout is not None and base is None
    if has_code:
        config["auto_map"] = {"AutoModelForCausalLM": remote_class(net.config)}
    if base:
        config["base"] = base
    with files.replace_folder(folder, OWN_FILES, may_exist=False) as new_folder:
        write_files(new_folder, net, net.state_dict(), layout, config)
        if has_code:
            shutil.copyfile(REMOTE_CODE, new_folder / REMOTE_CODE.name)
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, new_folder / file)
        if (source / "bpe.json").is_file():
            from data import tokenizer  # only here is a tokenizer more than a file

            tokenizer.load(source).save_for_transformers(new_folder)


def remote_class(config: "GPTConfig | LlamaConfig") -> str:
    """The class that runs a student of this family in `transformers`, as "auto_map" names it."""
    return f"{REMOTE_CODE.stem}.{config.family.capitalize()}Student"


def write_files(folder: Path, net: "GPT | Llama", state: dict[str, Tensor], layout: Layout | None,
                extra: dict) -> None:
    """Write the tensors and config.json, with the keys `extra`. With "base": of an adapter alone."""
    config = net.config
    base = extra.get("base")
    if base:
        state = {name: state[name] for name in lora.adapter_names(net)}
    tensors = {}
    for key, x in state.items():
        if key != MASK:
            x = x.T if is_transposed(config, key) else x
            tensors[to_hf_name(config, key)] = x.contiguous()
    if base:
        tensors = {lora.peft_name(name): x for name, x in tensors.items()}
        files.write_tensors(folder / ADAPTER, tensors)
        adapter_settings = json.dumps(lora.peft_config(net, base), indent=1)
        (folder / ADAPTER_CONFIG).write_text(adapter_settings, encoding="utf-8")
    else:
        files.write_tensors(folder / WEIGHTS, tensors)

    own_keys = {}
    if layout:
        own_keys["student"] = asdict(layout)
        if MASK in state:
            files.write_tensors(folder / MASK_FILE, {MASK: state[MASK]})
            own_keys["mask_file"] = MASK_FILE
        else:
            own_keys["mask_token_id"] = config.mask
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    settings = {**extra, **to_hf_config(config), **own_keys, "dtype": dtype}
    content = json.dumps(with_dtype(settings, dtype), indent=1)
    (folder / "config.json").write_text(content, encoding="utf-8")


def with_dtype(config: dict, dtype: str) -> dict:
    """The same settings, with `dtype` wherever they name one: `transformers` loads weights in that."""
    result = {}
    for key, value in config.items():
        if isinstance(value, dict) and key != "trained":
            value = with_dtype(value, dtype)
        result[key] = dtype if key in ("dtype", "torch_dtype") else value
    return result
