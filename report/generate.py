"""Ways to generate text: diffusion with any reveal rule (AR is block size 1), and speculative decoding."""
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

import opdlm
from decoding.denoiser import Denoiser
from decoding.reveal import Rule
from decoding.sampling import SamplingConfig, padding_id
from model.masks import Layout
from report import metrics, trace
from training import dist

MAX_SELF_BLOCK = 64         # of a student that verifies itself: its forward passes have block * block masks
MAX_POSITIONS = 2 ** 15     # of the texts that are generated together, which bounds the memory
PROMPT_LENGTHS = 8      # generate_texts uses this many different prompt lengths in turn


@dataclass
class TextGenerator:
    """A way to generate text; `diffusion_generator` and `speculative_generator` make one."""
    net: torch.nn.Module
    num_random: int         # uniform random numbers per position
    generate: Callable      # (prompt, length, u, eot, prompt_len) -> Rollout
    make_trace: Callable    # (prompt, pieces, order) -> Trace
    num_masks: int = 0      # masks of a forward pass that are not positions of the text

    def __call__(self, prompt: Tensor, length: int, seed: int, row_ids: range, eot: int | tuple,
                 prompt_len: Tensor | None = None) -> opdlm.Rollout:
        """Continue each row of `prompt` (B, P) by up to `length` tokens; `row_ids` key its random numbers."""
        shape = (prompt.size(1) + length, self.num_random)
        u = opdlm.uniforms(seed, 0, row_ids, shape).to(prompt.device)
        return self.generate(prompt, length, u, eot, prompt_len)

    def max_rows(self, num_tokens: int) -> int:
        """How many texts of `num_tokens`, prompt included, are to be generated together: at least one."""
        return max(1, MAX_POSITIONS // (num_tokens + self.num_masks))

    def traces(self, rollout: opdlm.Rollout, prompt: str, tokenizer) -> list[trace.Trace]:
        """One trace per row: its response, and when each token was revealed."""
        found = []
        rows = zip(rollout.tokens.cpu(), rollout.response_mask.cpu(), rollout.order.cpu())
        for tokens, response_mask, order in rows:
            # The last prompt token is decoded too: it tells the tokenizer whether a text begins here.
            with_last_prompt_token = response_mask | response_mask.roll(-1)
            ids = tokens[with_last_prompt_token].tolist()
            pieces = tokenizer.pieces(ids)[1:]
            found.append(self.make_trace(prompt, pieces, order[response_mask].tolist()))
        return found


def diffusion_generator(net, layout: Layout, rule: Rule, sampling: Callable = SamplingConfig(),
                        denoiser: Callable = Denoiser) -> TextGenerator:
    """Block diffusion, and AR text with a layout of block 1. `denoiser(net, layout)` makes the denoiser."""
    def generate(prompt, length, u, eot, prompt_len):
        return opdlm.rollout(denoiser(net, layout), prompt, length, rule, u, eot, sampling, prompt_len)

    make_trace = partial(trace.from_order, block=layout.block)
    return TextGenerator(net, rule.numbers(layout.block), generate, make_trace)


def can_verify_itself(layout: Layout) -> bool:
    """Whether a student is an AR model, with blocks short enough for its own drafts."""
    return layout.is_ar_model and 1 < layout.block <= MAX_SELF_BLOCK


def speculative_generator(student, layout: Layout, teacher=None,
                          sampling: Callable = SamplingConfig()) -> TextGenerator:
    """Speculative decoding: verified by the teacher, or without one by the student itself."""
    from decoding import speculative  # here, because the training script does not need it

    def generate(prompt, length, u, eot, prompt_len):
        text = speculative.speculative_decode(student, layout, prompt, length, u, eot, sampling, teacher,
                                              prompt_len)
        response_mask = text.accepted_in >= 0
        return opdlm.Rollout(text.tokens, text.accepted_in, response_mask, text.forwards, text.positions)

    make_trace = partial(trace.from_iterations, block=layout.block)
    num_masks = layout.block ** 2 if teacher is None else 0     # a block for each number of accepted drafts
    return TextGenerator(student, 3, generate, make_trace, num_masks)


def generate_texts(generator: TextGenerator, stories: list[Tensor], eot: int | tuple[int, ...], length: int,
                   seed: int, batch: int = 128, min_prompt: int = 1) -> tuple[list, float]:
    """One text per story, and the seconds that all took.

    The prompts are the first `min_prompt` to `min_prompt + 7` tokens of the stories, in turn. All responses
    have the same maximal length: `length` minus the longest prompt. The texts are a list of batches, each of
    them a pair (Rollout on the CPU, (B,) prompt lengths). Every process generates its share of the texts; all
    must call.
    """
    device = generator.net.wte.weight.device
    response_len = length - (min_prompt + PROMPT_LENGTHS - 1)

    def generate_share(story_ids: range) -> list:
        texts = []
        for i in range(0, len(story_ids), batch):
            row_ids = story_ids[i:i + batch]
            prompts = [stories[k][:min_prompt + k % PROMPT_LENGTHS] for k in row_ids]
            prompt_lens = torch.tensor(list(map(len, prompts)))
            tokens = metrics.padded(prompts, padding_id(eot)).to(device)   # (B, P)
            rollout = generator(tokens, response_len, seed, row_ids, eot, prompt_lens.to(device))
            texts.append((on_cpu(rollout), prompt_lens))
        return texts

    began = time.perf_counter()
    texts = dist.map_shared(generate_share, range(len(stories)))
    return texts, time.perf_counter() - began


def on_cpu(rollout: opdlm.Rollout) -> opdlm.Rollout:
    """The same rollout, in the memory of the CPU."""
    tensors = {field.name: getattr(rollout, field.name).cpu() for field in fields(rollout)}
    return opdlm.Rollout(**tensors)


@dataclass
class Cost:
    """What texts took, added up over batches."""
    tokens: int = 0
    forwards: int = 0
    positions: int = 0
    seconds: float = 0.0
    batch: int = 0          # texts generated together, of the largest batch

    def add(self, rollout: opdlm.Rollout, seconds: float) -> None:
        self.tokens += int(rollout.response_mask.sum())
        self.forwards += int(rollout.forwards.sum())
        self.positions += int(rollout.positions.sum())
        self.seconds += seconds
        self.batch = max(self.batch, len(rollout.tokens))

    def describe(self, net) -> str:
        """One line."""
        device = net.wte.weight.device.type
        threads = torch.get_num_threads()
        return (f"{self.tokens} tokens | {self.tokens / self.forwards:.2f} tokens/forward | "
                f"{self.positions / self.tokens:.2f} positions/token | "
                f"{self.tokens / self.seconds:.0f} tokens/s "
                f"(batch {self.batch}, {device}, {threads} threads)")


def check_weights(net: torch.nn.Module, name) -> None:
    """ValueError if a weight of `net`, the model `name`, is NaN or infinity."""
    for key, tensor in net.state_dict().items():
        num_bad = int((~tensor.isfinite()).sum())
        if num_bad:
            raise ValueError(f"{name}: the tensor {key} has {num_bad} numbers that are not finite (NaN or "
                             "infinity), so the file is damaged or the training has diverged; use another "
                             "checkpoint")


def continue_prompt(net, prompt: Tensor, length: int, layout: Layout, rule: Rule, tokenizer, seed: int,
                    sampling: Callable = SamplingConfig()) -> trace.Trace:
    """The trace of up to `length` tokens after `prompt` (P,), the same as of sample.py --mode=diffusion."""
    generator = diffusion_generator(net, layout, rule, sampling)
    prompt = prompt[None].to(net.wte.weight.device)              # (1, P)
    rollout = generator(prompt, length, seed, range(1), tokenizer.ends)
    prompt_text = tokenizer.decode(prompt[0].tolist())
    return generator.traces(rollout, prompt_text, tokenizer)[0]
