"""Tables, pictures and page of learned unmasking. Intervals are explained in comparison.py."""
import statistics

from experiments.common import page as md
from experiments.common.plots import GREY, series_style
from experiments.common.results import markdown_table, mean_range
from experiments.unmasking.comparison import (
    best_rule,
    by_policy,
    hull,
    mixture_at,
    point_of,
    test_of,
    test_points,
)

TITLE = "Learned unmasking: a policy instead of a reveal rule"
SUMMARY = (
    "Policies trained by GRPO beside 78 and 98 training-free rules: valid stories, steps, reward, seconds"
)


def values(policies: list[dict], name: str, metric: str) -> list[float]:
    """By seed, a metric of an evaluation: "" is the policy itself, "beta 0.5" and others are variants."""
    return [policy["evaluations"][name][metric] for policy in policies]


def reward_cell(results: dict, rule: str, alpha: float) -> str:
    """The test reward of a heuristic, with its standard error."""
    test = test_of(results, rule)
    return f"{test['reward'][str(alpha)]:.3f} +- {test['error'][str(alpha)]:.3f}"


def minutes(results: dict, policies: list[dict]) -> list[float]:
    """By seed, minutes of a core that the policy took, with the phases that it shares with others."""
    shared = {policy["seed"]: policy["seconds"] for policy in by_policy(results)["imitated"]}
    found = []
    for policy in policies:
        seconds = policy["seconds"]
        if policy["alpha"] is not None:
            seconds += shared[policy["seed"]] + results["fast_phase_seconds"][policy["seed"]]
        found.append(seconds / 60)
    return found


def table(results: dict) -> str:
    """Markdown: one row per policy and variant of it; at its NFE the best mixture of heuristics; its reward,
    and that of the heuristic that is best for its alpha."""
    header = [
        "policy",
        "NFE",
        "`valid`",
        "the heuristics' hull at that NFE",
        "reward",
        "the best heuristic's",
        "minutes to train",
    ]
    rows = []
    for name, policies in by_policy(results).items():
        alpha = policies[0]["alpha"]
        for variant in policies[0]["evaluations"]:
            nfe = values(policies, variant, "nfe")
            cells = [mean_range(nfe, 1), mean_range(values(policies, variant, "valid"), 2)]
            cells.append(mean_range([mixture_at(test_points(results), x) for x in nfe], 2))
            if alpha is None:
                cells += ["-", "-"]
            else:
                rewards = [reward[str(alpha)] for reward in values(policies, variant, "reward")]
                cells += [mean_range(rewards), reward_cell(results, best_rule(results, alpha), alpha)]
            cells.append(mean_range(minutes(results, policies), 0))
            rows.append([f"{name}, {variant}" if variant else name, *cells])
    return markdown_table(header, rows)


def interval(numbers: list[float] | None) -> str:
    """Value (95 % interval)."""
    if not numbers:
        return "-"
    value, low, high = numbers[:3]
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def gains_table(results: dict) -> str:
    """Markdown: one row per policy, each number with its interval."""
    header = ["policy", "reward minus the best heuristic's", "`valid` above the heuristics' hull",
              "above that of those chosen before", "of thresholds", "of random rules"]
    rows = []
    for gain in results["gains"]:
        cells = [interval(gain[name]) for name in ("reward", "heuristics", "chosen", "thresholds", "random")]
        rows.append([gain["policy"], *cells])
    return markdown_table(header, rows)


# Pictures -------------------------------------------------------------------------------------------------

def plot(results: dict, figure) -> None:
    """`valid` against NFE: heuristics, their hull, the policies. Beside it the additive reward, where it
    was tried."""
    figure.set_size_inches(12.5 if results["collapse"] else 9.5, 6.2)
    panels = figure.subplots(1, 1 + bool(results["collapse"]), squeeze=False)[0]
    plot_points(panels[0], results)
    if results["collapse"]:
        plot_collapse(panels[1], results)
    where = "in blocks of 8" if results["world"] == "blocks" else "over whole texts"
    figure.suptitle(f"Learned unmasking {where}, greedy, 512 stories")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)


