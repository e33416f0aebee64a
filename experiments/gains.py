"""What experiments/unmasking.py says of its policies: what they gain over all heuristics, with errors; its picture."""
import statistics

import numpy as np
import torch

from experiments.hull import at, bar, best_rule, hull, of_world, point, policies, test_of, volume, worlds
from experiments.results import cell
from model import grpo

DRAWS = 2000        # of the bootstrap


def table(results: dict) -> str:
    """Markdown: a row a policy, and what was made of it; at its NFE mixtures of heuristics, of thresholds, of random
    ones; its reward and that of the best heuristic for its alpha."""
    lines = ["| world | policy | NFE | `valid` | all heuristics at that NFE | thresholds | random | reward | the best "
             "heuristic's | minutes to train |", "|" + "---|" * 10]
    for world in worlds(results):
        bars = [bar(results, world), bar(results, world, "threshold"), bar(results, world, "random")]
        for name, some in policies(results, world).items():
            minutes = cell([policy["seconds"] / 60 for policy in some], 0)
            for what in some[0]["looks"]:
                seen, alpha = [policy["looks"][what] for policy in some], some[0]["alpha"]
                cells = [cell([x["nfe"] for x in seen], 1), cell([x["valid"] for x in seen], 2)]
                cells += [cell([at(points, x["nfe"]) for x in seen], 2) if points else "-" for points in bars]
                cells += ["-", "-"] if alpha is None else [
                    cell([x["reward"][str(alpha)] for x in seen]), of_best(results, world, alpha)]
                lines.append(f"| {world} | {name}{what and ', ' + what} | {' | '.join(cells)} | {minutes} |")
    return "\n".join(lines)


def of_best(results: dict, world: str, alpha: float) -> str:
    """The reward of the heuristic that is best for an alpha, with its standard error."""
    test = test_of(results, world, best_rule(results, world, alpha))
    return f"{test['reward'][str(alpha)]:.3f} +- {test['error'][str(alpha)]:.3f}"


def volumes(results: dict) -> dict:
    """By world, what a seed's policies of all alphas and betas dominate together, and what heuristics do: mean, and the
    2.5th and 97.5th percentiles of a bootstrap over stories, and over seeds; and of the differences."""
    return {world: volumes_of(results, world) for world in worlds(results)}


def volumes_of(results: dict, world: str) -> dict[str, list[float]]:
    sets = {f"policies, seed {seed}": some for seed, some in by_seed(results, world).items()}
    seeds = list(sets)
    for name, rules in (("heuristics", ()), ("thresholds", ("threshold",)), ("random", ("random",))):
        sets[name] = [rule["test"] for rule in of_world(results, world, *rules) if "test" in rule]
    count = len(sets["heuristics"][0]["right"])
    source, length = np.random.default_rng(0), sets["heuristics"][0]["length"]
    whole = {name: volume([point(x) for x in some], length) for name, some in sets.items() if some}
    drawn = {name: [] for name in ("policies", "heuristics", "thresholds", "random")}
    for _ in range(DRAWS):
        share = source.multinomial(count, [1 / count] * count) / count                  # of each story
        areas = {name: volume([counted(look, share) for look in some], length) for name, some in sets.items()}
        drawn["policies"].append(statistics.mean(areas[seed] for seed in source.choice(seeds, len(seeds))))
        for name in ("heuristics", "thresholds", "random"):
            drawn[name].append(areas[name])
    found = {"policies": [statistics.mean(whole[name] for name in seeds), *ends(drawn["policies"])]}
    for name in ("heuristics", "thresholds", "random"):
        found[name] = [whole.get(name, 0.0), *ends(drawn[name])]
        gain = [a - b for a, b in zip(drawn["policies"], drawn[name])]
        found[f"policies less {name}"] = [found["policies"][0] - found[name][0], *ends(gain)]
    return found


