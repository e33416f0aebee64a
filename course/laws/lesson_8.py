"""Laws of lesson 8: group-relative advantages, and the interval of a paired comparison."""
import torch
from torch import Tensor

from course import given  # noqa: F401  it loads the modules that an exercise imports
from course.laws.common import Broken, close, require, require_shape, show

WRITE = ("advantages", "paired_interval")


# What the laws need -------------------------------------------------------------------------------

def advantages_of(mine, quality, nfe, length: int, alpha: float = 1.0) -> Tensor:
    quality = torch.tensor(quality, dtype=torch.float64)
    nfe = torch.tensor(nfe)
    found = mine.advantages(quality, nfe, length, alpha)
    require_shape(found, tuple(quality.shape), None, "advantages")
    return found


def interval_of(mine, ours: Tensor, theirs: Tensor, picks: Tensor) -> tuple[float, float]:
    answer = mine.paired_interval(ours, theirs, picks)
    try:
        low, high = answer
        return float(low), float(high)
    except (TypeError, ValueError):
        hint = "return two numbers: the lower and the upper end"
        raise Broken(f"paired_interval returned {answer!r}", hint) from None


def groups(G: int, seed: int) -> tuple[list, list]:
    """Two groups of G texts: random qualities from 0 to 1, and numbers of steps from 1 to 8."""
    generator = torch.Generator().manual_seed(seed)
    quality = torch.rand(2, G, generator=generator, dtype=torch.float64)
    nfe = torch.randint(1, 9, (2, G), generator=generator)
    return quality.tolist(), nfe.tolist()


def random_picks(N: int, draws: int, seed: int) -> Tensor:
    return torch.randint(N, (draws, N), generator=torch.Generator().manual_seed(seed))


# The laws -----------------------------------------------------------------------------------------

def sum_to_zero(mine):
    """The advantages of a group sum to zero."""
    for G in (1, 2, 3, 4):
        quality, nfe = groups(G, seed=G)
        found = advantages_of(mine, quality, nfe, 8)
        total = found.sum(1)
        for row in range(2):
            hint = "compare a text with its own group: over which dimension is the mean?"
            require(close(total[row], 0), f"groups with the qualities {show(torch.tensor(quality))}, steps "
                    f"{nfe}: group {row} sums to {total[row]:.4f}", hint)


def own_group_only(mine):
    """The texts of one prompt do not change the advantages of another prompt."""
    for G in (2, 3):
        quality, nfe = groups(G, seed=G)
        together = advantages_of(mine, quality, nfe, 8)
        for row in range(2):
            alone = advantages_of(mine, quality[row:row + 1], nfe[row:row + 1], 8)
            require(close(together[row], alone[0]), f"group {row} of {show(torch.tensor(quality))}, steps "
                    f"{nfe}: {show(together[row])}, and alone {show(alone[0])}",
                    "prompts differ in difficulty; that is why the mean is the group's")


def wrong_texts_teach_nothing(mine):
    """If all texts of a group are wrong, all advantages are zero, however fast the texts were."""
    for nfe in ([8, 1], [8, 4], [5, 2]):
        for alpha in (1.0, 10.0):
            found = advantages_of(mine, [[0.0, 0.0]], [nfe], 8, alpha)
            require(close(found, 0), f"quality 0 and 0, {nfe[0]} and {nfe[1]} steps of 8, alpha {alpha:g}: "
                    f"the advantages are {show(found[0])}",
                    "a policy that is paid for speed alone learns to write nonsense in one step")


def one_step_is_full_price(mine):
    """One text in a single step against a wrong one: the two advantages differ by its quality."""
    for quality in (1.0, 0.5):
        for length in (4, 8):
            for alpha in (1.0, 3.0):
                found = advantages_of(mine, [[quality, 0.0]], [[1, 1]], length, alpha)
                difference = found[0, 0] - found[0, 1]
                if alpha != 1:
                    hint = "alpha is the power of the share of saved steps, which is 1 here"
                elif difference > quality:
                    hint = "the paper does not divide by the group's standard deviation"
                else:
                    hint = "a text in one step has saved all that can be saved"
                require(close(difference, quality), f"quality {quality} and 0, one step of {length}, alpha "
                        f"{alpha:g}: the advantages {show(found[0])} differ by {difference:.4f}", hint)


