"""Model scheduling: a light model takes some of the denoising steps of a heavy one (arXiv 2604.02340).

A denoiser of any size predicts the same thing, the tokens under the masks, and from step to step a sampler
keeps only the text. So each step may be taken by another model. A `Schedule` says which model takes which
step. A `ScheduledDenoiser` is a denoiser like any other, so it works with every reveal rule. Schedules are
written

    L32,H64,L32                         32 steps of each block by the light model L, 64 by the heavy model H,
                                        32 by L
    mask:1.0-0.8=L,0.8-0.2=H,0.2-0=L    by the share of the block that is still masked
    auto:0.25                           a quarter of the steps light: those that cost least, as measured

Section 3 measures how much a light step costs.

Shapes: B rows, T positions, R = T - 1 response, K block size, V vocabulary, M masked positions.
"""
import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.denoiser import Denoiser
from decoding.reveal import Rule
from decoding.sampling import uniforms
from model import masks
from model.files import read_json
from model.masks import Layout

IMPORTANCE_FILE = "importance.json"     # in a light model's folder: importance_curves, as measured

# 1. schedules: which model takes which step ------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Consecutive parts of the denoising of a block, each with the name of its model.

    `by` is "step" or "mask". By step, a part ends before step `until`. By mask, it ends when at most the
    share `until` of the block is masked.
    """
    by: str
    parts: tuple[tuple[str, float], ...]        # (name of the model, until)

    def __call__(self, step: Tensor, masked_share: Tensor) -> Tensor:
        """(B,) the part each row is in, by its step and masked share, (B,) each. The last part has no end."""
        ends = torch.tensor([until for _, until in self.parts[:-1]], device=step.device)
        if self.by == "step":
            has_ended = step[:, None] >= ends
        else:
            has_ended = masked_share[:, None] <= ends
        return has_ended.long().sum(1)

    @property
    def names(self) -> list[str]:
        """The models, sorted, each once."""
        return sorted({name for name, _ in self.parts})

    def steps(self) -> list[str]:
        """The model of each step; only of a schedule by steps."""
        models = []
        for name, until in self.parts:
            models += [name] * (int(until) - len(models))
        return models


def load_schedule(spec: str, folder: Path, rule: Rule) -> Schedule:
    """The schedule `spec`; auto:SHARE reads the measured costs of the light model in `folder`.

    ValueError if `spec` is not a schedule, or if auto:SHARE does not go with the reveal rule or the folder.
    """
    match = re.fullmatch(r"auto:(\d*\.?\d+)", spec)
    if match is None:
        return parse_schedule(spec)
    share = float(match[1])
    if share > 1 or rule.name != "ancestral":
        raise ValueError(f"--schedule={spec}: auto:SHARE expects a share from 0 to 1, and a rule whose steps "
                         "reveal equally many tokens: take --reveal=ancestral:STEPS")
    file = folder / IMPORTANCE_FILE
    if not file.is_file():
        raise ValueError(f"--schedule={spec} needs the measured costs of the light model in {folder}, but "
                         f"it has no {IMPORTANCE_FILE}: measure them as experiments/scheduling does, or list "
                         "the steps (e.g. --schedule=L32,H64,L32)")
    curves = read_curves(file)
    return derive_schedule(curves, rule.argument, share)


def read_curves(file: Path) -> dict:
    """The measured costs that importance_curves has made. ValueError if they cannot be used."""
    try:
        curves = read_json(file)
        t = [float(x) for x in curves["t"]]
        kl = [float(x) for x in curves["kl"]]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"{file} has no measured costs ({type(error).__name__}: {error}): measure them "
                         "again as experiments/scheduling does") from None
    is_ascending = all(x < y for x, y in zip(t, t[1:]))
    if len(t) != len(kl) or len(t) < 2 or not is_ascending or not all(map(math.isfinite, t + kl)):
        raise ValueError(f"{file}: expected at least two masked shares in ascending order as \"t\", and as "
                         "many finite numbers as \"kl\": measure them again as experiments/scheduling does")
    return {"t": t, "kl": kl}


def parse_schedule(spec: str, known: tuple[str, ...] = ("H", "L")) -> Schedule:
    """A schedule by steps or by masked shares. ValueError if it is neither, or names an unknown model."""
    if spec.startswith("mask:"):
        by = "mask"
        parts = parse_shares(spec)
    else:
        by = "step"
        parts = parse_steps(spec)
    if not parts:
        raise ValueError(f"--schedule={spec}: expected steps (e.g. L32,H64,L32), masked shares (e.g. "
                         "mask:1-0.8=L,0.8-0=H) or auto:SHARE (e.g. auto:0.25)")
    for name, _ in parts:
        if name not in known:
            raise ValueError(f"--schedule={spec} names a model {name}: expected {' or '.join(known)}")
    return Schedule(by, tuple(parts))


def parse_steps(spec: str) -> list[tuple[str, float]]:
    """The parts of a schedule like L32,H64,L32; none if it has another form."""
    parts = []
    end = 0
    for text in spec.split(","):
        match = re.fullmatch(r"([A-Z])(\d+)", text)
        if match is None:
            return []
        end += int(match[2])
        parts.append((match[1], end))
    return parts


def parse_shares(spec: str) -> list[tuple[str, float]]:
    """The parts of a schedule like mask:1.0-0.8=L,0.8-0.2=H,0.2-0=L; none if it has another form or a gap."""
    parts = []
    last_low = 1.0
    for text in spec.removeprefix("mask:").split(","):
        match = re.fullmatch(r"(\d(?:\.\d+)?)-(\d(?:\.\d+)?)=([A-Z])", text)
        if match is None:
            return []
        high = float(match[1])
        low = float(match[2])
        if high != last_low or low >= high:
            return []
        parts.append((match[3], low))
        last_low = low
    return parts if last_low == 0 else []


def schedule_from_steps(is_light: list[bool]) -> Schedule:
    """The schedule whose step k is light where is_light[k]."""
    parts = []
    end = 0
    for light, run in itertools.groupby(is_light):
        end += len(list(run))
        parts.append(("L" if light else "H", end))
    return Schedule("step", tuple(parts))


def derive_schedule(curves: dict, steps: int, share: float) -> Schedule:
    """The schedule with a `share` of the steps light: those that cost least.

    To first order the costs of the steps add up (chain rule over the trajectory), so the cheapest steps are
    the best choice.
    """
    num_light = round(share * steps)
    cheapest_first = step_costs(curves, steps).argsort(stable=True)
    is_light = torch.zeros(steps, dtype=torch.bool)
    is_light[cheapest_first[:num_light]] = True
    return schedule_from_steps(is_light.tolist())


def step_costs(curves: dict, steps: int) -> Tensor:
    """(steps,) nats per token that each step costs if it is light; step k has masked share t = 1 - k / steps.

    `curves` has "t", masked shares in ascending order, and "kl", the nats there (importance_curves).
    """
    curve_t = torch.tensor(curves["t"], dtype=torch.float64)
    curve_kl = torch.tensor(curves["kl"], dtype=torch.float64)
    t = 1 - torch.arange(steps, dtype=torch.float64) / steps
    return interpolate(t, curve_t, curve_kl)


def interpolate(x: Tensor, points: Tensor, values: Tensor) -> Tensor:
    """Linear interpolation at `x` between `points`, in ascending order; constant outside of them."""
    right = torch.searchsorted(points, x).clamp(1, len(points) - 1)
    left = right - 1
    fraction = (x - points[left]) / (points[right] - points[left])
    return values[left].lerp(values[right], fraction.clamp(0, 1))


# 2. the denoiser ---------------------------------------------------------------------------------------

class ScheduledDenoiser:
    """A denoiser whose logits come from one of several models, according to a schedule.

    Each model has its own cache. When it takes a step, it first reads what other models have generated.
    `forwards`, `positions` (B,) are the sums over all models; `denoisers[name]` has those of one.
    """

    def __init__(self, nets: dict, layout: Layout, schedule: Schedule):
        check_same_vocabulary(nets)
        self.schedule = schedule
        self.layout = layout
        self.denoisers = {name: Denoiser(nets[name], layout) for name in schedule.names}
        self.mask_id = nets[schedule.names[0]].mask_id

    def reset(self, prompt_len: Tensor, end: Tensor) -> None:
        """Start new rows. `prompt_len`, `end` (B,): where each response begins and where it must stop."""
        self.end = end
        self.start = torch.full_like(prompt_len, -1)
        self.step = torch.zeros_like(prompt_len)                 # (B,) denoising steps taken in this block
        for denoiser in self.denoisers.values():
            denoiser.reset(prompt_len, end)

    def __call__(self, tokens: Tensor, start: Tensor, masked: Tensor) -> Tensor:
        """(B, K, V): the logits that a Denoiser gives, each row's from the model that takes its step."""
        same_block = start == self.start
        self.step = torch.where(same_block, self.step + 1, 0)
        self.start = start
        size = (self.end - start).clamp(1, self.layout.block)    # the last block may be shorter
        masked_share = masked.sum(1) / size                      # (B,)
        part = self.schedule(self.step, masked_share)            # (B,)

        logits = None
        for name, denoiser in self.denoisers.items():
            has_model = torch.tensor([model == name for model, _ in self.schedule.parts], device=part.device)
            rows = has_model[part] & (masked_share > 0)          # (B,) rows whose step this model takes
            if rows.any():
                own_logits = denoiser(tokens, start, masked, rows)
                if logits is None:
                    logits = own_logits
                else:
                    logits = torch.where(rows[:, None, None], own_logits, logits)
        return logits

    @property
    def forwards(self) -> Tensor:
        return sum(denoiser.forwards for denoiser in self.denoisers.values())

    @property
    def positions(self) -> Tensor:
        return sum(denoiser.positions for denoiser in self.denoisers.values())


