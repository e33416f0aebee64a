"""The policies of experiments/unmasking.py, and looks at them and at heuristics. All of it is kept in out/; what was
made otherwise is made again."""
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.tinystories import stories
from decoding.sampling import SamplingConfig
from experiments.common.job import WORK
from experiments.common.results import kept
from experiments.unmasking.worlds import WORLDS, Blind, heuristics, imitable, job_of, opened_world
from report import generate, metrics
from report.compare import write_json
from training.resume import check_writable, latest_state, start_progress
from unmasking import grpo
from unmasking.policy import PolicyRule, load_policy
from unmasking.train import MIN_PROMPT, STATE, get_stories, max_response, train_policy, valid

TEMPERATURES, BETAS = (0.25, 0.5, 1), (0.25, 0.5, 0.75, 1, 10, 100)
LOOKED, MADE = 1, 3         # to be raised when the same settings give another look, or another policy


def folder(options) -> Path:
    return WORK / ("quick" if options.quick else "unmasking")


def look(options, rule: Callable, part: str) -> dict:
    """What is said of a rule's texts: the share that is valid, steps and forwards a text, each alpha's mean reward; and
    of each text, if it is right, and its steps."""
    net, layout, length, corpus = opened_world(options.world, options.quick)
    starts, tok = stories(corpus.val, corpus.tokenizer.eot), corpus.tokenizer
    held = metrics.held_out(corpus.val, starts, options.dev + options.test, length)
    held, right, nfe, forwards = held[:options.dev] if part == "dev" else held[options.dev:], [], [], 0
    for i in range(0, len(held), 128):
        noted = grpo.RecordingRule(rule)
        writer = generate.diffusion_generator(net, layout, noted, SamplingConfig(temperature=0))
        (text, _), = generate.generate_texts(writer, held[i:i + 128], tok.eot, length, i, min_prompt=MIN_PROMPT)[0]
        right.append(valid(text, tok))
        nfe.append(noted.trajectory().nfe)
        forwards += int(text.forwards.sum()) / len(held)
    right, nfe = torch.cat(right), torch.cat(nfe)
    worth = {str(a): grpo.reward(right, nfe, max_response(length), a) for a in WORLDS[options.world].alphas}
    return {"valid": right.mean().item(), "nfe": nfe.float().mean().item(), "forwards": forwards,
            "length": max_response(length),
            "reward": {a: r.mean().item() for a, r in worth.items()},
            "error": {a: (r.std() / len(r) ** 0.5).item() for a, r in worth.items()},
            "right": right.int().tolist(), "steps": nfe.tolist()}


def looked(options, rule: Callable, part: str, title: str, said: dict) -> dict:
    """The same; taken before, of the same: read."""
    torch.set_num_threads(1)
    settings = {"version": LOOKED, "student": job_of(options.world, options.quick).settings, "stories": [
        options.dev, options.test], **said}
    file = folder(options) / "looks" / f"{options.world}, {title}, {part}.json".replace(" ", "")
    return kept(file, settings, partial(look, options, rule, part))


def look_at(options, part: str, title: str) -> dict:
    """At a heuristic."""
    return looked(options, heuristics(options.world)[title], part, title, {})


def trained(options, title: str, expert: str, until: tuple, seed: int, begin: tuple[Path, int] | None = None,
            **how) -> tuple[Path, dict]:
    """The folder of a policy, and what it was made with; made, if it is not there so. A run that was killed goes on.
    `begin`: the folder of another, and how much of `until` that has done."""
    torch.set_num_threads(1)
    name, how = options.world, WORLDS[options.world].learning | how
    net, layout, length, corpus = opened_world(name, options.quick)
    assert imitable(rule := heuristics(name)[expert])
    until = tuple(2 + sorted({*until}).index(n) for n in until) if options.quick else until
    settings = grpo.Settings(max_response(length), expert=rule, **how)
    said = {"made": MADE, "student": job_of(name, options.quick).settings, "expert": expert, "until": list(until),
            "seed": seed, "rate": settings.lr, **{k: getattr(v, "__name__", v) for k, v in how.items()}}
    out = check_writable(folder(options) / f"{name}, {title}, seed {seed}".replace(" ", ""))
    if not (out / "job.json").exists() or json.loads((out / "job.json").read_text()) != said:
        (out / "job.json").unlink(missing_ok=True)
        same = (out / "begun.json").exists() and json.loads((out / "begun.json").read_text()) == said
        if not same:
            start_progress(out / "policy" / STATE, said)
            write_json(out / "begun.json", said)
        data = partial(get_stories, corpus, length=length, seed=seed, device="cpu")
        begin = begin and (load_policy(begin[0] / "policy").requires_grad_(True), until[begin[1]])
        resume, begun = same and latest_state(out / "policy" / STATE) is not None, time.process_time()
        train_policy(net, layout, None, corpus, data, settings, until, seed, out, said, resume, begin)
        write_json(out / "seconds.json", time.process_time() - begun)
        write_json(out / "job.json", said)
    return out, said


