"""The state file of a run, to resume from: the network, the optimizer and the progress of the run.

Learning rates, rows and random numbers follow from the step, so nothing else is needed. Progress is a dict of
plain values, for example {"step": 40, "tokens": 12345, "best": 1.23, "settings": {...}}.

Two state files are kept, the newest and the one before it. If one is a symbolic link, its target is written.
"""
import json
import os
import shutil
import signal
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.files import write_tensors
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


def check_results(out: Path, folders: tuple[str, ...], files: tuple[str, ...]) -> None:
    """ValueError if one of these results in `out` could not be written: now, not after the training.

    A result may be a symbolic link: then its target is written.
    """
    for name in folders:
        target = follow(out / name)
        if target.exists() and not target.is_dir():
            raise ValueError(f"{out / name} is not a folder, but a checkpoint is saved there: move it away")
        if target.is_dir() and any(target.iterdir()) and not (target / "config.json").exists():
            raise ValueError(f"{out / name} has files but no config.json: it is not a checkpoint, but would "
                             "be replaced by one; move it away or use another --out")
        if os.path.ismount(target):
            raise ValueError(f"{out / name} is a mount point, which cannot be replaced: use a folder in it")
        check_parent(out / name, target)
    for name in files:
        target = follow(out / name)
        if target.is_dir():
            raise ValueError(f"{out / name} is a folder, but a file is written there: move it away")
        check_parent(out / name, target)


def follow(path: Path) -> Path:
    """The target of a symbolic link; of another path, the path itself, made absolute."""
    try:
        target = path.resolve()
        is_loop = target.is_symlink()                            # since Python 3.13 it is no error
    except (OSError, RuntimeError):
        is_loop = True
    if is_loop:
        raise ValueError(f"{path} is a symbolic link that leads nowhere: remove it")
    return target


def check_parent(path: Path, target: Path) -> None:
    """ValueError if no file or folder `target` can be made, for `path` that may be a link to it."""
    folder = target.parent
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} is a link to {target}, but {folder} does not exist or cannot be written: "
                         "remove the link or make that folder writable")


def previous_state(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"before-{path.name}")


def damaged_state(path: Path) -> Path:
    """Where a damaged state is kept, after a run was resumed from the one before it."""
    return path.with_name(f"damaged-{path.name}")


def latest_state(path: Path) -> Path | None:
    """The last state file, or None. It is the previous one if a run was killed while it replaced `path`."""
    path = follow(path)
    for file in (path, previous_state(path)):
        if file.exists():
            return file
    return None


def write_state(path: Path, tensors: dict[str, Tensor], progress: str) -> None:
    """Write a state file completely or not at all, and keep the former one as previous_state(path).

    `progress` is JSON. ValueError if the file cannot be written.
    """
    path = follow(path)
    new = path.with_name(f"{path.name}.{os.getpid()}.part")
    metadata = {"noted": progress, "checksum": str(checksum(tensors, progress))}
    try:
        write_tensors(new, tensors, metadata)
        if path.exists():
            shutil.move(path, follow(previous_state(path)))      # a link may lead to another file system
        os.replace(new, path)
    except (OSError, SafetensorError) as error:
        new.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written ({error}): make room and continue with --resume; what "
                         "was saved before is still there") from None


def delete_unfinished(path: Path) -> None:
    """Delete what killed runs left of state files that they were writing. No other run may be writing."""
    path = follow(path)
    for file in path.parent.glob(f"{path.name}.*.part"):
        pid = file.name.removeprefix(f"{path.name}.").removesuffix(".part")
        if pid.isdecimal():
            file.unlink(missing_ok=True)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """(tensors, progress) of a state file. ValueError if it is damaged, OSError if it cannot be read."""
    open(path, "rb").close()                                     # OSError, for example without permission
    try:
        tensors = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if str(checksum(tensors, metadata["noted"])) != metadata["checksum"]:
            raise ValueError("wrong checksum")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    return tensors, json.loads(metadata["noted"])


def read_newest(path: Path) -> tuple[dict[str, Tensor], dict, Path, str]:
    """The newest state that is not damaged: tensors, progress, file, and why no newer one was read, or "".

    ValueError if there is none.
    """
    path = follow(path)
    problems = []
    for file in (path, previous_state(path)):
        if not file.exists():
            problems.append(f"{file} does not exist")
            continue
        try:
            tensors, progress = read_state(file)
        except ValueError as error:
            problems.append(str(error))
            continue
        return tensors, progress, file, problems[0] if problems and path.exists() else ""
    raise ValueError(f"no whole state to resume from: {', and '.join(problems)}. Restore one of these files "
                     "from a copy, or start again without --resume")


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
    path = follow(path)
    if is_first():
        delete_unfinished(path)
        for old in (path, previous_state(path), damaged_state(path)):
            follow(old).unlink(missing_ok=True)
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
    """Load the newest whole state into `net` and `optimizer`; returns its progress, with the new `settings`.

    Prints which settings differ from the saved ones. ValueError if no state is whole, or of another network.
    """
    path = follow(path)
    tensors, progress, file, problem = read_newest(path)
    params = local_params(net)
    check_same_network(file, tensors, params)
    if problem:
        print(f"{problem}: resuming from the state before it, {file}")
        if is_first():                                           # so that it does not replace the whole one
            path.replace(damaged_state(path))

    net_state = {}
    for name, p in params.items():
        net_state[name] = scatter_like(tensors[f"net.{name}"], p)
    net.load_state_dict(net_state, strict=False)                 # of an adapted network, only the adapter

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
    step = f"step {progress['step']}"
    if progress.get("phase") == "pretrain":
        step = f"step {progress['pretrain_step']} of the AR pretraining"
    print(f"resuming from {step}; " + (", ".join(changes) or "settings unchanged"))
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


