"""Training of an unmasking policy with GRPO (arXiv 2512.09106). The diffusion model is frozen.

GRPO in four sentences:

1. After each prompt the policy generates a group of G texts; tokens are always the most likely ones, so the
   texts of a group differ only by the policy's choices.
2. The reward of a text is its quality times ((L - NFE + 1) / L) ** alpha, where L is the maximum length and
   NFE the number of denoising steps; its advantage is its reward minus the mean reward of its group.
3. The choices at each step become more likely in proportion to the advantage of their text, until their
   probability has changed by a factor 1 +- eps; the steps of a text are averaged.
4. The same texts are used for two gradient steps, then new ones are generated.

As in the paper, the advantage is not divided by the group's standard deviation, the loss has no KL penalty
towards an older policy, and one action is the choice at all slots of a step.

Two things are not in the paper. From scratch the reward is almost always zero, so the policy first imitates a
heuristic (`imitate`); its logits are then scaled down to restore exploration (`scale_logits`). One saved step
changes the reward much less than one wrong text does, so alpha is large at first (`warmup_alpha`): the policy
finds fast choices while it still explores.

Shapes: S steps, B texts, K slots of a block, N states (a text at a step at which it has masks), G texts of
the policy and E texts of the expert in a group.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmasking.policy import Policy, PolicyRule

# An update of the imitation makes several passes over its states, in minibatches.
IMITATION_MINIBATCHES = 10
IMITATION_EPOCHS = 3
DAGGER_START = 3    # the first imitation update that also labels states of the policy's own texts


# 1. trajectories: what a rule has seen and done -----------------------------------------------------------

@dataclass
class Trajectory:
    """Inputs and actions of a reveal rule, while it generated B texts in parallel."""
    confidence: Tensor      # (S, B, K)
    masked: Tensor          # (S, B, K) bool
    time: Tensor            # (S, B) share of the block's steps that have passed
    action: Tensor          # (S, B, K) bool: the slots that were revealed

    @property
    def active(self) -> Tensor:
        """(S, B) bool: the steps at which a text still had a mask."""
        return self.masked.any(-1)

    @property
    def nfe(self) -> Tensor:
        """(B,) denoising steps of each text."""
        return self.active.sum(0)

    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """The policy's inputs at active steps: confidence (N, K), masked (N, K) and time (N,)."""
        active = self.active
        return self.confidence[active], self.masked[active], self.time[active]

    def log_prob(self, policy: Policy) -> Tensor:
        """(S, B) log-probability of each step's action under a policy: the sum over the masked slots."""
        active = self.active
        action = self.action[active]                                        # (N, K)
        logits = policy(*self.states())
        per_slot = F.logsigmoid(torch.where(action, logits, -logits))
        per_step = (per_slot * self.masked[active]).sum(-1)                 # (N,)
        return torch.zeros_like(active, dtype=per_step.dtype).masked_scatter(active, per_step)

    @torch.no_grad()
    def exploration(self, policy: Policy) -> float:
        """Expected number of choices per text that differ from the policy's most likely ones."""
        reveal_prob = policy(*self.states()).sigmoid()                      # (N, K)
        unlikely = torch.minimum(reveal_prob, 1 - reveal_prob)
        num_texts = self.active.size(1)
        return (unlikely * self.masked[self.active]).sum().item() / num_texts

    def relabelled(self, rule: Callable) -> "Trajectory":
        """The active steps, as one step of N texts, with the actions of another rule (not a random one)."""
        confidence, masked, time = self.states()
        step = (time * masked.size(1)).round().long()
        no_numbers = confidence.new_zeros(*confidence.shape, 1)
        action = rule(confidence, masked, step, no_numbers)                 # (N, K)
        return Trajectory(confidence[None], masked[None], time[None], action[None])


