"""A short conversion in float64, of any number of processes: what test_dist.py compares. Arguments: folder, passes."""
import copy
import json
import sys
from pathlib import Path

import torch

import opdlm
from decoding.denoiser import Denoiser
from decoding.reveal import parse
from model.gpt import GPT, GPTConfig
from model.masks import Layout
from training import dist
from training.optim import Muon, SkipNonFinite
from training.resume import begin_states, load_state, save_state

EOT, BATCH, LAYERS = 10, 4, 2


def teacher() -> GPT:
    generator = torch.Generator().manual_seed(0)
    net = GPT(GPTConfig(11, 32, LAYERS, 2, 16)).double().init_weights(generator)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return net.requires_grad_(False)


def stories(numbers) -> torch.Tensor:
    return torch.stack([torch.randint(0, EOT, (24,), generator=torch.Generator().manual_seed(n)) for n in numbers])


def convert(folder: Path, passes: int = 1, steps: range = range(4), compile: bool = False) -> dict:
    """Its texts, losses, gradients and states; a range that does not begin at 0 goes on from what is in `folder`."""
    frozen, said, net = teacher(), [], None

    class Counted(Denoiser):
        def forward(self, *args):
            said[-1]["calls"] += 1
            return super().forward(*args)

    def text(student, teacher, rows, P, R, u, recipe):
        said.append({"calls": 0})
        made = opdlm.rollout(Counted(student, recipe.layout), rows[:, :P], R, recipe.rule, u, recipe.eot)
        said[-1]["tokens"] = made.tokens.tolist()
        return made

    net = dist.shard_and_compile(copy.deepcopy(frozen).init_mask().requires_grad_(True), compile)
    frozen = dist.compile_blocks(frozen, compile)
    optimizer = SkipNonFinite(Muon(net), passes)
    noted = (load_state(folder / "state.safetensors", net, optimizer, {}) if steps.start
             else begin_states(folder / "state.safetensors", {}))
    recipe = opdlm.Recipe(opdlm.student_text, opdlm.visited, opdlm.teacher_probs, opdlm.first_masked_x8, Layout(4, 1, 1),
                          EOT, parse("threshold:0.3"), batch=BATCH, shard_rows=dist.shard_rows, grad_accum=passes, updates_per_rollout=2,
                          clean_weight=0.5)
    recipe.source = text
    records = list(dist.merge_records(opdlm.train(net, frozen, stories, recipe, optimizer, lambda step: 20, steps), passes))
    grads = {name: dist.gather(p.grad).tolist() for name, p in net.named_parameters()}
    save_state(folder / "state.safetensors", net, optimizer, noted | {"step": steps.stop})
    return {"records": records, "grads": grads, "processes": dist.gather_objects(said)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.start("cpu")
    results = convert(Path(sys.argv[1]), int(sys.argv[2]), range(int(sys.argv[3]), int(sys.argv[4])))
    if dist.is_first():
        Path(sys.argv[1], "results.json").write_text(json.dumps(results))
    dist.end()
