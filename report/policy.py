"""An unmasking policy learned for a student (model/grpo.py): prompts, what a text is worth, records, what is saved.

A text is worth 1 or 0. Of the story world by its checker, which is what this method needs: a reward that can't be
argued with. Of other text by the teacher: 1 if it is as likely to him as three in four of those that the student writes
one token a step, and is no duller; the second since dull text is likely.
"""
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import opdlm
from data import toy
from data.tinystories import Corpus
from model import reveal, unmask
from model.denoiser import Denoiser
from model.dist import Log
from model.draw import Warp
from model.grpo import Settings, imitate, soften, train
from model.masks import Layout
from model.muon import schedule
from model.state import begin_states, load_state, save_state
from report import measure

NUMBERS = 5         # the stream of uniform numbers; opdlm.py has 1 to 4
STATE = "state.safetensors"
LEAST = 12          # tokens of a prompt


def valid(text: opdlm.Text, tokenizer) -> Tensor:
    """(B,) 1 for a story that is finished and breaks no law."""
    ends = [int(keep.nonzero()[-1]) for keep in text.kept]
    told = [row[:end + 1].tolist() for row, end in zip(text.tokens, ends)]
    return torch.tensor([float(ids[-1] == tokenizer.eot and toy.check(tokenizer.decode(ids)) is None) for ids in told])


def room(length: int) -> int:
    """Tokens of a response, so that it fits behind any prompt."""
    return length - LEAST - 7


def likeness(text: opdlm.Text, teacher) -> tuple[Tensor, Tensor]:
    """(B,) twice: nats a token under the teacher, and the share of different pairs of neighbours."""
    nats = (measure.nats_of(teacher, text) / text.kept.sum(1)).float().cpu()
    said = [row[keep].tolist() for row, keep in zip(text.tokens.cpu(), text.kept.cpu())]
    return nats, torch.tensor([len(set(zip(ids, ids[1:]))) / max(len(ids) - 1, 1) for ids in said])


def fluent(text: opdlm.Text, teacher, most: float, least: float) -> Tensor:
    """(B,) 1 for a text of at most so many nats a token, with at least so many different pairs."""
    nats, pairs = likeness(text, teacher)
    return ((nats <= most) & (pairs >= least)).float()


def writer(student, layout: Layout, data: Callable, settings: Settings, seed: int, eot: int) -> Callable:
    """write(rule, update, G): G texts after each of an update's prompts, LEAST and up to 7 more tokens of training
    stories: of shorter ones many are the same."""
    def write(rule, update: int, count: int) -> opdlm.Text:
        stories = data(range(update * settings.prompts, (update + 1) * settings.prompts))
        P = LEAST + int(opdlm.uniforms(seed, NUMBERS, range(update, update + 1), (1,)) * 8)
        prompt = stories[:, :P].repeat_interleave(count, 0)
        first = settings.prompts * (update * (settings.group + 1) + (count != settings.group) * settings.group)
        u = opdlm.uniforms(seed + 1, NUMBERS, range(first, first + len(prompt)),
                           (P + settings.length, rule.numbers(layout.block))).to(prompt.device)
        return opdlm.rollout(Denoiser(student, layout), prompt, settings.length, rule, u, eot, Warp(temperature=0))
    return write


def worth(corpus: Corpus, teacher, write: Callable) -> Callable:
    """What a text is worth, as above."""
    if corpus.name == "toy":
        return partial(valid, tokenizer=corpus.tokenizer)
    nats, pairs = likeness(write(reveal.parse("static:1"), 0, 4), teacher)
    return partial(fluent, teacher=teacher, most=nats.quantile(0.75).item(), least=pairs.quantile(0.05).item())


def learn(student, layout: Layout, teacher, corpus: Corpus, data: Callable, settings: Settings,
          until: tuple[int, int, int], seed: int, out: Path, header: dict, resume: bool,
          begin: tuple[unmask.Policy, int] | None = None, every: int = 20) -> None:
    """Leaves the policy in out/policy, the log beside it; with `resume` goes on from where that stopped. `until`: the
    updates after which it has imitated, hurried, and learned what its alpha asks for; `begin`: a policy, and the update
    at which it goes on."""
    policy, first = begin or (unmask.Policy(unmask.PolicyConfig(layout.block)), 0)
    if not begin:
        policy.init_weights(torch.Generator().manual_seed(seed))
    state, log = out / "policy" / STATE, Log(out / "policy.jsonl", header, resume)
    write, optimizer = writer(student, layout, data, settings, seed, corpus.tokenizer.eot), adam(policy, settings.rate)
    noted = load_state(state, policy, optimizer, header) if resume else begin_states(state, header)
    done, good, alike = max(noted["step"], first), worth(corpus, teacher, write), 0
    for phase, how, updates, peak in phases(settings, until):
        left = range(max(done, updates.start), updates.stop)
        if left and left.start == updates.start:
            optimizer = adam(policy, peak)                  # gradients of the other phase were of other sizes
            soften(policy, settings.softened if updates.start == until[0] > 0 else 1)
        for record in phase(policy, write, good, how, optimizer, left, rates(optimizer, peak, updates)):
            step, alike = record["step"], alike + 1 if record.get("alike") == 1 else 0
            log.step({"phase": phase.__name__, "alpha": how.alpha, **record}, until[-1], said(record))
            if step % every == 0 or step == updates.stop:
                unmask.save(out / "policy", policy)
                save_state(state, policy, optimizer, noted | {"step": step})
            if alike == 20:
                return print("20 updates in which all texts of each group were worth the same: nothing can be learnt "
                             f"from them; their quality is {record['quality']:.2f}, take a better student, or another "
                             "--alpha")


def phases(settings: Settings, until: tuple[int, int, int]) -> list[tuple]:
    """What is done, how, in which updates, and up to which rate."""
    hurry, rate = replace(settings, alpha=max(settings.haste, settings.alpha)), settings.rate / (6 if until[0] else 1)
    return [(imitate, settings, range(until[0]), settings.rate), (train, hurry, range(*until[:2]), rate),
            (train, settings, range(*until[1:]), rate)]


def adam(policy: unmask.Policy, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.1)


def rates(optimizer, peak: float, updates: range) -> Callable:
    """Sets the rate of one of these updates: up to a peak, then down by a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = peak
    rate = schedule(optimizer, "cosine", max(len(updates), 1))
    return lambda update: rate(update - updates.start)


def said(record: dict) -> str:
    same = f" | groups alike {record['alike']:.2f}" if "alike" in record else ""
    return f"reward {record['reward']:.3f} | quality {record['quality']:.2f} | {record['nfe']:.1f} steps{same}"