def plot_points(axes, results: dict) -> None:
    points = test_points(results)
    axes.plot(*zip(*points), ".", color=GREY, alpha=0.7, label="heuristics")
    axes.plot(*zip(*hull(points)), color=GREY, label="their hull")
    for index, (name, policies) in enumerate(by_policy(results).items()):
        style = series_style(index) | {"linestyle": "none", "markersize": 8}
        found = [point_of(policy["evaluations"][""]) for policy in policies]
        axes.plot(*zip(*found), label=name, **style)
        scaled = []
        for policy in policies:
            scaled += [
                point_of(x) for variant, x in policy["evaluations"].items() if variant.startswith("beta")
            ]
        if scaled:
            axes.plot(
                *zip(*scaled), "+", color=style["color"], markersize=8, label=f"{name}, rates times beta"
            )
    axes.set(xlabel="NFE: steps per text", ylabel="valid", title="valid stories against steps")


def plot_collapse(axes, results: dict) -> None:
    for index, run in enumerate(results["collapse"]):
        steps, _, quality, nfe, *_ = zip(*run["log"])
        style = series_style(index) | {"marker": ""}
        label = {"reward": "product", "additive": "additive"}[run["reward"]]
        axes.plot(means_of(steps), means_of(quality), label=f"{label} reward: quality", **style)
        style["linestyle"] = ":"
        relative = [x / max(nfe) for x in means_of(nfe)]
        axes.plot(means_of(steps), relative, label=f"{label} reward: NFE / {max(nfe):.0f}", **style)
    axes.set(xlabel="update", title="two rewards, from a poor start")


def means_of(numbers, size: int = 10) -> list[float]:
    """The means of consecutive groups."""
    return [statistics.mean(numbers[i:i + size]) for i in range(0, len(numbers), size)]


PLOTS = {"blocks": plot, "whole": plot}


# Page -----------------------------------------------------------------------------------------------------

def page(all_results: dict[str, dict]) -> str:
    blocks = all_results["blocks"]
    whole = all_results["whole"]
    length = blocks["heuristics"][0]["dev"]["length"]
    return md.join(
        f"# {TITLE}",
        md.paragraph(f"""
            A small transformer sees how confident the student is at each masked position and says which
            positions are revealed; GRPO trains it on quality times speed
            ([2512.09106](https://arxiv.org/abs/2512.09106)). What is it worth beside training-free rules?
            Heuristics, and a policy's temperature, are chosen on 256 held-out stories of the story world; the
            numbers are of 512 others, greedy. NFE is steps per text; the reward is `valid` times (({length} -
            NFE + 1) / {length}) to the power alpha. There are three seeds of each policy; a policy has 21k
            parameters. Cells are mean (smallest to largest)."""),
        md.paragraph("""
            "The heuristics' hull" is the best `valid` that a mixture of heuristics reaches at that NFE. It is
            made of test numbers, which favours the heuristics. "mean" and "shuffled" are the same policy with
            wrong confidences at the masked positions; "beta" scales its rates."""),
        "## In blocks",
        md.measured(blocks, "blocks", "an hour on two CPU cores"),
        md.paragraph(f"""
            A student with blocks of 8, after 480 updates. {len(blocks["heuristics"])} heuristics: the reveal
            rules over their parameters, in blocks of 2, 4 and 8 and in sliding windows."""),
        table(blocks),
        md.details("Gains, with 95 % intervals of a bootstrap over stories and seeds", gains_table(blocks)),
        md.picture(
            "blocks", "Valid stories against steps in blocks of 8, and the additive reward from a poor start"
        ),
        md.picture("blocks_story", "A story by a policy and by threshold:0.9: one row per step"),
        "### What was found",
        md.bullets(blocks_findings(blocks)),
        "## Over whole texts",
        md.measured(whole, "whole", "two hours on two CPU cores"),
        md.paragraph(f"""
            A student whose block is the whole text, after 1,600 updates. {len(whole["heuristics"])}
            heuristics, in blocks of 8, 32 and 96 and in windows of 4 and 8. Policies begin as
            {short(expert_of(whole))}, a careful rule, which later also generates one text of each group."""),
        md.warning(
            [
                "The settings of training were chosen after a failure that is described below, when some "
                "numbers of these 512 stories had been seen.",
                reward_warning(whole),
            ]
        ),
        table(whole),
        md.details("Gains, with 95 % intervals of a bootstrap over stories and seeds", gains_table(whole)),
        md.picture("whole", "Valid stories against steps, of whole texts"),
        md.picture(
            "whole_story", "A story by a policy over the whole text and by threshold:0.9: one row per step"
        ),
        "### What was found over whole texts",
        md.bullets(whole_findings(whole)),
    )


