"""Numbers about a run: held-out likelihood, generated text, cost, FLOPs, and facts about the machine.

    val_nats            nats/token of held-out stories; the student predicts each block left to right, one
                        token at a time
    bits_per_byte       the same in bits per byte of text: comparable across vocabularies
    gen_nats            nats/token of generated text under the frozen AR teacher
    distinct2           share of distinct pairs among all pairs of neighbouring generated tokens
    entropy             nats, of the distribution of single generated tokens
    valid               share of generated stories that break no rule (story world only)
    tok_per_fwd         response tokens per forward pass: prefill, denoising and commits all count
    positions_per_tok   positions processed per response token
    tok_s               response tokens per second
"""
import math
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import opdlm
from decoding.sampling import is_end
from model.masks import Layout
from training import dist

MAX_LOGITS = 2 ** 27    # numbers in the logits of a pass; with large vocabularies it reads fewer rows

# 1. held-out likelihood ---------------------------------------------------------------------------

def held_out(stream: np.ndarray, starts: np.ndarray, count: int, length: int,
             separator: int = 1) -> list[Tensor]:
    """The first `count` stories of a token stream, each from its end-of-text to the next, as ids.

    `starts` holds the positions of the end-of-text tokens that begin a story. Longer stories are cut to
    `length` ids. If there are fewer than `count` stories, the windows that follow in the long ones are added,
    up to `count` in all. The first token of such a window is the last one of the window before it: a first
    token is context and is not scored, so each token is scored once.

    `separator` is the number of ids between two stories: 2 if an end-of-text does not begin the next story.
    """
    ends = [*starts[1:count + 1], len(stream) - 1]
    first = []              # (begin, stop) of the first window of each story
    following = []          # the same of all other windows
    for begin, end in zip(starts[:count], ends):
        last = end + 1 - separator      # the story's own end-of-text
        stop = min(last + 1, begin + length)
        first.append((begin, stop))
        while stop <= last and len(following) < count:
            begin = stop - 1
            stop = min(last + 1, begin + length)
            following.append((begin, stop))
    stories = []
    for begin, stop in (first + following)[:count]:
        ids = stream[begin:stop].astype(np.int64)
        stories.append(torch.from_numpy(ids))
    return stories


