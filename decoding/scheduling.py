"""Not all denoising steps are equal: several models write one text, each at the steps that it is good enough for.

A denoiser of any size predicts the same thing, the tokens under the masks, and what the sampler keeps from step to step
is the text alone; so it may ask another model at any step (model scheduling, arXiv 2604.02340). A `Schedule` says which
one; `Scheduled` is a denoiser like any other, so every reveal rule goes with it.

    L32,H64,L32                             the light model L at the first 32 steps of a block, then the heavy one, ...
    mask:1.0-0.8=L,0.8-0.2=H,0.2-0=L        by the share of the block that is still masked
    auto:0.25                               a quarter of the steps light: those where it costs least, as was measured
"""
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from decoding.denoiser import Denoiser
from decoding.reveal import Rule
from model.masks import Layout

MEASURED = "importance.json"        # in a light model's folder: nats that its steps cost, by the masked share


@dataclass(frozen=True)
class Schedule:
    """Parts of a block's way from all masks to none, each with the name of its model; each ends where the next begins.

    `by` is "step": a part ends before the step `until`; or "mask": it ends where no more than the share `until` of the
    block is masked."""
    by: str
    parts: tuple[tuple[str, float], ...]        # name, until

    def __call__(self, step: Tensor, share: Tensor) -> Tensor:
        """(B,) the part that each row is in, by its step and its masked share (B,). The last part has no end."""
        ends = torch.tensor([until for _, until in self.parts[:-1]], device=step.device)
        over = step[:, None] >= ends if self.by == "step" else share[:, None] <= ends
        return over.long().sum(1)

    @property
    def names(self) -> list[str]:
        """The models, each once."""
        return sorted({name for name, _ in self.parts})

    def steps(self) -> list[str]:
        """The model of each step, if it goes by them."""
        begins = [0, *(until for _, until in self.parts)]
        return [name for (name, until), begin in zip(self.parts, begins) for _ in range(int(begin), int(until))]


def read(spec: str, folder: Path, rule: Rule) -> Schedule:
    """A schedule as it is written above, for the light model in `folder` and a `rule`."""
    if not (match := re.fullmatch(r"auto:(\d*\.?\d+)", spec)):
        return parse(spec)
    if not (share := float(match[1])) <= 1 or rule.name != "ancestral":
        raise ValueError(f"--schedule={spec}: auto:SHARE, from 0 to 1, places steps of equal time: take "
                         "--reveal=ancestral:STEPS")
    if not (folder / MEASURED).is_file():
        raise ValueError(f"--schedule={spec}: nobody has measured yet what {folder} costs, it has no {MEASURED}: see "
                         "experiments/scheduling.py, or say the steps, as L32,H64,L32")
    return derived(json.loads((folder / MEASURED).read_text()), rule.argument, share)


def parse(spec: str, known: tuple[str, ...] = ("H", "L")) -> Schedule:
    """A schedule of steps or of masked shares."""
    by, parts = ("mask", shares(spec)) if spec.startswith("mask:") else ("step", counted(spec))
    if not parts:
        raise ValueError(f"--schedule={spec}: write steps, as L32,H64,L32, or shares, as mask:1-0.8=L,0.8-0=H, or "
                         "auto:SHARE")
    for name, _ in parts:
        if name not in known:
            raise ValueError(f"--schedule={spec} names a model {name}: there are {', '.join(known)}")
    return Schedule(by, tuple(parts))


def counted(spec: str) -> list[tuple[str, float]]:
    """L32,H64,L32; none if it is not written so."""
    found = [re.fullmatch(r"([A-Z])(\d+)", part) for part in spec.split(",")]
    if not all(found):
        return []
    counts = [int(match[2]) for match in found]
    return [(match[1], sum(counts[:i + 1])) for i, match in enumerate(found)]