def expert_of(results: dict) -> str:
    """The heuristic that the policies imitated."""
    return results["policies"][0]["expert"]


def short(rule: str) -> str:
    """The rule without the size of its blocks."""
    return rule.partition(" in ")[0]


def mean_reward(results: dict, alpha: float) -> float:
    """The test reward of the policies of an alpha, mean of the seeds."""
    policies = by_policy(results)[f"alpha {alpha}"]
    return statistics.mean(reward[str(alpha)] for reward in values(policies, "", "reward"))


def reward_warning(results: dict) -> str:
    """The gain in reward at alpha 1, against the chosen rule and against the rule that it imitated."""
    gain = next(gain for gain in results["gains"] if gain["policy"] == "alpha 1")
    chosen = best_rule(results, 1)
    expert = expert_of(results)
    chosen_reward = test_of(results, chosen)["reward"]["1"]
    expert_reward = test_of(results, expert)["reward"]["1"]
    ours = mean_reward(results, 1)
    return (f"At alpha 1 the policy's reward is {ours:.3f}. The best heuristic on the stories for choosing, "
            f"{short(chosen)}, has {chosen_reward:.3f} on the test stories: the gain is "
            f"{interval(gain['reward'])}. But {short(expert)}, the rule that the policy was made from, has "
            f"{expert_reward:.3f} there: against it the gain is {ours - expert_reward:.3f}, with a bootstrap "
            f"standard deviation of the former number of {gain['reward'][3]:.3f}. Part of the larger gain is "
            "bad luck of the chosen rule.")


def gain_of(results: dict, alpha: float, name: str) -> str:
    for gain in results["gains"]:
        if gain["policy"] == f"alpha {alpha}":
            return interval(gain[name])


def mean_of(results: dict, alpha: float, metric: str, variant: str = "") -> float:
    return statistics.mean(values(by_policy(results)[f"alpha {alpha}"], variant, metric))


def milliseconds(results: dict, name: str) -> str:
    """Per token, median of the turns."""
    return f"{1000 * statistics.median(results['costs']['seconds_per_token'][name]):.2f}"


def speed_finding(results: dict) -> str:
    expert = expert_of(results)
    step = 1000 * results["costs"]["seconds_per_step"]
    policy, rule = milliseconds(results, "policy"), milliseconds(results, expert)
    verdict = (
        "it removes more than that" if float(policy) < float(rule) else "more than the steps that it removes"
    )
    return (
        f"**Seconds**: the policy adds {step:.2f} ms per step, {verdict}: {policy} ms per token, "
        f"{short(expert)} {rule}, threshold:0.9 {milliseconds(results, 'threshold:0.9')}, the AR loop "
        f"{milliseconds(results, 'ar')}. AR remains faster than all of them."
    )


def beta_finding(results: dict, alphas: tuple) -> str:
    first, last = alphas
    return (f"**alpha is the dial**: NFE falls from {mean_of(results, first, 'nfe'):.1f} at {first} to "
            f"{mean_of(results, last, 'nfe'):.1f} at {last}. Scaling the rates instead (beta from 1 to 0.25) "
            f"takes the policy of alpha 1 from {mean_of(results, 1, 'nfe', 'beta 1'):.1f} to "
            f"{mean_of(results, 1, 'nfe', 'beta 0.25'):.1f} steps and `valid` from "
            f"{mean_of(results, 1, 'valid', 'beta 1'):.2f} to "
            f"{mean_of(results, 1, 'valid', 'beta 0.25'):.2f}: slower, and no better.")


