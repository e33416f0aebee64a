"""Around a run: where it computes, how it is stopped, what it says and writes down.

Everything that knows of several processes is here. Under torchrun each works on its share of an update's rows, with
its shards of the student (FSDP2); the teacher is whole everywhere. Without torchrun all of this does nothing.
"""
import json
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

# 1. processes ---------------------------------------------------------------------------------------------------------

def start(name: str) -> torch.device:
    """The device called `name` (auto, cuda, mps, cpu) of this process; under torchrun its group too, in which a silent
    process is waited for 10 minutes and only the first one speaks."""
    device = device_named(name)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
        if not first():
            sys.stdout = open(os.devnull, "w")
    return device


def end(code: int = 0) -> None:
    """The last thing a process does, with its exit code. In a group all go together, and at once: gloo's threads, which
    live on, now and then abort an interpreter that ends in its own way."""
    if dist.is_initialized():
        if code == 0:                            # who has failed does not wait for the others
            dist.barrier()
        print(end="", flush=True)
        os._exit(code)
    sys.exit(code)


def count() -> int:
    """Processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Is this the process that writes files?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(numbers: range) -> range:
    """The rows of an update that this process works on: as many as the others."""
    if len(numbers) % count():
        raise ValueError(f"{len(numbers)} rows can't be shared evenly by {count()} processes: make them a multiple")
    part = len(numbers) // count()
    return numbers[dist.get_rank() * part:][:part] if dist.is_initialized() else numbers


def compiled(net, wanted: bool):
    """The network, its blocks compiled in place if that is wanted, which leaves their names alone. They share what is
    compiled; batches differ in rows and lengths."""
    for block in net.h if wanted else ():
        block.compile(dynamic=True)
    return net


def inference():
    """A context without autograd's bookkeeping. With several processes the weights may be gathered in it and trained
    after it, which nothing can be that was made in inference mode."""
    return torch.no_grad() if dist.is_initialized() else torch.inference_mode()


def place(net, compile: bool = False):
    """The network as it trains: compiled, then sharded, in bf16 on a GPU.

    Parameters stay whole from the first forward to the end of the backward pass, so a rollout gathers them once, and
    processes may take different numbers of forwards in it.
    """
    compiled(net, compile)
    if dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        precision = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if net.wte.weight.is_cuda else ())
        for module in (*net.h, net):
            fully_shard(module, mp_policy=precision, reshard_after_forward=False)
    return net


def whole(tensor: Tensor) -> Tensor:
    """A parameter, or a part of the optimizer's state, put together of its shards; all processes have to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state_of(net) -> dict[str, Tensor]:
    """Its parameters by name, shards if it has any: after a forward the network holds whole copies instead, and what is
    done to those is lost."""
    for module in net.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return net.state_dict()


def whole_state(net) -> dict[str, Tensor]:
    """That, put together, on the CPU; all processes have to ask."""
    return {name: whole(p.detach()).cpu().contiguous() for name, p in state_of(net).items()}


def sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor parted as another one is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def from_all(value) -> list:
    """The values of all processes."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def merged(records: Iterator[dict], passes: int) -> Iterator[dict]:
    """One record an update: of its `passes`, in all processes."""
    while part := list(islice(records, passes)):
        parts = [record for some in from_all(part) for record in some]
        total = {name: sum(record[name] for record in parts)
                 for name in ("loss", "tokens", "places", "forwards", "positions") if name in part[0]}
        masked = [record["masked"] * record["tokens"] for record in parts]
        mean = {name: sum(record[name] * n for record, n in zip(parts, masked)) / max(sum(masked), 1)
                for name in ("kl", "text_nats")}
        yield part[0] if len(parts) == 1 else {
            **part[0], **total, **mean, "masked": sum(masked) / total["tokens"],
            "len": sum(record["len"] for record in parts) / len(parts)}


class Careful:
    """An optimizer whose step sums the gradients of `passes` backward passes, leaves a step out where they are not
    finite, and after ten such in a row stops the run.

    FSDP takes the mean over processes; a loss is divided by the rows of all, so it is the sum that is wanted.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, passes: int = 1):
        self.optimizer, self.passes, self.done, self.skipped, self.in_a_row = optimizer, passes, 0, 0, 0

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        if self.done % self.passes == 0:
            self.optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        self.done += 1
        if self.done % self.passes:
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        assert params, "no gradient came: was the optimizer made after a forward of a sharded network?"
        for p in params if count() > 1 else ():
            p.grad.mul_(count())
        if whole(torch.nn.utils.clip_grad_norm_(params, torch.inf)).isfinite():          # which clips nothing
            self.in_a_row = 0
            return self.optimizer.step()
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        print(f"a gradient is not finite: this step is left out, the {self.skipped}. so far", flush=True)
        if self.in_a_row == 10:
            raise ValueError("the gradients of ten steps in a row were not finite: lower --lr, or look at the data")


class Stop:
    """SIGTERM, noted until somebody asks."""

    def __init__(self):
        self.asked, self.before = False, signal.signal(signal.SIGTERM, self.note)

    def note(self, *_) -> None:
        self.asked = True

    def over(self) -> None:
        """SIGTERM does again what it did."""
        signal.signal(signal.SIGTERM, self.before)

    def __bool__(self) -> bool:
        """Has any process got it? All have to ask, so that they stop at the same step."""
        return any(from_all(self.asked))


# 2. device, log -------------------------------------------------------------------------------------------------------

def device_named(name: str) -> torch.device:
    """auto is cuda, else mps, else cpu; a device that is not there is refused."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there[name]:
        raise ValueError(f"--device={name}: torch finds no such device here; use --device=auto")
    return torch.device(name)


class Log:
    """log.jsonl, a record a line, and a line a step for people: a progress bar on a terminal, plain lines in a pipe."""

    def __init__(self, path: Path, header: dict, go_on: bool):
        path = path if first() else Path(os.devnull)
        if go_on and path.is_file():             # a killed run may have left half a line
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
        self.file, self.bar = open(path, "a" if go_on else "w", encoding="utf-8"), None
        if not go_on:
            self.write(header)

    def write(self, record: dict) -> None:
        print(json.dumps(record), file=self.file, flush=True)

    def step(self, record: dict, total: int, line: str) -> None:
        """Note a step, the `record["step"]`-th of `total`."""
        self.write(record)
        name, n = record["phase"], record["step"]
        if not (sys.stderr.isatty() and first()):
            print(f"{name:8} {n:4}/{total} | {line}", flush=True)
            return
        if self.bar is None or n <= self.bar.n:
            form = "{desc} {n}/{total} |{bar:16}| {remaining} left{postfix}"
            self.bar = tqdm(total=total, initial=n - 1, desc=name, bar_format=form)
        self.bar.set_postfix_str(line, refresh=False)
        self.bar.update(n - self.bar.n)
        if n == total:
            self.bar.close()
