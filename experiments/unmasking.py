"""What a learned unmasking policy is worth: beside every heuristic, in blocks and over whole texts (2512.09106).

    python -m experiments.unmasking             the story world, three policies of each kind
    python -m experiments.unmasking --quick     the plumbing, a minute

A policy learns from prompts of training stories; of the held-out ones one half is for choosing, among heuristics and
among a policy's temperatures, the other for what is said here. Text is greedy, as it is in training: what differs is
which masks come off, and when. Policies begin by imitating the heuristic whose reward is best. Leaves
experiments/unmasking/results.json (every seed, every number, the commit) and curves.png.
"""
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import train_tiny
from data.tinystories import stories
from experiments.conversion import opened
from experiments.hull import best_rule, draw, table
from experiments.job import WORK, Job, tiny
from experiments.results import finish, head, kept
from experiments.students import student
from model import grpo, reveal, unmask
from model.draw import Warp
from model.state import writable
from report import cli, measure, policy
from report.cli import option
from report.publish import write_json

ANY = {"text": "data", "states": "random", "target": "onehot", "weight": "1/t", "lr": 0.01}
LEVELS, TEMPERATURES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99), (0.5, 1)
BETAS, SHOWN = (0.25, 0.5, 2, 4), 1         # SHOWN: the alpha whose policy is scaled by them, and blinded


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
    seeds: int = option(3, "policies of each world and alpha")
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


def job_of(name: str, options: Options) -> Job:
    world = WORLDS[name]
    job = Job(f"unmasking, {name}", 0, world.flags, (world.updates,))
    return replace(tiny(job), points=(4,)) if options.quick else job


def opened_world(name: str, options: Options) -> tuple:
    """The student, its layout, the length of a text, the corpus."""
    settled, corpus = opened(job := job_of(name, options))
    return *student(job), settled.length, corpus


def heuristics(name: str) -> dict[str, Callable]:
    """Every rule over its parameter, in blocks of each size; a rule that comes again under another name is left out."""
    specs = [f"{rule}:{x}" for rule in ("threshold", "leftmost") for x in LEVELS] + ["factor:0.5", "eb:0.1", "eb:0.5"]
    found = {f"{spec} in {size}": unmask.Within(reveal.parse(spec), size) for spec in specs
             for size in WORLDS[name].sizes}
    return found | {f"{rule}:{n} in {size}": unmask.Within(reveal.parse(f"{rule}:{n}"), size)
                    for rule in ("static", "random") for n in (1, 2, 4) for size in WORLDS[name].sizes if n < size}


def look(options: Options, name: str, rule: Callable, part: str) -> dict:
    """What is said of a rule's texts: the share that is valid, steps and forwards a text, each alpha's mean reward."""
    net, layout, length, corpus = opened_world(name, options)
    starts, tok, N = stories(corpus.val, corpus.tokenizer.eot), corpus.tokenizer, options.stories
    held = measure.held_out(corpus.val, starts, 2 * N, length)[:N] if part == "dev" else measure.held_out(
        corpus.val, starts, 2 * N, length)[N:]
    right, nfe, forwards = [], [], 0
    for i in range(0, N, 128):
        noted = grpo.Recorded(rule)
        writer = measure.by_rule(net, layout, noted, Warp(temperature=0))
        (text, _), = measure.generate(writer, held[i:i + 128], tok.eot, length, i, least=policy.LEAST)[0]
        right.append(policy.valid(text, tok))
        nfe.append(noted.stacked().alive.sum(0))
        forwards += int(text.forwards.sum()) / N
    right, nfe = torch.cat(right), torch.cat(nfe)
    worth = {str(a): grpo.reward(right, nfe, policy.room(length), a) for a in WORLDS[name].alphas}
    return {"valid": right.mean().item(), "nfe": nfe.float().mean().item(), "forwards": forwards,
            "reward": {a: r.mean().item() for a, r in worth.items()},
            "error": {a: (r.std() / len(r) ** 0.5).item() for a, r in worth.items()}}


