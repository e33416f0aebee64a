"""Generate text from a checkpoint.

    python sample.py --prompt "Once upon a time"            as the checkpoint was trained to, coloured by step
    python sample.py --mode=diffusion --prompt "One day"    block by block
    python sample.py --mode=ar --prompt "Once upon a time"  the AR model that the student was made from
    python sample.py --mode=speculative --verifier=self     drafted and verified by the same model
    python sample.py --reveal=static:1 --n=4                another reveal rule, four texts
    python sample.py --watch --picture=text.html            step by step in the terminal, and as a page
    python sample.py --ckpt=hf:gpt2 --mode=ar               a checkpoint of the Hugging Face hub
    python sample.py --export=FOLDER                        no text: the checkpoint, for `transformers`

The last line is the cost: tokens, tokens per forward pass (all passes counted), positions per token, speed.
"""
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import opdlm
from data import tokenizer
from decoding import reveal, scheduling
from decoding.denoiser import Denoiser
from decoding.sampling import MAX_SEED, MAX_TEMPERATURE, NotFiniteError, SamplingConfig
from model import checkpoint
from model.masks import AR, Layout
from report import generate, html, terminal, trace
from report.generate import MAX_SELF_BLOCK
from training import cli
from training.dist import find_device
from training.flags import Range, check_ranges, check_utf8, expand_home
from unmasking import policy  # registers --reveal=policy:FOLDER

LAST_RUN = Path("out/tiny")
PRETRAINED = Path(__file__).parent / "model/pretrained"
MAX_TOKENS = 1024           # of a response, unless --length is given
RANGES = {
    "length": Range(1),
    "n": Range(1),
    "seed": Range(0, MAX_SEED),
    "block": Range(1),
    "fps": Range(0.1, 1000),
}
DIFFUSION_FLAGS = ("reveal", "confidence", "schedule")      # no other --mode uses them
PICTURES = {".png": trace.picture, ".html": html.save}


@dataclass
class Options:
    # Model
    ckpt: str | None = None     # run, checkpoint or hf:NAME[@REVISION]; default: out/tiny, or shipped
    mode: Literal["diffusion", "ar", "speculative", "verified"] | None = None   # default: the checkpoint's
    verifier: str | None = None     # teacher (the run's AR model), self, or an AR checkpoint
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    # Text
    prompt: str = ""            # text to continue
    length: int | None = None   # longest response, tokens; default: what the context allows, at most 1024
    n: int = 1                  # number of texts; many are generated in batches of about 32,768 tokens
    seed: int = 0               # random seed; text i of a seed is the same for every --n
    temperature: float | None = None    # 0: always the most likely token; default: the checkpoint's
    top_k: int | None = None    # sample from the k most likely tokens
    top_p: float | None = None  # sample from the fewest tokens with this total probability
    # Diffusion
    reveal: str | None = None   # reveal rule, NAME:ARGUMENT (docs/decoding.md); default: the checkpoint's
    confidence: Literal["largest", "drawn", "margin", "entropy"] | None = None  # default: the rule's own
    block: int | None = None    # tokens denoised together; default: the checkpoint's
    light: str | None = None    # a smaller student that takes a part of the steps (docs/scheduling.md)
    schedule: str | None = None     # its steps: L32,H64,L32 or mask:1-0.5=L,0.5-0=H or auto:SHARE
    # Output
    watch: bool = False         # show in the terminal how each text is denoised
    fps: float = 8.0            # forward passes per second of --watch, 0.1 to 1000
    picture: str | None = None  # file showing how the first text was denoised: .png, or .html with a slider
    export: str | None = None   # a new folder for the checkpoint itself, in Hugging Face's layout
    dtype: Literal["float32", "bfloat16"] | None = None  # number format of --export

    def __post_init__(self):
        if self.mode == "verified":
            self.mode = "speculative"
        check_ranges(self, RANGES)
        temperature = 1.0 if self.temperature is None else self.temperature
        SamplingConfig(temperature, self.top_k, self.top_p)          # refuses values out of range
        if self.dtype and not self.export:
            raise ValueError("--dtype is the number format of --export: give --export=FOLDER too")
        if (self.light is None) != (self.schedule is None):
            raise ValueError("--light names the smaller model and --schedule its steps: give both or neither")
        unused = {
            None: (),
            "diffusion": ("verifier",),
            "ar": ("reveal", "confidence", "block", "schedule", "verifier"),
            "speculative": DIFFUSION_FLAGS,
        }
        for name in unused[self.mode]:
            value = getattr(self, name)
            if value:
                raise ValueError(f"--{name}={value} has no effect with --mode={self.mode}: leave it out")
        if self.picture is not None and Path(self.picture).suffix.lower() not in PICTURES:
            endings = " or ".join(PICTURES)
            raise ValueError(f"--picture={self.picture}: expected a file name that ends in {endings}")
        check_utf8("prompt", self.prompt)


