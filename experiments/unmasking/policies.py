"""Trains policies, evaluates them and heuristics, and looks into one policy. All of it is kept in out/; what
was made with other settings is made again."""
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data.tinystories import stories
from decoding import reveal
from decoding.sampling import SamplingConfig
from experiments.common.job import WORK
from experiments.common.results import cached
from experiments.common.timing import seconds_per_token
from experiments.unmasking.worlds import WORLDS, BlindRule, can_be_imitated, heuristics, job_of, open_world
from report import generate, metrics
from report.compare import write_json
from training.resume import check_writable, latest_state, start_progress
from unmasking import grpo
from unmasking import train as policy_training
from unmasking.policy import PolicyRule, load_policy

TEMPERATURES = (0.25, 0.5, 1)
BETAS = (0.25, 0.5, 0.75, 1, 10, 100)
EVALUATION_VERSION = 1      # raise these when the same settings give another evaluation, or another policy
TRAINING_VERSION = 3
TURNS = 5
GREEDY = SamplingConfig(temperature=0)
LEAST = policy_training.MIN_PROMPT


def work_folder(options) -> Path:
    return WORK / ("quick" if options.quick else "unmasking")


def held_stories(options, count: int) -> tuple:
    """The world's student, its layout, the first held-out stories, the tokenizer, the length of a text."""
    net, layout, length, corpus = open_world(options.world, options.quick)
    starts = stories(corpus.val, corpus.tokenizer.eot)
    return net, layout, metrics.held_out(corpus.val, starts, count, length), corpus.tokenizer, length


# 1. evaluation --------------------------------------------------------------------------------------------

def evaluate_rule(options, rule: Callable, part: str) -> dict:
    """Metrics of a rule's texts on the "dev" or the "test" stories: the share that is valid, steps (NFE) and
    forward passes per text, each alpha's mean reward and standard error; and of each text whether it is
    valid, and its NFE."""
    net, layout, held, tok, length = held_stories(options, options.dev + options.test)
    held = held[:options.dev] if part == "dev" else held[options.dev:]
    valid, nfe = [], []
    forwards = 0
    for i in range(0, len(held), 128):
        recorder = grpo.RecordingRule(rule)
        generator = generate.diffusion_generator(net, layout, recorder, GREEDY)
        texts, _ = generate.generate_texts(generator, held[i:i + 128], tok.eot, length, i, min_prompt=LEAST)
        text, _ = texts[0]
        valid.append(policy_training.valid(text, tok))
        nfe.append(recorder.trajectory().active.sum(0))
        forwards += int(text.forwards.sum()) / len(held)
    valid = torch.cat(valid)
    nfe = torch.cat(nfe)
    room = policy_training.max_response(length)
    mean_reward, error = {}, {}
    for alpha in WORLDS[options.world].alphas:
        reward = grpo.reward(valid, nfe, room, alpha)
        mean_reward[str(alpha)] = reward.mean().item()
        error[str(alpha)] = (reward.std() / len(reward) ** 0.5).item()
    return {
        "valid": valid.mean().item(),
        "nfe": nfe.float().mean().item(),
        "forwards": forwards,
        "length": room,
        "reward": mean_reward,
        "error": error,
        "valid_each": valid.int().tolist(),
        "nfe_each": nfe.tolist(),
    }


def evaluate(options, rule: Callable, part: str, title: str, settings: dict) -> dict:
    """The same; read from out/ if it is there with these settings."""
    torch.set_num_threads(1)
    all_settings = {
        "version": EVALUATION_VERSION,
        "student": job_of(options.world, options.quick).settings,
        "stories": [options.dev, options.test],
        **settings,
    }
    name = f"{options.world}, {title}, {part}.json".replace(" ", "")
    file = work_folder(options) / "evaluations" / name
    return cached(file, all_settings, partial(evaluate_rule, options, rule, part))


def evaluate_heuristic(options, part: str, name: str) -> dict:
    return evaluate(options, heuristics(options.world)[name], part, name, {})


# 2. training ----------------------------------------------------------------------------------------------

