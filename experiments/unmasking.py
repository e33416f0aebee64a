"""What a learned unmasking policy is worth: beside every heuristic, in blocks and over whole texts (2512.09106).

    python -m experiments.unmasking             the story world, three seeds
    python -m experiments.unmasking --quick     the plumbing, a minute

A policy learns from prompts of training stories; of the held-out ones one half is for choosing among heuristics, the
other for what is said here. Text is greedy, as it is in training: what differs is which masks come off, and when.
Leaves experiments/unmasking/results.json (every seed, every number, the commit) and curves.png.
"""
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch

import train_tiny
from data.tinystories import stories
from experiments.conversion import opened
from experiments.hull import draw, table
from experiments.job import WORK, Job, tiny
from experiments.pool import prepare
from experiments.results import finish, head, kept
from experiments.students import student
from model import grpo, reveal, unmask
from model.draw import Warp
from model.state import writable
from report import cli, measure, policy
from report.cli import option

ANY = {"text": "data", "states": "random", "target": "onehot", "weight": "1/t", "lr": 0.01}
LEVELS, BETAS, SHOWN = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99), (0.25, 0.5, 1, 2, 4), 1      # SHOWN: alpha of these betas


@dataclass(frozen=True)
class World:
    """A student, and what is tried on it."""
    flags: dict         # of train_tiny.py
    updates: int        # of 16 rows
    sizes: tuple        # of blocks inside its blocks, for the heuristics
    alphas: tuple       # a policy each


WORLDS = {"blocks": World({**ANY, "block": 8}, 480, (2, 4, 8), (0, 0.3, 1, 3)),
          "whole": World({**ANY, "block": 0, "context": "block"}, 1600, (4, 8, 16, 32, 96), (0.3, 1))}


@dataclass
class Options:
    quick: bool = option(False, "tiny students, two updates: whether it runs at all")
    seeds: int = option(3, "students of each world, and policies of each")
    updates: int = option(300, "of a policy, 64 texts each")
    stories: int = option(256, "that a look is made of")


@dataclass(frozen=True)
class Blind:
    """A rule that does not see how sure the model is of a slot, but of which it is not: does the rule use it at all?"""
    rule: Callable
    how: str            # "mean": each masked slot has their mean; "shuffled": they change places, by the rule's numbers

    def __call__(self, sure: torch.Tensor, masked: torch.Tensor, step: torch.Tensor, numbers: torch.Tensor):
        mean = (sure * masked).sum(1, keepdim=True) / masked.sum(1, keepdim=True).clamp(min=1)
        if self.how == "mean":
            return self.rule(torch.where(masked, mean, sure), masked, step, numbers)
        place = masked.long().argsort(dim=1, descending=True, stable=True)               # (B, K) masked slots first
        other = numbers[..., 0].masked_fill(~masked, 2.0).argsort(dim=1, stable=True)      # in another order
        return self.rule(sure.scatter(1, place, sure.gather(1, other)), masked, step, numbers)

    def __getattr__(self, name: str):
        return getattr(self.rule, name)


def job_of(name: str, seed: int, options: Options) -> Job:
    world = WORLDS[name]
    job = Job(f"unmasking, {name}", seed, world.flags, (world.updates,), folder="full")
    return replace(tiny(job), points=(4,)) if options.quick else job


def expert(name: str) -> Callable:
    """What a policy imitates at first: of whole texts, as in the paper, threshold:0.9 in blocks."""
    return unmask.Within(reveal.parse("threshold:0.9"), 8)


def trained(name: str, alpha: float, seed: int, options: Options, reward: Callable = grpo.reward) -> unmask.Policy:
    """The policy of a world's student; trained on, if it is not finished."""
    (net, layout), (settled, corpus) = student(job := job_of(name, seed, options)), opened(job)
    out = WORK / ("quick" if options.quick else "unmasking") / f"{name}-{reward.__name__}-{alpha}-{seed}"
    settings = grpo.Settings(settled.length - 8, alpha, expert=expert(name), imitated=40, reward=reward)
    header = {**asdict(options), "settings": repr(replace(settings, expert=None, reward=None))}
    data = partial(train_tiny.draw, corpus, length=settled.length, seed=seed, device="cpu")
    policy.learn(net, layout, None, corpus, data, settings, options.updates, seed, 0.003, writable(out), header,
                 (out / "policy" / policy.STATE).exists())
    return unmask.load(out / "policy")


