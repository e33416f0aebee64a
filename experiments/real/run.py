"""A real checkpoint converted with an adapter, on text that it writes itself, and what that buys.

    python -m experiments.real.run --data=TinyStories-train.txt --val_data=TinyStories-valid.txt
    python -m experiments.real.run --quick      the same steps with the shipped model: does it run at all?

The checkpoint is --init, by default SmolLM2-135M-Instruct. Prompts for training are 1 to 16 tokens of stories
and of Python's language reference; what follows them is the checkpoint's own text, greedy. Writes
experiments/real/results/smollm2.json.
"""
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data import story_world
from data import tokenizer as tokenizers
from decoding import reveal
from decoding.sampling import SamplingConfig, padding_id
from experiments.common.job import WORK
from experiments.common.results import EXPERIMENTS, cached, output_folder, round_floats, run_info
from experiments.common.timing import greedy_ar, seconds_of
from experiments.real import prompts
from experiments.real.tables import table
from model import checkpoint, lora
from model.masks import AR, Layout
from report import generate, metrics
from report.compare import distillation_cost, write_json
from training import cli

STORIES = 1_000_000     # characters of --data that give prompts for training
SAMPLES = 3             # of each kind of prompt, shown on the page
GREEDY = SamplingConfig(temperature=0)
WARM = SamplingConfig(temperature=0.7)
SHORTER = (2, 3)        # blocks of decoding, shorter than those of training
TIMED = ("self-verified", "self-verified, blocks of 2")
SHIPPED = str(EXPERIMENTS.parent / "model/pretrained")


@dataclass
class Options:
    init: str = "hf:HuggingFaceTB/SmolLM2-135M-Instruct"    # --init of train_tiny.py
    data: str | None = None  # text of stories, <|endoftext|> between them
    val_data: str | None = None  # held-out stories
    lora: int = 64  # --lora of train_tiny.py
    block: int = 4  # --block
    lr: float = 0.003  # --lr
    updates: int = 224  # --distill_steps, of two rows each
    answer: int = 24  # tokens generated after a prompt
    texts: int = 32  # held-out texts of each kind
    tokens: int = 96  # of them
    turns: int = 3  # timings of each decoder
    threads: int = 2  # of the timings
    quick: bool = False  # the shipped model, four updates

    def __post_init__(self):
        if not self.quick and not (self.data and self.val_data):
            raise ValueError("--data and --val_data: expected two files of stories, e.g. TinyStories")


# 1. conversion --------------------------------------------------------------------------------------------

def write_prompt_texts(options: Options, folder: Path) -> None:
    """Two text files that train_tiny.py reads: stories, and Python's language reference."""
    folder.mkdir(parents=True, exist_ok=True)
    if options.quick:
        stories = tokenizers.EOT.join(story_world.story(k) for k in range(200))
    else:
        stories = Path(options.data).read_text(encoding="utf-8")[:STORIES]
    (folder / "stories.txt").write_text(stories, encoding="utf-8")
    (folder / "reference.txt").write_text(tokenizers.EOT.join(prompts.reference_texts()), encoding="utf-8")


def command(options: Options, work: Path) -> list[str]:
    """The command line of the conversion."""
    flags = {
        "init": options.init,
        "data": work / "prompts",
        "out": work / "student",
        "lora": options.lora,
        "block": options.block,
        "lr": options.lr,
        "distill_steps": options.updates,
        "source": "student-ar",
        "temperature": 0,
        "weight": "mean",
        "warm_steps": 0,
        "batch": 2,
        "updates_per_rollout": 32,
        "length": 112,
        "max_response": 96,
        "optimizer": "adamw",
        "eval_every": 96,
        "eval_texts": 4,
        "eval_tokens": 32,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, str(EXPERIMENTS.parent / "train_tiny.py"), *words]