def with_defaults(options: Options) -> Options:
    """The options, with the checkpoint's --mode, --verifier and --temperature where they are not given."""
    folder = find_checkpoint(options.ckpt, options.mode)
    student = folder.parent / "opdlm"
    if options.mode == "ar" and folder.name == "ar" and (student / "config.json").exists():
        folder = student                                         # both models of a run have one temperature
    config = checkpoint.read_config(folder)
    if "student" not in config:
        config = {}                                              # in AR models these keys have other meanings
    trained_mode = config.get("mode", "diffusion")
    temperature = config.get("temperature", 1.0)
    if trained_mode not in ("diffusion", "speculative"):
        raise ValueError(f"{folder}/config.json: expected mode diffusion or speculative, got "
                         f"{trained_mode!r}")
    if type(temperature) not in (int, float) or not 0 <= temperature <= MAX_TEMPERATURE:
        raise ValueError(f"{folder}/config.json: expected a temperature from 0 to {MAX_TEMPERATURE}, got "
                         f"{temperature!r}")
    mode = options.mode or implied_mode(options) or trained_mode
    verifier = options.verifier
    if mode == "speculative" and verifier is None:
        verifier = "self" if trained_mode == "speculative" else "teacher"
    if options.temperature is not None:
        temperature = options.temperature
    return replace(options, mode=mode, verifier=verifier, temperature=temperature)


def implied_mode(options: Options) -> str | None:
    """The only mode that uses the flags that are given, if there is one."""
    given = [name for name in DIFFUSION_FLAGS if getattr(options, name)]
    if given and options.verifier:
        raise ValueError(f"--verifier={options.verifier} is for speculative decoding, and "
                         f"--{given[0]}={getattr(options, given[0])} for diffusion: give one of them")
    if given:
        return "diffusion"
    return "speculative" if options.verifier else None


def find_checkpoint(name: str | None, mode: str | None) -> Path:
    """The folder of a checkpoint: within a run, of the model that `mode` uses; by default the last run."""
    part = "ar" if mode == "ar" else "opdlm"
    if name is None:
        name = LAST_RUN if (LAST_RUN / part).is_dir() else PRETRAINED
    folder = checkpoint.fetch(name)
    if (folder / part).is_dir():
        return folder / part
    if part == "ar" and (folder / "opdlm").is_dir():
        raise ValueError(f"{folder} has no ar/: its AR model is the checkpoint given to --init; use that as "
                         "--ckpt")
    return folder


def load_generator(options: Options) -> tuple[generate.TextGenerator, tokenizer.Tokenizer]:
    """A way to generate text, as --mode says, and the tokenizer."""
    folder = find_checkpoint(options.ckpt, options.mode)
    device = find_device(options.device)
    net, layout = load_network(folder, device)
    tok = tokenizer.load(folder)
    sampling = SamplingConfig(options.temperature, options.top_k, options.top_p)
    if options.mode == "ar":
        return generate.diffusion_generator(net, AR, reveal.parse("static:1"), sampling), tok
    if layout is None:
        raise ValueError(f"{folder} is an AR model: use --mode=ar, or a checkpoint that train_tiny.py has "
                         "converted")
    if options.block:
        if options.block > net.config.context:
            raise ValueError(f"--block={options.block} exceeds the model's context of {net.config.context}")
        context_block = options.block if layout.context_block > 1 else 1
        layout = Layout(options.block, context_block, layout.logit_shift)
    if options.mode == "speculative":
        if options.verifier == "self" and layout.block > MAX_SELF_BLOCK:
            raise ValueError(f"blocks of {layout.block} tokens are too long for --verifier=self, whose "
                             "forward passes have block * block masks: use --block=N of at most "
                             f"{MAX_SELF_BLOCK}")
        verifier = load_verifier(options, folder, net, tok, device)
        return generate.speculative_generator(net, layout, verifier, sampling), tok
    rule = load_rule(options, folder)
    make_denoiser = load_denoiser(options, tok, layout, rule, device)
    return generate.diffusion_generator(net, layout, rule, sampling, make_denoiser), tok


