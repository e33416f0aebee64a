"""Train an unmasking policy for a diffusion language model (arXiv 2512.09106).

    python -m unmasking.train --ckpt=out/tiny --data=toy          a policy for the student of a run
    python -m unmasking.train --ckpt=out/tiny --alpha=3 --out=out/fast      faster text, in another folder
    python sample.py --ckpt=out/tiny --reveal=policy:out/tiny/policy        text with that policy

Phases, each a third of the updates: imitation of a heuristic (--expert), GRPO with a large alpha, GRPO with
--alpha. The reward is the quality of a text, 1 or 0, times a factor for speed. In the story world the quality
is 1 if the story is valid. Other text is scored by an AR model (--judge) and compared with text that the
student generates one token per step: the quality is 1 if the NLL per token is not above its 75th percentile
there, and distinct-2 not below its 5th percentile. Distinct-2 excludes repetitive text with a low NLL.

Results in --out: policy/ (weights, and the state for --resume) and policy.jsonl (one record per update).
"""
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import opdlm
from data import story_world, tokenizer
from data.corpus import Corpus, open_corpus
from decoding import reveal
from decoding.denoiser import Denoiser
from decoding.sampling import MAX_SEED, SamplingConfig
from model import checkpoint
from model.masks import Layout
from report import metrics
from report.generate import check_weights
from training import cli, dist
from training.flags import Range, check_ranges, expand_home
from training.lock import FolderLock
from training.log import Log
from training.optim import lr_schedule
from training.resume import (
    SigtermFlag,
    check_results,
    check_writable,
    latest_state,
    load_state,
    save_state,
    start_progress,
)
from unmasking.grpo import BLOCK_SETTINGS, FULL_SEQUENCE_SETTINGS, Settings, imitate, scale_logits, train
from unmasking.policy import Policy, PolicyConfig, save_policy

STATE = "state.safetensors"     # in --out/policy: everything that --resume needs
SAVE_EVERY = 20                 # updates
UNMASKING = 5                   # stream of random numbers; opdlm.py has streams 1 to 4
MIN_PROMPT = 12                 # tokens of a prompt; of shorter ones many would be the same
MAX_PROMPT = 19
RANGES = {
    "alpha": Range(0.0, 1000.0),
    "updates": Range(1, 10**9),
    "lr": Range(0.0, 1.0, above=True),
    "seed": Range(0, MAX_SEED - 1),         # the seed of generated texts is one more
}
MAX_TIED_UPDATES = 20           # training stops after as many updates in a row without differences in reward


@dataclass
class Config:
    # Student and output
    ckpt: str = "out/tiny"      # student: a run's folder, a checkpoint, or hf:NAME[@REVISION]
    out: str | None = None      # folder for policy/ and policy.jsonl; default: --ckpt, if it is a folder
    resume: bool = False        # continue the training in --out
    # Data
    data: str | None = None     # prompts: tinystories, toy, or a text file; default: tinystories
    val_data: str | None = None     # held-out text file; default: every 20th text of --data
    length: int | None = None   # prompt and response, tokens; default: the student's context
    # Method
    alpha: float = 1.0          # weight of speed in the reward
    expert: str | None = None   # rule to imitate; default: the student's, leftmost:0.95 if full-sequence
    judge: str | None = None    # AR model that scores text, unused on toy; default: ar/ in --ckpt
    # Optimization
    updates: int | None = None  # updates of all phases together; default: 450, full-sequence 330
    lr: float | None = None     # peak learning rate; default: 0.003, full-sequence 0.002
    # Machine
    seed: int = 0               # random seed of everything
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"      # auto: cuda, else mps, else cpu

# 1. the quality of a text ---------------------------------------------------------------------------------

def valid(text: opdlm.Rollout, tokenizer) -> Tensor:
    """(B,) 1 for a story that is finished and breaks no law of the story world, else 0."""
    scores = []
    for tokens, response_mask in zip(text.tokens, text.response_mask):
        last = int(response_mask.nonzero()[-1])
        ids = tokens[:last + 1].tolist()                         # the prompt is part of the story
        is_finished = ids[-1] in {*tokenizer.eos, tokenizer.bos}
        scores.append(float(is_finished and story_world.check(tokenizer.decode(ids)) is None))
    return torch.tensor(scores)