def speed_pays(mine):
    """A right text that saves half of the steps gets 0.5 ** alpha of its quality."""
    for alpha in (1.0, 2.0, 3.0):
        found = advantages_of(mine, [[1.0, 1.0, 0.0]], [[1, 5, 1]], 8, alpha)
        fast = found[0, 0] - found[0, 2]
        slow = found[0, 1] - found[0, 2]
        require(close(slow, fast * 0.5 ** alpha), f"right texts in 1 and 5 steps of 8, alpha {alpha:g}: "
                f"their rewards over a wrong text are {fast:.4f} and {slow:.4f}; they save 8 / 8 and 4 / 8",
                "the share of saved steps is (L - nfe + 1) / L, and alpha is its power")


def control_is_zero(mine):
    """A sampler against itself has the interval from 0 to 0."""
    for N in (2, 3, 8):
        scores = torch.rand(N, generator=torch.Generator().manual_seed(N), dtype=torch.float64)
        low, high = interval_of(mine, scores, scores, random_picks(N, 200, seed=0))
        require(close(low, 0) and close(high, 0), f"the same scores {show(scores)} twice: from {low:.4f} to "
                f"{high:.4f}", "in a paired comparison both samplers get the same prompts in each draw")


def difficulty_cancels(mine):
    """What a prompt adds to both scores does not change the interval."""
    for N in (2, 4, 16):
        generator = torch.Generator().manual_seed(N)
        ours, theirs, difficulty = torch.rand(3, N, generator=generator, dtype=torch.float64)
        picks = random_picks(N, 200, seed=1)
        before = interval_of(mine, ours, theirs, picks)
        after = interval_of(mine, ours + 5 * difficulty, theirs + 5 * difficulty, picks)
        require(close(before[0], after[0]) and close(before[1], after[1]),
                f"{N} prompts: the interval goes from ({before[0]:.4f}, {before[1]:.4f}) to ({after[0]:.4f}, "
                f"{after[1]:.4f}) when each prompt adds a number of its own to both scores",
                "take the difference of the two scores of a prompt first")


def swapping(mine):
    """Swapping the two samplers turns the interval around; the ends are in order."""
    for N in (3, 8):
        generator = torch.Generator().manual_seed(N)
        ours, theirs = torch.rand(2, N, generator=generator, dtype=torch.float64)
        ours = ours + 0.5
        picks = random_picks(N, 400, seed=2)
        low, high = interval_of(mine, ours, theirs, picks)
        require(low <= high, f"N = {N}: from {low:.4f} to {high:.4f}", "the lower end comes first")
        require(low > 0 or high < 0 or low < (ours - theirs).mean() < high,
                f"N = {N}: from {low:.4f} to {high:.4f}", "the interval lies around the mean gain")
        require(high > 0, f"ours are better by {(ours - theirs).mean():.4f} on average, the interval is from "
                f"{low:.4f} to {high:.4f}", "a gain is ours minus theirs")
        turned = interval_of(mine, theirs, ours, picks)
        require(close(-low, turned[1]) and close(-high, turned[0]),
                f"N = {N}: from {low:.4f} to {high:.4f}, swapped from {turned[0]:.4f} to {turned[1]:.4f}",
                "as much is cut off on the left as on the right")


def coverage(mine):
    """Of 400 experiments whose true gain is known, the interval holds it in about 95 %."""
    N, draws, experiments = 40, 400, 400
    generator = torch.Generator().manual_seed(0)
    gains = 0.3 + torch.randn(experiments, N, generator=generator, dtype=torch.float64)
    picks = random_picks(N, draws, seed=3)
    hits = 0
    for gain in gains:
        low, high = interval_of(mine, gain, torch.zeros_like(gain), picks)
        hits += low <= 0.3 <= high
    share = hits / experiments
    if share > 0.98:
        hint = "the interval is too wide: between which percentiles of the means of the draws does it lie?"
    else:
        hint = "the interval is too narrow: how much is cut off on each side, and has each draw N prompts?"
    require(0.9 <= share <= 0.98, f"{N} prompts, true gain 0.3: the interval holds it in {share:.3f} of the "
            "experiments", hint)


LAWS = [sum_to_zero, own_group_only, wrong_texts_teach_nothing, one_step_is_full_price, speed_pays,
        control_is_zero, difficulty_cancels, swapping, coverage]