def gains(results: dict) -> list[dict]:
    """Of each policy's name, pair by pair over stories, the mean of its seeds: its reward less the best heuristic's for
    its alpha, with the standard error; and its share of valid texts less what mixtures of thresholds and of random
    rules reach at its NFE, with the ends of a bootstrap."""
    return [{"world": world, "policy": name, **gain(results, world, some)} for world in worlds(results)
            for name, some in policies(results, world).items() if some[0]["alpha"] is not None]


def gain(results: dict, world: str, some: list[dict]) -> dict:
    alpha, source = some[0]["alpha"], np.random.default_rng(0)
    rule = test_of(results, world, best_rule(results, world, alpha))
    seen = [policy["looks"][""] for policy in some]
    less = np.mean([rewards(look, alpha) for look in seen], 0) - rewards(rule, alpha)
    found = {"reward": [float(less.mean()), float(less.std(ddof=1) / len(less) ** 0.5)]}
    count = len(rule["right"])
    for rules in ("threshold", "random"):
        sets = [r["test"] for r in of_world(results, world, rules) if "test" in r]

        def above(share, sets=sets):
            rivals = [counted(look, share) for look in sets]
            return statistics.mean(y - at(rivals, x) for x, y in (counted(look, share) for look in seen))
        draws = [above(source.multinomial(count, [1 / count] * count) / count) for _ in range(DRAWS // 4)]
        found[rules] = [above(np.full(count, 1 / count)), *ends(draws)] if sets else None
    return found


def rewards(look: dict, alpha: float) -> np.ndarray:
    """Of each text."""
    return grpo.reward(*map(torch.tensor, (look["right"], look["steps"])), look["length"], alpha).numpy()


def counted(look: dict, share: np.ndarray) -> tuple:
    """The point, if each story counts so much."""
    return float(share @ np.array(look["steps"])), float(share @ np.array(look["right"]))


def by_seed(results: dict, world: str) -> dict[int, list[dict]]:
    """What a seed's policies wrote, whatever their alpha, and however scaled."""
    found = {}
    for policy in results["policies"]:
        if policy["world"] == world and policy["alpha"] is not None:
            found.setdefault(policy["seed"], []).extend(
                look for what, look in policy["looks"].items() if what[:4] in ("", "beta"))
    return found


def ends(values: list[float]) -> list[float]:
    return [float(np.quantile(values, q)) for q in (0.025, 0.975)]


def draw(results: dict, figure) -> None:
    """`valid` against NFE, a picture a world: heuristics, their hull, the policies. And the reward that collapses."""
    figure.set_size_inches(16, 4.8)
    axes = figure.subplots(1, len(worlds(results)) + 1)
    for one, world in zip(axes, worlds(results)):
        one.plot(*zip(*bar(results, world)), ".", color="0.8", label="heuristics")
        one.plot(*zip(*hull(bar(results, world))), color="0.5", label="their hull")
        for name, some in policies(results, world).items():
            one.plot(*zip(*(point(policy["looks"][""]) for policy in some)), "*", label=name)
            scaled = [x for policy in some for what, x in policy["looks"].items() if what.startswith("beta")]
            if scaled:
                one.plot(*zip(*map(point, scaled)), "+", label=f"{name}, times beta")
        one.set(xlabel="NFE, steps a text", title=world)
        one.grid(alpha=0.3)
        one.legend(fontsize=6)
    axes[0].set_ylabel("valid")
    for run, color in zip(results["collapse"], ("0.4", "C3")):
        steps, quality, nfe, _ = zip(*run["log"])
        axes[-1].plot(smooth(steps), smooth(quality), color=color, label=f"{run['reward']}: quality")
        axes[-1].plot(smooth(steps), [x / max(nfe) for x in smooth(nfe)], ":", color=color,
                      label=f"{run['reward']}: NFE / {max(nfe):.0f}")
    axes[-1].set(xlabel="update", title="the additive reward, from a poor start")
    axes[-1].legend(fontsize=6)


def smooth(values, size: int = 10) -> list[float]:
    """Means of so many neighbours."""
    return [statistics.mean(values[i:i + size]) for i in range(0, len(values), size)]
