"""Draw the pictures of the lessons: course/NN_name/picture.png, made for slides.

    python course/pictures.py                      all lessons
    python course/pictures.py 3                    lesson 3

One function per lesson. What is drawn comes from the project's own functions.
"""
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))        # the project's root

import torch
from matplotlib.colors import ListedColormap

import opdlm
from course import check, given
from course.check import lessons
from decoding import reveal, speculative
from decoding.denoiser import Denoiser
from decoding.sampling import SamplingConfig, uniforms
from model import masks
from report import metrics
from training import cli

# The colours of all pictures. DARK and LIGHT also differ in print without colours.
DARK, MIDDLE, LIGHT, ORANGE = "#1f4e79", "#5b9bd5", "#deebf7", "#d9730d"


def draw_cells(axes, words: list[list[str]], masked: torch.Tensor) -> None:
    """A row of cells per state, the first on top; masked cells are white."""
    for row, (texts, hidden) in enumerate(zip(words, masked.tolist())):
        for column, (text, is_masked) in enumerate(zip(texts, hidden)):
            colour = "white" if is_masked else LIGHT
            axes.add_patch(plt.Rectangle((column, row), 0.94, 0.86, facecolor=colour, edgecolor=DARK))
            axes.text(column + 0.47, row + 0.43, "_" if is_masked else text, ha="center", va="center")
    axes.set_xlim(-0.1, len(words[0]) + 0.1)
    axes.set_ylim(len(words), -0.7)
    axes.axis("off")


# Lesson 1: masks and the bound --------------------------------------------------------------------

