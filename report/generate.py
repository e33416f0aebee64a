"""Ways to generate text: diffusion with any reveal rule, AR, and speculative decoding."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import opdlm
from decoding.denoiser import Denoiser
from decoding.reveal import Rule
from decoding.sampling import SamplingConfig
from model.masks import Layout
from report import metrics, trace


@dataclass
class TextGenerator:
    """A way to write text: `write(prompt, length, u, eot, prompt_len)` gives the Text, from `numbers` uniform ones a
    position; `trace(prompt, pieces, order)` makes it visible."""
    net: torch.nn.Module
    numbers: int
    write: Callable
    trace: Callable

    def __call__(self, prompt: Tensor, length: int, seed: int, rows: range, eot: int, lens: Tensor | None = None):
        """The Text of the `rows` of a seed."""
        u = opdlm.uniforms(seed, 0, rows, (prompt.size(1) + length, self.numbers)).to(prompt.device)
        return self.write(prompt, length, u, eot, prompt_len=lens)

    def traces(self, text: opdlm.Rollout, prompt: str, tokenizer) -> list[trace.Trace]:
        """One a row: what was written behind the prompt, and when. The token before it tells if a text begins."""
        rows = zip(text.tokens.cpu(), text.response_mask.cpu(), text.order.cpu())
        return [self.trace(prompt, tokenizer.pieces(tokens[kept | kept.roll(-1)].tolist())[1:], order[kept].tolist())
                for tokens, kept, order in rows]


def diffusion_generator(net, layout: Layout, rule: Rule, sampling: Callable = SamplingConfig(), denoiser: Callable = Denoiser) -> TextGenerator:
    """Diffusion, and AR text, which is that of block 1. `denoiser(net, layout)` may ask others too."""
    def write(prompt, length, u, eot, prompt_len):
        return opdlm.rollout(denoiser(net, layout), prompt, length, rule, u, eot, sampling, prompt_len)
    return TextGenerator(net, rule.numbers(layout.block), write, partial(trace.from_order, block=layout.block))


def speculative_generator(student, layout: Layout, teacher=None, sampling: Callable = SamplingConfig()) -> TextGenerator:
    """Verified by the teacher, or if there is none by the student itself."""
    from decoding import speculative

    def write(prompt, length, u, eot, prompt_len):
        text = speculative.speculative_decode(student, layout, prompt, length, u, eot, sampling, teacher,
                                              prompt_len)
        response_mask = text.accepted_in >= 0
        return opdlm.Rollout(text.tokens, text.accepted_in, response_mask, text.forwards, text.positions)
    return TextGenerator(student, 3, write, partial(trace.from_turns, block=layout.block))


def generate_texts(writer: TextGenerator, stories: list[Tensor], eot: int, length: int, seed: int,
             batch: int = 128, least: int = 1) -> tuple[list, float]:
    """Texts that go on from the first 1 to 8 tokens of `stories`, or `least` and up to 7 more, batch by batch with the
    prompts' lengths, and the seconds they took. A response has what is left of `length` by the longest prompt."""
    texts, device, begun = [], writer.net.wte.weight.device, time.perf_counter()
    for i in range(0, len(stories), batch):
        prompts = [s[:least + k % 8] for k, s in enumerate(stories[i:i + batch], i)]
        tokens, lens = metrics.padded(prompts, eot).to(device), torch.tensor([len(p) for p in prompts])
        rows = range(i, i + len(prompts))
        texts.append((writer(tokens, length - 7 - least, seed, rows, eot, lens.to(device)), lens))
    return texts, time.perf_counter() - begun


def cost(text: opdlm.Rollout, seconds: float, net) -> str:
    """What a text took, in a line."""
    tokens, forwards, positions = (int(x.sum()) for x in (text.response_mask, text.forwards, text.positions))
    where = f"batch {len(text.tokens)}, {net.wte.weight.device.type}, {torch.get_num_threads()} threads"
    return (f"{tokens} tokens | {tokens / forwards:.2f} tokens/forward | {positions / tokens:.2f} positions/token | "
            f"{tokens / seconds:.0f} tokens/s ({where})")


def continue_prompt(net, prompt: Tensor, length: int, layout: Layout, rule, tokenizer, seed: int) -> trace.Trace:
    """The trace of up to `length` tokens after `prompt` (P,): those of sample.py with this --length and --seed."""
    writer = diffusion_generator(net, layout, rule)
    text = writer(prompt[None].to(net.wte.weight.device), length, seed, range(1), tokenizer.eot)
    return writer.traces(text, tokenizer.decode(prompt.tolist()), tokenizer)[0]
