"""Two processes, or several backward passes per update, take the steps of one."""
import copy
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import opdlm
from data import story_world
from model import lora
from tests.model import test_llama
from tests.training import worker
from training import dist
from training.chunked_kl import chunked_kl
from training.dist import find_device

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_does_not_exist():
    with pytest.raises(ValueError, match="--device=cuda: torch finds no such device"):
        find_device("cuda")
    assert find_device("auto").type in ("cpu", "mps")


# a conversion in two processes ----------------------------------------------------------------------------

def command(processes, script):
    """The command line that runs a script in this number of processes on this machine."""
    if processes == 1:
        return [sys.executable, str(script)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            str(script)]


def run_script(processes, script, *args, **options):
    words = [*command(processes, script), *map(str, args)]
    return subprocess.run(words, capture_output=True, text=True, env=ENV, **options)


def convert_in_two(folder, grad_accum=1, start=0, stop=4, rank=0):
    folder.mkdir(exist_ok=True)
    run = run_script(2, ROOT / "tests/training/worker.py", folder, grad_accum, start, stop, rank, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return convert_in_two(tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return worker.convert(tmp_path_factory.mktemp("one"))


def assert_same(a, b):
    for x, y in zip(a["records"], b["records"], strict=True):
        assert x == pytest.approx(y, rel=1e-5)
    for name, grad in a["grads"].items():
        assert torch.allclose(torch.tensor(grad), torch.tensor(b["grads"][name]), atol=1e-6, rtol=1e-4), name


def test_two_processes_are_one(one, two):
    """Same texts, losses and gradients, although the processes need different numbers of forward passes."""
    assert_same(one, two)
    (alone,) = one["rollouts"]
    left, right = two["rollouts"]
    for whole, a, b in zip(alone, left, right, strict=True):     # a rollout has the rows of two updates
        parts = [a["tokens"][:2], b["tokens"][:2], a["tokens"][2:], b["tokens"][2:]]
        assert [row for part in parts for row in part] == whole["tokens"]
    assert any(a["calls"] != b["calls"] for a, b in zip(left, right))


def test_gradient_accumulation_does_not_matter(one, tmp_path):
    assert_same(one, worker.convert(tmp_path, grad_accum=2))
    assert_same(one, worker.convert(tmp_path, grad_accum=4))


def test_gradient_accumulation_in_two_processes(one, tmp_path):
    assert_same(one, convert_in_two(tmp_path, grad_accum=2))


def test_a_state_of_two_processes_is_resumed_in_one_and_in_two(one, tmp_path):
    convert_in_two(tmp_path, stop=2)
    shutil.copytree(tmp_path, tmp_path / "b")
    rest = {**one, "records": one["records"][2:]}
    assert_same(worker.convert(tmp_path, steps=range(2, 4)), rest)
    assert_same(convert_in_two(tmp_path / "b", start=2), rest)


def test_an_adapter_in_two_processes(tmp_path, monkeypatch):
    """Whole in both; its gradients are summed."""
    monkeypatch.setattr(worker, "RANK", 2)
    one = worker.convert(tmp_path, grad_accum=2)
    assert all(name.endswith(("lora_A", "lora_B", "mask_vector")) for name in one["grads"])
    assert_same(one, convert_in_two(tmp_path / "2", rank=2))


# the whole command in two processes -----------------------------------------------------------------------

SHORT = ("--data=stories.txt", "--vocab=300", "--pretrain_steps=60", "--pretrain_batch=4", "--warm_steps=32",
         "--updates_per_rollout=2", "--layers=1", "--width=64", "--length=64", "--batch=4", "--eval_every=2",
         "--distill_steps=40", "--device=cpu", "--sample_prompt=One day", "--eval_texts=128",
         "--eval_tokens=64", "--lr=0.02", "--temperature=1")


def distill_records(folder):
    """The records of distillation in the log, without a partial line at its end."""
    log = folder / "log.jsonl"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [record for record in map(json.loads, lines) if record.get("phase") == "distil"]


def loss_by_step(folder):
    return {record["step"]: record["loss"] for record in distill_records(folder)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder with stories, and in its folder 1 the run of the whole command in one process."""
    folder = tmp_path_factory.mktemp("whole")
    stories = [story_world.story(seed) for seed in range(300)]
    (folder / "stories.txt").write_text("<|endoftext|>".join(stories))
    run = run_script(1, ROOT / "train_tiny.py", *SHORT, "--out=1", cwd=folder, timeout=200)
    assert run.returncode == 0, run.stderr
    return folder


def assert_same_runs(a, b):
    """Both learned the same: the losses on training text and the final evaluations are equal up to rounding.

    The losses on generated text are not compared: rounding can change a token, and with it all later ones.
    """
    one = loss_by_step(a)
    two = loss_by_step(b)
    assert one.keys() == two.keys() == set(range(1, 41))
    assert [two[i] for i in range(1, 33)] == pytest.approx([one[i] for i in range(1, 33)], rel=0.01)
    one = json.loads((a / "summary.json").read_text())
    two = json.loads((b / "summary.json").read_text())
    for name in one:
        assert two[name]["val_nats"] == pytest.approx(one[name]["val_nats"], abs=0.005)
    assert abs(one["after"]["val_nats"] - one["before"]["val_nats"]) > 0.02


def test_the_whole_command_in_two_processes(alone):
    run = run_script(2, ROOT / "train_tiny.py", *SHORT, "--out=2", cwd=alone, timeout=200)
    assert run.returncode == 0, run.stderr
    assert_same_runs(alone / "1", alone / "2")
    samples = [(alone / name / "log.jsonl").read_text().count('"watch"') for name in "12"]
    assert run.stdout.count("forwards | One day") == samples[0] == samples[1] > 10   # only one process prints


def test_one_of_two_processes_is_killed_and_the_run_resumed(alone):
    """Converts a checkpoint in the format of GPT-2; the result can be sampled."""
    words = [*command(2, ROOT / "train_tiny.py"), *SHORT, "--init=1/ar", "--out=3"]
    options = {"cwd": alone, "env": ENV, "capture_output": True, "text": True, "timeout": 200}
    run = subprocess.Popen(words, cwd=alone, env=ENV, text=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE)
    while run.poll() is None and len(distill_records(alone / "3")) < 9:
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert "SIGKILL" in run.communicate(timeout=60)[1] and run.returncode
    resumed = subprocess.run([*words, "--resume"], **options)
    assert resumed.returncode == 0 and "resuming from step" in resumed.stdout, resumed.stderr
    assert_same_runs(alone / "1", alone / "3")
    sample = [sys.executable, ROOT / "sample.py", "--ckpt=3", "--prompt=One day", "--length=8"]
    sampled = subprocess.run(sample, **options)
    assert sampled.returncode == 0 and sampled.stdout.startswith("One day"), sampled.stderr


def test_a_process_that_dies_ends_the_run(tmp_path):
    """With a message, and soon: the other process does not wait for it."""
    script = tmp_path / "dies.py"
    script.write_text("import os, signal\nfrom training import dist\ndist.start('cpu')\n"
                      "if not dist.is_first():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
                      "dist.gather_objects(1)\nprint('continued')\n")
    run = run_script(2, script, timeout=60)
    assert run.returncode and "continued" not in run.stdout and "SIGKILL" in run.stderr


def test_rows_that_cannot_be_divided(tmp_path):
    script = tmp_path / "divides.py"
    script.write_text("from training import dist\ndist.start('cpu')\ndist.shard_rows(range(3))\n")
    message = "rows must be divisible by the number of processes, got 3 rows and 2 processes"
    assert message in run_script(2, script, timeout=60).stderr


# compiled blocks ------------------------------------------------------------------------------------------

def test_compiled_blocks_give_the_same_and_share_what_is_compiled(monkeypatch, tmp_path, caplog):
    """With any number of blocks. Uses only the compiler's front end, which counts graphs and needs no C++."""
    import torch._dynamo as dynamo
    plain = worker.convert(tmp_path)["records"]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counts = []
    for layers in (2, 12):
        dynamo.reset()
        dynamo.utils.counters.clear()
        monkeypatch.setattr(worker, "LAYERS", layers)
        compiled = worker.convert(tmp_path, compile=True)["records"]
        counts.append(dynamo.utils.counters["stats"]["unique_graphs"])
        if layers == 2:
            assert all(a == pytest.approx(b, rel=1e-9) for a, b in zip(plain, compiled, strict=True))
    assert max(counts) < 2 * 8, counts                           # two kinds of blocks
    assert "recompile_limit" not in caplog.text  # the compiler stops at 8 graphs of one kind


# shared work ----------------------------------------------------------------------------------------------

SHARING = """
import torch
from decoding import reveal
from model.masks import Layout
from report import generate, metrics
from tests.training import worker
from training import dist

class Letters:
    eot = ends = worker.EOT

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)

def measure():
    net = worker.make_teacher()
    layout = Layout(4, 1, 1)
    stories = [worker.story(i) for i in range(5)]
    text = generate.diffusion_generator(net, layout, reveal.parse("threshold:0.3"))
    passes = []
    net.register_forward_hook(lambda net, inputs, output: passes.append(inputs[0].numel()))
    texts, _ = generate.generate_texts(text, stories, worker.EOT, 24, seed=0)
    numbers = metrics.likelihood(net, stories, layout, Letters())
    numbers |= metrics.text_metrics(net, texts, 1.0, Letters(), None)
    numbers["tokens"] = [ids for rollout, _ in texts for ids in metrics.response_ids(rollout)]
    return numbers, sum(passes)

if __name__ == "__main__":
    import json
    dist.start("cpu")
    numbers, positions = measure()
    seen = []
    few = dist.map_shared(lambda share: seen.extend(share) or share, [7])
    numbers |= {"positions": dist.gather_objects(positions), "few": [few, *dist.gather_objects(seen)]}
    if dist.is_first():
        print(json.dumps(numbers))
    dist.end()
"""


def test_processes_share_an_evaluation(tmp_path):
    """Each does its part of the work; all get the numbers of one process."""
    script = tmp_path / "sharing.py"
    script.write_text(SHARING)
    run = run_script(2, script, timeout=60)
    assert run.returncode == 0, run.stderr
    two = json.loads(run.stdout)
    functions = {"__name__": "sharing"}
    exec(SHARING, functions)
    one, positions = functions["measure"]()
    assert two.pop("few") == [[7], [7], [7]]                     # fewer items than processes: all do all
    assert all(0.3 * positions < of_process < 0.7 * positions for of_process in two.pop("positions"))
    assert two.pop("tokens") == one.pop("tokens")
    assert two == pytest.approx(one, rel=1e-6)


# number formats -------------------------------------------------------------------------------------------

def test_bf16_on_a_gpu_without_fsdp():
    assert dist.uses_autocast("cuda", is_sharded=False)
    assert not dist.uses_autocast("cuda", is_sharded=True)       # FSDP casts the weights
    assert not dist.uses_autocast("cpu", is_sharded=False)
    assert not dist.uses_autocast("mps", is_sharded=False)


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_autocast_computes_in_bf16_and_keeps_the_weights(family, is_adapter, monkeypatch, tiny):
    """As on a GPU, here on the CPU: rollout, loss and gradients of an update."""
    def update():
        teacher = (tiny() if family == "gpt2" else test_llama.llama()).float().requires_grad_(False)
        student = copy.deepcopy(teacher).requires_grad_(True)
        if is_adapter:
            student = lora.adapt(teacher, 2)
        student = dist.in_bf16_on_gpu(student.init_mask())
        recipe = worker.make_recipe(1, [])
        recipe.source = opdlm.student_text
        recipe = replace(recipe, clean_weight=0, batch=2, **chunked_kl("full", "teacher"))
        optimizer = torch.optim.AdamW(student.parameters())
        steps = opdlm.train(student, teacher, worker.stories, recipe, optimizer, lambda step: 20, range(1))
        kl = [record["kl"] for record in steps]
        grads = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        assert {x.dtype for x in (*student.parameters(), *grads.values())} == {torch.float32}
        return kl, grads, student(torch.zeros(1, 3, dtype=torch.long))

    kl, grads, logits = update()
    monkeypatch.setattr(dist, "uses_autocast", lambda device_type, is_sharded: True)
    kl_bf16, grads_bf16, logits_bf16 = update()
    assert (logits.dtype, logits_bf16.dtype) == (torch.float32, torch.bfloat16)
    assert kl_bf16 != kl and all(map(math.isfinite, kl_bf16))
    assert grads_bf16.keys() == grads.keys() and grads
    assert all(grad.isfinite().all() for grad in grads_bf16.values())
