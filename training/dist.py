"""Around a run: where it computes, how it is stopped, what it says and writes down.

Everything that knows of several processes is here. Under torchrun each works on its share of an update's rows, with
its shards of the student (FSDP2); the teacher is whole everywhere. Without torchrun all of this does nothing.
"""
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model import checkpoint

# 1. processes ---------------------------------------------------------------------------------------------------------

def start(name: str) -> torch.device:
    """The device called `name` (auto, cuda, mps, cpu) of this process; under torchrun its group too, in which a silent
    process is waited for 10 minutes and only the first one speaks."""
    device = find_device(name)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
        if not is_first():
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


def is_first() -> bool:
    """Is this the process that writes files?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def shard_rows(numbers: range) -> range:
    """The rows of an update that this process works on: as many as the others."""
    if len(numbers) % count():
        raise ValueError(f"{len(numbers)} rows can't be shared evenly by {count()} processes: make them a multiple")
    part = len(numbers) // count()
    return numbers[dist.get_rank() * part:][:part] if dist.is_initialized() else numbers


def compile_blocks(net, wanted: bool):
    """The network, its blocks compiled in place if that is wanted, which leaves their names alone. They share what is
    compiled; batches differ in rows and lengths."""
    for block in net.h if wanted else ():
        block.compile(dynamic=True)
    return net


def shard_and_compile(net, compile: bool = False):
    """The network as it trains: compiled, then sharded, in bf16 on a GPU.

    Parameters stay whole from the first forward to the end of the backward pass, so a rollout gathers them once, and
    processes may take different numbers of forwards in it.
    """
    compile_blocks(net, compile)
    if dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        precision = MixedPrecisionPolicy(*(torch.bfloat16, torch.float32) if net.wte.weight.is_cuda else ())
        for module in (*net.h, net):
            fully_shard(module, mp_policy=precision, reshard_after_forward=False)
    return net


def gather(tensor: Tensor) -> Tensor:
    """A parameter, or a part of the optimizer's state, put together of its shards; all processes have to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_params(net) -> dict[str, Tensor]:
    """Its parameters by name, shards if it has any: after a forward the network holds whole copies instead, and what is
    done to those is lost."""
    for module in net.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return net.state_dict()


def full_state(net) -> dict[str, Tensor]:
    """That, put together, on the CPU; all processes have to ask."""
    return {name: gather(p.detach()).cpu().contiguous() for name, p in local_params(net).items()}


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor parted as another one is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def gather_objects(value) -> list:
    """The values of all processes."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def merge_records(records: Iterator[dict], passes: int) -> Iterator[dict]:
    """One record an update: of its `passes`, in all processes."""
    while part := list(islice(records, passes)):
        parts = [record for some in gather_objects(part) for record in some]
        total = {name: sum(record[name] for record in parts)
                 for name in ("loss", "tokens", "loss_positions", "forwards", "positions") if name in part[0]}
        masked = [record["masked"] * record["tokens"] for record in parts]
        mean = {name: sum(record[name] * n for record, n in zip(parts, masked)) / max(sum(masked), 1)
                for name in ("kl", "text_nats")}
        yield part[0] if len(parts) == 1 else {
            **part[0], **total, **mean, "masked": sum(masked) / total["tokens"],
            "len": sum(record["len"] for record in parts) / len(parts)}


def find_device(name: str) -> torch.device:
    """auto is cuda, else mps, else cpu; a device that is not there is refused."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found)
    if not there[name]:
        raise ValueError(f"--device={name}: torch finds no such device here; use --device=auto")
    return torch.device(name)


def print0(*values) -> None:
    """print, in the first process only."""
    if is_first():
        print(*values, flush=True)


def save_checkpoint(folder: Path, net, tokenizer, layout=None, **extra) -> None:
    """checkpoint.save of a network that may be sharded; the first process writes, all processes must call."""
    state = full_state(net)
    if is_first():
        checkpoint.save(folder, net, tokenizer, layout, state, **extra)
