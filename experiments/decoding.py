"""Quality against speed: every reveal rule over its parameter, by block, with AR and verified text as points beside it.

    python -m experiments.decoding              the story world, blocks 4, 8, 16, three seeds: about an hour and a half
    python -m experiments.decoding --quick      the plumbing, a minute

Students are those of `train_tiny.py --data=toy --block=... --seed=...`, in out/; a look that is there is not taken
again. Leaves experiments/decoding/results.json (every seed, every point, the commit) and curves.png.
"""
import json
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data import tokenizer, toy
from data.corpus import open_corpus
from data.tinystories import stories
from experiments import speed
from experiments.results import at_cost, cell, finish
from model import hub, reveal
from model.dist import facts
from model.masks import AR, Layout
from report import cli, measure
from report.cli import option
from report.publish import write_json

ROOT = Path(__file__).parent.parent
LEVELS = (0.5, 0.7, 0.9, 0.98, 1)
WAYS = {                                # of rules by name: specs, and the confidence that they go by
    "leftmost": ([f"leftmost:{level}" for level in LEVELS], None),
    "threshold": ([f"threshold:{level}" for level in LEVELS], None),
    "factor": ([f"factor:{bound}" for bound in (0.02, 0.1, 0.5, 1)], None),
    "eb": ([f"eb:{bound}" for bound in (0, 0.02, 0.1, 0.5)], None),
    **{f"static, {name}": ([f"static:{n}" for n in (1, 2, 4)], name) for name in ("largest", "margin", "entropy")},
    "random": ([f"random:{n}" for n in (1, 2, 4)], None)}
POINTS = {"ar": "AR", "self": "verified by itself", "teacher": "verified by the teacher"}


@dataclass
class Options:
    quick: bool = option(False, "one tiny student, few looks: whether it runs at all")
    seeds: int = option(3, "students of each block")
    stories: int = option(256, "that a look is made of; their speed is that of the first 16, one at a time")


def student(block: int, seed: int, quick: bool) -> Path:
    """The folder of a run, made if it is not there."""
    folder = Path("out", "quick" if quick else "" if block == 4 else f"block-{block}", f"toy-{seed}")
    short = ["--pretrain_steps=20", "--distill_steps=4", "--warm_steps=2", "--layers=1", "--width=64"] if quick else []
    if not (folder / "summary.json").exists():
        subprocess.run([sys.executable, str(ROOT / "train_tiny.py"), "--data=toy", f"--block={block}", f"--seed={seed}",
                        f"--out={folder}", *short], check=True)
    return folder


def looks(block: int, seed: int, options: Options) -> dict[str, dict]:
    """Numbers by name, those of AR and verified text too."""
    folder = student(block, seed, options.quick)
    (net, _), (teacher, _), tok = hub.load(folder / "opdlm"), hub.load(folder / "ar"), tokenizer.load(folder / "ar")
    layout, corpus = Layout(block, 1, 1), open_corpus("toy", None, 0, None)
    held = measure.held_out(corpus.val, stories(corpus.val, tok.eot), options.stories, net.config.context)
    writers = {"ar": measure.by_rule(teacher, AR, reveal.parse("static:1")), "self": measure.by_verifier(net, layout),
               "teacher": measure.by_verifier(net, layout, teacher)}
    for name, (specs, confidence) in WAYS.items():
        writers |= {f"{name} {spec}": measure.by_rule(net, layout, reveal.parse(spec, confidence)) for spec in specs}
    seen = {}
    for name, writer in list(writers.items())[::6 if options.quick else 1]:
        made = measure.generate(writer, held, tok.eot, net.config.context, seed)
        _, seconds = alone = measure.generate(writer, held[:16], tok.eot, net.config.context, seed, batch=1)
        count = sum(int(text.kept.sum()) for text, _ in alone[0])
        seen[name] = measure.generated(teacher, *made, tok, toy.check) | {"tok_s": count / seconds}
    prompt, length = torch.stack([story[:8] for story in held[:16]]), net.config.context - 8
    seconds = sum(speed.timed(partial(speed.ar, teacher, row[None], length)) for row in prompt)
    seen["ar"]["tok_s"] = 16 * length / seconds                             # a plain loop's, the fairest to AR
    return seen