def heuristics(name: str) -> dict[str, Callable]:
    """Every rule over its parameter, in blocks of each size."""
    specs = {f"{rule}:{x}" for rule in ("threshold", "leftmost") for x in LEVELS}
    specs |= {f"{rule}:{n}" for rule in ("static", "random") for n in (1, 2, 4)} | {"factor:0.5", "eb:0.1", "eb:0.5"}
    return {f"{spec} in {size}": unmask.Within(reveal.parse(spec), size)
            for spec in sorted(specs) for size in WORLDS[name].sizes}


def learned(name: str, seed: int, options: Options) -> dict[str, Callable]:
    """The policies of each alpha; one at several betas, and one that may not see."""
    made = {alpha: unmask.Learned(trained(name, alpha, seed, options)) for alpha in WORLDS[name].alphas}
    found = {f"alpha {alpha}": rule for alpha, rule in made.items()}
    found |= {f"alpha {SHOWN}, beta {beta}": replace(made[SHOWN], beta=beta) for beta in BETAS}
    return found | {f"alpha {SHOWN}, {how}": Blind(made[SHOWN], how) for how in ("mean", "shuffled")}


def look(net, layout, rule: Callable, held: list, tok, length: int, alphas: tuple) -> dict:
    """What is said of a rule's texts: the share that is valid, forwards a text, each alpha's mean reward; seconds."""
    texts, seconds = measure.generate(measure.by_rule(net, layout, rule, Warp(temperature=0)), held, tok.eot, length, 0)
    right = torch.cat([policy.valid(text, tok) for text, _ in texts])
    nfe = torch.cat([text.forwards for text, _ in texts])
    worth = {str(a): grpo.reward(right, nfe, length - 8, a) for a in alphas}
    return {"valid": right.mean().item(), "nfe": nfe.float().mean().item(), "seconds": seconds / len(held),
            "reward": {a: r.mean().item() for a, r in worth.items()},
            "error": {a: (r.std() / len(r) ** 0.5).item() for a, r in worth.items()}}


def looks(options: Options, work: tuple[str, int]) -> dict:
    """Those of a world and seed; taken before, with these settings: read."""
    torch.set_num_threads(1)
    name, seed = work
    file = WORK / ("quick" if options.quick else "unmasking") / f"looks-{name}-{seed}.json"
    return kept(file, {"updates": options.updates, "stories": options.stories}, partial(made, options, name, seed))


def made(options: Options, name: str, seed: int) -> dict:
    """Of every rule, on the stories for choosing, "dev", and on the others, "test"; policies on these alone."""
    (net, layout), (settled, corpus) = student(job := job_of(name, seed, options)), opened(job)
    starts, alphas = stories(corpus.val, corpus.tokenizer.eot), WORLDS[name].alphas
    held = measure.held_out(corpus.val, starts, 2 * options.stories, settled.length)
    parts = {"dev": held[:options.stories], "test": held[options.stories:]}
    def of(rule, part):
        return look(net, layout, rule, parts[part], corpus.tokenizer, settled.length, alphas)
    rules = dict(list(heuristics(name).items())[:: 40 if options.quick else 1])
    found = {rule: {part: of(one, part) for part in parts} for rule, one in rules.items()}
    return found | {rule: {"test": of(one, "test")} for rule, one in learned(name, seed, options).items()}


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=2, stories=8)
    results, work = head("unmasking", options), [(name, seed) for name in WORLDS for seed in range(options.seeds)]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(prepare, [job_of("blocks", seed, options) for seed in range(options.seeds)]))
        seen = list(pool.map(partial(looks, options), work))
    results["runs"] = [{"world": name, "seed": seed, "looks": look} for (name, seed), look in zip(work, seen)]
    finish("unmasking", results, draw, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
