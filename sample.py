"""Text from a checkpoint.

    python sample.py --prompt "Once upon a time"             block by block, coloured by the step that revealed a token
    python sample.py --mode=ar --prompt "Once upon a time"   the autoregressive model that it was made of
    python sample.py --reveal=static:1 --n 4                 another rule, four texts
    python sample.py --watch --picture=text.html             before your eyes; and as a page to go through it again
    python sample.py --ckpt=hf:gpt2 --mode=ar                a checkpoint of the Hugging Face hub
    python sample.py --export=FOLDER                         no text: the checkpoint itself, for `transformers` to read

The last line is the cost: tokens, tokens per forward (all forwards counted), positions per token, tokens per second.
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import opdlm
from data import tokenizer
from model import hub
from model import reveal as rules
from model.denoiser import Denoiser
from model.dist import device_named
from model.draw import Warp
from model.masks import AR, Layout
from report import cli, page, trace, watch
from report.cli import option

MOST = 1024         # tokens of a response that nobody gave a length
PICTURES = {".png": trace.picture, ".html": page.save}


@dataclass
class Options:
    ckpt: str = option("out/tiny", "a run's folder, a checkpoint's, or hf:NAME or hf:NAME@REVISION of the hub")
    export: str | None = option(None, "a new folder to write the checkpoint to, instead of text")
    prompt: str = option("", "text to go on from")
    mode: str = option("diffusion", "diffusion: a block at a time; ar: a token at a time, by the AR model",
                       ("diffusion", "ar"))
    reveal: str | None = option(None, f"which masks come off; none: the checkpoint's rule. {rules.ABOUT}")
    confidence: str | None = option(None, f"p of a slot; none: the rule's. {rules.said(rules.CONFIDENCE)}",
                                    tuple(rules.CONFIDENCE))
    block: int | None = option(None, "tokens denoised together; none: the checkpoint's")
    temperature: float = option(1.0, "of the tokens drawn; 0 takes the likeliest")
    top_k: int | None = option(None, "draw among the so many likeliest tokens")
    top_p: float | None = option(None, "draw among the fewest tokens that have this share of all probability together")
    length: int | None = option(None, "longest response, tokens; none: what the model has room for, at most 1024")
    n: int = option(1, "texts")
    seed: int = option(0, "of the draws; text i of a seed is the same for any --n")
    watch: bool = option(False, "show on a terminal how each text was denoised, forward by forward")
    fps: float = option(8.0, "forwards a second that --watch shows, 0.1 to 1000")
    picture: str | None = option(None, "a file for how the first text was denoised: .png, a still, or .html, a page "
                                 "with a slider")
    device: str = option("auto", "auto: cuda, else mps, else cpu", ("auto", "cpu", "cuda", "mps"))

    def __post_init__(self):
        if any(x is not None and x < 1 for x in (self.n, self.length, self.block)):
            raise ValueError("--n and --length are at least 1, as is --block")
        self.warp()                                                  # refuses what can't be
        for name in ("reveal", "confidence", "block") if self.mode == "ar" else ():
            if getattr(self, name):
                raise ValueError(f"--{name}={getattr(self, name)} means nothing to --mode=ar, a token at a time: "
                                 "leave it out")
        if not 0.1 <= self.fps <= 1000:
            raise ValueError(f"--fps={self.fps:g}: from 0.1 to 1000 forwards a second can be shown")
        if self.picture is not None and Path(self.picture).suffix.lower() not in PICTURES:
            raise ValueError(f"--picture={self.picture}: the name of a picture ends in {' or '.join(PICTURES)}")

    def warp(self) -> Warp:
        return Warp(self.temperature, self.top_k, self.top_p)


def find(options: Options) -> Path:
    """The checkpoint's folder: of a run, the model that --mode asks for."""
    folder = hub.fetch(options.ckpt)
    inner = folder / {"ar": "ar", "diffusion": "opdlm"}[options.mode]
    return inner if inner.is_dir() else folder


