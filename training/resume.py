"""The state file of a run, to resume from: the network, the optimizer and the progress of the run.

Learning rates, rows and random numbers follow from the step, so nothing else is needed. Progress is a dict of
plain values, for example {"step": 40, "tokens": 12345, "best": 1.23, "settings": {...}}.
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

# 1. files -----------------------------------------------------------------------------------------

def check_writable(folder: Path) -> Path:
    """The folder, created if necessary. ValueError if it is not writable: now, not after the training."""
    trial = folder / f".try{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.write_text("")
        trial.unlink()
    except OSError as error:
        raise ValueError(f"--out={folder} cannot be written ({error.strerror}): use another folder") from None
    return folder


def previous_state(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"before-{path.name}")


def latest_state(path: Path) -> Path | None:
    """The last state file, or None. It is the previous one if a run was killed while it replaced `path`."""
    for file in (path, previous_state(path)):
        if file.exists():
            return file
    return None


def write_state(path: Path, tensors: dict[str, Tensor], progress: str) -> None:
    """Write a state file completely or not at all, and keep the former one as previous_state(path).

    `progress` is JSON. ValueError if the file cannot be written.
    """
    new = Path(f"{path}.new")
    metadata = {"noted": progress, "checksum": str(checksum(tensors, progress))}
    try:
        save_file(tensors, new, metadata)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({error}): make room and continue with --resume; what "
                         "was saved before is still there") from None
    if path.exists():
        os.replace(path, previous_state(path))
    os.replace(new, path)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, progress) of a state file. ValueError if it is damaged."""
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if str(checksum(tensors, metadata["noted"])) != metadata["checksum"]:
            raise ValueError("wrong checksum")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): to continue from the state before it, rename "
                         f"{previous_state(path).name} to {path.name}") from None
    return tensors, json.loads(metadata["noted"])


def checksum(tensors: dict[str, Tensor], progress: str) -> int:
    """CRC-32 of the progress and of the names and bytes of the tensors, sorted by name."""
    crc = zlib.crc32(progress.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        data = tensors[name].view(-1).view(torch.uint8)
        crc = zlib.crc32(data.numpy(), crc)
    return crc


# 2. states of a run -------------------------------------------------------------------------------

def start_progress(path: Path, settings: dict) -> dict:
    """The progress of a new run. Deletes the state files of a former run."""
    if is_first():
        for old in (path, previous_state(path)):
            old.unlink(missing_ok=True)
    return {"step": 0, "tokens": 0, "best": float("inf"), "settings": settings}


def save_state(path: Path, net, optimizer, progress: dict) -> None:
    """Save what `load_state` needs. All processes must call; ValueError if the file cannot be written."""
    tensors = {}
    for name, p in full_state(net).items():
        tensors[f"net.{name}"] = p
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = gather(value.detach()).cpu().contiguous()
    if is_first():
        write_state(path, tensors, json.dumps(progress))
    gather_objects(None)                                         # all processes wait until the file is there


def load_state(path: Path, net, optimizer, settings: dict) -> dict:
    """Load the latest state into `net` and `optimizer`; returns its progress, with the new `settings`.

    Prints which settings differ from the saved ones. ValueError if the file is damaged or of another network.
    """
    path = latest_state(path)
    tensors, progress = read_state(path)
    params = local_params(net)
    check_same_network(path, tensors, params)

    net_state = {}
    for name, p in params.items():
        net_state[name] = scatter_like(tensors[f"net.{name}"], p)
    net.load_state_dict(net_state)

    optimizer_params = [p for group in optimizer.param_groups for p in group["params"]]
    states = {}
    for name, value in tensors.items():
        if not name.startswith("optimizer."):
            continue
        _, index, key = name.split(".", 2)
        p = optimizer_params[int(index)]
        like = p if value.shape == p.shape else value            # a step count, for example, is not sharded
        states.setdefault(int(index), {})[key] = scatter_like(value, like)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    changes = []
    for name, old in progress["settings"].items():
        if settings.get(name) != old:
            changes.append(f"{name} was {old} and is {settings.get(name)}")
    print(f"resuming from step {progress['step']}; " + (", ".join(changes) or "settings unchanged"))
    return progress | {"settings": settings}


def check_same_network(path: Path, tensors: dict[str, Tensor], params: dict[str, Tensor]) -> None:
    """ValueError if the network that was saved has other parameters than `params`, or other shapes."""
    advice = "use the sizes that it was saved with"
    saved_names = {name.removeprefix("net.") for name in tensors if name.startswith("net.")}
    only_in_one = saved_names ^ set(params)
    if only_in_one:
        raise ValueError(f"{path} is of another network, {min(only_in_one)} is not in both: {advice}")
    for name, p in params.items():
        saved = tensors[f"net.{name}"]
        if saved.shape != p.shape:
            raise ValueError(f"{path} is of another network, {name} is {tuple(saved.shape)} there and "
                             f"{tuple(p.shape)} here: {advice}")


# 3. SIGTERM ---------------------------------------------------------------------------------------

class SigtermFlag:
    """Catches SIGTERM. True once any process has received it, so that a run can save its state and stop."""

    def __init__(self):
        self.received = False
        self.former_handler = signal.signal(signal.SIGTERM, self.handle)

    def handle(self, *_) -> None:
        self.received = True

    def restore(self) -> None:
        """Let SIGTERM end the process again."""
        signal.signal(signal.SIGTERM, self.former_handler)

    def __bool__(self) -> bool:
        """All processes must ask at the same step, and get the same answer."""
        return any(gather_objects(self.received))