class RecordingRule:
    """A reveal rule that behaves like `rule` and records its inputs and actions."""

    def __init__(self, rule):
        self.rule = rule
        self.recorded = []

    def __call__(self, confidence: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        revealed = self.rule(confidence, masked, step, numbers)
        time = step / masked.size(1)
        self.recorded.append((confidence, masked, time, revealed))
        return revealed

    def __getattr__(self, name: str):
        return getattr(self.rule, name)

    def trajectory(self) -> Trajectory:
        fields = [torch.stack(tensors) for tensors in zip(*self.recorded)]
        return Trajectory(*fields)


# 2. rewards and settings ----------------------------------------------------------------------------------

def reward(quality: Tensor, nfe: Tensor, length: int, alpha: float) -> Tensor:
    """(B,) quality times the share of saved steps to the power alpha. `length` is L, the maximum length."""
    saved = (length - nfe.clamp(max=length) + 1) / length
    return quality * saved ** alpha


def additive(quality: Tensor, nfe: Tensor, length: int, alpha: float) -> Tensor:
    """(B,) an alternative for comparison: if all texts of a group are wrong, it still rewards fast ones."""
    return quality - alpha * nfe / length


@dataclass
class Settings:
    """The configuration of the training. The paper's value is named where it differs."""
    length: int                     # L, the maximum length of a response in tokens
    alpha: float = 1.0              # weight of speed in the reward
    group_size: int = 8             # G, texts per prompt
    prompts: int = 8                # per update (paper: 16)
    eps: float = 0.2                # clipping range of the probability ratio (paper: 0.5 without expert)
    num_epochs: int = 2             # gradient steps on the same texts
    max_grad_norm: float = 0.2
    lr: float = 0.003               # peak learning rate; of GRPO after imitation it is a sixth
    expert: Callable | None = None  # the reveal rule to imitate
    logit_scale_after_imitation: float = 0.5
    warmup_alpha: float = 10        # alpha of the first GRPO updates
    mix_in_expert: bool = False     # add an expert's text to each group (paper: full-sequence models only)
    reward: Callable = reward


BLOCK_SETTINGS = {"eps": 0.5}
FULL_SEQUENCE_SETTINGS = {
    "eps": 0.2, "mix_in_expert": True, "prompts": 8, "group_size": 4,
    "logit_scale_after_imitation": 0.75, "lr": 0.002,
}


# 3. GRPO --------------------------------------------------------------------------------------------------

def train(policy: Policy, generate: Callable, quality: Callable, settings: Settings, optimizer,
          updates: range, set_lr: Callable = lambda update: None) -> Iterator[dict]:
    """GRPO for the given updates; yields one record per update.

    `generate(rule, update, count)` returns the Rollout of `count` texts per prompt at temperature 0, with the
    texts of a prompt in adjacent rows. `quality(rollout)` (B,) is their quality. `set_lr(update)` sets the
    learning rate.
    """
    rules = [PolicyRule(policy, explore=True)]
    counts = [settings.group_size]                               # texts per prompt
    if settings.mix_in_expert:
        rules.append(settings.expert)
        counts.append(1)
    for update in updates:
        set_lr(update)
        trajectories, rewards, record = generate_texts(rules, counts, generate, quality, settings, update)
        per_prompt = [x.view(settings.prompts, -1) for x in rewards]        # (prompts, G), (prompts, E)
        group = torch.cat(per_prompt, 1)                                    # (prompts, G + E)
        advantage = group - group.mean(1, keepdim=True)
        is_tied = advantage.abs().amax(1) < 1e-9                            # (prompts,)
        record["tied_groups"] = is_tied.float().mean().item()
        record["exploration"] = trajectories[0].exploration(policy)
        if record["tied_groups"] < 1:
            advantages = [part.flatten() for part in advantage.split(counts, 1)]
            record |= grpo_update(policy, trajectories, advantages, settings, optimizer)
        yield record


def generate_texts(rules: list, counts: list[int], generate: Callable, quality: Callable,
                   settings: Settings, update: int) -> tuple[list[Trajectory], list[Tensor], dict]:
    """Each rule generates its count of texts per prompt.

    Returns the trajectory and the rewards (B,) of every rule, and a record with means over the first rule's
    texts.
    """
    trajectories = []
    qualities = []
    rewards = []
    for rule, count in zip(rules, counts):
        recorder = RecordingRule(rule)
        text = generate(recorder, update, count)
        trajectory = recorder.trajectory()
        text_quality = quality(text)                                        # (B,)
        text_reward = settings.reward(text_quality, trajectory.nfe, settings.length, settings.alpha)
        trajectories.append(trajectory)
        qualities.append(text_quality)
        rewards.append(text_reward)
    record = {
        "step": update + 1,
        "reward": rewards[0].mean().item(),
        "quality": qualities[0].mean().item(),
        "nfe": trajectories[0].nfe.float().mean().item(),
    }
    return trajectories, rewards, record


def grpo_update(policy: Policy, trajectories: list[Trajectory], advantages: list[Tensor], settings: Settings,
                optimizer) -> dict:
    """Sentences 3 and 4. Both lists: first the policy's texts, then the expert's, if there are any."""
    def log_probs() -> list[Tensor]:
        values = [trajectory.log_prob(policy) for trajectory in trajectories]
        for i in range(1, len(values)):
            values[i] = mixture(values[i], settings.group_size, 1)
        return values

    with torch.no_grad():
        old_log_probs = log_probs()
    num_texts = sum(len(advantage) for advantage in advantages)

    def loss() -> Tensor:
        total = 0.0
        for trajectory, advantage, new, old in zip(trajectories, advantages, log_probs(), old_log_probs):
            objective = surrogate(new, old, advantage, trajectory.active, settings.eps)
            total = total + objective * len(advantage)
        return -total / num_texts

    return gradient_steps([loss] * settings.num_epochs, policy, settings, optimizer)


def surrogate(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, active: Tensor,
              eps: float) -> Tensor:
    """The clipped objective, to be maximized: mean over the active steps of a text, then over texts.

    `log_prob`, `old_log_prob` (S, B) of the actions; `advantage` (B,); `active` (S, B) bool.
    """
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - eps, 1 + eps)
    objective = torch.minimum(ratio * advantage, clipped * advantage)       # (S, B)
    num_steps = active.sum(0).clamp(min=1)                                  # (B,)
    return ((objective * active).sum(0) / num_steps).mean()