def load_network(folder: Path, device) -> tuple[torch.nn.Module, Layout | None]:
    """The network of a checkpoint, on a device, and its layout if it is a student. Its weights are finite."""
    net, layout = checkpoint.load(folder)
    generate.check_weights(net, folder)
    return net.to(device), layout


def load_rule(options: Options, folder: Path) -> reveal.Rule:
    """The reveal rule of the command line, else that of the checkpoint."""
    config = checkpoint.read_config(folder)
    confidence = config.get("confidence", "largest")
    if confidence not in reveal.CONFIDENCE:
        known = " or ".join(reveal.CONFIDENCE)
        raise ValueError(f"{folder}/config.json: expected confidence {known}, got {confidence!r}")
    if options.reveal is None:
        rule = reveal.parse_saved(config, folder / "config.json", options.confidence, confidence)
    else:
        rule = reveal.parse(options.reveal, options.confidence, confidence)
    if isinstance(rule, policy.PolicyRule):
        generate.check_weights(rule.policy, rule.folder)
    return rule


def load_denoiser(options: Options, tok, layout: Layout, rule: reveal.Rule, device) -> Callable:
    """A function (net, layout) -> denoiser: of one network, or with --light of two under a schedule."""
    if options.light is None:
        return Denoiser
    folder = find_checkpoint(options.light, "opdlm")
    light, light_layout = load_network(folder, device)
    if light_layout is None or not same_attention(light_layout, layout):
        raise ValueError(f"--light={options.light} has another attention pattern than --ckpt: train both "
                         "with the same --align and --context")
    if tokenizer.load(folder).to_json() != tok.to_json():
        raise ValueError(f"--light={options.light} has another tokenizer: train both models on the same text")
    schedule = scheduling.load_schedule(options.schedule, folder, rule)
    max_steps = rule.steps(layout.block)
    _, num_steps = schedule.parts[-1]
    if schedule.by == "step" and num_steps != max_steps:
        raise ValueError(f"--schedule={options.schedule} has {num_steps} steps, but "
                         f"--reveal={rule} takes up to {max_steps} in a block of {layout.block}")
    return lambda heavy, layout: scheduling.ScheduledDenoiser({"H": heavy, "L": light}, layout, schedule)


def same_attention(a: Layout, b: Layout) -> bool:
    """Whether two students have the same --align and --context."""
    return (a.context_block > 1) == (b.context_block > 1) and a.logit_shift == b.logit_shift


def load_verifier(options: Options, folder: Path, student, tok, device):
    """The AR model that verifies drafts; None if the student verifies its own."""
    if options.verifier == "self":
        return None
    if options.verifier == "teacher":
        teacher_folder = find_checkpoint(options.ckpt, "ar")
        if teacher_folder == folder:
            raise ValueError(f"{folder} has no ar/ with its teacher: use --verifier=FOLDER or "
                             "--verifier=self")
    else:
        teacher_folder = checkpoint.fetch(options.verifier)
    net, layout = load_network(teacher_folder, device)
    same_tokens = (net.config.vocab == student.config.vocab
                   and tokenizer.load(teacher_folder).to_json() == tok.to_json())
    if layout is not None or not same_tokens:
        raise ValueError(f"--verifier={options.verifier}: expected an AR model with the student's tokenizer")
    return net


def response_length(options: Options, prompt_len: int, context: int) -> int:
    """The longest response, in tokens."""
    if prompt_len >= context:
        raise ValueError(f"the prompt has {prompt_len} tokens, including the first one, but the model's "
                         f"context is {context}: shorten the prompt")
    room = context - prompt_len
    if options.length and options.length > room:
        raise ValueError(f"--length={options.length} and a prompt of {prompt_len} tokens exceed the model's "
                         f"context of {context}")
    return options.length or min(room, MAX_TOKENS)


