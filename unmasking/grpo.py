"""How an unmasking policy is trained (arXiv 2512.09106). The diffusion model is frozen: it is the world in which the
policy acts, and a text is worth what it is worth at its end. What GRPO is here, in four sentences:

1. The policy writes a group of G texts after each prompt; tokens are always the likeliest, so that they differ by its
   choices alone.
2. A text's reward is its quality times ((L - NFE + 1) / L) ** alpha, L the longest length and NFE its steps; its
   advantage is that less the mean of its group.
3. Each step's choices are made likelier in proportion to the advantage of their text, as long as their probability has
   not changed by more than a factor 1 +- eps since they were made; a text's steps count as one together.
4. All that twice on the same texts, then on new ones.

As in the paper there is no division by the group's deviation and no KL to an older policy, and an action is all slots
of a step. Not in the paper: a policy far from anything that is ever rewarded learns nothing from rewards, so before all
that it imitates a rule (`imitate`), and is then made less sure of it (`soften`), or it would never try anything else.
And a step saved is worth little beside a text that is spoilt: so that it is found while the policy still tries, speed
counts more at first (`haste`).

Letters: S steps, B texts, K slots of a block, G policy's texts and E experts' of a group.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unmasking.policy import Policy, PolicyRule

PARTS, TURNS = 10, 3        # of an update that imitates: what was seen is parted, and gone through so many times


class RecordingRule:
    """A rule that notes what it saw and did."""

    def __init__(self, rule):
        self.rule, self.seen = rule, []

    def __call__(self, sure: Tensor, masked: Tensor, step: Tensor, numbers: Tensor) -> Tensor:
        show = self.rule(sure, masked, step, numbers)
        self.seen.append((sure, masked, step / masked.size(1), show))
        return show

    def __getattr__(self, name: str):
        return getattr(self.rule, name)

    def stacked(self) -> "Trajectory":
        return Trajectory(*map(torch.stack, zip(*self.seen)))


@dataclass
class Trajectory:
    """What a policy, or an expert, has seen and done."""
    sure: Tensor            # (S, B, K) confidences
    masked: Tensor          # (S, B, K)
    time: Tensor            # (S, B)
    action: Tensor          # (S, B, K) whose mask came off

    @property
    def alive(self) -> Tensor:
        """(S, B) the steps that a text took, at which it had a mask; their number is its NFE."""
        return self.masked.any(-1)

    def logprob(self, policy: Policy) -> Tensor:
        """(S, B) of the actions under a policy: of each masked slot that its mask came off, or did not."""
        alive = self.alive
        logits, action, masked = policy(*self.states()), self.action[alive], self.masked[alive]      # (N, K)
        said = (F.logsigmoid(torch.where(action, logits, -logits)) * masked).sum(-1)
        return torch.zeros_like(alive, dtype=said.dtype).masked_scatter(alive, said)

    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """What there was to see at the N steps of texts that had a mask: (N, K) twice, (N,)."""
        return self.sure[self.alive], self.masked[self.alive], self.time[self.alive]

    @torch.no_grad()
    def doubts(self, policy: Policy) -> float:
        """How many choices of a text are expected to fall otherwise than most likely: what exploration there is."""
        p = policy(*self.states()).sigmoid()
        return (torch.minimum(p, 1 - p) * self.masked[self.alive]).sum().item() / self.alive.size(1)

    def relabelled(self, rule: Callable) -> "Trajectory":
        """The same steps, with what a rule would have done; one that goes by the confidences."""
        sure, masked, time = self.states()
        step, nothing = (time * masked.size(1)).round().long(), sure.new_zeros(*sure.shape, 1)
        return Trajectory(*(x[None] for x in (sure, masked, time, rule(sure, masked, step, nothing))))


def reward(quality: Tensor, nfe: Tensor, length: int, alpha: float) -> Tensor:
    """(B,) of texts of at most `length` tokens: quality times the share of steps that were not needed, to the alpha."""
    return quality * ((length - nfe.clamp(max=length) + 1) / length) ** alpha


def additive(quality: Tensor, nfe: Tensor, length: int, alpha: float) -> Tensor:
    """(B,) the other one, there to be looked at: where all texts of a group are wrong, the fast ones still win."""
    return quality - alpha * nfe / length


def surrogate(new: Tensor, old: Tensor, advantage: Tensor, alive: Tensor, eps: float) -> Tensor:
    """What is to grow, from log-probabilities of steps `new` and `old` (S, B), `advantage` (B,) and `alive` (S, B)."""
    ratio = (new - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
    return ((gain * alive).sum(0) / alive.sum(0).clamp(min=1)).mean()


def mixture(logp: Tensor, group: int, experts: int) -> Tensor:
    """Of an expert's step: drawn from the policy, or with probability E / (G + E) what the expert does. It bounds the
    ratio where the policy would hardly ever have done so."""
    whole = math.log(group + experts)
    return torch.logaddexp(logp + math.log(group) - whole, torch.full_like(logp, math.log(experts) - whole))


@dataclass
class Settings:
    """Where the paper has another value it is named."""
    length: int                     # L, tokens of the longest response
    alpha: float = 1.0              # how much speed counts
    group: int = 8                  # G
    prompts: int = 8                # of an update (paper: 16)
    eps: float = 0.2                # (paper: 0.5 where no expert steers)
    inner: int = 2                  # gradient steps on the same texts
    clip: float = 0.2               # of the gradient's norm
    rate: float = 0.003             # peak of the learning rate; where rewards teach after imitation, a sixth
    expert: Callable | None = None  # a rule
    softened: float = 0.5           # what is left of the logits after imitation
    warmup_alpha: float = 10               # alpha at first
    steered: bool = False           # if the expert goes on to write a text of each group (paper: of whole texts only)
    reward: Callable = reward


IN_BLOCKS = {"eps": 0.5}
OF_WHOLE_TEXTS = {"eps": 0.2, "steered": True, "prompts": 8, "group": 4, "softened": 0.75, "rate": 0.002}


def train(policy: Policy, write: Callable, quality: Callable, settings: Settings, optimizer, updates: range,
          rate: Callable = lambda update: None) -> Iterator[dict]:
    """Write, judge, learn; yields each update's record. `write(rule, update, G)` gives the Text of G rows a prompt,
    side by side, at temperature 0; `quality(text)` (B,) is what its rows are worth."""
    for update in updates:
        rate(update)
        rules = [(PolicyRule(policy, explore=True), settings.group)] + [(settings.expert, 1)] * settings.steered
        seen, rewards, record = written(rules, write, quality, settings, update)
        both = torch.cat([r.view(settings.prompts, -1) for r in rewards], 1)             # (prompts, G + E)
        gain = both - both.mean(1, keepdim=True)                                         # advantages
        record |= {"alike": (gain.abs().amax(1) < 1e-9).float().mean().item(), "doubts": seen[0].doubts(policy)}
        if record["alike"] < 1:
            record |= learn(policy, seen, [part.flatten() for part in gain.split([g for _, g in rules], 1)], settings,
                            optimizer)
        yield record


def written(rules: list[tuple], write: Callable, quality: Callable, settings: Settings, update: int) -> tuple:
    """What rules see and do when each writes so many texts a prompt, the rewards, and what is said of the first's."""
    noted = [RecordingRule(rule) for rule, _ in rules]
    texts = [write(rule, update, count) for rule, (_, count) in zip(noted, rules)]
    seen, worth = [rule.stacked() for rule in noted], [quality(text) for text in texts]
    rewards = [settings.reward(q, s.alive.sum(0), settings.length, settings.alpha) for q, s in zip(worth, seen)]
    return seen, rewards, {"step": update + 1, "reward": rewards[0].mean().item(), "quality": worth[0].mean().item(),
                           "nfe": seen[0].alive.sum(0).float().mean().item()}