def nll_and_distinct2(text: opdlm.Rollout, teacher) -> tuple[Tensor, Tensor]:
    """(B,) each: nats per token under the AR model, and the share of distinct pairs of adjacent tokens."""
    num_tokens = text.response_mask.sum(1)
    nll = (metrics.nats_of(teacher, text) / num_tokens).float().cpu()
    distinct2 = []
    for tokens, response_mask in zip(text.tokens.cpu(), text.response_mask.cpu()):
        ids = tokens[response_mask].tolist()
        pairs = set(zip(ids, ids[1:]))
        distinct2.append(len(pairs) / max(len(ids) - 1, 1))
    return nll, torch.tensor(distinct2)


def fluent(text: opdlm.Rollout, teacher, max_nll: float, min_distinct2: float) -> Tensor:
    """(B,) 1 for a text with an NLL per token of at most `max_nll` and at least this distinct-2, else 0."""
    nll, distinct2 = nll_and_distinct2(text, teacher)
    return ((nll <= max_nll) & (distinct2 >= min_distinct2)).float()


def make_quality(corpus: Corpus, teacher, generate: Callable) -> Callable:
    """The quality function for a corpus, as described at the top of this file: Rollout -> (B,)."""
    if corpus.name == "toy":
        return partial(valid, tokenizer=corpus.tokenizer)
    text = generate(reveal.parse("static:1"), update=0, count=4)
    nll, distinct2 = nll_and_distinct2(text, teacher)
    max_nll = nll.quantile(0.75).item()
    min_distinct2 = distinct2.quantile(0.05).item()
    return partial(fluent, teacher=teacher, max_nll=max_nll, min_distinct2=min_distinct2)


# 2. prompts and texts -------------------------------------------------------------------------------------

def get_stories(corpus: Corpus, row_ids: range, length: int, seed: int, device) -> Tensor:
    """(B, length): the windows of training text that belong to these global row numbers."""
    u = opdlm.uniforms(seed, opdlm.DATA, row_ids, (1,))[:, 0]
    tokens = corpus.windows(length)(u.numpy())
    return torch.from_numpy(tokens).to(device)


def max_response(length: int) -> int:
    """Tokens of a response that fits into `length` after any prompt."""
    return length - MAX_PROMPT


def make_generator(student, layout: Layout, stories: Callable, settings: Settings, seed: int,
                   eot: int | tuple[int, ...]) -> Callable:
    """generate(rule, update, count): the Rollout of `count` texts after each prompt of an update.

    `stories(row_ids)` returns training texts (B, T). Prompts are their first MIN_PROMPT to MAX_PROMPT tokens.
    """
    def generate(rule, update: int, count: int) -> opdlm.Rollout:
        row_ids = range(update * settings.prompts, (update + 1) * settings.prompts)
        texts = stories(row_ids)                                            # (prompts, T)
        u_prompt = opdlm.uniforms(seed, UNMASKING, range(update, update + 1), (1,))
        P = MIN_PROMPT + int(u_prompt * (MAX_PROMPT - MIN_PROMPT + 1))      # one prompt length per update
        prompt = texts[:, :P].repeat_interleave(count, 0)                   # (B, P), B = prompts * count

        # Every text of an update has random numbers of its own: first the policy's, then the expert's.
        first = update * settings.prompts * (settings.group_size + 1)
        if count != settings.group_size:
            first += settings.prompts * settings.group_size
        row_ids = range(first, first + len(prompt))
        S = rule.numbers(layout.block)
        u = opdlm.uniforms(seed + 1, UNMASKING, row_ids, (P + settings.length, S)).to(prompt.device)
        denoiser = Denoiser(student, layout)
        greedy = SamplingConfig(temperature=0)
        return opdlm.rollout(denoiser, prompt, settings.length, rule, u, eot, greedy)
    return generate


# 3. training ----------------------------------------------------------------------------------------------

