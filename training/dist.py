"""Several processes and the device of each. No other module knows about process groups or shards.

Under torchrun, each process works on its part of the rows of an update and stores its shards of the student
(FSDP2); every process has the whole teacher. Without torchrun there is one process, and the functions below
return what they are given.
"""
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from model import checkpoint, lora

# 1. processes -------------------------------------------------------------------------------------

def start(device_name: str) -> torch.device:
    """Join the process group if there is one, and return the device of this process.

    `device_name` is auto, cuda, mps or cpu. Waiting for another process fails after 10 minutes. Only the
    first process prints: the stdout of the others is discarded.
    """
    device = find_device(device_name)
    if "RANK" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=10))
        if not is_first():
            sys.stdout = open(os.devnull, "w")
    return device


def end(code: int = 0) -> None:
    """Exit with this code; the last call of a program.

    In a process group it uses os._exit, since gloo's threads sometimes crash a normal exit.
    """
    if dist.is_initialized():
        if code == 0:                                            # a failed process does not wait for others
            dist.barrier()
        print(end="", flush=True)
        os._exit(code)
    sys.exit(code)


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def print0(*values) -> None:
    """print, in the first process only."""
    if is_first():
        print(*values, flush=True)


def find_device(name: str) -> torch.device:
    """The device called `name`; auto is cuda, else mps, else cpu. ValueError if torch does not find it."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, found in available.items() if found)
    if not available[name]:
        raise ValueError(f"--device={name}: torch finds no such device here; use --device=auto")
    return torch.device(name)


# 2. networks and tensors --------------------------------------------------------------------------

def compile_blocks(net, enabled: bool):
    """The network; if enabled, its transformer blocks are compiled in place, so parameters keep their names.

    All blocks share the compiled code. Its shapes are dynamic, since batches differ in rows and lengths.
    """
    if enabled:
        for block in net.h:
            block.compile(dynamic=True)
    return net


def uses_autocast(device_type: str, is_sharded: bool) -> bool:
    """Whether a network in training computes in bf16 by autocast: on a GPU, unless FSDP casts its weights."""
    return device_type == "cuda" and not is_sharded


def in_bf16_on_gpu(net, is_sharded: bool = False):
    """The network; on a GPU its forward passes compute in bf16. Its weights stay in float32."""
    device_type = net.wte.weight.device.type
    if uses_autocast(device_type, is_sharded):
        net.forward = torch.autocast(device_type, torch.bfloat16)(net.forward)
    return net


def shard_and_compile(net, compile: bool = False):
    """The network, ready to train: compiled if `compile`; in a process group sharded, and in bf16 on a GPU.

    Parameters stay gathered from the first forward pass to the end of the backward pass. Therefore a rollout
    gathers them once, and processes may need different numbers of forward passes for it.
    """
    compile_blocks(net, compile)
    if dist.is_initialized():
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        if net.wte.weight.is_cuda:
            precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        else:
            precision = MixedPrecisionPolicy()
        for module in (*net.h, net):
            fully_shard(module, mp_policy=precision, reshard_after_forward=False)
    return in_bf16_on_gpu(net, is_sharded=dist.is_initialized())


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one. All processes must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, sharded as `like` is; the tensor itself if `like` is not sharded."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def local_params(net) -> dict[str, Tensor]:
    """The state dict of this process: shards if the network is sharded, of an adapted network the adapter.

    After a forward pass the network has gathered copies of its parameters, and changes of the copies are
    lost. Therefore the copies are dropped first.
    """
    for module in net.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    state = net.state_dict()
    if lora.is_adapted(net):
        return {name: state[name] for name in lora.adapter_names(net)}
    return state


def full_state(net) -> dict[str, Tensor]:
    """The whole state dict, on the CPU. All processes must call."""
    state = {}
    for name, p in local_params(net).items():
        state[name] = gather(p.detach()).cpu().contiguous()
    return state


def sum_gradients(params: list[Tensor]) -> None:
    """Turn the gradients into sums over processes. FSDP averages them; an adapter has those of its process.

    A loss is divided by the rows of all processes, so its gradient is the sum.
    """
    if count() == 1:
        return
    for p in params:
        if hasattr(p.grad, "full_tensor"):
            p.grad.mul_(count())
        else:
            dist.all_reduce(p.grad)


def save_checkpoint(folder: Path, net, tokenizer, layout=None, **extra) -> None:
    """checkpoint.save for a network that may be sharded. All processes must call; the first one writes.

    If `folder` is a symbolic link, its target is replaced.
    """
    state = full_state(net)
    if is_first():
        checkpoint.save(folder.resolve(), net, tokenizer, layout, state, **extra)


# 3. rows and records ------------------------------------------------------------------------------

def shard_rows(row_ids: range) -> range:
    """The part of an update's rows that this process works on; all parts have the same size."""
    if len(row_ids) % count():
        raise ValueError(f"the number of rows must be divisible by the number of processes, got "
                         f"{len(row_ids)} rows and {count()} processes")
    if not dist.is_initialized():
        return row_ids
    size = len(row_ids) // count()
    start = dist.get_rank() * size
    return row_ids[start:start + size]


def gather_objects(value) -> list:
    """The values of all processes, in the order of their ranks. All processes must call."""
    values = [value] * count()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def map_shared(function: Callable, items: Sequence) -> list:
    """The list function(items), where each process computes the part for its share of the items.

    The list of a part must be that part of the whole list. All processes must call, and all get the whole.
    With fewer items than processes, each of them computes everything: a sharded network needs them all.
    """
    if len(items) < count():
        return function(items)
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = len(items) * rank // count()
    stop = len(items) * (rank + 1) // count()
    whole = []
    for part in gather_objects(function(items[start:stop])):
        whole += part
    return whole


def merge_records(records: Iterator[dict], grad_accum: int) -> Iterator[dict]:
    """One record per update, from `grad_accum` records of `opdlm.train` in each process.

    Losses and counts are summed. Means over masked positions are weighted by the number of masked positions.
    """
    while own := list(islice(records, grad_accum)):
        parts = []
        for records_of_process in gather_objects(own):
            parts += records_of_process
        if len(parts) == 1:
            yield own[0]
            continue
        merged = dict(own[0])
        for name in ("loss", "tokens", "loss_positions", "forwards", "positions"):
            if name in merged:
                merged[name] = sum(part[name] for part in parts)
        masked = [part["masked"] * part["tokens"] for part in parts]         # masked positions of each part
        for name in ("kl", "text_nats"):
            total = sum(part[name] * n for part, n in zip(parts, masked))
            merged[name] = total / max(sum(masked), 1)
        merged["masked"] = sum(masked) / max(merged["tokens"], 1)
        merged["len"] = sum(part["len"] for part in parts) / len(parts)
        yield merged