def aup(points: list[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (d3LLM, 2601.07568): the area under accuracy, in percent, over tokens per forward, of
    the points not more than 5 below the slowest; accuracy below the `best` of all counts exp(-3 (1 - accuracy / best))
    of itself. From 0 to the slowest point it is that point's."""
    points = sorted(points)
    points = [(x, y) for x, y in points if y >= points[0][1] - 5]
    weighed = [(x, y * min(math.exp(-3 * (1 - y / max(best, 1))), 1)) for x, y in points]
    area = points[0][0] * points[0][1]
    return area + sum((b - a) * (y + z) / 2 for (a, y), (b, z) in zip(weighed, weighed[1:]))


def main(argv: list[str]) -> None:
    options = cli.parse(Options, argv, __doc__)
    torch.set_num_threads(1)
    blocks, seeds = ((4,), 1) if options.quick else ((4, 8, 16), options.seeds)
    runs = []
    for seed in range(seeds):
        for block in blocks:
            file = Path("out/experiments", "quick" if options.quick else "decoding", f"{block}-{seed}.json")
            if not file.exists():
                write_json(file, looks(block, seed, options))
            runs.append({"block": block, "seed": seed, "looks": json.loads(file.read_text())})
            print(f"{len(runs)}/{len(blocks) * seeds} block {block}, seed {seed}", flush=True)
    results = {"command": "python -m experiments.decoding", **facts(torch.device("cpu")), "runs": runs}
    finish("decoding", results, draw, options.quick)
    print(table(results), points(results), sep="\n\n")


def by_block(results: dict) -> dict[int, list[dict]]:
    """The looks of all seeds."""
    seen = {}
    for run in results["runs"]:
        seen.setdefault(run["block"], []).append(run["looks"])
    return seen


def ways(look: dict) -> dict[str, list[str]]:
    """The names of its numbers by the rule they belong to."""
    return {way: names for way in WAYS if (names := [name for name in look if name.rpartition(" ")[0] == way])}


def table(results: dict) -> str:
    """Markdown: a row a block and rule, at equal cost; AR and verified text are points."""
    lines = ["| block | rule | `valid` at 1.5 | at 2 | `gen_nats` at 1.5 | at 2 | AUP |", "|" + "---|" * 7]
    for block, seen in by_block(results).items():
        for way, names in ways(seen[0]).items():
            cells = [cell([at_cost(look, number, cost, tuple(names)) for look in seen])
                     for number in ("valid", "gen_nats") for cost in (1.5, 2)]
            areas = [aup([(look[n]["tok_per_fwd"], 100 * look[n]["valid"]) for n in names],
                         100 * look["ar"]["valid"]) for look in seen]
            lines.append(f"| {block} | {way} | {' | '.join(cells)} | {cell(areas, 0)} |")
    return "\n".join(lines)


def points(results: dict) -> str:
    """Markdown: AR and verified text, which have no parameter."""
    numbers = ("tok_per_fwd", "positions_per_tok", "valid", "gen_nats", "distinct2")
    lines = [f"| block | | {' | '.join(f'`{n}`' for n in numbers)} | `tok_s` / AR's |", "|" + "---|" * 8]
    for block, seen in by_block(results).items():
        for name in (name for name in POINTS if name in seen[0]):
            cells = [cell([look[name][number] for look in seen]) for number in numbers]
            cells.append(cell([look[name]["tok_s"] / look["ar"]["tok_s"] for look in seen], 2))
            lines.append(f"| {block} | {POINTS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict, figure) -> None:
    """`valid` against tokens a forward, a picture a block, a line a rule, and the points."""
    blocks = by_block(results)
    for axes, (block, seen) in zip(figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0], blocks.items()):
        def mean(name, number, seen=seen):
            return statistics.mean(look[name][number] for look in seen)
        for way, names in ways(seen[0]).items():
            axes.plot([mean(n, "tok_per_fwd") for n in names], [mean(n, "valid") for n in names], marker=".", label=way)
        for name in (name for name in POINTS if name in seen[0]):
            axes.plot(mean(name, "tok_per_fwd"), mean(name, "valid"), "*", ms=12, label=POINTS[name])
        axes.set(xlabel="tokens a forward", title=f"block {block}")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("valid")
    figure.axes[-1].legend(fontsize=8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