@dataclass
class Phase:
    """A part of the training."""
    method: Callable        # imitate or train of unmasking/grpo.py
    settings: Settings
    updates: range
    lr: float               # peak learning rate


def make_phases(settings: Settings, ends: tuple[int, int, int]) -> list[Phase]:
    """The three phases, and after how many updates each ends."""
    imitation_end, warmup_end, end = ends
    warmup = replace(settings, alpha=max(settings.warmup_alpha, settings.alpha))
    lr = settings.lr / 6 if imitation_end else settings.lr       # of GRPO
    return [
        Phase(imitate, settings, range(imitation_end), settings.lr),
        Phase(train, warmup, range(imitation_end, warmup_end), lr),
        Phase(train, settings, range(warmup_end, end), lr),
    ]


def train_policy(student, layout: Layout, teacher, corpus: Corpus, stories: Callable, settings: Settings,
                 ends: tuple[int, int, int], seed: int, out: Path, header: dict, resume: bool,
                 start: tuple[Policy, int] | None = None) -> None:
    """Train a policy for a student. Writes out/policy and out/policy.jsonl, whose first record is `header`.

    `ends`: the numbers of updates after which imitation, GRPO with warmup_alpha and GRPO with alpha end.
    `resume` continues the run in `out`. `start` is a policy and the number of updates that it has done;
    without it, a new policy is trained.
    """
    if start is None:
        generator = torch.Generator().manual_seed(seed)
        policy = Policy(PolicyConfig(layout.block)).init_weights(generator)
        first = 0
    else:
        policy, first = start
    optimizer = make_adamw(policy, settings.lr)
    log = Log(out / "policy.jsonl", header, resume)
    state_file = out / "policy" / STATE
    if resume:
        progress = load_state(state_file, policy, optimizer, header)
    else:
        progress = start_progress(state_file, header)
    done = max(progress["step"], first)
    generate = make_generator(student, layout, stories, settings, seed, corpus.tokenizer.ends)
    quality = make_quality(corpus, teacher, generate)

    imitation_end, _, end = ends
    tied_updates = 0
    for phase in make_phases(settings, ends):
        updates = range(max(done, phase.updates.start), phase.updates.stop)
        if not updates:
            continue
        if updates.start == phase.updates.start:
            optimizer = make_adamw(policy, phase.lr)             # each phase has gradients of another scale
            if imitation_end > 0 and updates.start == imitation_end:
                scale_logits(policy, settings.logit_scale_after_imitation)
        set_lr = make_lr_schedule(optimizer, phase)
        name = phase.method.__name__
        for record in phase.method(policy, generate, quality, phase.settings, optimizer, updates, set_lr):
            step = record["step"]
            log.step({"phase": name, "alpha": phase.settings.alpha, **record}, end, describe(record))
            if step % SAVE_EVERY == 0 or step == phase.updates.stop:
                save_policy(out / "policy", policy)
                save_state(state_file, policy, optimizer, {**progress, "step": step})
            all_tied = record.get("tied_groups") == 1
            tied_updates = tied_updates + 1 if all_tied else 0
            if tied_updates == MAX_TIED_UPDATES:
                print(f"stopped: in {MAX_TIED_UPDATES} updates in a row all texts of each group had the same "
                      "reward, so there is nothing to learn from them; their quality is "
                      f"{record['quality']:.2f}: use a better student or another --alpha")
                return


def make_adamw(policy: Policy, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.1)


def make_lr_schedule(optimizer, phase: Phase) -> Callable:
    """set_lr(update): warm-up to the peak learning rate of a phase, then a cosine decay to its end."""
    for group in optimizer.param_groups:
        group["lr"] = phase.lr
    set_lr = lr_schedule(optimizer, "cosine", len(phase.updates))
    return lambda update: set_lr(update - phase.updates.start)


def describe(record: dict) -> str:
    """The log line of an update."""
    line = f"reward {record['reward']:.3f} | quality {record['quality']:.2f} | {record['nfe']:.1f} steps"
    if "tied_groups" in record:
        line += f" | tied groups {record['tied_groups']:.2f}"
    return line


# 4. the command -------------------------------------------------------------------------------------------

