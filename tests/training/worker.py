"""A short conversion in float64 in any number of processes, for test_dist.py.

Arguments: folder, gradient accumulation steps, first update, end of the updates, rank of an adapter or 0.
"""
import copy
import json
import sys
from pathlib import Path

import torch

import opdlm
from decoding.denoiser import Denoiser
from decoding.reveal import parse
from model import lora
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from training import dist
from training.optim import Muon, SkipNonFinite
from training.resume import load_state, save_state, start_progress

EOT = 10
BATCH = 4
LAYERS = 2
RANK = None                 # of an adapter; None: the whole student is trained


def make_teacher() -> GPT:
    generator = torch.Generator().manual_seed(0)
    net = GPT(GPTConfig(11, 32, LAYERS, 2, 16)).double().init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.requires_grad_(False)


def story(row_id: int) -> torch.Tensor:
    return torch.randint(0, EOT, (24,), generator=torch.Generator().manual_seed(row_id))


def stories(row_ids) -> torch.Tensor:
    return torch.stack([story(row_id) for row_id in row_ids])


def make_recipe(grad_accum: int, rollouts: list) -> opdlm.Recipe:
    """The method, with a source that adds the tokens and forward passes of each rollout to `rollouts`."""
    class CountingDenoiser(Denoiser):
        def forward(self, *args):
            rollouts[-1]["calls"] += 1
            return super().forward(*args)

    def student_text(student, teacher, texts, P, R, u, recipe):
        rollouts.append({"calls": 0})
        denoiser = CountingDenoiser(student, recipe.layout)
        text = opdlm.rollout(denoiser, texts[:, :P], R, recipe.rule, u, recipe.eot)
        rollouts[-1]["tokens"] = text.tokens.tolist()
        return text

    recipe = opdlm.Recipe(
        source=opdlm.student_text,
        states=opdlm.visited,
        target=opdlm.teacher_probs,
        weight=opdlm.first_masked_x8,
        layout=Layout(4, 1, 1),
        eot=EOT,
        rule=parse("threshold:0.3"),
        batch=BATCH,
        shard_rows=dist.shard_rows,
        grad_accum=grad_accum,
        updates_per_rollout=2,
        clean_weight=0.0 if RANK else 0.5,
    )
    recipe.source = student_text                                 # the check accepts only opdlm.student_text
    return recipe


def convert(folder: Path, grad_accum: int = 1, steps: range = range(4), compile: bool = False) -> dict:
    """Records, gradients of the last update, rollouts. Resumes from `folder` unless `steps` starts at 0."""
    teacher = make_teacher()
    if RANK:
        student = lora.adapt(teacher, RANK).init_mask()
    else:
        student = copy.deepcopy(teacher).init_mask().requires_grad_(True)
        student = dist.shard_and_compile(student, compile)
    teacher = dist.compile_blocks(teacher, compile)
    optimizer = SkipNonFinite(Muon(student), grad_accum)
    state_file = folder / "state.safetensors"
    if steps.start:
        progress = load_state(state_file, student, optimizer, {})
    else:
        progress = start_progress(state_file, {})

    rollouts = []
    recipe = make_recipe(grad_accum, rollouts)
    records = opdlm.train(student, teacher, stories, recipe, optimizer, lambda step: 20, steps)
    records = list(dist.merge_records(records, grad_accum))
    grads = {}
    for name, p in student.named_parameters():
        if p.requires_grad:
            grads[name] = dist.gather(p.grad).tolist()
    save_state(state_file, student, optimizer, progress | {"step": steps.stop})
    return {"records": records, "grads": grads, "rollouts": dist.gather_objects(rollouts)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start("cpu")
    folder, grad_accum, start, stop, rank = sys.argv[1:]
    RANK = int(rank)
    results = convert(Path(folder), int(grad_accum), range(int(start), int(stop)))
    if dist.is_first():
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.end()
