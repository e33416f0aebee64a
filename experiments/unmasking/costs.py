"""What a policy costs in seconds, and pictures: all points, and one story by it and by the threshold rule."""
import statistics
import time
from pathlib import Path

import torch

from data.tinystories import stories
from decoding import reveal
from decoding.sampling import SamplingConfig
from experiments.common.results import HERE
from experiments.common.students import in_turns
from experiments.unmasking.hull import bar, hull, point, policies
from experiments.unmasking.policies import folder
from experiments.unmasking.worlds import heuristics, opened_world
from report import generate, metrics, trace
from unmasking.grpo import RecordingRule
from unmasking.policy import PolicyRule, load_policy
from unmasking.train import MIN_PROMPT, valid

TURNS = 5


def learned(options, results: dict) -> PolicyRule:
    """The policy of the first seed, of the alpha that is shown, at its temperature."""
    said = next(p for p in results["policies"] if (p["alpha"], p["seed"]) == (results["shown"], 0))
    made = load_policy(folder(options) / f"{results['world']},{said['policy']},seed0".replace(" ", "") / "policy")
    return PolicyRule(made, temperature=said["temperature"])


def told(options, count: int) -> tuple:
    """The world's student, its layout, stories for choosing, the tokenizer, the length."""
    net, layout, length, corpus = opened_world(options.world, options.quick)
    starts = stories(corpus.val, corpus.tokenizer.eot)
    return net, layout, metrics.held_out(corpus.val, starts, count, length), corpus.tokenizer, length


def costs(options, results: dict, expert: str) -> dict:
    """Seconds a token, 8 texts one at a time, a number a turn, of greedy text: by the policy, the heuristic that it
    began with, thresholds; AR's loop. And what the policy itself takes a step."""
    net, layout, held, tok, _ = told(options, 8)
    rules = {"policy": learned(options, results), expert: heuristics(options.world)[expert],
             "threshold:0.9": reveal.parse("threshold:0.9")}
    writers = {title: generate.diffusion_generator(net, layout, rule, SamplingConfig(temperature=0)) for title, rule in rules.items()}
    found = in_turns(writers, net, held, tok.eot, 0, TURNS, MIN_PROMPT)
    return {"seconds a token": found, "seconds of the policy a step": alone(rules["policy"], layout.block)}


def alone(rule: PolicyRule, block: int, times: int = 200) -> float:
    """Of one text."""
    sure, masked = torch.rand(1, block), torch.ones(1, block, dtype=torch.bool)
    numbers, step = torch.rand(1, block, rule.numbers(block)), torch.zeros(1, dtype=torch.long)
    begun = time.perf_counter()
    for _ in range(times):
        rule(sure, masked, step, numbers)
    return (time.perf_counter() - begun) / times


def choices(options, results: dict, expert: str) -> dict:
    """Where the policy and the heuristic that it began with part, in 64 of the policy's texts: how many slots a text
    come off sooner than by that, and how many later, and quantiles of how sure the student is of them."""
    net, layout, held, tok, length = told(options, 64)
    noted = RecordingRule(learned(options, results))
    writer = generate.diffusion_generator(net, layout, noted, SamplingConfig(temperature=0))
    generate.generate_texts(writer, held, tok.eot, length, 0, min_prompt=MIN_PROMPT)
    seen = noted.trajectory()
    theirs = seen.relabelled(heuristics(options.world)[expert]).action[0]
    ours, sure = seen.action[seen.active], seen.confidence[seen.active]
    parted = {"sooner": sure[ours & ~theirs], "later": sure[theirs & ~ours]}
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    return {name: {"a text": len(some) / len(held), "sure": some.quantile(levels).tolist() if len(some) else []}
            for name, some in parted.items()}


def draw(results: dict, figure) -> None:
    """`valid` against NFE: heuristics, their hull, the policies. And the reward that collapses."""
    left, *right = figure.subplots(1, 1 + bool(results["collapse"]), squeeze=False)[0]
    left.plot(*zip(*bar(results)), ".", color="0.8", label="heuristics")
    left.plot(*zip(*hull(bar(results))), color="0.5", label="their hull")
    for name, some in policies(results).items():
        left.plot(*zip(*(point(policy["looks"][""]) for policy in some)), "*", label=name)
        scaled = [x for policy in some for what, x in policy["looks"].items() if what.startswith("beta")]
        if scaled:
            left.plot(*zip(*map(point, scaled)), "+", label=f"{name}, times beta")
    left.set(xlabel="NFE, steps a text", ylabel="valid")
    left.grid(alpha=0.3)
    left.legend(fontsize=6)
    for run, color in zip(results["collapse"], ("0.4", "C3")):
        steps, _, quality, nfe, *_ = zip(*run["log"])
        right[0].plot(smooth(steps), smooth(quality), color=color, label=f"{run['reward']}: quality")
        right[0].plot(smooth(steps), [x / max(nfe) for x in smooth(nfe)], ":", color=color,
                      label=f"{run['reward']}: NFE / {max(nfe):.0f}")
        right[0].set(xlabel="update", title="the additive reward, from a poor start")
        right[0].legend(fontsize=6)


def smooth(values, size: int = 10) -> list[float]:
    """Means of so many neighbours."""
    return [statistics.mean(values[i:i + size]) for i in range(0, len(values), size)]


def story(options, results: dict) -> None:
    """story.png beside the results: the first story for choosing, by the policy and by threshold:0.9, a row a step, a
    column a token."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    net, layout, held, tok, length = told(options, 1)
    rules = {"by the policy": learned(options, results), "by threshold:0.9": reveal.parse("threshold:0.9")}
    figure, axes = plt.subplots(2, 1, figsize=(13, 5.4), dpi=130)
    for one, (title, rule) in zip(axes, rules.items()):
        writer = generate.diffusion_generator(net, layout, rule, SamplingConfig(temperature=0))
        texts, _ = generate.generate_texts(writer, held, tok.eot, length, 0, min_prompt=MIN_PROMPT)
        panel(one, title, *texts[0], tok, layout.block)
    figure.tight_layout()
    where = Path("out/experiments/quick") if options.quick else HERE
    trace.save(figure, where / f"unmasking_{options.world}" / "story.png")
    plt.close(figure)


def panel(axes, title: str, text, lens, tok, block: int) -> None:
    """Each token at the step of the text at which its mask came off."""
    kept = text.response_mask[0]
    order, pieces = text.order[0][kept], tok.pieces(text.tokens[0][kept].tolist())
    began, steps = 0, []
    for i in range(0, len(order), block):
        part = order[i:i + block]
        steps += (began + part).tolist()
        began += int(part.max()) + 1
    right = bool(valid(text, tok)[0])
    for at, (step, piece) in enumerate(zip(steps, pieces)):
        axes.plot(at, step, "s", color=f"C{at // block % 2}", ms=3)
        axes.text(at, step - 0.6, trace.visible(piece).strip(), fontsize=6, rotation=60, va="bottom")
    axes.set(title=f"{title}: {len(order)} tokens in {began} steps, {'valid' if right else 'not valid'}", ylabel="step",
             xlim=(-1, len(order) + 1), ylim=(began + 0.5, -4))
    axes.grid(alpha=0.2)
