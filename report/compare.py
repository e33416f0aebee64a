"""Evaluation of the models of a run.

During the run: metrics and a story of each model. At the end: the table, summary.json and the pictures.
"""
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import story_world
from data.tinystories import Corpus, stories
from decoding.sampling import SamplingConfig
from model.masks import AR, Layout
from report import curves, generate, metrics, trace
from training.log import progress_of_passes, to_json

SAMPLE_TOKENS = 32      # tokens generated after --sample_prompt
LONG_BLOCK = 32         # tokens; the likelihood takes one pass per token of a block, so longer blocks ...
FEW_STORIES = 64        # ... are scored on this many stories only
QUICK_STORIES = 32      # of an evaluation between updates
NUM_TEXTS = (4, 128)    # affordable_size: the least and the most texts ...
TEXT_TOKENS = (32, 128)     # ... and tokens of a text
TRAIN_POSITIONS = 7     # of an update, per token: teacher, student, and twice as much for its backward pass
TABLE_METRICS = ("val_nats", "bits_per_byte", "gen_nats", "valid", "broken", "recovery", "agreement",
                 "distinct2", "entropy", "tok_per_fwd", "bytes_per_fwd", "positions_per_tok", "tok_s")


# 1. during a run ----------------------------------------------------------------------------------

class Evaluator:
    """Evaluates the models of a run on the same held-out stories, and writes the results to the log.

    There are `count` stories; by default 512 of the story world, which come with a validity checker, or 128.
    They are cut after `length` tokens, and generated texts have as many at most. All models generate text
    with the same `sampling`. `sample_prompt` (P,) is also continued at each evaluation, with the same random
    numbers each time.
    """

    def __init__(self, teacher, corpus: Corpus, length: int, seed: int, log,
                 sample_prompt: Tensor | None = None, sampling: SamplingConfig = SamplingConfig(),
                 count: int | None = None):
        self.teacher = teacher
        self.tokenizer = corpus.tokenizer
        self.length = length
        self.seed = seed
        self.log = log
        self.sample_prompt = sample_prompt
        is_story_world = corpus.name == "toy"
        self.judge = story_world.breaks if is_story_world else None
        self.sampling = sampling
        count = count or (512 if is_story_world else 128)
        starts = stories(corpus.val, corpus.tokenizer.bos)
        separator = len(corpus.tokenizer.between)
        self.held_out = metrics.held_out(corpus.val, starts, count, length, separator)
        self.metrics = {}       # of each column of the table: ar, before, after, speculative
        self.traces = {}        # one story of each model

    def evaluate(self, name: str, net, layout: Layout, rule, train_tokens: int) -> None:
        """Evaluate a model in full: name is ar, before or after."""
        generator = generate.diffusion_generator(net, layout, rule, self.sampling)
        positions = diffusion_positions(layout.block)
        self.add_column(name, net, layout, generator, train_tokens, positions)
        model = "ar" if name == "ar" else "student"
        self.log.write({"phase": "eval", "of": model, "tokens": train_tokens, **self.metrics[name]})
        self.log_sample(name, net, layout, rule, model, train_tokens)

    def evaluate_speculative(self, student, layout: Layout, train_tokens: int) -> None:
        """Evaluate the student as an AR model whose text it drafts itself, several tokens at once."""
        generator = generate.speculative_generator(student, layout, None, self.sampling)
        positions = speculative_positions(layout.block)
        self.add_column("speculative", student, AR, generator, train_tokens, positions)

    def add_column(self, name: str, net, layout: Layout, generator: generate.TextGenerator,
                   train_tokens: int, positions: int) -> None:
        """One column of the table. An evaluated token takes about so many `positions` of forward passes."""
        title = f"evaluation of {name}"
        num_tokens = len(self.held_out) * self.length
        print(f"{title}: {len(self.held_out)} texts of up to {self.length} tokens", flush=True)
        with progress_of_passes(title, num_tokens * positions, net, self.teacher):
            self.metrics[name], self.traces[name] = evaluate_model(
                net, self.teacher, layout, generator, self.held_out, self.tokenizer, self.length, self.seed,
                self.judge)
        self.metrics[name]["train_tokens"] = train_tokens

    def quick_eval(self, net, layout: Layout, train_tokens: int, rule) -> float:
        """val_nats of the student on the first 32 stories."""
        quick = self.held_out[:QUICK_STORIES]
        positions = len(quick) * self.length * likelihood_positions(layout.block)
        with progress_of_passes("evaluation", positions, net):
            numbers = metrics.likelihood(net, quick, layout, self.tokenizer)
        self.log.write({"phase": "eval", "of": "student", "tokens": train_tokens, **numbers})
        self.log_sample(f"{train_tokens / 1e3:.1f}k", net, layout, rule, "student", train_tokens)
        return numbers["val_nats"]

    def log_sample(self, title: str, net, layout: Layout, rule, model: str, train_tokens: int) -> None:
        """Continue the sample prompt, if there is one: a line on the terminal, the trace in the log.

        All processes have to call this, since a sharded network generates text in all of them.
        """
        if self.sample_prompt is None:
            return
        sample = generate.continue_prompt(
            net, self.sample_prompt, SAMPLE_TOKENS, layout, rule, self.tokenizer, self.seed, self.sampling)
        self.log.write({"phase": "watch", "of": model, "tokens": train_tokens, **asdict(sample)})
        colour = trace.wants_colour(sys.stdout) and layout.block > 1
        text = trace.coloured(sample, colour).replace("\n", "⏎")
        tqdm.write(f"{title:8} {len(sample.pieces):2} tokens in {sample.forwards:2} forwards | {text}")

    def publish(self, out: Path) -> None:
        """Print the table and the stories; write summary.json and the pictures to the folder of the run."""
        cost = distillation_cost(out / "log.jsonl")
        self.metrics["after"] |= cost
        print("\n" + table(self.metrics))
        print("\n" + self.footnote(cost))
        self.print_stories()
        write_json(out / "summary.json", self.metrics)
        curves.draw(out / "log.jsonl", out / "curves.png")
        trace.picture(self.traces["after"], out / "states.png")
        names = [path.name + "/" * path.is_dir() for path in out.iterdir() if path.suffix != ".lock"]
        print(f"\nleft in {out}: " + " ".join(sorted(names)))

    def footnote(self, cost: dict[str, float]) -> str:
        """How the speed was measured, and what distillation took."""
        device = self.teacher.wte.weight.device
        train_tokens = self.metrics["after"]["train_tokens"]
        return (f"tok_s: up to 128 texts at once, {device}, {torch.get_num_threads()} threads; "
                f"distillation: {train_tokens / 1e3:.0f}k response tokens, "
                f"{cost['loss_positions'] / 1e3:.0f}k of them with a loss, "
                f"{cost['rollout_positions'] / 1e3:.0f}k positions of rollouts, "
                f"{cost['train_flops']:.2g} FLOPs in all")

    def print_stories(self) -> None:
        """Print one story of each model; the students' in the colours of their denoising steps."""
        colour = trace.wants_colour(sys.stdout)
        for name, story in self.traces.items():
            print(f"\n{name}: {trace.coloured(story, colour and name != 'ar')}")
        for name in ("after", "speculative"):
            if colour and name in self.traces:
                story = self.traces[name]
                print(f"\n{name}: {trace.legend(story.num_steps, story.colour_meaning)}")