def lesson_1():
    """The states of three tokens with their weights, and what the weight does to the loss of a real block."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.2), width_ratios=(1.25, 1))
    states = given.all_states(3)
    draw_cells(left, [["Lily", "saw", "him"]] * len(states), states)
    left.set_xlim(-0.1, 5.4)
    left.text(3.9, -0.25, "probability", ha="center")
    left.text(5.0, -0.25, "1 / t", ha="center")
    for row, (masked, prob) in enumerate(zip(states, given.state_probs(states))):
        left.text(3.9, row + 0.43, f"1/{round(1 / prob.item())}", ha="center", va="center")
        left.text(5.0, row + 0.43, f"3/{int(masked.sum())}", ha="center", va="center")
    left.set_title("The 7 states of a text of 3 tokens", fontsize=12)

    net, layout, tok = given.pretrained()
    K = layout.block
    prompt = 12
    text = given.encode(tok)[:, :prompt + K]
    masked = given.all_states(K)
    tokens = text.expand(len(masked), -1)
    noisy = tokens[:, prompt:].masked_fill(masked, net.mask_id)
    rows, slots = masked.nonzero(as_tuple=True)
    logits = opdlm.student_logits(net, tokens, noisy, prompt, layout, rows, slots + prompt)
    nats = -logits.log_softmax(-1).gather(1, tokens[rows, slots + prompt][:, None])[:, 0]
    total = torch.zeros(len(masked)).index_add(0, rows, nats)                # (B,) of each state
    count = masked.sum(-1)
    n = torch.arange(1, K + 1)
    plain = torch.stack([total[count == i].mean() for i in n])
    right.bar(n - 0.2, plain, 0.38, color=MIDDLE, label="sum over the masked positions")
    right.bar(n + 0.2, plain * K / n, 0.38, color=DARK, label="the same, times 1 / t")
    mean = (plain * K / n).mean()
    right.axhline(mean, color=ORANGE, label=f"mean = the bound, {mean:.2f} nats")
    right.set_xticks(n.tolist())
    right.set_xlabel(f"n masked positions of {K}")
    right.set_ylabel("nats")
    right.set_title("A block of a story, shipped model", fontsize=12)
    right.legend(fontsize=9, frameon=False, loc="upper left")
    right.set_ylim(0, 1.45 * right.get_ylim()[1])
    figure.tight_layout()
    return figure


# Lesson 2: parallel reveals -----------------------------------------------------------------------

def lesson_2():
    """A joint of two words beside what one step makes of it; stories by tokens per step."""
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.6), width_ratios=(1, 1, 1.35))
    joint = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    masked = torch.ones(1, 2, dtype=torch.bool)
    first, second = given.conditionals(joint, torch.zeros(1, 2, dtype=torch.long), masked)[0]
    one_step = first[:, None] * second
    titles = ("the truth: two steps", "one step: error log 2 = 0.69 nats")
    for axes, table, title in zip(panels, (joint, one_step), titles):
        axes.imshow(table, vmin=0, vmax=0.7, cmap="Blues")
        for i in range(2):
            for j in range(2):
                colour = "white" if table[i, j] > 0.4 else "black"
                axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", color=colour)
        axes.set_xticks([0, 1], ["... he", "... she"])
        axes.set_yticks([0, 1], ["A boy", "A girl"])
        axes.tick_params(length=0)
        axes.set_title(title, fontsize=12)
        axes.spines[:].set_visible(False)

    net, layout, tok = given.pretrained()
    counts = ["1", "2", "4"]
    nats = [given.stories(net, layout, tok, reveal.parse(f"static:{k}"))[0] for k in counts]
    bars = panels[2].bar(counts, nats, 0.6, color=[LIGHT, MIDDLE, DARK], edgecolor=DARK)
    panels[2].bar_label(bars, fmt="%.2f")
    panels[2].set_xlabel("tokens revealed by one step")
    panels[2].set_ylabel("nats per token")
    panels[2].set_ylim(0, 1.12 * max(nats))
    panels[2].set_title("stories of the shipped model,\nread by itself as an AR model", fontsize=12)
    figure.tight_layout()
    return figure


# Lesson 3: from AR to block -----------------------------------------------------------------------

def lesson_3():
    """The mask of a training pass with the names of its parts; where the logits of a block are read."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.2), width_ratios=(1.15, 1))
    P, K, T = 3, 4, 11
    mask = masks.training_mask(T, P, masks.Layout(K))
    part = torch.ones_like(mask, dtype=torch.long)                           # the colour of each part
    part[T:, :T] = 2
    part[T:, T:] = 3
    colours = ListedColormap(["white", LIGHT, MIDDLE, DARK])
    left.imshow(mask * part, cmap=colours, vmin=0, vmax=3)
    for edge in (P, P + K, T, T + K):
        style = {"color": "black" if edge == T else "gray", "lw": 1.5 if edge == T else 0.6}
        left.axhline(edge - 0.5, **style)
        left.axvline(edge - 0.5, **style)
    centres = [1, 4.5, 8.5, 12.5, 16.5]
    names = ["prompt", "block 0", "block 1", "noisy 0", "noisy 1"]
    left.set_xticks(centres, names, fontsize=9)
    left.set_yticks(centres, names, fontsize=9)
    left.xaxis.tick_top()
    left.xaxis.set_label_position("top")
    left.set_xlabel("keys:  clean text  |  noisy response")
    left.set_ylabel("queries")
    left.spines[:].set_visible(True)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.9}
    left.text(3.2, 7.7, "causal:\nthe AR model", ha="center", va="center", fontsize=9, bbox=box)
    left.text(14.5, 5, "nothing", ha="center", va="center", fontsize=9)
    left.text(3, 14.5, "the blocks before", ha="center", va="center", fontsize=9, bbox=box)
    left.text(14.5, 14.5, "its own block, both ways", ha="center", va="center", fontsize=9, bbox=box)

    right.set_xlim(-0.9, 8.2)
    right.set_ylim(-0.6, 4.4)
    right.axis("off")
    clean = ["Lily", "had", "a", "big", "red", "ball", "."]
    for i, word in enumerate(clean):
        right.add_patch(plt.Rectangle((i, 3), 0.94, 0.6, facecolor=LIGHT, edgecolor=DARK))
        right.text(i + 0.47, 3.3, word, ha="center", va="center", fontsize=10)
        if i >= P:
            right.add_patch(plt.Rectangle((i, 1.5), 0.94, 0.6, facecolor="white", edgecolor=DARK))
            right.text(i + 0.47, 1.8, "[MASK]", ha="center", va="center", fontsize=8)
            right.text(i + 0.47, 0.2, word, ha="center", va="center", fontsize=10, color=ORANGE)
            source = (i - 0.75, 3.0) if i == P else (i - 0.4, 1.5)
            arrow = {"arrowstyle": "->", "color": ORANGE, "lw": 1.6}
            right.annotate("", (i + 0.35, 0.4), source, arrowprops=arrow)
    right.text(-0.1, 3.8, "clean text (prompt | block 0)", fontsize=10)
    right.text(-0.1, 1.8, "noisy block 0,\nall masked:", fontsize=10, va="center")
    right.text(-0.1, 0.2, "logits predict:", fontsize=10, va="center", color=ORANGE)
    title = "The shift: logits at i - 1 predict token i.\nOnly a first token is read in the clean text."
    right.set_title(title, fontsize=12)
    figure.tight_layout()
    return figure