def load(options: Options) -> tuple:
    """(network, its layout, its tokenizer, the reveal rule it was trained with, if no other is asked for)."""
    folder = find(options)
    net, layout = hub.load(folder)
    if layout is None and options.mode == "diffusion":
        raise ValueError(f"{folder} holds an AR model: use --mode=ar, or a checkpoint that train_tiny.py has converted")
    config = hub.read_config(folder)
    rule, confidence = options.reveal or config.get("reveal", "static:1"), config.get("confidence", "largest")
    if confidence not in rules.CONFIDENCE:
        known = " or ".join(rules.CONFIDENCE)
        raise ValueError(f"{folder}/config.json says confidence {confidence!r}: {known} was wanted")
    if options.mode == "ar":
        layout = AR
    elif options.block:
        layout = Layout(options.block, options.block if layout.clean_block > 1 else 1, layout.shift)
    rule = rules.parse(rule, options.confidence, confidence)
    return net.to(device_named(options.device)), layout, tokenizer.load(folder), rule


def room(options: Options, prompt: int, context: int) -> int:
    """Tokens of the response."""
    if prompt >= context:
        raise ValueError(f"the prompt has {prompt} tokens, its start counted, and the model {context} positions: "
                         "shorten it")
    if options.length and prompt + options.length > context:
        raise ValueError(f"--length={options.length} and a prompt of {prompt} tokens are more than the model's "
                         f"{context} positions")
    return options.length or min(context - prompt, MOST)


def write(options: Options, net, layout: Layout, tok, rule: rules.Rule) -> tuple[opdlm.Text, float]:
    """The texts, and the seconds they took."""
    ids = [tok.eot, *tok.encode(options.prompt)]                   # a text begins behind an end-of-text, as in training
    length, device = room(options, len(ids), net.config.context), net.wte.weight.device
    numbers = (len(ids) + length, rule.numbers(layout.block))
    u, warp = opdlm.uniforms(options.seed, 0, range(options.n), numbers).to(device), options.warp()
    begun = time.perf_counter()
    prompt = torch.tensor([ids] * options.n, device=device)
    text = opdlm.rollout(Denoiser(net, layout), prompt, length, rule, u, tok.eot, warp)
    return text, time.perf_counter() - begun


def traces(text: opdlm.Text, prompt: str, tok, block: int) -> list[trace.Trace]:
    """One for each row: what was written, and when. The token before it tells if a text begins."""
    return [trace.from_order(prompt, tok.pieces(row[kept | kept.roll(-1)].tolist())[1:], order[kept].tolist(), block)
            for row, kept, order in zip(text.tokens.cpu(), text.kept.cpu(), text.order.cpu())]


def cost(text: opdlm.Text, seconds: float, net) -> str:
    """The last line."""
    tokens, forwards, positions = (int(x.sum()) for x in (text.kept, text.forwards, text.positions))
    where = f"batch {len(text.tokens)}, {net.wte.weight.device.type}, {torch.get_num_threads()} threads"
    return (f"{tokens} tokens | {tokens / forwards:.2f} tokens/forward | {positions / tokens:.2f} positions/token | "
            f"{tokens / seconds:.0f} tokens/s ({where})")


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.export:
        hub.export(find(options), options.export)
        print(f"{find(options)} is now in {options.export}")
        return
    net, layout, tok, rule = load(options)
    text, seconds = write(options, net, layout, tok, rule)
    colour = trace.wants_colour(sys.stdout) and layout.block > 1
    stories = traces(text, options.prompt, tok, layout.block)
    for story in stories:
        if options.watch:
            watch.play(story, sys.stdout, options.fps, colour)
        print(trace.coloured(story, colour), end="\n\n")
    if colour:
        print(trace.legend(layout.block))
    if options.picture is not None:
        PICTURES[Path(options.picture).suffix.lower()](stories[0], options.picture)
    print(cost(text, seconds, net))


if __name__ == "__main__":
    sys.exit(cli.run(main))
