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
from experiments.hull import best_rule, draw, table
from experiments.job import WORK
from experiments.results import finish, head, kept
from experiments.students import student
from experiments.worlds import WORLDS, Blind, heuristics, job_of, opened_world
from model import grpo, unmask
from model.draw import Warp
from model.state import writable
from report import cli, measure, policy
from report.cli import option
from report.publish import write_json

TEMPERATURES, BETAS, SHOWN = (0.5, 1), (0.25, 0.5, 2, 4), 1     # SHOWN: the alpha whose policy is scaled and blinded


@dataclass
class Options:
    quick: bool = option(False, "tiny students, two updates: whether it runs at all")
    seeds: int = option(3, "policies of each world and alpha")
    stories: int = option(256, "that a look is made of")


def look(options: Options, name: str, rule: Callable, part: str) -> dict:
    """What is said of a rule's texts: the share that is valid, steps and forwards a text, each alpha's mean reward."""
    net, layout, length, corpus = opened_world(name, options.quick)
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
    settings = {"student": job_of(name, options.quick).settings, "stories": options.stories, **said}
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
    title, (net, layout, length, corpus) = f"alpha {alpha}, {reward}, seed {seed}", opened_world(name, options.quick)
    world, rule = WORLDS[name], heuristics(name)[expert]
    settings = grpo.Settings(policy.room(length), alpha, expert=replace(rule, slides=True),
                             reward=getattr(grpo, reward), **world.learning)
    updates = 2 if options.quick else world.policy_updates
    said = {"expert": expert, "updates": updates, **world.learning}
    out, data = folder(options) / f"{name}, {title}".replace(" ", ""), partial(
        train_tiny.draw, corpus, length=length, seed=seed, device="cpu")
    if not (out / "job.json").exists() or json.loads((out / "job.json").read_text()) != said:
        begun = time.perf_counter()
        policy.learn(net, layout, None, corpus, data, settings, updates, seed, 0.003, writable(out), said, resume=False)
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
        options = replace(options, seeds=1, stories=8)
    results, every = head("unmasking", options), 40 if options.quick else 1
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(student, [job_of(name, options.quick) for name in WORLDS]))
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