def learn(policy: Policy, seen: list[Trajectory], gains: list[Tensor], settings: Settings, optimizer) -> dict:
    """Sentences 3 and 4. `gains`: advantages of the policy's texts, and of the experts' if there are any."""
    def said():
        logp = [some.logprob(policy) for some in seen]
        return [logp[0], *(mixture(x, settings.group, 1) for x in logp[1:])]
    with torch.no_grad():
        old = said()

    def loss():
        each = [surrogate(n, o, gain, some.alive, settings.eps) * len(gain)
                for n, o, gain, some in zip(said(), old, gains, seen)]
        return -sum(each) / sum(map(len, gains))
    return descend([loss] * settings.inner, policy, settings, optimizer)


def imitate(policy: Policy, write: Callable, quality: Callable, settings: Settings, optimizer, updates: range,
            rate: Callable = lambda update: None) -> Iterator[dict]:
    """Learns what the expert does in its own texts and, from the fourth of the `updates` on, what that would have done
    in the policy's (DAgger, 1011.0686). Takes and yields what `train` does."""
    for update in updates:
        rate(update)
        rules = [(PolicyRule(policy, explore=True), settings.group)] * (update >= 3) + [(settings.expert, 1)]
        seen, _, record = written(rules, write, quality, settings, update)
        yield record | imitated(policy, [some.relabelled(settings.expert) for some in seen], settings, optimizer)


def imitated(policy: Policy, expert: list[Trajectory], settings: Settings, optimizer) -> dict:
    """Make what the expert does likelier. There is no ratio here that bounds the steps on one text: many small ones."""
    seen = [torch.cat(x, 1) for x in zip(*((some.sure, some.masked, some.time, some.action) for some in expert))]
    seen = [Trajectory(*(x[:, i::PARTS] for x in seen)) for i in range(PARTS)]                # (1, N / PARTS, K) each
    return descend([lambda some=some: -some.logprob(policy).mean() for some in seen] * TURNS, policy, settings,
                   optimizer)


@torch.no_grad()
def soften(policy: Policy, share: float) -> None:
    """Leaves a share of its logits."""
    policy.head.weight.mul_(share)
    policy.head.bias.mul_(share)


def descend(losses: list[Callable], policy: Policy, settings: Settings, optimizer) -> dict:
    """A step down each."""
    for loss in losses:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.clip)
        optimizer.step()
    return {"loss": value.item(), "norm": norm.item()}
