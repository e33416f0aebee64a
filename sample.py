"""Text from a checkpoint.

    python sample.py --prompt "Once upon a time"             block by block, coloured by the step that revealed a token
    python sample.py --mode=ar --prompt "Once upon a time"   the autoregressive model that it was made of
    python sample.py --reveal=static:1 --n 4                 another rule, four texts
    python sample.py --mode=verified                         the AR model's text, sooner; or --verifier=self
    python sample.py --watch --picture=text.html             before your eyes; and as a page to go through it again
    python sample.py --ckpt=hf:gpt2 --mode=ar                a checkpoint of the Hugging Face hub
    python sample.py --export=FOLDER                         no text: the checkpoint itself, for `transformers` to read

The last line is the cost: tokens, tokens per forward (all forwards counted), positions per token, tokens per second.
"""
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import opdlm
from data import tokenizer
from decoding import reveal as rules
from decoding import scheduling as schedule
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig
from model import checkpoint
from model.masks import AR, Layout
from report import generate, html, terminal, trace
from training import cli
from training.dist import find_device
from unmasking import policy  # noqa: F401  (registers --reveal=policy:FOLDER)

RUN, SMALL = Path("out/tiny"), Path(__file__).parent / "model/pretrained"
MOST = 1024         # tokens of a response that nobody gave a length
PICTURES = {".png": trace.picture, ".html": html.save}


@dataclass
class Options:
    ckpt: str | None = None  # a run's folder, a checkpoint's, or hf:NAME or hf:NAME@REVISION of the hub; none: out/tiny if a run left it, else model/pretrained, which comes with the code
    export: str | None = None  # a new folder to write the checkpoint to, instead of text
    dtype: Literal["float32", "bfloat16"] | None = None  # numbers that --export writes; none: the checkpoint's
    prompt: str = ""  # text to go on from
    mode: Literal["diffusion", "ar", "verified"] = "diffusion"  # diffusion: a block at a time; ar: a token at a time, by the AR model; verified: the verifier's own text, which diffusion drafts
    verifier: str = "teacher"  # of --mode=verified: teacher: the run's AR model; self: the student, as an AR model; or an AR checkpoint, as --ckpt
    reveal: str | None = None  # see docs/decoding.md
    confidence: str | None = None  # see docs/decoding.md
    block: int | None = None  # tokens denoised together; none: the checkpoint's
    temperature: float = 1.0  # of the tokens drawn; 0 takes the likeliest
    top_k: int | None = None  # draw among the so many likeliest tokens
    top_p: float | None = None  # draw among the fewest tokens that have this share of all probability together
    light: str | None = None  # a smaller model with the same tokens, as --ckpt, that takes a part of the steps
    schedule: str | None = None  # which steps: L32,H64,L32, the first 32 of a block light, and so on; mask:1-0.5=L,0.5-0=H, by the share masked; auto:0.25, the quarter that costs least
    length: int | None = None  # longest response, tokens; none: what the model has room for, at most 1024
    n: int = 1  # texts
    seed: int = 0  # of the draws; text i of a seed is the same for any --n
    watch: bool = False  # show on a terminal how each text was denoised, forward by forward
    fps: float = 8.0  # forwards a second that --watch shows, 0.1 to 1000
    picture: str | None = None  # a file for how the first text was denoised: .png, a still, or .html, a page with a slider
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu

    def __post_init__(self):
        if any(x is not None and x < 1 for x in (self.n, self.length, self.block)):
            raise ValueError("--n and --length are at least 1, as is --block")
        SamplingConfig(self.temperature, self.top_k, self.top_p)               # refuses what can't be
        if self.dtype and not self.export:
            raise ValueError("--dtype is for what --export writes: name its folder too")
        if (self.light is None) != (self.schedule is None):
            raise ValueError("--light says which model takes a part of the steps and --schedule which: give both")
        no = {"ar": ("reveal", "confidence", "block", "schedule"), "verified": ("reveal", "confidence", "schedule")}
        for name in no.get(self.mode, ()):
            if getattr(self, name):
                raise ValueError(f"--{name}={getattr(self, name)} means nothing to --mode={self.mode}: leave it out")
        if not 0.1 <= self.fps <= 1000:
            raise ValueError(f"--fps={self.fps:g}: from 0.1 to 1000 forwards a second can be shown")
        if self.picture is not None and Path(self.picture).suffix.lower() not in PICTURES:
            raise ValueError(f"--picture={self.picture}: the name of a picture ends in {' or '.join(PICTURES)}")


def find(name: str | None, mode: str) -> Path:
    """A checkpoint's folder: of a run, the model that a mode asks for; of no name, the last run, if it has that."""
    part = "ar" if mode == "ar" else "opdlm"
    folder = checkpoint.fetch(name or (RUN if (RUN / part).is_dir() else SMALL))
    if part == "ar" and (folder / "opdlm").is_dir() and not (folder / part).is_dir():
        raise ValueError(f"{folder} has no ar/: its AR model is the checkpoint that --init named, so name that")
    return folder / part if (folder / part).is_dir() else folder


