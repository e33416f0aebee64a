"""Around a run: where it computes, what it says and writes down, how it is stopped and goes on."""
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm


def device_named(name: str) -> torch.device:
    """auto is cuda, else mps, else cpu; a device that is not there is refused."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there[name]:
        raise ValueError(f"--device={name}: torch finds no such device here; use --device=auto")
    return torch.device(name)


def facts(device: torch.device) -> dict:
    """What a number depends on besides the settings: commit, versions, device, threads."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False,
                         cwd=Path(__file__).parent) if _has_git() else None
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    return {"commit": (git and git.stdout.strip()) or "unknown", "torch": torch.__version__,
            "python": platform.python_version(), "device": f"{device} ({name})", "threads": torch.get_num_threads()}


def _has_git() -> bool:
    return any((Path(folder) / name).exists() for folder in os.get_exec_path() for name in ("git", "git.exe"))


def writable(folder: Path) -> Path:
    """The folder, made if need be; refused now, not after the training, if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".try").write_text("")
        (folder / ".try").unlink()
    except OSError as error:
        raise ValueError(f"--out={folder} can't be written ({error.strerror}): name another folder") from None
    return folder


class Log:
    """log.jsonl, a record a line, and a line a step for people: a progress bar on a terminal, plain lines in a pipe."""

    def __init__(self, path: Path, header: dict, go_on: bool):
        if go_on and path.exists():              # a killed run may have left half a line
            whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
            path.write_text(whole + "\n", encoding="utf-8")
        self.file = open(path, "a" if go_on else "w", encoding="utf-8")
        self.bar = None
        if not go_on:
            self.write(header)

    def write(self, record: dict) -> None:
        print(json.dumps(record), file=self.file, flush=True)

    def step(self, record: dict, total: int, line: str) -> None:
        """Note a step, the `record["step"]`-th of `total`."""
        self.write(record)
        name, n = record["phase"], record["step"]
        if not sys.stderr.isatty():
            print(f"{name:8} {n:4}/{total} | {line}", flush=True)
            return
        if self.bar is None or n <= self.bar.n:
            form = "{desc} {n}/{total} |{bar:16}| {remaining} left{postfix}"
            self.bar = tqdm(total=total, initial=n - 1, desc=name, bar_format=form)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(n - self.bar.n)
        if n == total:
            self.bar.close()


def save_state(path: Path, net, optimizer, step: int, tokens: int) -> None:
    """All that a conversion needs to go on, in one file that appears whole or not at all."""
    tensors = {f"net.{name}": p.detach().cpu().contiguous() for name, p in net.state_dict().items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(tensors, f"{path}.new", {"step": str(step), "tokens": str(tokens)})
    os.replace(f"{path}.new", path)


def load_state(path: Path, net, optimizer) -> tuple[int, int]:
    """The steps done and tokens seen; `net` and `optimizer` take up what `save_state` wrote."""
    from safetensors import safe_open
    tensors, states = load_file(path), {}
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".", 2)
            states.setdefault(int(i), {})[key] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(meta["step"]), int(meta["tokens"])