def convert(options: Options, work: Path) -> dict:
    """What the conversion took. It is not repeated if it is finished, and goes on if it was interrupted."""
    student = work / "student"
    seconds = work / "seconds"
    if not (student / "summary.json").exists():
        write_prompt_texts(options, work / "prompts")
        resume = ["--resume"] * (student / "state.safetensors").exists()
        taken = seconds_of(lambda: subprocess.run(command(options, work) + resume, check=True))
        seconds.write_text(f"{taken:.0f}")
    return {"seconds": int(seconds.read_text()), **distillation_cost(student / "log.jsonl")}


# 2. evaluation --------------------------------------------------------------------------------------------

def held_out_texts(options: Options, tokenizer) -> dict[str, list[Tensor]]:
    """Texts to score by kind, each from its first token on."""
    if options.quick:
        stories = [story_world.story(10_000 + k) for k in range(options.texts)]
    else:
        stories = Path(options.val_data).read_text(encoding="utf-8").split(tokenizers.EOT)
    found = {}
    for kind, texts in {"stories": stories, "docstrings": prompts.docstrings()}.items():
        rows = [encode(text.strip(), tokenizer)[:options.tokens] for text in texts[:options.texts]]
        found[kind] = rows
    return found


def encode(text: str, tokenizer) -> Tensor:
    """(T,) ids: the token that begins a text, and the text."""
    return torch.tensor([tokenizer.bos, *tokenizer.encode(text)])


def continue_all(generator: generate.TextGenerator, rows: list[Tensor], length: int, eot,
                 batch: int = 20) -> list[tuple]:
    """Continue the prompts by up to `length` tokens: a list of (Rollout, (B,) prompt lengths)."""
    texts = []
    for begin in range(0, len(rows), batch):
        part = rows[begin:begin + batch]
        lengths = torch.tensor([len(row) for row in part])
        row_ids = range(begin, begin + len(part))
        tokens = metrics.padded(part, padding_id(eot))           # (B, P)
        texts.append((generator(tokens, length, 0, row_ids, eot, lengths), lengths))
    return texts


def decoders(teacher, student, untrained, layout: Layout) -> dict[str, generate.TextGenerator]:
    """The ways of writing that are compared; the first one is the AR model, greedy."""
    one = reveal.parse("static:1")
    ways = {
        "AR": generate.diffusion_generator(teacher, AR, one, GREEDY),
        "self-verified before training": generate.speculative_generator(untrained, layout, None, GREEDY),
        "self-verified": generate.speculative_generator(student, layout, None, GREEDY),
        "leftmost:0.9": generate.diffusion_generator(student, layout, reveal.parse("leftmost:0.9"), GREEDY),
        "static:2": generate.diffusion_generator(student, layout, reveal.parse("static:2"), GREEDY),
        "AR, temperature 0.7": generate.diffusion_generator(teacher, AR, one, WARM),
        "self-verified, temperature 0.7": generate.speculative_generator(student, layout, None, WARM),
    }
    for block in SHORTER:                                        # the same student
        shorter = replace(layout, block=block)
        ways[f"self-verified, blocks of {block}"] = generate.speculative_generator(student, shorter, None,
                                                                                   GREEDY)
    return ways


def measure_texts(generator: generate.TextGenerator, rows: dict[str, list[Tensor]], teacher, tokenizer,
                  options: Options) -> dict:
    """The metrics of all continuations and of each kind, and the ids of every response."""
    found = {"kinds": {}, "responses": {}}
    everything = []
    for kind, prompt_rows in rows.items():
        texts = continue_all(generator, prompt_rows, options.answer, tokenizer.ends)
        everything += texts
        found["kinds"][kind] = metrics.text_metrics(teacher, texts, 1.0, tokenizer, None)
        responses = []
        for rollout, _ in texts:
            responses += metrics.response_ids(rollout)
        found["responses"][kind] = responses
    found["all"] = metrics.text_metrics(teacher, everything, 1.0, tokenizer, None)
    return found