CHANGED = {     # fingerprint: the message if it differs
    "data": "the training text (--data) has changed",
    "val_data": "the held-out text (--val_data) has changed",
    "tokenizer": "the tokenizer (--vocab, or that of --init) has changed",
    "ar": "the AR model (--init, or ar/ in --out) has changed",
}


class RunState:
    """What a run of two phases, pretrain and distil, has done so far, and its state files.

    `progress` has the keys of `start_progress`, and
        phase           the phase of the saved network: pretrain (the AR model) or distil (the student)
        pretrain_step   updates of the AR model that are done
        fingerprints    checksums of what must be the same when the run is resumed
    States of older versions have none of these: they are of the phase distil.
    """

    def __init__(self, path: Path, settings: dict, resume: bool):
        self.path = path
        self.settings = settings
        self.saved_phase = None                                  # the phase to resume in
        self.progress = {"phase": "pretrain", "pretrain_step": 0, "fingerprints": {}}
        if resume:
            _, progress, _, _ = read_newest(path)
            self.progress |= {"phase": "distil"} | progress
            self.saved_phase = self.progress["phase"]

    def check_unchanged(self, flags: list[str], fingerprints: dict[str, int]) -> None:
        """ValueError if a run is resumed with other values of these flags, or other fingerprints.

        Keeps the fingerprints. What an older state does not have is not compared.
        """
        saved_flags = self.progress.get("settings", {})
        saved_fingerprints = self.progress["fingerprints"]
        changes = []
        for name in flags:
            new = self.settings[name]
            old = saved_flags.get(name, new)
            if old != new:
                changes.append(f"--{name} was {old} and is {new}")
        for name, new in fingerprints.items():
            if saved_fingerprints.get(name, new) != new:
                changes.append(CHANGED[name])
        if changes:
            raise ValueError(f"cannot resume the run in {self.path.parent}: {', '.join(changes)}. Use what "
                             "it was started with, or start without --resume in another --out")
        saved_fingerprints.update(fingerprints)

    def check_teacher(self, teacher) -> None:
        """ValueError if a run is resumed with another teacher. Keeps the checksum of this one."""
        crc = None
        if is_first():
            crc = checksum({name: p.detach().cpu() for name, p in teacher.named_parameters()}, "")
        self.check_unchanged([], {"ar": gather_objects(crc)[0]})

    def start(self) -> None:
        """Before the first phase of a run: if it is a new one, delete the state files of a former run."""
        if self.saved_phase is None:
            self.progress |= start_progress(self.path, self.settings)
        elif is_first():
            delete_unfinished(self.path)

    def start_phase(self, phase: str, net, optimizer) -> None:
        """Load the network and the optimizer if the saved state is of this phase."""
        if self.saved_phase == phase:
            load_state(self.path, net, optimizer, self.settings)
        self.progress |= {"phase": phase, "settings": self.settings}

    def save(self, net, optimizer) -> None:
        """All processes must call."""
        save_state(self.path, net, optimizer, self.progress)


# 3. SIGTERM ---------------------------------------------------------------------------------------

class Terminated(BaseException):
    """The run ends because of SIGTERM."""


class SigtermFlag:
    """Catches SIGTERM within `with SigtermFlag() as sigterm:`, so that a run can save its state and stop.

    While `saves_first` is set, the flag becomes true, once any process has received the signal; the run then
    saves and raises Terminated. Otherwise Terminated is raised at once. It ends the with statement, after
    which `exit_code` is 143.
    """

    def __init__(self):
        self.received = False
        self.saves_first = False
        self.exit_code = 0

    def __enter__(self) -> "SigtermFlag":
        self.former_handler = signal.signal(signal.SIGTERM, self.handle)
        return self

    def __exit__(self, kind, *_) -> bool:
        signal.signal(signal.SIGTERM, self.former_handler)
        if kind is Terminated:
            self.exit_code = 143
        return kind is Terminated

    def handle(self, *_) -> None:
        if not self.saves_first:
            raise Terminated
        self.received = True
        os.write(2, b"SIGTERM: the run stops at its next save point\n")     # print is not safe here

    def __bool__(self) -> bool:
        """All processes must ask at the same step, and get the same answer."""
        return any(gather_objects(self.received))