# Lesson 4: cache and reveal rules -----------------------------------------------------------------

class Recorder(Denoiser):
    """The project's cached denoiser, which notes (written, start, masked) of its one row at each pass."""

    def __init__(self, net, layout):
        super().__init__(net, layout)
        self.passes = []

    def __call__(self, tokens, start, masked):
        self.passes.append((int(self.written), int(start), masked[0].tolist()))
        return super().__call__(tokens, start, masked)


@torch.no_grad()
def lesson_4():
    """A denoising staircase: what each forward pass processes, and what it takes from the cache."""
    net, layout, tok = given.pretrained()
    prompt = given.encode(tok, "Once upon a time")
    P, length = prompt.size(1), 20
    denoiser = Recorder(net, layout)
    rule = reveal.parse("threshold:0.4")
    u = torch.zeros(1, P + length, rule.numbers(layout.block))
    greedy = SamplingConfig(temperature=0)
    text = opdlm.rollout(denoiser, prompt, length, rule, u, tok.ends, greedy)
    words = [tok.decode([i]).replace("\n", " ").strip() for i in text.tokens[0].tolist()]

    rows = len(denoiser.passes)
    figure, axes = plt.subplots(figsize=(11, 0.36 * rows + 1.2))
    for row, (written, start, masked) in enumerate(denoiser.passes):
        for column in range(start + len(masked)):
            in_block = column >= start
            style = {"facecolor": LIGHT, "edgecolor": "white"}               # taken from the cache
            if in_block:
                hidden = masked[column - start]
                style = {"facecolor": "white" if hidden else DARK, "edgecolor": DARK}
            elif column >= written:
                style = {"facecolor": MIDDLE, "edgecolor": "white"}          # finished text, written now
            axes.add_patch(plt.Rectangle((column, row), 0.9, 0.86, **style))
    names = ["<start>", *words[1:]]
    axes.set_xticks([i + 0.45 for i in range(len(names))], names, rotation=60, ha="left", fontsize=9)
    axes.xaxis.tick_top()
    axes.set_yticks([i + 0.45 for i in range(rows)], range(1, rows + 1), fontsize=9)
    axes.tick_params(length=0)
    axes.set_ylabel("forward pass")
    axes.set_xlim(-0.1, P + length)
    axes.set_ylim(rows, -0.1)
    axes.spines[:].set_visible(False)
    kinds = {
        "from the cache, not processed": (LIGHT, LIGHT),
        "finished text, written to the cache": (MIDDLE, MIDDLE),
        "block: masked": ("white", DARK),
        "block: visible": (DARK, DARK),
    }
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=face, edgecolor=edge) for face, edge in kinds.values()]
    axes.legend(handles, kinds, loc="upper right", fontsize=10, frameon=False)
    return figure


# Lesson 5: likelihood -----------------------------------------------------------------------------