def train_policy(
    options,
    title: str,
    expert: str,
    until: tuple,
    seed: int,
    begin: tuple[Path, int] | None = None,
    **learning,
) -> tuple[Path, dict]:
    """The folder of a policy, and its settings; trained first, if out/ does not have it. A killed run is
    resumed.

    `begin` is the folder of another policy to continue from, and the phase of `until` that it has finished.
    """
    torch.set_num_threads(1)
    world = options.world
    learning = WORLDS[world].learning | learning
    net, layout, length, corpus = open_world(world, options.quick)
    rule = heuristics(world)[expert]
    assert can_be_imitated(rule)
    if options.quick:
        until = tuple(2 + sorted(set(until)).index(n) for n in until)
    settings = grpo.Settings(policy_training.max_response(length), expert=rule, **learning)
    described = {
        "version": TRAINING_VERSION,
        "student": job_of(world, options.quick).settings,
        "expert": expert,
        "until": list(until),
        "seed": seed,
        "rate": settings.lr,
        **{name: getattr(value, "__name__", value) for name, value in learning.items()},
    }
    out = check_writable(work_folder(options) / f"{world}, {title}, seed {seed}".replace(" ", ""))
    if read_json(out / "job.json") == described:
        return out, described
    (out / "job.json").unlink(missing_ok=True)
    state = out / "policy" / policy_training.STATE
    was_begun = read_json(out / "begun.json") == described
    if not was_begun:
        start_progress(state, described)
        write_json(out / "begun.json", described)
    data = partial(policy_training.get_stories, corpus, length=length, seed=seed, device="cpu")
    if begin:
        folder, phase = begin
        begin = load_policy(folder / "policy").requires_grad_(True), until[phase]
    resume = was_begun and latest_state(state) is not None
    began = time.process_time()
    policy_training.train_policy(
        net, layout, None, corpus, data, settings, until, seed, out, described, resume, begin
    )
    write_json(out / "seconds.json", time.process_time() - began)
    write_json(out / "job.json", described)
    return out, described


def read_json(file: Path):
    """What a file holds; None if it does not exist."""
    return json.loads(file.read_text()) if file.exists() else None


def train_phase(options, expert: str, seed: int, phase: int,
                alpha: float = grpo.Settings.warmup_alpha) -> tuple[Path, dict]:
    """A policy that has imitated the expert (phase 0), then learned to be fast at a high alpha (1), then
    learned for its own alpha (2). Phases that policies of a seed have in common are trained once."""
    until = WORLDS[options.world].until
    begin = None
    if phase:
        before, _ = train_phase(options, expert, seed, phase - 1)
        begin = before, phase - 1
    title = ("imitated", "fast", f"alpha {alpha:g}")[phase]
    stop = tuple(min(n, until[phase]) for n in until)
    return train_policy(options, title, expert, stop, seed, begin, alpha=alpha)


def log_records(out: Path) -> list[list]:
    """Of each update: number, reward, quality, NFE, exploration, share of groups with equal rewards."""
    lines = (out / "policy.jsonl").read_text().splitlines()[1:]
    by_step = {}
    for line in lines:                           # a resumed run has some updates twice: the last one counts
        record = json.loads(line)
        by_step[record["step"]] = record
    names = ("step", "reward", "quality", "nfe", "exploration", "tied_groups")
    return [[record.get(name) for name in names] for record in by_step.values()]


def imitating_policy(options, expert: str, seed: int) -> dict:
    """One that has only imitated."""
    out, settings = train_phase(options, expert, seed, 0)
    return evaluate_policy(options, out, settings, "imitated", expert, seed)


def fast_phase_seconds(options, expert: str, seed: int) -> float:
    """The seconds of the second phase, which policies of a seed have in common."""
    out, _ = train_phase(options, expert, seed, 1)
    return read_json(out / "seconds.json")


def rewarded_policy(options, expert: str, shown_alpha: float, work: tuple[float, int]) -> dict:
    """One that went through all phases, for (alpha, seed)."""
    alpha, seed = work
    out, settings = train_phase(options, expert, seed, 2, alpha)
    return evaluate_policy(
        options, out, settings, f"alpha {alpha:g}", expert, seed, alpha, alpha == shown_alpha
    )


def evaluate_policy(
    options,
    out: Path,
    settings: dict,
    title: str,
    expert: str,
    seed: int,
    alpha: float | None = None,
    in_detail: bool = False,
) -> dict:
    """Its evaluations at the temperature whose reward is best on the stories for choosing; `in_detail` also
    with scaled rates (temperature 1) and blind."""
    learned = PolicyRule(load_policy(out / "policy"))

    def measure(rule, part, what=""):
        name = f"{title}, seed {seed}, at {rule.temperature}, {what}"
        return evaluate(options, rule, part, name, settings)

    by_temperature = {t: measure(replace(learned, temperature=t), "dev") for t in TEMPERATURES}
    chosen_alpha = str(1 if alpha is None else alpha)
    best = max(TEMPERATURES, key=lambda t: by_temperature[t]["reward"][chosen_alpha])
    rule = replace(learned, temperature=best)
    evaluations = {"": measure(rule, "test")}
    if in_detail:
        for beta in BETAS:
            evaluations[f"beta {beta}"] = measure(replace(learned, beta=beta), "test", f"beta {beta}")
        for how in ("mean", "shuffled"):
            evaluations[how] = measure(BlindRule(rule, how), "test", how)
    return {
        "policy": title,
        "alpha": alpha,
        "seed": seed,
        "expert": expert,
        "temperature": best,
        "seconds": read_json(out / "seconds.json"),
        "dev_by_temperature": by_temperature,
        "evaluations": evaluations,
        "log": log_records(out),
    }


def reward_comparison(options, expert: str, reward: str) -> dict:
    """The log of a policy at alpha 3 that hardly imitated, so that most of its texts are wrong."""
    learning = {"alpha": 3, "reward": getattr(grpo, reward)}
    out, _ = train_policy(options, f"little, {reward}", expert, (3, 3, 123), 0, **learning)
    return {"reward": reward, "log": log_records(out)}