def check_same_vocabulary(nets: dict) -> None:
    """ValueError if the models differ in vocabulary or [MASK]."""
    sizes = {(net.config.vocab, net.mask_id) for net in nets.values()}
    if len(sizes) > 1:
        found = ", ".join(f"{name} has {net.config.vocab} tokens, [MASK] is {net.mask_id}"
                          for name, net in nets.items())
        raise ValueError(f"the models of a schedule need one vocabulary and one [MASK], but {found}: train "
                         "them with the same tokenizer")


# 3. how much a light step costs, measured --------------------------------------------------------------
#
# Both are full-sequence models, which see the first token and denoise the R tokens after it. In a state with
# n of these masked, t = n / R, a masked token x_i costs the light model on average
#
#     CE(t) = mean of log p_heavy(x_i) - log p_light(x_i)      on real text: the true cost, but noisy
#     KL(t) = mean of KL(p_heavy || p_light)                   the same number if the heavy model is right
#
# The mean of CE over n = 1 .. R is the gap between the bounds of the two models, per token. Each of S
# ancestral steps reveals R / S tokens on average. So to first order the light steps of a schedule cost the
# sum of KL at their t, divided by S, in nats per token.

def pad_to_length(stories: list[Tensor], length: int, eot: int) -> Tensor:
    """(stories, length): the stories, cut or padded with end-of-text, as full-sequence models learn them."""
    cut = [story[:length] for story in stories]
    tokens = torch.nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=eot)
    return F.pad(tokens, (0, length - tokens.size(1)), value=eot)


