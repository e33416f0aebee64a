"""Checkpoints, in and out, in Hugging Face's layouts: config.json and safetensors, which hold numbers and no code.

    fetch     hf:NAME or hf:NAME@REVISION as a folder of the hub's cache
    load      the network of a folder, and how it is wired if it is a student
    fitted    the sizes that a conversion takes from one
    save      a network as a folder, which `transformers` reads too
    export    any checkpoint as `save` would write it, not a byte of a tensor changed unless another dtype is asked for

What `transformers` does not know stands beside what it does: how a student is wired under "student" of config.json, its
[MASK] vector in the file that "mask_file" names, or, where [MASK] is a token of the vocabulary, "mask_token_id".
"""
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import gpt, llama
from model.gpt import GPT, GPTConfig
from model.llama import Llama, LlamaConfig
from model.masks import Layout

MASK, MASK_FILE, WEIGHTS = "mask_vector", "mask.safetensors", "model.safetensors"
TEXT_FILES = ("bpe.json", "tokenizer.json", "tokenizer_config.json")           # what makes ids of text, and text of ids
FILES = ["config.json", WEIGHTS, "model-*-of-*.safetensors", f"{WEIGHTS}.index.json", MASK_FILE, *TEXT_FILES]
QWEN3_MASK = 151669         # the first unused row of Qwen3's table, [MASK] of the released OPDLM and dllm checkpoints
RENAMED = {"clean_block": "context_block", "shift": "logit_shift"}   # in the config.json of older checkpoints
BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$")       # in old files; no parameters


# 1. where it lies -----------------------------------------------------------------------------------------------------

@cache
def fetch(name: str | Path, **hub) -> Path:
    """The folder of a checkpoint: `name` itself, or of hf:NAME the hub's cache, which is brought up to date where there
    is a network: a transfer that breaks off is resumed, files once whole are kept. `hub`: `endpoint`, `cache_dir`."""
    if not str(name).startswith("hf:"):
        return Path(name)
    from huggingface_hub import snapshot_download

    repo, _, revision = str(name)[3:].partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=FILES, **hub))
    except Exception as error:  # their classes differ from one version of the hub to the next
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"{name} can't be fetched ({reason}): wanted is hf:OWNER/NAME or hf:OWNER/NAME@REVISION, and "
                         "a network the first time") from error


def read_config(name: str | Path) -> dict:
    """config.json as a dictionary."""
    folder = fetch(name)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict):
            return config
    except (OSError, ValueError):
        pass
    raise ValueError(f"{folder} is no checkpoint: it has no readable config.json; give a folder that has one (of a run "
                     "its ar or opdlm), or hf:NAME, or train one with train_tiny.py")


# 2. what its config.json says -----------------------------------------------------------------------------------------

@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Whatever is wrong with a checkpoint becomes one sentence that names it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OSError, SafetensorError, RuntimeError) as error:
        said = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{folder} is no checkpoint that can be read: {' '.join(said.split())}") from None


def read_layout_and_config(name: str | Path) -> tuple[GPTConfig | LlamaConfig, Layout | None]:
    """Sizes and family of a checkpoint, and how it is wired if it is a student."""
    said, folder = read_config(name), fetch(name)
    with readable(folder):
        kind = said.get("model_type")
        if kind != "gpt2" and str(kind).removeprefix("a2d-") not in llama.FIXED:
            raise ValueError(f"its model_type is {kind!r}: gpt2, {', '.join(llama.FIXED)} or a2d-qwen3 was wanted")
        layout, mask = wiring(folder, said)
        return gpt.config_of(said) if kind == "gpt2" else llama.config_of(said, mask), layout