def main(argv: list[str]) -> int:
    config = cli.parse(Config, argv, __doc__)
    config = expand_home(config, "ckpt", "out", "data", "val_data", "expert", "judge")
    check_ranges(config, RANGES)
    if config.out is None and config.ckpt.startswith("hf:"):
        raise ValueError(f"--ckpt={config.ckpt}: expected --out=FOLDER beside it, since the policy is not "
                         "written into the cache of the hub")
    device = dist.start(config.device)

    # 1. the student
    run = checkpoint.fetch(config.ckpt)
    folder = run / "opdlm" if (run / "opdlm").is_dir() else run
    student, layout = checkpoint.load(folder)
    if layout is None:
        raise ValueError(f"--ckpt={config.ckpt} is an AR model: convert it first, with train_tiny.py")
    check_weights(student, folder)
    student = student.to(device).requires_grad_(False)
    out, length = check_options(config, run, student.config.context)
    is_full_sequence = layout.block >= length

    # 2. prompts, and the AR model that scores texts
    tok = tokenizer.load(folder)
    corpus = open_corpus(config.data, config.val_data, tok.vocab_size, tok)
    stories = partial(get_stories, corpus, length=length, seed=config.seed, device=device)
    teacher = None
    if corpus.name != "toy":
        teacher = load_judge(config.judge, run).to(device)

    # 3. settings
    expert = choose_expert(config.expert, folder, is_full_sequence)
    tuned = FULL_SEQUENCE_SETTINGS if is_full_sequence else BLOCK_SETTINGS
    settings = Settings(max_response(length), config.alpha, expert=expert, **tuned)
    if config.lr is not None:
        settings = replace(settings, lr=config.lr)
    updates = config.updates
    if updates is None:
        updates = 330 if is_full_sequence else 450
    ends = (updates // 3, updates * 2 // 3, updates)

    # 4. imitation, GRPO with a large alpha, GRPO with --alpha
    header = {**asdict(config), "resume": None}
    with SigtermFlag() as sigterm, FolderLock(out):
        (out / "policy").mkdir(exist_ok=True)
        train_policy(student, layout, teacher, corpus, stories, settings, ends, config.seed, out, header,
                     config.resume)
    return sigterm.exit_code


def check_options(config: Config, run: Path, context: int) -> tuple[Path, int]:
    """The folder --out and the maximum length. ValueError for values too small, or nothing to resume."""
    length = context if config.length is None else min(config.length, context)
    if max_response(length) < 1:
        raise ValueError(f"--length={length}: too short for prompts of up to {MAX_PROMPT} tokens and a "
                         f"response, use at least {MAX_PROMPT + 1}")
    out = check_writable(Path(config.out or run))
    check_results(out, (), ("policy.jsonl",))
    if config.resume and not latest_state(out / "policy" / STATE):
        raise ValueError(f"nothing to resume in {out}: it has no policy/{STATE}; run without --resume")
    return out, length


def choose_expert(name: str | None, folder: Path, is_full_sequence: bool) -> reveal.Rule:
    """The rule that the policy imitates. ValueError if it needs more than the inputs of a policy."""
    if name is None and not is_full_sequence:
        expert = reveal.parse_saved(checkpoint.read_config(folder), folder / "config.json")
    else:
        expert = reveal.parse(name or "leftmost:0.95")
    if expert.rolls or expert.confidence is not reveal.largest:
        raise ValueError(f"--expert={expert}: cannot be imitated, since it is random or its confidence is "
                         "not the largest probability; use leftmost:P, threshold:P, static:COUNT or factor:F")
    return expert


def load_judge(name: str | None, run: Path):
    """The AR model that scores text: the one named, or the run's own."""
    if name is None and not (run / "ar").is_dir():
        raise ValueError(f"{run} has no ar folder, but text is scored by an AR model: name the one that the "
                         "student was made from, --judge=NAME")
    folder = checkpoint.ar_folder(name or str(run / "ar"))
    judge, _ = checkpoint.load(folder)
    check_weights(judge, folder)
    return judge


if __name__ == "__main__":
    dist.end(cli.run(main))
