"""Lesson 8: what a policy is rewarded for, and whether one sampler is better than another.

    python course/08_schedules_and_policies/exercise.py     the demonstration at the end of this file
    python course/check.py 8                                the laws

Write the two functions of part 1. Everything else is given.

Shapes: G texts of a group (the same prompt), N prompts, D draws of the bootstrap.
"""
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))    # the project's root

import opdlm
from course import given
from decoding import reveal, scheduling
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, uniforms
from report import metrics

# 1. to write --------------------------------------------------------------------------------------

def advantages(quality: Tensor, nfe: Tensor, length: int, alpha: float) -> Tensor:
    """(prompts, G) advantage of each text: its reward minus the mean reward of its group.

    `quality` (prompts, G) is at least 0; `nfe` (prompts, G) is the number of denoising steps of a text, 1
    to `length`, the maximum length L. The reward is quality * ((L - nfe + 1) / L) ** alpha: quality, times
    a factor that is 1 for a single step. As in the paper (arXiv 2512.09106), the advantage is not divided by
    the group's standard deviation. (In the project: unmasking/grpo.py, reward and train.)
    """
    saved = (length - nfe + 1) / length                          # (prompts, G)
    reward = quality * saved ** alpha
    return reward - reward.mean(1, keepdim=True)


def paired_interval(ours: Tensor, theirs: Tensor, picks: Tensor) -> tuple[float, float]:
    """A 95 % interval for the mean gain of `ours` over `theirs`, by a paired bootstrap.

    `ours`, `theirs` (N,) are the scores of two samplers on the same N prompts. `picks` (D, N) are random
    prompts, from 0 to N - 1: a row is one draw of N prompts with replacement. Every draw gives a mean gain.
    The ends of the interval are the 2.5th and the 97.5th percentile of the D means: torch.quantile at 0.025
    and 0.975, one number at a time (a tensor of both has to have the dtype of the means). (In the project:
    experiments/unmasking/comparison.py, bootstrap.)
    """
    gain = ours - theirs                                         # (N,)
    means = gain[picks].mean(1)                                  # (D,)
    ends = torch.tensor([0.025, 0.975], dtype=means.dtype)
    low, high = torch.quantile(means, ends).tolist()
    return low, high


# 2. given: the demonstration ----------------------------------------------------------------------

LENGTH = 32     # tokens of a text
N = 64          # texts
DRAWS = 2000    # of the bootstrap
RESULTS = Path(scheduling.__file__).parents[1] / "experiments/scheduling/results/story_world.json"


def evaluate(model, rule: reveal.Rule, seed: int) -> tuple[Tensor, float]:
    """Of N texts: scores (N,), minus the nats per token under the AR model; and tokens per forward pass."""
    net, layout, tok = model
    prompt = given.encode(tok, "Once upon a time, there was a").expand(N, -1)
    P = prompt.size(1)
    u = uniforms(seed, 0, range(N), (P + LENGTH, rule.numbers(layout.block)))
    denoiser = Denoiser(net, layout)
    text = opdlm.rollout(denoiser, prompt, LENGTH, rule, u, tok.eot, SamplingConfig(0.7))
    num_tokens = text.response_mask.sum(1)
    score = -metrics.nats_of(net, text) / num_tokens
    return score, (num_tokens.sum() / text.forwards.sum()).item()


def level_at_cost(model, tok_per_fwd: float, steps: int = 8) -> float:
    """The level of leftmost:LEVEL that writes so many tokens per forward pass: bisection, on another seed."""
    low, high = 0.0, 1.0                                         # a lower level is faster
    for _ in range(steps):
        level = (low + high) / 2
        _, speed = evaluate(model, reveal.parse(f"leftmost:{level}"), seed=1)
        if speed > tok_per_fwd:
            low = level
        else:
            high = level
    return (low + high) / 2


def compare(name: str, ours: Tensor, theirs: Tensor, picks: Tensor) -> None:
    low, high = paired_interval(ours, theirs, picks)
    print(f"{name:52} gain {(ours - theirs).mean():+.3f}, from {low:+.3f} to {high:+.3f}")


def show_schedules() -> None:
    """Where a light model costs least, from the measured costs of experiments/scheduling, seed 0."""
    results = json.loads(RESULTS.read_text())
    curves = results["runs"][0]["curves"]
    costs = scheduling.step_costs(curves, 32)                    # (32,) nats per token if a step is light
    derived = scheduling.derive_schedule(curves, 32, 0.25)
    print("\n32 steps, 8 of them light (L): predicted cost of the light steps, nats per token")
    for name, schedule in (("sandwich", scheduling.parse_schedule("L4,H24,L4")), ("derived", derived)):
        steps = schedule.steps()
        is_light = torch.tensor([model == "L" for model in steps])
        print(f"{name:9} {''.join(steps)}  {costs[is_light].sum() / 32:.3f}")


def demonstration() -> None:
    """Advantages of a small group; two reveal rules, at unequal and at equal cost; a schedule."""
    quality = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    nfe = torch.tensor([[8, 4, 8, 1], [8, 4, 8, 1]])
    print("quality", quality.tolist(), "steps", nfe[0].tolist())
    for alpha in (1.0, 10.0):
        rounded = [[round(x, 3) for x in row] for row in advantages(quality, nfe, 8, alpha).tolist()]
        print(f"advantages, alpha = {alpha}: {rounded}")

    model = given.pretrained()
    picks = torch.randint(N, (DRAWS, N), generator=torch.Generator().manual_seed(0))
    two, speed_two = evaluate(model, reveal.parse("static:2"), seed=0)
    slow, speed_slow = evaluate(model, reveal.parse("leftmost:0.5"), seed=0)
    print(f"\nscores on {N} prompts: minus nats per token; in brackets tokens per forward pass")
    again, _ = evaluate(model, reveal.parse("static:2"), seed=2)
    compare("static:2 against itself, same random numbers", two, two, picks)
    compare("static:2 against itself, other random numbers", again, two, picks)
    compare(f"leftmost:0.5 ({speed_slow:.2f}) against static:2 ({speed_two:.2f})", slow, two, picks)
    level = level_at_cost(model, speed_two)
    fast, speed_fast = evaluate(model, reveal.parse(f"leftmost:{level}"), seed=0)
    compare(f"leftmost:{level:.3f} ({speed_fast:.2f}) against static:2 ({speed_two:.2f})", fast, two, picks)

    show_schedules()


if __name__ == "__main__":
    demonstration()