def shares(spec: str) -> list[tuple[str, float]]:
    """mask:1.0-0.8=L,0.8-0.2=H,0.2-0=L; none if it is not written so, or has a gap."""
    part = r"(\d(?:\.\d+)?)-(\d(?:\.\d+)?)=([A-Z])"
    found = [re.fullmatch(part, text) for text in spec.removeprefix("mask:").split(",")]
    if not all(found):
        return []
    ends = [(float(match[1]), float(match[2])) for match in found]
    whole = [1.0, *(low for _, low in ends)] == [*(high for high, _ in ends), 0.0]
    return [(match[3], low) for match, (_, low) in zip(found, ends)] if whole and all(a > b for a, b in ends) else []


def placed(light: list[bool]) -> Schedule:
    """The schedule whose step k is light or not."""
    names = ["L" if x else "H" for x in light]
    last = [k for k in range(len(names)) if k + 1 == len(names) or names[k + 1] != names[k]]
    return Schedule("step", tuple((names[k], k + 1) for k in last))


def derived(curves: dict, steps: int, share: float) -> Schedule:
    """A share of the steps light: those that cost least. To first order what the steps cost adds up (the chain rule
    over the trajectory), so the cheapest ones are the best ones."""
    cheap = costs(curves, steps).argsort(stable=True)[:round(share * steps)]
    return placed(torch.zeros(steps, dtype=torch.bool).index_fill(0, cheap, True).tolist())


def costs(curves: dict, steps: int) -> Tensor:
    """(steps,) nats a token that each step costs if it is light: step k stands at t = 1 - k / steps. `curves`: "t",
    masked shares from 0 up, and "kl", the nats there (report/importance.py)."""
    t, kl = (torch.tensor(curves[name], dtype=torch.float64) for name in ("t", "kl"))
    return interpolated(1 - torch.arange(steps, dtype=torch.float64) / steps, t, kl)


def interpolated(x: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """Linear between the points `at`, ascending, and constant beyond them."""
    k = torch.searchsorted(at, x).clamp(1, len(at) - 1)
    share = ((x - at[k - 1]) / (at[k] - at[k - 1])).clamp(0, 1)
    return y[k - 1].lerp(y[k], share)


class ScheduledDenoiser:
    """A denoiser that asks one of several models, each of which keeps its own exact cache: what another one wrote it
    reads when it is next asked. `forwards`, `positions` (B,) are those of all; `denoisers[name]` has its own."""

    def __init__(self, nets: dict, layout: Layout, schedule: Schedule):
        agree(nets)
        self.schedule, self.layout = schedule, layout
        self.denoisers = {name: Denoiser(nets[name], layout) for name in schedule.names}
        self.mask_id = nets[schedule.names[0]].mask_id

    def reset(self, prompt: Tensor, end: Tensor) -> None:
        """Begin with new rows, as Denoiser.open."""
        self.end, self.start, self.step = end, torch.full_like(prompt, -1), torch.zeros_like(prompt)
        for denoiser in self.denoisers.values():
            denoiser.reset(prompt, end)

    def __call__(self, tokens: Tensor, start: Tensor, masked: Tensor) -> Tensor:
        """(B, K, V) as Denoiser's, each row's from the model that it is to ask."""
        self.step, self.start = torch.where(start == self.start, self.step + 1, 0), start
        share, logits = masked.sum(1) / (self.end - start).clamp(1, self.layout.block), None      # (B,) of the block
        part = self.schedule(self.step, share)
        for name, denoiser in self.denoisers.items():
            mine = torch.tensor([of == name for of, _ in self.schedule.parts], device=part.device)[part] & (share > 0)
            if mine.any():
                made = denoiser(tokens, start, masked, mine)
                logits = made if logits is None else torch.where(mine[:, None, None], made, logits)
        return logits

    @property
    def forwards(self) -> Tensor:
        return sum(denoiser.forwards for denoiser in self.denoisers.values())

    @property
    def positions(self) -> Tensor:
        return sum(denoiser.positions for denoiser in self.denoisers.values())


def agree(nets: dict) -> None:
    """Refuses models that don't speak of the same tokens."""
    said = {name: (net.config.vocab, net.mask_id) for name, net in nets.items()}
    if len(set(said.values())) > 1:
        raise ValueError("models of one schedule need one vocabulary and one [MASK]: " + ", ".join(
            f"{name} has {vocab} tokens, [MASK] is {mask}" for name, (vocab, mask) in said.items()))