def load(options: Options) -> tuple[generate.TextGenerator, tokenizer.Tokenizer]:
    """A way to write, as --mode says, and the tokenizer."""
    folder, device = find(options.ckpt, options.mode), find_device(options.device)
    net, layout = checkpoint.load(folder)
    net, tok, sampling = net.to(device), tokenizer.load(folder), SamplingConfig(options.temperature, options.top_k, options.top_p)
    if options.mode == "ar":
        return generate.diffusion_generator(net, AR, rules.parse("static:1"), sampling), tok
    if layout is None:
        raise ValueError(f"{folder} holds an AR model: use --mode=ar, or a checkpoint that train_tiny.py has converted")
    if options.block:
        layout = Layout(options.block, options.block if layout.context_block > 1 else 1, layout.logit_shift)
    if options.mode == "diffusion":
        rule = rule_of(options, folder)
        return generate.diffusion_generator(net, layout, rule, sampling, denoiser(options, tok, layout, rule, device)), tok
    return generate.speculative_generator(net, layout, verifier(options, folder, net, tok, device), sampling), tok


def rule_of(options: Options, folder: Path) -> rules.Rule:
    """That of the command line, else that of the checkpoint."""
    config = checkpoint.read_config(folder)
    confidence = config.get("confidence", "largest")
    if confidence not in rules.CONFIDENCE:
        known = " or ".join(rules.CONFIDENCE)
        raise ValueError(f"{folder}/config.json says confidence {confidence!r}: {known} was wanted")
    return rules.parse(options.reveal or config.get("reveal", "static:1"), options.confidence, confidence)


def denoiser(options: Options, tok, layout: Layout, rule: rules.Rule, device) -> Callable:
    """What makes one of a network: itself at all steps, or with --light at some."""
    if options.light is None:
        return Denoiser
    folder = find(options.light, "opdlm")
    net, wired = checkpoint.load(folder)
    if wired is None or (wired.context_block > 1, wired.logit_shift) != (layout.context_block > 1, layout.logit_shift):
        raise ValueError(f"--light={options.light} is not wired as the other model is: train both with the same "
                         "--align and --context")
    if tokenizer.load(folder).to_json() != tok.to_json():
        raise ValueError(f"--light={options.light} has another tokenizer: train both on the same text")
    plan, most = schedule.read(options.schedule, folder, rule), rule.steps(layout.block)
    if plan.by == "step" and len(plan.steps()) != most:
        raise ValueError(f"--schedule={options.schedule} is about {len(plan.steps())} steps, and --reveal={rule} takes "
                         f"up to {most} in a block of {layout.block}")
    return lambda heavy, layout: schedule.ScheduledDenoiser({"H": heavy, "L": net.to(device)}, layout, plan)


def verifier(options: Options, folder: Path, student, tok, device):
    """The teacher; none if the student verifies itself."""
    if options.verifier == "self":
        return None
    teacher = find(options.ckpt, "ar") if options.verifier == "teacher" else checkpoint.fetch(options.verifier)
    if teacher == folder and options.verifier == "teacher":
        raise ValueError(f"{folder} has no ar/ with a teacher in it: say --verifier=FOLDER, or --verifier=self")
    net, layout = checkpoint.load(teacher)
    same = net.config.vocab == student.config.vocab and tokenizer.load(teacher).to_json() == tok.to_json()
    if layout is not None or not same:
        raise ValueError(f"--verifier={options.verifier}: an AR model with the student's tokenizer was wanted")
    return net.to(device)


def room(options: Options, prompt: int, context: int) -> int:
    """Tokens of the response."""
    if prompt >= context:
        raise ValueError(f"the prompt has {prompt} tokens, its start counted, and the model {context} positions: "
                         "shorten it")
    if options.length and prompt + options.length > context:
        raise ValueError(f"--length={options.length} and a prompt of {prompt} tokens are more than the model's "
                         f"{context} positions")
    return options.length or min(context - prompt, MOST)


def write(options: Options, writer: generate.TextGenerator, tok) -> tuple[opdlm.Rollout, float]:
    """The texts, and the seconds they took."""
    ids = [tok.eot, *tok.encode(options.prompt)]                   # a text begins behind an end-of-text, as in training
    length = room(options, len(ids), writer.net.config.context)
    prompt = torch.tensor([ids] * options.n, device=writer.net.wte.weight.device)
    begun = time.perf_counter()
    text = writer(prompt, length, options.seed, range(options.n), tok.eot)
    return text, time.perf_counter() - begun


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.export:
        folder = find(options.ckpt, options.mode)
        checkpoint.export(folder, options.export, getattr(torch, options.dtype) if options.dtype else None)
        print(f"{folder} is now in {options.export}")
        return
    writer, tok = load(options)
    text, seconds = write(options, writer, tok)
    stories = writer.traces(text, options.prompt, tok)
    colour = trace.wants_colour(sys.stdout) and options.mode != "ar"
    for story in stories:
        if options.watch:
            terminal.play(story, sys.stdout, options.fps, colour)
        print(trace.coloured(story, colour), end="\n\n")
    if colour:
        print(trace.legend(max(story.num_steps for story in stories), stories[0].colour_meaning))
    if options.picture is not None:
        PICTURES[Path(options.picture).suffix.lower()](stories[0], options.picture)
    print(generate.cost(text, seconds, writer.net))


if __name__ == "__main__":
    sys.exit(cli.run(main))