def lesson_5():
    """Generative perplexity and distinct2 of the shipped AR model's samples, over the temperature."""
    net, _, tok = given.pretrained()
    temperatures = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    perplexity = []
    distinct = []
    for temperature in temperatures:
        prompt = torch.full((16, 1), tok.bos)
        u = uniforms(0, 0, range(16), (65, 1))
        rule = reveal.parse("static:1")
        sampling = SamplingConfig(temperature)
        text = opdlm.rollout(Denoiser(net, masks.AR), prompt, 64, rule, u, tok.eot, sampling)
        nats = metrics.nats_of(net, text).sum() / text.response_mask.sum()
        perplexity.append(nats.exp().item())
        distinct.append(metrics.distinct_pairs(metrics.response_ids(text)))

    story = given.encode(tok)
    nats = metrics.story_nats(net, [story[0]], masks.AR, tok.eot) / (story.size(1) - 1)
    silly = torch.full_like(story, tok.encode("r")[0])
    silly[:, 0] = tok.bos
    silly_nats = metrics.story_nats(net, [silly[0]], masks.AR, tok.eot) / (story.size(1) - 1)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    left.plot(temperatures, perplexity, "o-", color=DARK, label="samples of the AR model")
    for value, text in ((nats, "a real story"), (silly_nats, '"rrrrrrr..."')):
        left.axhline(value.exp().item(), color=ORANGE)
        left.text(1.0, value.exp().item() - 0.07, text, color=ORANGE, ha="right", va="top")
    left.set(xlabel="temperature", ylabel="generative perplexity", ylim=(0.8, None))
    left.set_title("lower looks better ...", fontsize=12)
    right.plot(temperatures, distinct, "o-", color=DARK)
    right.set(xlabel="temperature", ylabel="distinct2 of all samples", ylim=(0, 1))
    right.set_title("... but it is sameness", fontsize=12)
    figure.tight_layout()
    return figure


# Lesson 6: on-policy distillation -----------------------------------------------------------------

def lesson_6():
    """A rollout of the shipped student: the finished text, the order, and the states that follow from it."""
    net, layout, tok = given.pretrained()
    K = layout.block
    prompt = given.encode(tok, "Once upon a time, there was a")
    P = prompt.size(1)
    rule = reveal.parse("leftmost:0.5")
    u = uniforms(3, 0, range(1), (P + 2 * K, rule.numbers(K)))
    text = opdlm.rollout(Denoiser(net, layout), prompt, 2 * K, rule, u, tok.eot, SamplingConfig(0.7))
    order = text.order[0, P:]
    words = [tok.decode([int(token)]).strip() for token in text.tokens[0, P:]]

    figure, axes = plt.subplots(figsize=(10, 3.6))
    rows = [words, [str(int(step)) for step in order]]
    masked = [torch.zeros(2 * K, dtype=torch.bool)] * 2
    num_states = int(order.max()) + 1
    for k in range(num_states):
        rows.append(words)
        masked.append(order >= k)
    draw_cells(axes, rows, torch.stack(masked))
    names = ["finished text", "order: revealed at step"] + [f"state {k}" for k in range(num_states)]
    for row, name in enumerate(names):
        axes.text(-0.25, row + 0.43, name, ha="right", va="center")
    axes.plot([K - 0.03, K - 0.03], [-0.2, num_states + 1.95], color=ORANGE, linewidth=2)
    axes.text(K / 2, -0.3, "block 1", ha="center")
    axes.text(3 * K / 2, -0.3, "block 2", ha="center")
    axes.set_xlim(-2.9, 2 * K + 0.1)
    return figure


# Lesson 7: speculative decoding -------------------------------------------------------------------

def lesson_7():
    """The overlap of p and q, and how many drafts the shipped student accepts of its own."""
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.tensor([0.2, 0.3, 0.5])
    overlap = torch.minimum(p, q)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    token = torch.arange(3)
    left.bar(token, overlap, 0.6, color=MIDDLE, label=f"min(p, q): accepted, {overlap.sum():.1f}")
    left.bar(token, p - overlap, 0.6, overlap, color=DARK, label="(p - q)+: what replaces a rejected draft")
    rejected = q > p
    left.bar(token[rejected], (q - p)[rejected], 0.6, p[rejected], color="white", edgecolor=ORANGE,
             hatch="//", label="(q - p)+: rejected drafts")
    left.set_xticks(token.tolist(), [f"token {i}" for i in range(3)])
    left.set(ylabel="probability", ylim=(0, 0.85))
    left.set_title("acceptance = 1 - TV", fontsize=12)
    left.legend(fontsize=9, frameon=False, loc="upper center")

    net, layout, tok = given.pretrained()
    prompt = given.encode(tok, "Once upon a time, there was a").expand(64, -1)
    u = uniforms(0, 0, range(64), (prompt.size(1) + 64, 3))
    for i, temperature in enumerate((1.0, 0.7, 0.0)):
        sampling = SamplingConfig(temperature)
        text = speculative.speculative_decode(net, layout, prompt, 64, u, tok.eot, sampling)
        iteration = text.accepted_in
        new_tokens = torch.stack([(iteration == k).sum(1) for k in range(1, int(iteration.max()))])
        counts = new_tokens[new_tokens > 0].bincount(minlength=layout.block + 1)[1:]
        slot = torch.arange(layout.block) + 0.27 * (i - 1)
        colour = (DARK, MIDDLE, LIGHT)[i]
        label = f"temperature {temperature}"
        right.bar(slot, counts / counts.sum(), 0.25, color=colour, edgecolor=DARK, label=label)
    right.set_xticks(range(layout.block))
    right.set(xlabel="accepted drafts per forward pass (of 3)", ylabel="share of the passes")
    right.set_title("shipped student, its own verifier", fontsize=12)
    right.legend(fontsize=9, frameon=False)
    figure.tight_layout()
    return figure


