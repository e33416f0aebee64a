"""Checkpoints, in and out: a folder of config.json and safetensors, which hold numbers and no code.

A student's [MASK] vector stands in a file of its own, mask.safetensors, and its config says how it is wired, under
"student".
"""
import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.dist import first, whole_state
from model.gpt import GPT, GPTConfig
from model.masks import Layout

MASK = "mask_vector"


def save(folder: Path, net: GPT, tokenizer, layout: Layout | None = None, **extra) -> None:
    """Write a checkpoint, whole or not at all: into a new folder, which then takes the old one's place."""
    state, folder = whole_state(net), Path(folder)
    if not first():
        return
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    mask = state.pop(MASK)
    save_file(state, fresh / "model.safetensors")
    if layout is not None:
        save_file({MASK: mask}, fresh / "mask.safetensors")
        extra["student"] = asdict(layout)
    (fresh / "config.json").write_text(json.dumps({**asdict(net.config), **extra}, indent=1))
    tokenizer.save(fresh)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)                  # not before: after a kill right here it is the only one
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_config(folder: Path) -> dict:
    """config.json as a dictionary."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no checkpoint: it has no readable config.json; give a run's folder, "
                         "or train one with train_tiny.py") from None


def load(folder: Path) -> tuple[GPT, Layout | None]:
    """The network of a folder, and how it is wired if it is a student."""
    folder, config = Path(folder), read_config(folder)
    try:
        net = GPT(GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig)}))
        state = load_file(folder / "model.safetensors")
        layout = Layout(**config["student"]) if "student" in config else None
        state[MASK] = load_file(folder / "mask.safetensors")[MASK] if layout else net.mask_vector.detach()
        net.load_state_dict(state)
    except (KeyError, TypeError, ValueError, OSError, SafetensorError, RuntimeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{folder} is no checkpoint that can be read: {said}") from None
    return net, layout