def records(out: Path) -> list[list]:
    """Of each update: its number, reward, quality, NFE, doubts, the share of groups that were worth the same."""
    lines = {x["step"]: x for x in map(json.loads, (out / "policy.jsonl").read_text().splitlines()[1:])}
    names = ("step", "reward", "quality", "nfe", "exploration", "tied_groups")
    return [[x.get(name) for name in names] for x in lines.values()]                        # of a resumed one the last


def imitated(options, expert: str, seed: int) -> dict:
    """Of one that has only imitated."""
    return judged(options, *staged(options, expert, seed, 0), "imitated", expert, seed)


def hurried(options, expert: str, seed: int) -> float:
    """The seconds that one took to hurry, from where it had imitated."""
    return json.loads((staged(options, expert, seed, 1)[0] / "seconds.json").read_text())


def staged(options, expert: str, seed: int, stage: int, alpha: float = grpo.Settings.warmup_alpha) -> tuple[Path, dict]:
    """One that has imitated (stage 0), from there hurried (1), from there learned what its alpha asks for (2). What a
    seed's policies have in common is made once."""
    every = WORLDS[options.world].until
    begin = (staged(options, expert, seed, stage - 1)[0], stage - 1) if stage else None
    title = ("imitated", "hurried", f"alpha {alpha:g}")[stage]
    return trained(options, title, expert, tuple(min(n, every[stage]) for n in every), seed, begin, alpha=alpha)


def grown(options, expert: str, shown: float, work: tuple[float, int]) -> dict:
    """Of one that went on from there by rewards."""
    alpha, seed = work
    made = staged(options, expert, seed, 2, alpha)
    return judged(options, *made, f"alpha {alpha:g}", expert, seed, alpha, alpha == shown)


def judged(options, out: Path, said: dict, title: str, expert: str, seed: int, alpha: float | None = None,
           more: bool = False) -> dict:
    """Its looks. Its temperature is the one whose reward is best on the stories for choosing; scaled, it is 1."""
    made = PolicyRule(load_policy(out / "policy"))

    def of(rule, part, what=""):
        return looked(options, rule, part, f"{title}, seed {seed}, at {rule.temperature}, {what}", said)
    tried = {t: of(replace(made, temperature=t), "dev") for t in TEMPERATURES}
    best = max(TEMPERATURES, key=lambda t: tried[t]["reward"][str(1 if alpha is None else alpha)])
    looks = {"": of(replace(made, temperature=best), "test")}
    if more:
        looks |= {f"beta {beta}": of(replace(made, beta=beta), "test", f"beta {beta}") for beta in BETAS}
        looks |= {how: of(Blind(replace(made, temperature=best), how), "test", how) for how in ("mean", "shuffled")}
    return {"policy": title, "alpha": alpha, "seed": seed, "expert": expert, "temperature": best,
            "seconds": json.loads((out / "seconds.json").read_text()), "tried": tried, "looks": looks,
            "log": records(out)}


def additive(options, expert: str, reward: str) -> dict:
    """The log of one that hardly imitates, so that most of its texts are wrong, where speed counts much."""
    out, _ = trained(options, f"little, {reward}", expert, (3, 3, 123), 0, alpha=3, reward=getattr(grpo, reward))
    return {"reward": reward, "log": records(out)}