def sample_prompt_ids(prompt: str | None, tokenizer, length: int) -> Tensor | None:
    """(P,) ids of --sample_prompt, if given. ValueError if SAMPLE_TOKENS more do not fit into `length`."""
    if prompt is None:
        return None
    ids = [tokenizer.bos, *tokenizer.encode(prompt)]
    if len(ids) + SAMPLE_TOKENS > length:
        raise ValueError(f"--sample_prompt has {len(ids)} tokens (with the one that begins a text), and "
                         f"{SAMPLE_TOKENS} more must fit in the {length} positions: shorten it")
    return torch.tensor(ids)


# 2. one model -------------------------------------------------------------------------------------

def evaluate_model(net, teacher, layout: Layout, generator: generate.TextGenerator, held_out: list[Tensor],
                   tokenizer, length: int, seed: int,
                   judge: Callable | None = None) -> tuple[dict, trace.Trace]:
    """All metrics of a model on held-out stories, and the trace of the first text that it generated."""
    texts, seconds = generate.generate_texts(generator, held_out, tokenizer.ends, length, seed)
    scored = held_out if layout.block <= LONG_BLOCK else held_out[:FEW_STORIES]
    numbers = metrics.likelihood(net, scored, layout, tokenizer)
    numbers |= metrics.text_metrics(teacher, texts, seconds, tokenizer, judge)

    rollout, prompt_lens = texts[0]
    prompt_ids = rollout.tokens[0, :prompt_lens[0]].tolist()
    traces = generator.traces(rollout, tokenizer.decode(prompt_ids), tokenizer)
    return numbers, traces[0]