def blind_finding(results: dict) -> str:
    return (
        f"With wrong confidences its reward falls: shuffled by {gain_of(results, 1, 'shuffled')}, their mean "
        f"in place of each by {gain_of(results, 1, 'mean')}."
    )


def blocks_findings(results: dict) -> list[str]:
    sooner = results["disagreements"]["sooner"]
    low, high = sooner["confidence"][0], sooner["confidence"][-1]
    gain = next(gain for gain in results["gains"] if gain["policy"] == "alpha 1")
    product, additive = [[step[2] for step in run["log"][-20:]] for run in results["collapse"]]
    return [
        "**By its own reward a policy is about as good as the best heuristic** "
        f"({short(best_rule(results, 1))} at alpha 1): at alpha 1 {gain_of(results, 1, 'reward')}, standard "
        f"deviation {gain['reward'][3]:.3f}; at alpha 3 {gain_of(results, 3, 'reward')}; at 0 and 10 "
        f"{gain_of(results, 0, 'reward')} and {gain_of(results, 10, 'reward')}, which is worse.",
        "**At equal NFE it has more valid stories than any mixture of heuristics** at alpha 1, by "
        f"{gain_of(results, 1, 'heuristics')}, and at 0.3, by {gain_of(results, 0.3, 'heuristics')}; at 0, 3 "
        f"and 10 it cannot be told. Above thresholds alone it is {gain_of(results, 1, 'thresholds')}. But "
        "heuristics also have slower settings with hardly an error, so both dominate the same area: "
        f"policies {interval(results['areas']['policies'])}, heuristics "
        f"{interval(results['areas']['heuristics'])}.",
        f"It reveals {sooner['per_text']:.1f} positions per text sooner than the rule that it imitated, nine "
        f"in ten of them at confidences of {low:.2f} to {high:.2f}: where several words would do, the most "
        f"likely one may be taken at once. {blind_finding(results)}",
        beta_finding(results, (0, 10)),
        speed_finding(results),
        "The reward has to be a product. With quality minus alpha times NFE, from a poor start, the quality "
        f"of the last 20 updates is {statistics.mean(additive):.2f}; with the product it is "
        f"{statistics.mean(product):.2f}.",
    ]


def whole_findings(results: dict) -> list[str]:
    sooner = results["disagreements"]["sooner"]
    areas = results["areas"]
    expert_reward = test_of(results, expert_of(results))["reward"]["1"]
    return [
        f"**At equal NFE it has more valid stories than any mixture of heuristics**: at alpha 1 by "
        f"{gain_of(results, 1, 'heuristics')}, at 0.3 by {gain_of(results, 0.3, 'heuristics')}, at 3 by "
        f"{gain_of(results, 3, 'heuristics')}. Not at 10: {gain_of(results, 10, 'heuristics')}.",
        f"By its own reward, at alpha 1, it is {mean_reward(results, 1) - expert_reward:.3f} above the rule "
        f"that it was made from, and {gain_of(results, 1, 'reward')} above the rule that was chosen (see "
        "above).",
        f"At alpha 3 the gain in reward over the chosen rule is {gain_of(results, 3, 'reward')}, at 0.3 "
        f"{gain_of(results, 0.3, 'reward')}, at 10 {gain_of(results, 10, 'reward')}.",
        f"The dominated area is not larger for certain: policies {interval(areas['policies'])}, heuristics "
        f"{interval(areas['heuristics'])}, the difference {interval(areas['policies less heuristics'])}; "
        f"thresholds alone {interval(areas['thresholds'])}.",
        f"It reveals {sooner['per_text']:.1f} positions per text sooner than {short(expert_of(results))}, "
        f"half of them at confidences above {sooner['confidence'][2]:.2f}. {blind_finding(results)}",
        beta_finding(results, (0.3, 10)),
        "**Training is fragile.** With half as many prompts per update, twice the texts of each and a "
        "learning rate half as high again, one of three seeds lost more than half of its valid stories in "
        "the fast phase, and another did not move.",
        speed_finding(results),
    ]