def padded(rows: list[Tensor], fill: int) -> Tensor:
    """(B, T): rows of different lengths, padded on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


def complete_last_block(tokens: Tensor, block: int, context: int, fill: int) -> Tensor:
    """(B, T): padded to whole blocks after the first token, as far as the context allows.

    Otherwise the number of masks in the last block would tell the model where the story ends.
    """
    T = tokens.size(1)
    missing = -(T - 1) % block
    room = context - T
    padding = max(0, min(missing, room))
    return F.pad(tokens, (0, padding), value=fill)


@torch.no_grad()
def story_nats(net, stories: list[Tensor], layout: Layout, eot: int, batch: int = 32) -> Tensor:
    """(stories,) nats of each story given its first token: the chain rule, from left to right.

    One pass per slot j of a block scores the j-th token of every block. The tokens before it in its block are
    revealed, the others masked.
    """
    device = net.wte.weight.device
    by_length = sorted(range(len(stories)), key=lambda i: len(stories[i]))
    nats = torch.zeros(len(stories))
    longest = max(map(len, stories), default=1)
    read_per_row = -(-longest // layout.block)                   # positions of one pass
    batch = min(batch, rows_at_once(net, read_per_row))
    for i in range(0, len(stories), batch):
        story_ids = by_length[i:i + batch]
        tokens = padded([stories[k] for k in story_ids], eot)
        tokens = complete_last_block(tokens, layout.block, net.config.context, eot).to(device)   # (B, T)
        lengths = torch.tensor([len(stories[k]) for k in story_ids], device=device)
        position = torch.arange(1, tokens.size(1), device=device)  # (R,) positions of the response
        slot = (position - 1) % layout.block  # (R,) position within the block
        in_story = position < lengths[:, None]                   # (B, R)
        for j in range(layout.block):
            noisy = tokens[:, 1:].masked_fill(slot >= j, net.mask_id)
            scored = (slot == j) & in_story
            rows, column = scored.nonzero(as_tuple=True)         # (N,) each
            if len(rows) == 0:
                continue
            scored_position = column + 1
            logits = opdlm.student_logits(net, tokens, noisy, 1, layout, rows, scored_position)
            log_probs = logits.float().log_softmax(-1)           # (N, V)
            true_token = tokens[rows, scored_position]
            token_log_probs = log_probs.gather(1, true_token[:, None])[:, 0]
            row_log_probs = torch.zeros(len(story_ids)).index_add(0, rows.cpu(), token_log_probs.cpu())
            nats[story_ids] -= row_log_probs
    return nats


def rows_at_once(net, num_read: int) -> int:
    """How many rows to read in one pass, each with the logits of `num_read` positions: at least one."""
    return max(1, MAX_LOGITS // (num_read * net.config.vocab))


def likelihood(net, stories: list[Tensor], layout: Layout, tokenizer) -> dict:
    """val_nats and bits_per_byte. An end-of-text counts as a token of the story, but has no bytes.

    The first token of a story is not scored, nor are its bytes counted. Every process scores its share of the
    stories; all must call.
    """
    def nats_of_share(share: list[Tensor]) -> list[float]:
        return story_nats(net, share, layout, tokenizer.eot).tolist()

    nats = dist.map_shared(nats_of_share, stories)
    total_nats = torch.tensor(nats).sum().item()
    total_tokens = sum(len(story) - 1 for story in stories)
    total_bytes = 0
    for story in stories:
        total_bytes += len(tokenizer.decode(story.tolist()).encode())
        total_bytes -= len(tokenizer.decode(story[:1].tolist()).encode())
    return {
        "val_nats": total_nats / total_tokens,
        "bits_per_byte": total_nats / math.log(2) / total_bytes,
    }


# 2. generated text --------------------------------------------------------------------------------
# `texts` is a list of batches: (Rollout, (B,) prompt lengths).

def text_metrics(teacher, texts: list, seconds: float, tokenizer, judge: Callable | None) -> dict:
    """All metrics of generated texts that took `seconds`.

    `judge(story)` gives for each sentence of a story the set of laws that it breaks (data/story_world.py).
    Every process lets the teacher read its share of the batches; all must call.
    """
    rollouts = [rollout for rollout, _ in texts]
    responses = []
    for rollout in rollouts:
        responses += response_ids(rollout)
    num_tokens = sum(map(len, responses))
    forwards = sum(rollout.forwards.sum().item() for rollout in rollouts)
    positions = sum(rollout.positions.sum().item() for rollout in rollouts)
    num_bytes = sum(response_bytes(*batch, tokenizer) for batch in texts)
    def read_share(share: list) -> list[tuple[float, int]]:
        results = []
        for rollout in share:
            nats, is_argmax = read_by(teacher, rollout)
            results.append((nats.sum().item(), int(is_argmax.sum())))
        return results

    teacher_nats = 0.0
    num_argmax = 0
    for batch_nats, batch_argmax in dist.map_shared(read_share, rollouts):
        teacher_nats += batch_nats
        num_argmax += batch_argmax
    metrics = {
        "gen_nats": teacher_nats / num_tokens,
        "distinct2": distinct_pairs(responses),
        "entropy": unigram_entropy(responses),
        "agreement": num_argmax / num_tokens,
        "tok_per_fwd": num_tokens / forwards,
        "bytes_per_fwd": num_bytes / forwards,
        "tok_s": num_tokens / seconds,
        "positions_per_tok": positions / num_tokens,
    }
    if judge:
        metrics |= story_scores(whole_stories(texts, tokenizer), judge)
    return metrics


def story_scores(stories: list[tuple[str, bool]], judge: Callable) -> dict:
    """valid, broken and recovery of stories, each given as (text, whether it ended).

    valid       the share of stories that break no law; an unfinished story breaks the plot
    broken      laws broken per story; a law that two sentences break counts twice
    recovery    the share of sentences with a broken law among those after the first such sentence of their
                story, divided by the share among all sentences up to the first one. At 1 errors do not lead
                to further errors. It is left out where no story goes on after an error.
    """
    num_valid = 0
    num_broken = 0
    before = [0, 0]                     # sentences with a broken law, and sentences: up to the first error
    after = [0, 0]                      # the same of the sentences after it
    for text, is_finished in stories:
        laws = judge(text)
        if not is_finished and not any(laws):
            laws = [*laws, {"plot"}]
        num_broken += sum(map(len, laws))
        has_error = [bool(of_sentence) for of_sentence in laws]
        first = has_error.index(True) + 1 if any(has_error) else len(laws)
        num_valid += not any(has_error)
        before[0] += any(has_error)
        before[1] += first
        after[0] += sum(has_error[first:])
        after[1] += len(has_error[first:])
    scores = {"valid": num_valid / len(stories), "broken": num_broken / len(stories)}
    if after[1]:
        rate_before = before[0] / before[1]
        rate_after = after[0] / after[1]
        scores["recovery"] = rate_after / rate_before
    return scores


def response_bytes(rollout: opdlm.Rollout, prompt_lens: Tensor, tokenizer) -> int:
    """The bytes of all responses."""
    total = 0
    rows = zip(rollout.tokens.cpu(), rollout.response_mask.cpu(), prompt_lens)
    for tokens, response_mask, prompt_len in rows:
        prompt = tokens[:prompt_len].tolist()
        text = prompt + tokens[response_mask].tolist()
        total += len(tokenizer.decode(text).encode()) - len(tokenizer.decode(prompt).encode())
    return total


def response_ids(rollout: opdlm.Rollout) -> list[list[int]]:
    """The ids of each row's response."""
    rows = zip(rollout.tokens.cpu(), rollout.response_mask.cpu())
    return [tokens[response_mask].tolist() for tokens, response_mask in rows]