def sample_masks(row_ids: range, R: int, stretch: tuple[float, float], seed: int) -> Tensor:
    """(B, R): n random positions of each row, n / R uniform in a `stretch` (low, high) of (0, 1]."""
    low, high = stretch
    u = uniforms(seed, 0, row_ids, (R + 1,))
    share = low + (high - low) * u[:, :1]                        # (B, 1)
    n = 1 + (R * share).long()
    rank = u[:, 1:].argsort(1).argsort(1)                        # (B, R) a random order
    return rank < n.clamp(max=R)


@torch.no_grad()
def log_probs(net, tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (M, V) at the `masked` (B, R) positions of `tokens` (B, T), and their rows (M,)."""
    T = tokens.size(1)
    rows, slots = masked.nonzero(as_tuple=True)                  # (M,) each
    noisy = tokens[:, 1:].masked_fill(masked, net.mask_id)       # (B, R)
    inputs = torch.cat([tokens[:, :1], noisy], 1)
    # The clean text is the first token; the rest is one block, in which logits are not shifted.
    mask = masks.training_mask(T, 1, Layout(T, T, 0), tokens.device, upto=1)         # (T, T)
    position = torch.arange(T, device=tokens.device)
    read = rows * T + slots + 1
    logits = net(inputs, mask, position, read)
    return logits.float().log_softmax(-1), rows


def light_model_costs(heavy, light, tokens: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
    """CE and KL of each row of `tokens` (B, T), nats: means over its masked positions, (B,) each, float64."""
    heavy_log_probs, rows = log_probs(heavy, tokens, masked)     # (M, V), (M,)
    light_log_probs, _ = log_probs(light, tokens, masked)
    difference = heavy_log_probs - light_log_probs
    true_token = tokens[:, 1:][masked]                           # (M,)
    ce = difference.gather(1, true_token[:, None])[:, 0]
    kl = (heavy_log_probs.exp() * difference).sum(1)
    zeros = torch.zeros(len(tokens), dtype=torch.float64)
    num_masked = masked.sum(1)
    ce_mean = zeros.index_add(0, rows, ce.double()) / num_masked
    kl_mean = zeros.index_add(0, rows, kl.double()) / num_masked
    return ce_mean, kl_mean


def costs_in_stretch(heavy, light, tokens: Tensor, stretch: tuple[float, float], first_row: int, seed: int,
                     batch: int) -> tuple[Tensor, Tensor]:
    """CE and KL of each row of `tokens` in a random state of the stretch; `first_row` numbers the first."""
    ce_parts = []
    kl_parts = []
    for i in range(0, len(tokens), batch):
        part = tokens[i:i + batch]
        row_ids = range(first_row + i, first_row + i + len(part))
        masked = sample_masks(row_ids, tokens.size(1) - 1, stretch, seed)
        ce, kl = light_model_costs(heavy, light, part, masked)
        ce_parts.append(ce)
        kl_parts.append(kl)
    return torch.cat(ce_parts), torch.cat(kl_parts)


def importance_curves(heavy, light, stories: list[Tensor], length: int, eot: int, stretches: int = 20,
                      seed: int = 0, batch: int = 64) -> dict:
    """CE and KL at the middles t of equal stretches of (0, 1], and at t = 1, where a text begins.

    Each is a mean over all stories, in nats; "ce_error" and "kl_error" are the standard errors.
    """
    tokens = pad_to_length(stories, length, eot)
    curves = {"t": [], "ce": [], "ce_error": [], "kl": [], "kl_error": []}
    for k in range(stretches + 1):
        low = min(k, stretches) / stretches
        high = min(k + 1, stretches) / stretches                 # the last stretch is the point t = 1
        ce, kl = costs_in_stretch(heavy, light, tokens, (low, high), k * len(tokens), seed, batch)
        curves["t"].append((low + high) / 2)
        curves["ce"].append(ce.mean().item())
        curves["ce_error"].append(standard_error(ce))
        curves["kl"].append(kl.mean().item())
        curves["kl_error"].append(standard_error(kl))
    return curves


def bound_gap(heavy, light, stories: list[Tensor], length: int, eot: int, draws: int, seed: int,
              batch: int = 64) -> dict:
    """The light model's bound minus the heavy one's, nats per token, with its standard error.

    Each story is measured in `draws` random states, n uniform over 1 .. R. With a seed other than that of the
    curves, this is an independent estimate.
    """
    tokens = pad_to_length(stories, length, eot)
    parts = []
    for k in range(draws):
        ce, _ = costs_in_stretch(heavy, light, tokens, (0.0, 1.0), k * len(tokens), seed, batch)
        parts.append(ce)
    ce = torch.cat(parts)
    return {"nats": ce.mean().item(), "error": standard_error(ce)}


def standard_error(x: Tensor) -> float:
    return x.std().item() / math.sqrt(len(x))