def mixture(log_prob: Tensor, group_size: int, num_experts: int) -> Tensor:
    """Log-probability of the expert's action under a mixture of policy and expert, weighted G to E.

    `log_prob` is its log-probability under the policy. The mixture bounds the probability ratio where the
    policy would almost never act like the expert.
    """
    log_total = math.log(group_size + num_experts)
    policy_part = log_prob + math.log(group_size) - log_total
    expert_part = torch.full_like(log_prob, math.log(num_experts) - log_total)
    return torch.logaddexp(policy_part, expert_part)


# 4. imitation ---------------------------------------------------------------------------------------------

def imitate(policy: Policy, generate: Callable, quality: Callable, settings: Settings, optimizer,
            updates: range, set_lr: Callable = lambda update: None) -> Iterator[dict]:
    """Learn the expert's actions in its own texts, later also in the policy's (DAgger, arXiv 1011.0686).

    Arguments and records as for `train`.
    """
    for update in updates:
        set_lr(update)
        rules = [settings.expert]
        counts = [1]
        if update >= DAGGER_START:
            rules.insert(0, PolicyRule(policy, explore=True))
            counts.insert(0, settings.group_size)
        trajectories, _, record = generate_texts(rules, counts, generate, quality, settings, update)
        labelled = [trajectory.relabelled(settings.expert) for trajectory in trajectories]
        record |= imitation_update(policy, labelled, settings, optimizer)
        yield record


def imitation_update(policy: Policy, labelled: list[Trajectory], settings: Settings, optimizer) -> dict:
    """Many small steps of maximum likelihood on the expert's actions; each trajectory is (1, N, K)."""
    confidence = torch.cat([t.confidence for t in labelled], 1)
    masked = torch.cat([t.masked for t in labelled], 1)
    time = torch.cat([t.time for t in labelled], 1)
    action = torch.cat([t.action for t in labelled], 1)
    losses = []
    for i in range(IMITATION_MINIBATCHES):
        part = slice(i, None, IMITATION_MINIBATCHES)
        minibatch = Trajectory(confidence[:, part], masked[:, part], time[:, part], action[:, part])
        losses.append(lambda minibatch=minibatch: -minibatch.log_prob(policy).mean())
    return gradient_steps(losses * IMITATION_EPOCHS, policy, settings, optimizer)


@torch.no_grad()
def scale_logits(policy: Policy, scale: float) -> None:
    """Multiply the policy's logits. Below 1 it explores more; its most likely choices stay the same."""
    policy.head.weight.mul_(scale)
    policy.head.bias.mul_(scale)


def gradient_steps(losses: list[Callable], policy: Policy, settings: Settings, optimizer) -> dict:
    """One optimizer step for each loss function; the record of the last one."""
    for loss in losses:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
    return {"loss": value.item(), "norm": norm.item()}