def likelihoods(teacher, student, layout: Layout, texts: dict[str, list[Tensor]], tokenizer) -> dict:
    """By kind of text: bits per byte of the AR model, of the student as an AR model, and in its blocks."""
    found = {}
    for kind, rows in texts.items():
        score = partial(metrics.likelihood, stories=rows, tokenizer=tokenizer)
        found[kind] = {
            "ar": score(teacher, layout=AR),
            "student_ar": score(student, layout=AR),
            "blocks": score(student, layout=layout),
        }
    return found


def seconds_per_token(generators: dict[str, generate.TextGenerator], teacher, rows: list[Tensor], eot,
                      options: Options) -> dict[str, list[float]]:
    """By decoder, one number per turn: texts one at a time. AR is a plain greedy loop with a cache."""
    length = 2 * options.answer
    torch.set_num_threads(options.threads)
    seconds = {"AR": []} | {name: [] for name in generators}
    for _ in range(options.turns):
        taken = sum(seconds_of(lambda row=row: greedy_ar(teacher, row[None], length)) for row in rows)
        seconds["AR"].append(taken / (len(rows) * length))
        for name, generator in generators.items():
            began = time.perf_counter()
            num_tokens = 0
            for row in rows:
                (rollout, _), = continue_all(generator, [row], length, eot)
                num_tokens += int(rollout.response_mask.sum())
            seconds[name].append((time.perf_counter() - began) / num_tokens)
    return seconds


def samples(ways: dict[str, dict], tokenizer, count: int) -> list[dict]:
    """Of the first `count` prompts of each kind: the prompt and what each decoder wrote."""
    shown = []
    for kind, texts in prompts.test_prompts().items():
        for k in range(count):
            written = {way: tokenizer.decode(numbers["responses"][kind][k]) for way, numbers in ways.items()}
            shown.append({"kind": kind, "prompt": texts[k], "written": written})
    return shown


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    if options.quick:
        options = Options(SHIPPED, lora=4, updates=4, answer=6, texts=2, tokens=24, turns=1, quick=True)
    results = run_info("real", options)
    work = (WORK / "quick" if options.quick else WORK) / "real"
    results["conversion"] = convert(options, work)

    student, layout = checkpoint.load(work / "student/opdlm")
    teacher, _ = checkpoint.load(options.init)
    tokenizer = tokenizers.load(checkpoint.ar_folder(options.init))
    untrained = lora.adapt(teacher, options.lora)
    untrained.init_mask()
    trained = [p for p in student.parameters() if p.requires_grad]
    results["parameters"] = sum(p.numel() for p in teacher.parameters())
    results["trained"] = sum(p.numel() for p in trained)

    few = 2 if options.quick else None
    rows = {}
    for kind, texts in prompts.test_prompts().items():
        rows[kind] = [encode(text, tokenizer) for text in texts[:few]]
    generators = decoders(teacher, student, untrained, layout)
    settings = asdict(replace(options, turns=0, threads=0))      # all but those of the timings
    ways = {}
    for name, generator in generators.items():
        measure = partial(measure_texts, generator, rows, teacher, tokenizer, options)
        ways[name] = cached(work / f"{name}.json", settings, measure)
        print(f"{name}: {ways[name]['all']['tok_per_fwd']:.2f} tokens per forward pass", flush=True)
    results["texts"] = ways
    scored = held_out_texts(options, tokenizer)
    score = partial(likelihoods, teacher, student, layout, scored, tokenizer)
    results["likelihood"] = cached(work / "likelihood.json", settings, score)
    timed = [row for kind_rows in rows.values() for row in kind_rows[:2]]
    timed_generators = {name: generators[name] for name in TIMED}
    results["seconds_per_token"] = seconds_per_token(timed_generators, teacher, timed, tokenizer.ends,
                                                     options)
    results["samples"] = samples(ways, tokenizer, few or SAMPLES)
    write_json(output_folder("real", options.quick) / "smollm2.json", round_floats(results))
    print(table(results))


if __name__ == "__main__":
    sys.exit(cli.run(main))
