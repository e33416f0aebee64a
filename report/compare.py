"""What a run says of its models: numbers and a story of each; at its end the table, the summary and the pictures."""
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import story_world
from data.tinystories import Corpus, stories
from model.masks import Layout
from report import curves, generate, metrics, trace

SAMPLE_TOKENS = 32        # tokens that go on from a prompt that is watched


def sample_prompt_ids(prompt: str | None, tokenizer, length: int) -> Tensor | None:
    """(P,) the ids of a prompt that is watched, if there is one, refused if it leaves no room in `length` positions."""
    if prompt is None:
        return None
    ids = [tokenizer.eot, *tokenizer.encode(prompt)]
    if len(ids) + SAMPLE_TOKENS > length:
        raise ValueError(f"--sample_prompt has {len(ids)} tokens, its start counted, and {SAMPLE_TOKENS} more must fit in the "
                         f"{length} positions: shorten it")
    return torch.tensor(ids)


class Evaluator:
    """Models looked at over the same held-out stories: 512 of the story world, which has a checker, 128 of a text; and
    by what they write after the `prompt` (P,) that is watched, if any, from the same random numbers each time."""

    def __init__(self, teacher, corpus: Corpus, length: int, seed: int, log, prompt: Tensor | None = None):
        self.teacher, self.tokenizer, self.length, self.seed, self.log = teacher, corpus.tokenizer, length, seed, log
        self.prompt = prompt
        self.check, count = (story_world.check, 512) if corpus.name == "toy" else (None, 128)
        self.held = metrics.held_out(corpus.val, stories(corpus.val, corpus.tokenizer.eot), count, length)
        self.numbers, self.stories = {}, {}

    def evaluate(self, name: str, net, layout, rule, tokens: int) -> None:
        """At one that was trained on so many tokens: ar, before or after."""
        self.numbers[name], self.stories[name] = evaluate_model(
            net, self.teacher, layout, rule, self.held, self.tokenizer, self.length, self.seed, self.check)
        self.numbers[name]["train_tokens"] = tokens
        of = "ar" if name == "ar" else "student"
        self.log.write({"phase": "eval", "of": of, "tokens": tokens, **self.numbers[name]})
        self.watch(name, net, layout, rule, of, tokens)

    def quick_eval(self, net, layout, tokens: int, rule) -> float:
        """val_nats of a few, noted in the log."""
        numbers = metrics.likelihood(net, self.held[:32], layout, self.tokenizer)
        self.log.write({"phase": "eval", "of": "student", "tokens": tokens, **numbers})
        self.watch(f"{tokens / 1e3:.1f}k", net, layout, rule, "student", tokens)
        return numbers["val_nats"]

    def watch(self, name: str, net, layout, rule, of: str, tokens: int) -> None:
        """A line of what comes after the prompt now, under a model's name or the tokens it had so far, and its trace
        in the log. All processes have to take part."""
        if self.prompt is None:
            return
        story = generate.continue_prompt(net, self.prompt, SAMPLE_TOKENS, layout, rule, self.tokenizer, self.seed)
        self.log.write({"phase": "watch", "of": of, "tokens": tokens, **asdict(story)})
        text = trace.coloured(story, trace.wants_colour(sys.stdout) and layout.block > 1).replace("\n", "⏎")
        tqdm.write(f"{name:8} {len(story.pieces):2} tokens in {story.forwards:2} forwards | {text}")

    def publish(self, out: Path) -> None:
        """The table and the stories on the terminal; summary.json and the pictures in the run's folder."""
        self.numbers["after"] |= (cost := spent(out / "log.jsonl"))
        print("\n" + table(self.numbers))
        print(f"\ntok_s: up to 128 texts at once, {self.teacher.wte.weight.device}, {torch.get_num_threads()} threads; "
              f"distillation: {self.numbers['after']['train_tokens'] / 1e3:.0f}k response tokens, "
              f"{cost['loss_positions'] / 1e3:.0f}k of them with a loss, "
              f"{cost['rollout_positions'] / 1e3:.0f}k positions of rollouts, {cost['train_flops']:.2g} FLOPs in all")
        colour = trace.wants_colour(sys.stdout)
        for name, story in self.stories.items():
            print(f"\n{name}: {trace.coloured(story, colour and name != 'ar')}")
        if colour:
            print("\n" + trace.legend(self.stories["after"].block))
        write_json(out / "summary.json", self.numbers)
        curves.draw(out / "log.jsonl", out / "curves.png")
        trace.picture(self.stories["after"], out / "states.png")
        print(f"\nleft in {out}: " + " ".join(sorted(p.name + "/" * p.is_dir() for p in out.iterdir())))


def spent(log: Path) -> dict[str, float]:
    """What distillation took beside response tokens, from its records: positions that entered a loss, positions of
    rollouts, FLOPs of all. A step that was made again counts once."""
    lines = map(json.loads, log.read_text().splitlines())
    steps = {line["step"]: line for line in lines if line.get("phase") == "distil"}
    return {name: sum(step[key] for step in steps.values()) for name, key in (
        ("loss_positions", "loss_positions"), ("rollout_positions", "positions"), ("train_flops", "flops"))}


def write_json(path: Path, value) -> None:
    """A file that appears whole or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    new.write_text(json.dumps(value, indent=1))
    os.replace(new, path)


def evaluate_model(net, teacher, layout: Layout, rule, stories: list[Tensor], tokenizer, length: int, seed: int,
             check: Callable | None = None) -> tuple[dict, trace.Trace]:
    """All the numbers of a model over held-out `stories`, and the trace of the first text that it wrote. A likelihood
    takes as many passes as a block has slots: for long blocks it is that of 64 stories."""
    writer = generate.diffusion_generator(net, layout, rule)
    texts, seconds = generate.generate_texts(writer, stories, tokenizer.eot, length, seed)
    scored = stories if layout.block <= 32 else stories[:64]
    numbers = metrics.likelihood(net, scored, layout, tokenizer) | metrics.text_metrics(teacher, texts, seconds, tokenizer, check)
    (text, lens), *_ = texts
    return numbers, writer.traces(text, tokenizer.decode(text.tokens[0, :lens[0]].tolist()), tokenizer)[0]


ROWS = ("val_nats", "bits_per_byte", "gen_nats", "valid", "distinct2", "entropy", "tok_per_fwd", "positions_per_tok",
        "tok_s")


def table(numbers: dict[str, dict]) -> str:
    """A column a model, a row a number."""
    lines = [" " * 18 + "".join(f"{name:>10}" for name in numbers)]
    for row in (row for row in ROWS if all(row in column for column in numbers.values())):
        digits = 0 if row == "tok_s" else 3
        lines.append(f"{row:18}" + "".join(f"{column[row]:10.{digits}f}" for column in numbers.values()))
    return "\n".join(lines)