def wiring(folder: Path, said: dict) -> tuple[Layout | None, int | None]:
    """A student's layout, and the id of [MASK] if that is in the vocabulary.

    `a2d-` are students as the paper's and dllm's are wired; their config.json names no block, the paper's has 4 slots.
    """
    if "student" in said:
        layout = {RENAMED.get(key, key): value for key, value in dict(**said["student"]).items()}
        return Layout(**layout), said.get("mask_token_id")
    if not said["model_type"].startswith("a2d-"):
        return None, None
    config, full = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
                    for path in (folder / "tokenizer_config.json", folder / "tokenizer.json"))
    token, ids = config.get("mask_token"), {entry["content"]: entry["id"] for entry in full.get("added_tokens", [])}
    ids |= {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
    found = said.get("mask_token_id", ids.get(token["content"] if isinstance(token, dict) else token))
    return Layout.of(said.get("block_size", 4), "paper", "block"), QWEN3_MASK if found is None else found


def ar_folder(name: str) -> Path:
    """The folder of the AR model `name`. A student is refused: its weights are not those of the model that teaches."""
    if layout := read_layout_and_config(name)[1]:
        raise ValueError(f"--init={name} is a student already (block {layout.block}): give the AR model that it was "
                         "made of, for example a run's ar folder")
    return fetch(name)


def sizes_from_checkpoint(name: str, length: int | None, usual: int) -> dict:
    """What a conversion takes from checkpoint `name`: `length` positions, by default the `usual` or all that it has."""
    config = read_layout_and_config(name)[0]
    if length and length > config.context:
        raise ValueError(f"--length={length} is more than the {config.context} positions of --init={name}")
    return {"pretrain_steps": 0, "layers": config.layers, "width": config.width,
            "length": length or min(usual, config.context)}


# 3. in ----------------------------------------------------------------------------------------------------------------

def load(name: str | Path, dtype: torch.dtype | None = torch.float32) -> tuple[GPT | Llama, Layout | None]:
    """The network of a checkpoint, and how it is wired if it is a student. `dtype` None: as its tensors are stored."""
    (config, layout), folder = read_layout_and_config(name), fetch(name)
    with readable(folder):
        with torch.device("meta"):
            net = (GPT if config.family == "gpt2" else Llama)(config)
        state = from_hf(net, tensors(folder))
        if MASK in net.state_dict():
            file = folder / read_config(name).get("mask_file", MASK_FILE)
            state[MASK] = load_file(file)[MASK] if layout else torch.zeros(config.width)
        check_shapes(net, state)
        net.load_state_dict({key: x.to(dtype or x.dtype) for key, x in state.items()}, assign=True)
    return net, layout


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, in one file or in those that its index names."""
    index = folder / f"{WEIGHTS}.index.json"
    if (folder / WEIGHTS).exists():
        return load_file(folder / WEIGHTS)
    if not index.exists():
        raise ValueError(f"it has no {WEIGHTS}, and other kinds of weights are not read")
    for name in (names := sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))):
        if Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"{index.name} names {name}, which is not there: fetch it again")
    return {key: x for name in names for key, x in load_file(folder / name).items()}


def from_hf(net, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors by our names and as they lie here: GPT-2's files hold matrices transposed."""
    state = {key.removeprefix("transformer."): x for key, x in found.items() if not BUFFERS.search(key)}
    head, table = state.get("lm_head.weight"), state.get("wte.weight", state.get("model.embed_tokens.weight"))
    if "lm_head.weight" not in net.state_dict() and head is not None and table is not None:
        if not torch.equal(head, table):
            raise ValueError("lm_head.weight is not the embedding, but its config.json ties the two")
        del state["lm_head.weight"]
    return {key: x.T.contiguous() if transposed(net.config, key) and x.dim() == 2 else x for key, x in state.items()}


def to_hf_name(config, key: str) -> str:
    """A tensor's name in `transformers`."""
    return f"transformer.{key}" if config.family == "gpt2" and key != MASK else key


def transposed(config, key: str) -> bool:
    """Is this a Conv1D of GPT-2's, whose weight lies the other way round?"""
    return config.family == "gpt2" and ".c_" in key and key.endswith(".weight")


def check_shapes(net, state: dict[str, Tensor]) -> None:
    """Names the first tensor that is missing, one too many or of another shape, as it is in the checkpoint."""
    wanted = net.state_dict()
    for key in {**wanted, **state}:
        name, turn = to_hf_name(net.config, key), -1 if transposed(net.config, key) else 1
        if key not in wanted:
            raise ValueError(f"{name} is one tensor too many: {net.config.family} of this config.json has none")
        shape = tuple(wanted[key].shape)[::turn]
        if key not in state:
            raise ValueError(f"{name} is missing: a tensor of the shape {shape} was wanted")
        if state[key].shape != wanted[key].shape:
            raise ValueError(f"{name} has the shape {tuple(state[key].shape)[::turn]}: {shape} was wanted")


# 4. out ---------------------------------------------------------------------------------------------------------------

def save(folder: str | Path, net: GPT | Llama, tokenizer, layout: Layout | None = None,
         state: dict[str, Tensor] | None = None, **extra) -> None:
    """Write a checkpoint, whole or not at all. A text begins and ends with the tokenizer's end-of-text."""
    if state is None:
        state = {name: p.detach().cpu().contiguous() for name, p in net.state_dict().items()}
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    with replaced(Path(folder)) as fresh:
        write(fresh, net.config, state, layout, {**ends, **extra})
        tokenizer.save(fresh)


def export(name: str | Path, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write checkpoint `name` to a new folder: tensors in the layout that they have in it, and its dtype unless there
    is another, its text files as they are, and all else that its config.json says."""
    source, folder = fetch(name), Path(folder)
    if folder.exists():
        raise ValueError(f"--export={folder} is there already: name a new folder")
    net, layout = load(name, dtype)
    rest = {key: value for key, value in read_config(name).items() if key != "auto_map"}       # code of another's
    with replaced(folder) as fresh:
        write(fresh, net.config, net.state_dict(), layout, rest)
        for path in (source / text for text in TEXT_FILES):
            if path.is_file():
                shutil.copyfile(path, fresh / path.name)


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A new folder to write to, which then takes the place of the old one."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise ValueError(f"{folder} can't be written ({error}): make room; what was there before still is") from None
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)                  # not before: after a kill right here it is the only one
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def write(folder: Path, config: GPTConfig | LlamaConfig, state: dict, layout: Layout | None, extra: dict) -> None:
    """Tensors and config.json."""
    mask = state.pop(MASK, None)
    state = {to_hf_name(config, key): (x.T if transposed(config, key) else x).contiguous() for key, x in state.items()}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    own = {"student": asdict(layout)} if layout else {}
    if layout and mask is None:
        own["mask_token_id"] = config.mask
    elif layout:
        save_file({MASK: mask}, folder / MASK_FILE, {"format": "pt"})
        own["mask_file"] = MASK_FILE
    (folder / "config.json").write_text(json.dumps({**extra, **to_hf_config(config), **own}, indent=1), encoding="utf-8")


def to_hf_config(config: GPTConfig | LlamaConfig) -> dict:
    """config.json as `transformers` reads it."""
    names, fixed = (gpt.NAMES, gpt.FIXED) if config.family == "gpt2" else (llama.NAMES, llama.FIXED[config.family])
    said = {"model_type": config.family, **{key: getattr(config, ours) for ours, key in names.items()},
            **{key: values[0] for key, values in fixed.items()}}
    if config.family == "gpt2":
        return {"architectures": ["GPT2LMHeadModel"], **said}
    return {"architectures": [f"{config.family.capitalize()}ForCausalLM"], **said, "rms_norm_eps": config.eps,
            "tie_word_embeddings": config.tied, "rope_theta": config.theta}