# 3. a closer look at one policy ---------------------------------------------------------------------------

def shown_policy(options, results: dict) -> PolicyRule:
    """The policy of the first seed and the shown alpha, at its temperature."""
    for policy in results["policies"]:
        if (policy["alpha"], policy["seed"]) == (results["shown_alpha"], 0):
            name = f"{results['world']}, {policy['policy']}, seed 0".replace(" ", "")
            learned = load_policy(work_folder(options) / name / "policy")
            return PolicyRule(learned, temperature=policy["temperature"])


def measure_costs(options, results: dict, expert: str) -> dict:
    """Seconds per token of greedy text, 8 texts one at a time: by the policy, by the heuristic that it
    imitated, by a threshold, and by AR's loop. And the seconds that the policy itself takes per step."""
    net, layout, held, tok, _ = held_stories(options, 8)
    rules = {
        "policy": shown_policy(options, results),
        expert: heuristics(options.world)[expert],
        "threshold:0.9": reveal.parse("threshold:0.9"),
    }
    generators = {
        name: generate.diffusion_generator(net, layout, rule, GREEDY) for name, rule in rules.items()
    }
    return {
        "seconds_per_token": seconds_per_token(generators, net, held, tok.eot, 0, TURNS, LEAST),
        "seconds_per_step": seconds_per_step(rules["policy"], layout.block),
    }


def seconds_per_step(rule: PolicyRule, block: int, calls: int = 200) -> float:
    """Of one text."""
    confidence = torch.rand(1, block)
    masked = torch.ones(1, block, dtype=torch.bool)
    u = torch.rand(1, block, rule.numbers(block))
    step = torch.zeros(1, dtype=torch.long)
    began = time.perf_counter()
    for _ in range(calls):
        rule(confidence, masked, step, u)
    return (time.perf_counter() - began) / calls


def find_disagreements(options, results: dict, expert: str) -> dict:
    """Where the policy and the heuristic that it imitated differ, in 64 of the policy's texts: positions per
    text that it reveals sooner, and later, and quantiles of the student's confidence there."""
    net, layout, held, tok, length = held_stories(options, 64)
    recorder = grpo.RecordingRule(shown_policy(options, results))
    generator = generate.diffusion_generator(net, layout, recorder, GREEDY)
    generate.generate_texts(generator, held, tok.eot, length, 0, min_prompt=LEAST)
    seen = recorder.trajectory()
    theirs = seen.relabelled(heuristics(options.world)[expert]).action[0]
    ours = seen.action[seen.active]
    confidence = seen.confidence[seen.active]
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    found = {}
    for name, differs in (("sooner", ours & ~theirs), ("later", theirs & ~ours)):
        values = confidence[differs]
        quantiles = values.quantile(levels).tolist() if len(values) else []
        found[name] = {"per_text": len(values) / len(held), "confidence": quantiles}
    return found


def draw_story(options, results: dict, path: Path) -> None:
    """A picture of the first story for choosing, by the policy and by threshold:0.9: one row per step, one
    column per token."""
    from experiments.common.plots import save_picture
    net, layout, held, tok, length = held_stories(options, 1)
    rules = {
        "by the policy": shown_policy(options, results),
        "by threshold:0.9": reveal.parse("threshold:0.9"),
    }

    def plot(results, figure):
        figure.set_size_inches(14, 8)
        for axes, (title, rule) in zip(figure.subplots(2, 1), rules.items()):
            generator = generate.diffusion_generator(net, layout, rule, GREEDY)
            texts, _ = generate.generate_texts(generator, held, tok.eot, length, 0, min_prompt=LEAST)
            text, _ = texts[0]
            plot_story(axes, title, text, tok, layout.block)
    save_picture(plot, results, path)


def plot_story(axes, title: str, text, tok, block: int) -> None:
    """Each token at the step of the text that revealed it; blocks in two colours by turns."""
    from experiments.common.plots import COLORS
    from report import trace
    kept = text.response_mask[0]
    order = text.order[0][kept]
    pieces = tok.pieces(text.tokens[0][kept].tolist())
    total = 0                                    # steps of the blocks before this one
    steps = []
    for i in range(0, len(order), block):
        in_block = order[i:i + block]
        steps += (total + in_block).tolist()
        total += int(in_block.max()) + 1
    for position, (step, piece) in enumerate(zip(steps, pieces)):
        axes.plot(position, step, "s", color=COLORS[position // block % 2], markersize=4)
        axes.text(position, step - 0.6, trace.visible(piece).strip(), fontsize=10, rotation=60, va="bottom")
    verdict = "valid" if bool(policy_training.valid(text, tok)[0]) else "not valid"
    axes.set(
        title=f"{title}: {len(order)} tokens in {total} steps, {verdict}",
        xlabel="position",
        ylabel="step",
        xlim=(-1, len(order) + 1),
        ylim=(total + 0.5, -4),
    )