def distinct_pairs(responses: list[list[int]]) -> float:
    """The number of distinct pairs of neighbouring tokens, divided by the number of all pairs."""
    pairs = []
    for ids in responses:
        pairs += zip(ids, ids[1:])
    return len(set(pairs)) / max(len(pairs), 1)


def unigram_entropy(responses: list[list[int]]) -> float:
    """Entropy in nats of the distribution of single tokens."""
    ids = [token for response in responses for token in response]
    _, counts = np.unique(ids, return_counts=True)
    share = counts / len(ids)
    return float(-(share * np.log(share)).sum())


def whole_stories(texts: list, tokenizer) -> list[tuple[str, bool]]:
    """Of each text: the story, prompt included, and whether it ended with end-of-text."""
    found = []
    for rollout, prompt_lens in texts:
        responses = response_ids(rollout)
        for tokens, prompt_len, response in zip(rollout.tokens.cpu(), prompt_lens, responses):
            story = tokenizer.decode(tokens[:prompt_len].tolist() + response)
            is_finished = bool(is_end(torch.tensor(response[-1]), tokenizer.ends))
            found.append((story, is_finished))
    return found


def nats_of(teacher, rollout: opdlm.Rollout) -> Tensor:
    """(B,) nats of each response under the AR teacher, in float64."""
    return read_by(teacher, rollout)[0]


@torch.no_grad()
def read_by(teacher, rollout: opdlm.Rollout) -> tuple[Tensor, Tensor]:
    """(B,) nats of each response under the AR teacher, in float64; (N,) bool of each response token.

    The second says whether a token is the teacher's most likely one, given the text before it.
    """
    device = teacher.wte.weight.device
    T = rollout.tokens.size(1)
    B = rows_at_once(teacher, T)
    nats = []
    is_argmax = []
    for tokens, mask in zip(rollout.tokens.split(B), rollout.response_mask.split(B)):
        tokens = tokens.to(device)                               # (B, T)
        rows, position = mask.to(device).nonzero(as_tuple=True)  # (N,) each
        read = rows * T + position - 1  # an AR model's logits at i - 1 predict token i
        log_probs = teacher(tokens, read=read).float().log_softmax(-1)       # (N, V)
        token = tokens[rows, position]
        token_nats = -log_probs.gather(1, token[:, None])[:, 0]
        zeros = torch.zeros(len(tokens), dtype=torch.float64, device=device)
        nats.append(zeros.index_add(0, rows, token_nats.double()))
        is_argmax.append(log_probs.argmax(-1) == token)
    return torch.cat(nats), torch.cat(is_argmax)


# 3. FLOPs -----------------------------------------------------------------------------------------
# One multiply-add counts as 2.

def body_flops(config, keys: float) -> float:
    """FLOPs of one position's forward pass through the blocks, where it attends to `keys` positions."""
    matrices = 2 * config.matrices
    attention = 4 * keys * config.heads * config.head_size
    return config.layers * (matrices + attention)


def head_flops(config) -> float:
    """FLOPs of one position's logits."""
    return 2 * config.width * config.vocab


def distill_flops(config, record: dict) -> float:
    """The FLOPs that a distillation step needs at least, from its record in the log.

    A forward and a backward pass together count as three forward passes. Each response token takes one
    position of the rollout, if there was one, one of the teacher and two of the student (forward and
    backward). The head is applied once per generated token, and per position in the loss by the teacher and
    by the student (forward and backward).
    """
    body = body_flops(config, record["len"] / 2)
    head = head_flops(config)
    generated = record["tokens"] * (record["positions"] > 0)     # 0 if the text was not generated
    body_positions = generated + (1 + 2 * 3) * record["tokens"]
    head_positions = generated + (1 + 3) * record["loss_positions"]
    return body * body_positions + head * head_positions


# 4. the machine -----------------------------------------------------------------------------------

def facts(device: torch.device) -> dict:
    """What a number depends on besides the settings: commit, versions, device, threads, processes."""
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name()
    else:
        device_name = platform.processor() or platform.machine()
    return {
        "commit": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({device_name})",
        "threads": torch.get_num_threads(),
        "processes": dist.count(),
    }


def commit() -> str:
    """The commit of this repository, with "-dirty" if files were changed; "unknown" without git."""
    if not shutil.which("git"):
        return "unknown"
    command = ["git", "describe", "--always", "--dirty"]
    folder = Path(__file__).parent
    git = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return git.stdout.strip() or "unknown"


def matmul_rate(device, size: int = 1024, dtype: torch.dtype = torch.float32) -> float:
    """Measured FLOP/s of a product of two `size` x `size` matrices of `dtype`: the median of five."""
    a = torch.randn(size, size, device=device, dtype=dtype)

    def measure() -> float:
        began = time.perf_counter()
        product = a @ a
        product[0, 0].item()                                     # waits for the device
        return time.perf_counter() - began

    measure()                                                    # warm-up
    seconds = sorted(measure() for _ in range(5))
    return 2 * size ** 3 / seconds[2]