def looked(options: Options, name: str, rule: Callable, part: str, title: str, said: dict) -> dict:
    """The same; taken before, of the same: read."""
    torch.set_num_threads(1)
    settings = {"student": job_of(name, options).settings, "stories": options.stories, **said}
    file = folder(options) / "looks" / f"{name}, {title}, {part}.json".replace(" ", "")
    return kept(file, settings, partial(look, options, name, rule, part))


def folder(options: Options) -> Path:
    return WORK / ("quick" if options.quick else "unmasking")


def of_heuristics(options: Options, work: tuple[str, str]) -> dict:
    """Both looks of one."""
    name, title = work
    return {part: looked(options, name, heuristics(name)[title], part, title, {}) for part in ("dev", "test")}


def trained(options: Options, work: tuple[str, float, int, str, str]) -> dict:
    """A policy's looks; it is trained if it is not there, or was trained otherwise. Its temperature is the one whose
    reward is best on the stories for choosing."""
    torch.set_num_threads(1)
    name, alpha, seed, expert, reward = work
    title, (net, layout, length, corpus) = f"alpha {alpha}, {reward}, seed {seed}", opened_world(name, options)
    rule = heuristics(name)[expert]
    settings = grpo.Settings(policy.room(length), alpha, eps=0.2 if name == "whole" else 0.5, imitated=40,
                             expert=replace(rule, slides=True), steered=name == "whole", reward=getattr(grpo, reward))
    said = {"expert": expert, "updates": options.updates, "settings": repr(replace(settings, expert=None, reward=None))}
    out, data = folder(options) / f"{name}, {title}".replace(" ", ""), partial(
        train_tiny.draw, corpus, length=length, seed=seed, device="cpu")
    if not (out / "job.json").exists() or json.loads((out / "job.json").read_text()) != said:
        begun = time.perf_counter()
        policy.learn(net, layout, None, corpus, data, settings, options.updates, seed, 0.003, writable(out), said,
                     resume=False)
        write_json(out / "seconds.json", time.perf_counter() - begun)
        write_json(out / "job.json", said)
    made = unmask.Learned(unmask.load(out / "policy"))
    def of(rule, part, what):
        return looked(options, name, rule, part, f"{title}, {what}", said)
    best = max(TEMPERATURES, key=lambda t: of(replace(made, temperature=t), "dev", f"at {t}")["reward"][str(alpha)])
    made, looks = replace(made, temperature=best), {"": of(replace(made, temperature=best), "test", f"at {best}")}
    if alpha == SHOWN and reward == "reward":
        looks |= {f"beta {beta}": of(replace(made, beta=beta), "test", f"beta {beta}") for beta in BETAS}
        looks |= {how: of(Blind(made, how), "test", how) for how in ("mean", "shuffled")}
    log = [json.loads(line) for line in (out / "policy.jsonl").read_text().splitlines()[1:]]
    return {"world": name, "alpha": alpha, "seed": seed, "expert": expert, "reward": reward, "temperature": best,
            "seconds": json.loads((out / "seconds.json").read_text()), "looks": looks,
            "log": [[x["step"], x["quality"], x["nfe"]] for x in log[::5]]}


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = replace(options, seeds=1, updates=2, stories=8)
    results, every = head("unmasking", options), 40 if options.quick else 1
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(student, [job_of(name, options) for name in WORLDS]))
        work = [(name, title) for name in reversed(WORLDS) for title in list(heuristics(name))[::every]]
        seen = pool.map(partial(of_heuristics, options), work)
        results["heuristics"] = [{"world": name, "rule": rule, **both} for (name, rule), both in zip(work, seen)]
        tries = [(name, alpha, seed, best_rule(results, name, alpha), "reward") for name in reversed(WORLDS)
                 for alpha in WORLDS[name].alphas for seed in range(options.seeds)]
        tries.append(("blocks", SHOWN, 0, best_rule(results, "blocks", SHOWN), "additive"))
        results["policies"] = list(pool.map(partial(trained, options), tries[::4 if options.quick else 1]))
    finish("unmasking", results, draw, options.quick)
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