# 3. what an evaluation costs ----------------------------------------------------------------------
# Positions of forward passes per evaluated token, about. They take most of the time, of updates too.

def likelihood_positions(block: int) -> int:
    """A held-out token is scored: one pass over two streams for each slot of a block."""
    return 2 * block


def diffusion_positions(block: int) -> int:
    """A token is scored, one is generated, and the teacher reads it. An AR model has block 1."""
    return likelihood_positions(block) + block + 1


def speculative_positions(block: int) -> int:
    """The same of a student that verifies its own drafts, at about two tokens per forward pass."""
    generated = block * (block + 1) // 2
    return likelihood_positions(1) + generated + 1


def affordable_size(update_tokens: int, updates: int, eval_every: int, block: int,
                    text_tokens: int | None = None) -> tuple[int, int]:
    """How many texts, of how many tokens, keep evaluation to a tenth of a run that pretrains nothing.

    The run takes `updates`, each on `update_tokens`, with an evaluation every `eval_every` of them. There are
    at least 4 texts of 32 tokens, even if that is more than a tenth of a very short run. `text_tokens`, if
    given, is kept.
    """
    quick = updates // eval_every * likelihood_positions(block)
    columns = diffusion_positions(1) + 2 * diffusion_positions(block) + speculative_positions(block)
    training = updates * update_tokens * TRAIN_POSITIONS
    evaluation = training // 9                                   # positions
    num_tokens = evaluation // (columns + quick)
    tokens = text_tokens or clamp(num_tokens // NUM_TEXTS[0], *TEXT_TOKENS)
    texts = num_tokens // tokens
    if texts > QUICK_STORIES:                                    # the others are only in the columns
        texts = (evaluation // tokens - QUICK_STORIES * quick) // columns
    return clamp(texts, *NUM_TEXTS), tokens


def clamp(x: int, low: int, high: int) -> int:
    """The number nearest to x from low to high."""
    return min(max(x, low), high)


# 4. the report ------------------------------------------------------------------------------------

def table(numbers: dict[str, dict]) -> str:
    """The metrics of several models as text: a column per model, a row per metric that all of them have."""
    header = " " * 18 + "".join(f"{name:>13}" for name in numbers)
    lines = [header]
    for metric in TABLE_METRICS:
        if not all(metric in of_model for of_model in numbers.values()):
            continue
        digits = 0 if metric == "tok_s" else 3
        cells = [f"{of_model[metric]:13.{digits}f}" for of_model in numbers.values()]
        lines.append(f"{metric:18}" + "".join(cells))
    return "\n".join(lines)


def distillation_cost(log: Path) -> dict[str, float]:
    """What distillation took, from its records: positions in a loss, positions of rollouts, FLOPs.

    A step that was repeated after a resume counts once.
    """
    steps = {}
    for line in log.read_text().splitlines():
        record = json.loads(line)
        if record.get("phase") == "distil":
            steps[record["step"]] = record
    return {
        "loss_positions": sum(step["loss_positions"] for step in steps.values()),
        "rollout_positions": sum(step["positions"] for step in steps.values()),
        "train_flops": sum(step["flops"] for step in steps.values()),
    }


def write_json(path: Path, value) -> None:
    """Write a JSON file, whole or not at all; its folder is made if needed."""
    text = to_json(value, indent=1)
    trace.write_atomically(path, lambda unfinished: unfinished.write_text(text))