# Lesson 8: schedules and policies -----------------------------------------------------------------

def lesson_8():
    """Gains over static:2 with their intervals, at unequal and at equal cost; quality against speed."""
    lesson = check.load(lessons()[8] / "exercise.py")
    model = given.pretrained()
    two, speed_two = lesson.evaluate(model, reveal.parse("static:2"), seed=0)
    again, _ = lesson.evaluate(model, reveal.parse("static:2"), seed=2)
    curve = []
    for level in (0.0, 0.1, 0.15, 0.2, 0.3, 0.5):
        score, speed = lesson.evaluate(model, reveal.parse(f"leftmost:{level}"), seed=0)
        curve.append((speed, -score.mean()))
    slow, speed_slow = lesson.evaluate(model, reveal.parse("leftmost:0.5"), seed=0)
    level = lesson.level_at_cost(model, speed_two)
    equal, speed_equal = lesson.evaluate(model, reveal.parse(f"leftmost:{level}"), seed=0)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.8))
    left.plot(*zip(*curve), "o-", color=DARK, label="leftmost, levels 0.5 to 0")
    left.plot([speed_two], [-two.mean()], "s", color=ORANGE, markersize=9, label="static:2")
    left.axvline(speed_two, color=ORANGE, linewidth=1, linestyle="--")
    left.set(xlabel="tokens per forward pass", ylabel="nats per token")
    left.legend(fontsize=9, frameon=False)
    left.set_title("compare on the dashed line", fontsize=12)

    picks = torch.randint(len(two), (lesson.DRAWS, len(two)), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    rows = [("control:\nother seed", again), (f"leftmost at\n{speed_slow:.2f} tok/pass", slow),
            (f"leftmost at\n{speed_equal:.2f} tok/pass", equal)]
    for row, (_, score) in enumerate(rows):
        gain = score - two
        low, high = torch.quantile(gain[picks].mean(1), ends)
        right.plot([low, high], [row, row], color=DARK, linewidth=3)
        right.plot([gain.mean()], [row], "o", color=DARK, markersize=8)
    right.axvline(0, color=ORANGE)
    right.set_yticks(range(len(rows)), [name for name, _ in rows])
    right.set(xlabel="gain over static:2 (2.00 tok/pass), nats per token", ylim=(len(rows) - 0.5, -0.5))
    right.set_title("95 % intervals, paired bootstrap", fontsize=12)
    figure.tight_layout()
    return figure


PICTURES = {     # each function returns a figure
    1: lesson_1,
    2: lesson_2,
    3: lesson_3,
    4: lesson_4,
    5: lesson_5,
    6: lesson_6,
    7: lesson_7,
    8: lesson_8,
}


def main(argv: list[str]) -> None:
    folders = lessons()
    chosen = argv or [str(number) for number in PICTURES]
    for word in chosen:
        if not word.isdigit() or int(word) not in PICTURES:
            raise ValueError(f"there is no picture {word!r}: give numbers from {min(PICTURES)} to "
                             f"{max(PICTURES)}")
        path = folders[int(word)] / "picture.png"
        plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
        figure = PICTURES[int(word)]()
        figure.savefig(path, dpi=95, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
        print(f"{path} ({path.stat().st_size / 1000:.0f} KB)")


if __name__ == "__main__":
    sys.exit(cli.run(main))
