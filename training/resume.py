"""The state of a conversion, in its run's folder, to go on from: network, optimizer and what is noted with them, in one
file.

Nothing else has to be kept: learning rates, rows and random numbers follow from the step.
"""
import json
import os
import signal
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from training.dist import full_state, gather, gather_objects, is_first, local_params, scatter_like


def writable(folder: Path) -> Path:
    """The folder, made if need be; refused now, not after the training, if nothing can be written there."""
    trial = folder / f".try{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise ValueError(f"--out={folder} can't be written ({error.strerror}): name another folder") from None
    return folder


def save_state(path: Path, net, optimizer, noted: dict) -> None:
    """Write what a conversion needs to go on, and what is `noted` with it, whole or not at all; the file before it is
    kept beside it. ValueError if it can't be written."""
    tensors = {f"net.{name}": p for name, p in full_state(net).items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": gather(value.detach()).cpu().contiguous() for key, value in state.items()}
    if is_first():
        write(path, tensors, json.dumps(noted))
    gather_objects(None)                                          # nobody goes on before it is there


def write(path: Path, tensors: dict[str, Tensor], noted: str) -> None:
    new = Path(f"{path}.new")
    try:
        save_file(tensors, new, {"noted": noted, "checksum": str(checksum(tensors, noted))})
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise ValueError(f"{path} can't be written ({error}): make room and go on with --resume, what was saved before "
                         "is still there") from None
    if path.exists():
        os.replace(path, before(path))
    os.replace(new, path)


def before(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"before-{path.name}")


def latest_state(path: Path) -> Path | None:
    """The last state that there is: the one before, if a run was killed between two renamings."""
    return next((at for at in (path, before(path)) if at.exists()), None)


def checksum(tensors: dict[str, Tensor], noted: str) -> int:
    """CRC-32 of what is noted and of names and bytes, in the order of the names."""
    crc = zlib.crc32(noted.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].view(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return crc


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, what was noted). ValueError for a file that is not as it was written."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            meta = file.metadata()
        if str(checksum(tensors, meta["noted"])) != meta["checksum"]:
            raise ValueError("its checksum is another")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): to go on from the save before it, rename {before(path).name} "
                         f"to {path.name}") from None
    return tensors, json.loads(meta["noted"])


def begin_states(path: Path, settings: dict) -> dict:
    """Forget a former run's; what is noted of a run at its begin."""
    for old in (path, before(path)) if is_first() else ():
        old.unlink(missing_ok=True)
    return {"step": 0, "tokens": 0, "best": float("inf"), "settings": settings}


def load_state(path: Path, net, optimizer, settings: dict) -> dict:
    """What was noted; `net` and `optimizer` take up what `save_state` wrote, or of it their shards. ValueError if it is
    damaged or of another network. Says which settings are others now."""
    path = latest_state(path)
    tensors, noted = read_state(path)
    here = {f"net.{name}": p for name, p in local_params(net).items()}
    for name in sorted({name for name in tensors if name.startswith("net.")} ^ set(here)):
        raise ValueError(f"{path} is of another network, {name[4:]} is not in both: give the sizes it was made with")
    for name, p in here.items():
        if p.shape != tensors[name].shape:
            raise ValueError(f"{path} is of another network, {name[4:]} is {tuple(tensors[name].shape)} there and "
                             f"{tuple(p.shape)} here: give the sizes it was made with")
    net.load_state_dict({name[4:]: scatter_like(tensors[name], p) for name, p in here.items()})
    params, states = [p for group in optimizer.param_groups for p in group["params"]], {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            like = params[int(i)] if value.shape == params[int(i)].shape else value
            states.setdefault(int(i), {})[key] = scatter_like(value, like)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    other = [f"{name} was {old} and is {settings.get(name)}" for name, old in noted["settings"].items()
             if old != settings.get(name)]
    print(f"going on from step {noted['step']}; " + (", ".join(other) or "settings as they were"))
    return noted | {"settings": settings}


class SigtermFlag:
    """SIGTERM, noted until somebody asks."""

    def __init__(self):
        self.asked, self.before = False, signal.signal(signal.SIGTERM, self.note)

    def note(self, *_) -> None:
        self.asked = True

    def restore(self) -> None:
        """SIGTERM does again what it did."""
        signal.signal(signal.SIGTERM, self.before)

    def __bool__(self) -> bool:
        """Has any process got it? All have to ask, so that they stop at the same step."""
        return any(gather_objects(self.asked))
