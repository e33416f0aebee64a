"""An unmasking policy learned for a student (model/grpo.py): prompts, what a text is worth, records, what is saved.

A text is worth 1 or 0. Of the story world by its checker, which is what this method needs: a reward that can't be
argued with. Of other text by the teacher: 1 if it is as likely to him as three in four of those that the student writes
one token a step, and is no duller; the second since dull text is likely.
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import opdlm
import train_tiny
from data import story_world, tokenizer
from data.corpus import open_corpus
from data.tinystories import Corpus
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig
from model import checkpoint
from model.masks import Layout
from report import metrics
from training import cli, dist
from training.log import Log
from training.optim import lr_schedule
from training.resume import check_writable, load_state, save_state, start_progress
from unmasking import grpo
from unmasking import policy as unmask
from unmasking.grpo import Settings, imitate, soften, train

NUMBERS = 5         # the stream of uniform numbers; opdlm.py has 1 to 4
STATE = "state.safetensors"
LEAST = 12          # tokens of a prompt


def valid(text: opdlm.Rollout, tokenizer) -> Tensor:
    """(B,) 1 for a story that is finished and breaks no law."""
    ends = [int(keep.nonzero()[-1]) for keep in text.response_mask]
    told = [row[:end + 1].tolist() for row, end in zip(text.tokens, ends)]
    return torch.tensor([float(ids[-1] == tokenizer.eot and story_world.check(tokenizer.decode(ids)) is None) for ids in told])


def room(length: int) -> int:
    """Tokens of a response, so that it fits behind any prompt."""
    return length - LEAST - 7


def likeness(text: opdlm.Rollout, teacher) -> tuple[Tensor, Tensor]:
    """(B,) twice: nats a token under the teacher, and the share of different pairs of neighbours."""
    nats = (metrics.nats_of(teacher, text) / text.response_mask.sum(1)).float().cpu()
    said = [row[keep].tolist() for row, keep in zip(text.tokens.cpu(), text.response_mask.cpu())]
    return nats, torch.tensor([len(set(zip(ids, ids[1:]))) / max(len(ids) - 1, 1) for ids in said])


def fluent(text: opdlm.Rollout, teacher, most: float, least: float) -> Tensor:
    """(B,) 1 for a text of at most so many nats a token, with at least so many different pairs."""
    nats, pairs = likeness(text, teacher)
    return ((nats <= most) & (pairs >= least)).float()


def writer(student, layout: Layout, data: Callable, settings: Settings, seed: int, eot: int) -> Callable:
    """write(rule, update, G): G texts after each of an update's prompts, LEAST and up to 7 more tokens of training
    stories: of shorter ones many are the same."""
    def write(rule, update: int, count: int) -> opdlm.Rollout:
        stories = data(range(update * settings.prompts, (update + 1) * settings.prompts))
        P = LEAST + int(opdlm.uniforms(seed, NUMBERS, range(update, update + 1), (1,)) * 8)
        prompt = stories[:, :P].repeat_interleave(count, 0)
        first = settings.prompts * (update * (settings.group + 1) + (count != settings.group) * settings.group)
        u = opdlm.uniforms(seed + 1, NUMBERS, range(first, first + len(prompt)),
                           (P + settings.length, rule.numbers(layout.block))).to(prompt.device)
        return opdlm.rollout(Denoiser(student, layout), prompt, settings.length, rule, u, eot, SamplingConfig(temperature=0))
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
    noted = load_state(state, policy, optimizer, header) if resume else start_progress(state, header)
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
    hurry, rate = replace(settings, alpha=max(settings.warmup_alpha, settings.alpha)), settings.rate / (6 if until[0] else 1)
    return [(imitate, settings, range(until[0]), settings.rate), (train, hurry, range(*until[:2]), rate),
            (train, settings, range(*until[1:]), rate)]


def adam(policy: unmask.Policy, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.1)


def rates(optimizer, peak: float, updates: range) -> Callable:
    """Sets the rate of one of these updates: up to a peak, then down by a cosine."""
    for group in optimizer.param_groups:
        group["lr"] = peak
    rate = lr_schedule(optimizer, "cosine", max(len(updates), 1))
    return lambda update: rate(update - updates.start)


def said(record: dict) -> str:
    same = f" | groups alike {record['alike']:.2f}" if "alike" in record else ""
    return f"reward {record['reward']:.3f} | quality {record['quality']:.2f} | {record['nfe']:.1f} steps{same}"


# the command ----------------------------------------------------------------------------------------------

@dataclass
class Config:
    ckpt: str = "out/tiny"      # the student: a run's folder, a checkpoint, or hf:NAME[@REVISION]
    out: str | None = None      # the policy is written to OUT/policy; default: the run's folder
    data: str | None = None     # prompts: tinystories, toy, or a text file; default: tinystories
    val_data: str | None = None     # held-out text file; default: every 20th text of --data
    alpha: float = 1.0          # weight of speed in the reward (paper: 10 to 0)
    expert: str | None = None   # rule to imitate at first; default: the student's own, for whole texts leftmost:0.95
    judge: str | None = None    # AR model that scores text, not needed on toy; default: the run's ar folder
    updates: int | None = None  # a third imitate, a third train at alpha 10; default: 450, for whole texts 330
    lr: float | None = None     # peak learning rate; default: 0.003, for whole texts 0.002
    length: int | None = None   # longest text, tokens; default: the student's context
    seed: int = 0               # random seed
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"      # auto: cuda, else mps, else cpu
    resume: bool = False        # continue the training in --out


def main(argv: list[str]) -> None:
    config = cli.parse(Config, argv, __doc__)
    device = dist.start(config.device)
    run = checkpoint.fetch(config.ckpt)
    folder = run / "opdlm" if (run / "opdlm").is_dir() else run
    student, layout = checkpoint.load(folder)
    if layout is None:
        raise ValueError(f"--ckpt={config.ckpt} is an AR model: convert it first, with train_tiny.py")
    tok = tokenizer.load(folder)
    corpus = open_corpus(config.data, config.val_data, tok.vocab_size, tok)
    teacher = None if corpus.name == "toy" else load_judge(config.judge, run).to(device)
    length = min(config.length or student.config.context, student.config.context)
    if room(length) < 1:
        raise ValueError(f"--length={length}: prompts have up to {length - room(length)} tokens, so use a longer one")
    whole_text = layout.block >= length
    expert = choose_expert(config.expert, folder, whole_text)
    how = dict(grpo.OF_WHOLE_TEXTS if whole_text else grpo.IN_BLOCKS)
    if config.lr:
        how["rate"] = config.lr
    settings = Settings(room(length), config.alpha, expert=expert, **how)
    updates = config.updates or (330 if whole_text else 450)
    data = partial(train_tiny.get_batch, corpus, length=length, seed=config.seed, device=device)
    until = (updates // 3, updates * 2 // 3, updates)
    out = check_writable(Path(config.out or run))
    student = student.to(device).requires_grad_(False)
    learn(student, layout, teacher, corpus, data, settings, until, config.seed, out, asdict(config), config.resume)


def choose_expert(name: str | None, folder: Path, whole_text: bool) -> reveal.Rule:
    """The rule that the policy imitates at first."""
    default = "leftmost:0.95" if whole_text else checkpoint.read_config(folder)["reveal"]
    expert = reveal.parse(name or default)
    if expert.rolls or expert.confidence is not reveal.largest:
        raise ValueError(f"--expert={expert} cannot be imitated, since it is random or uses another confidence than the "
                         "largest probability: use leftmost:P, threshold:P, static:COUNT or factor:F")
    return expert


def load_judge(name: str | None, run: Path):
    """The AR model that scores text: the one named, or the run's own."""
    if name is None and not (run / "ar").is_dir():
        raise ValueError(f"{run} has no ar folder, and rewards on text need an AR model: name the one that the student "
                         "was made from, --judge=NAME")
    return checkpoint.load(checkpoint.ar_folder(name or str(run / "ar")))[0]


if __name__ == "__main__":
    dist.end(cli.run(main))