def encode_prompt(text: str, net, tok) -> list[int]:
    """The ids of a text's beginning. A text begins with the token `bos`, as in training."""
    ids = tok.encode(text)
    if not {tok.bos, *tok.eos, net.mask_id}.isdisjoint(ids):
        raise ValueError(f"--prompt={text!r}: this model's tokenizer reads a part of it as the end of a text "
                         "or as [MASK]; leave that part out")
    return [tok.bos, *ids]


@torch.inference_mode()
def write_texts(generator: generate.TextGenerator, prompt_ids: list[int], length: int, seed: int,
                row_ids: range, ends: int | tuple[int, ...]) -> tuple[opdlm.Rollout, float]:
    """The texts with these numbers, and the seconds they took."""
    prompt = torch.tensor([prompt_ids] * len(row_ids), device=generator.net.wte.weight.device)
    began = time.perf_counter()
    text = generator(prompt, length, seed, row_ids, ends)
    return text, time.perf_counter() - began


def used_models(options: Options) -> str:
    """The checkpoints that the texts are generated with, for messages."""
    names = [str(find_checkpoint(options.ckpt, options.mode))]
    if options.light is not None:
        names.append(options.light)
    if options.mode == "speculative" and options.verifier != "self":
        names.append(f"its verifier ({options.verifier})")
    return " or ".join(names)


def export(options: Options) -> None:
    """Write the checkpoint to the new folder --export."""
    folder = find_checkpoint(options.ckpt, options.mode)
    new_folder = Path(options.export)
    if options.export.startswith("hf:"):
        raise ValueError(f"--export={options.export}: expected a folder of this computer")
    if os.path.lexists(new_folder):
        raise ValueError(f"--export={options.export} exists already: give the name of a new folder")
    if new_folder.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"--export={options.export} is inside the checkpoint {folder}, which a training "
                         "replaces as a whole: name a folder outside")
    checkpoint.read_config(folder)
    check_writable("export", new_folder)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    checkpoint.export(folder, options.export, dtype)
    print(f"{folder} is now in {options.export}")


def check_writable(flag: str, path: Path) -> None:
    """ValueError if --flag=path cannot be made: now, not after the work. Its folder is made if needed."""
    try:
        path = path.resolve()                                    # the target of a symbolic link
        trial = path.with_name(f"{path.name}.{os.getpid()}.try")
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.write_text("")
        trial.unlink()
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--{flag}={path} cannot be written ({reason}): name another place") from None


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    options = expand_home(options, "ckpt", "verifier", "reveal", "light", "schedule", "picture", "export")
    if options.export:
        export(options)
        return
    if options.picture is not None:
        check_writable("picture", Path(options.picture))
    options = with_defaults(options)
    generator, tok = load_generator(options)
    prompt_ids = encode_prompt(options.prompt, generator.net, tok)
    length = response_length(options, len(prompt_ids), generator.net.config.context)
    rows = generator.max_rows(len(prompt_ids) + length)
    colour = trace.wants_colour(sys.stdout) and options.mode != "ar"
    cost = generate.Cost()
    first_trace = None
    max_steps = 0
    for first in range(0, options.n, rows):
        row_ids = range(first, min(first + rows, options.n))
        try:
            text, seconds = write_texts(generator, prompt_ids, length, options.seed, row_ids, tok.ends)
        except NotFiniteError as error:
            raise ValueError(f"{used_models(options)}: {error}") from None
        cost.add(text, seconds)
        traces = generator.traces(text, options.prompt, tok)
        first_trace = first_trace or traces[0]
        for one in traces:
            max_steps = max(max_steps, one.num_steps)
            if options.watch:
                terminal.play(one, sys.stdout, options.fps, colour)
            print(trace.coloured(one, colour), end="\n\n")
    if colour:
        print(trace.legend(max_steps, first_trace.colour_meaning))
    if options.picture is not None:
        write_picture = PICTURES[Path(options.picture).suffix.lower()]
        write_picture(first_trace, options.picture)
    print(cost.describe(generator.net))


if __name__ == "__main__":
    sys.exit(cli.run(main))
