"""One row's rollout made visible: as text, as coloured text, and as a picture of all forward passes.

A trace is the finished text and, for each token, the forward pass that revealed it. Every intermediate state
follows from these two.
"""
from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MASK_SIGN = "▢"
RAMP = (33, 31, 29, 64, 130, 160, 162, 129)     # xterm colours; contrast of at least 3 on black and on white

# Code points that change how a terminal shows text, and the character shown instead.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}   # ESC becomes ␛
DEL_AND_C1 = range(0x7F, 0xA0)
DIRECTION_MARKS = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
SURROGATES = range(0xD800, 0xE000)
UNSAFE = CONTROL_PICTURES | dict.fromkeys([*DEL_AND_C1, *DIRECTION_MARKS, *SURROGATES], 0xFFFD)


@dataclass
class Trace:
    """A prompt, the response's tokens as text, and when each of them was revealed."""
    pieces: list[str]           # one per token
    revealed_at: list[int]      # one per token: the forward pass, counted from 1, that revealed it
    prompt: str
    forwards: int               # denoising passes; prefill and commits are not counted here
    block: int                  # tokens; blocks are counted from the end of the prompt
    speculative: bool = False   # speculative decoding: groups of tokens accepted together instead of blocks

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(start, stop) of each block, or of the tokens accepted by one iteration."""
        n = len(self.pieces)
        if self.speculative:
            starts = [i for i in range(n) if i == 0 or self.revealed_at[i] > self.revealed_at[i - 1]]
        else:
            starts = list(range(0, n, self.block))
        stops = [*starts[1:], n]
        return list(zip(starts, stops))

    @property
    def forwards_before(self) -> list[int]:
        """For each token, the number of forward passes before its block began."""
        counts = []
        for start, stop in self.groups:
            count = max(self.revealed_at[:start], default=0)
            counts += [count] * (stop - start)
        return counts

    @property
    def steps(self) -> list[int]:
        """For each token, the step of its block, from 0, that revealed it; its colour shows this number.

        In speculative decoding it is the token's index among those accepted together.
        """
        if self.speculative:
            return [i for start, stop in self.groups for i in range(stop - start)]
        return [at - 1 - before for at, before in zip(self.revealed_at, self.forwards_before)]

    @property
    def num_steps(self) -> int:
        """The number of steps that the colours have to distinguish."""
        if self.speculative:
            return max(self.steps, default=0) + 1
        return self.block

    @property
    def unit(self) -> str:
        """What `forwards` counts. An iteration of speculative decoding may take two forward passes."""
        return "iteration" if self.speculative else "forward"

    @property
    def colour_meaning(self) -> str:
        """What the colours mean, for the legend."""
        if self.speculative:
            return "index among the tokens accepted together"
        return "step of its block that revealed it"


def from_order(prompt: str, pieces: list[str], order, block: int) -> Trace:
    """The trace of a rollout. order[i] is the step within its block, from 0, that revealed token i."""
    order = [int(step) for step in order]
    assert len(order) == len(pieces), f"{len(order)} steps for {len(pieces)} tokens: pass one step per token"
    assert block >= 1, f"block {block}: must be at least 1"
    assert min(order, default=0) >= 0, f"steps {order}: must be at least 0 (pass revealed tokens only)"
    revealed_at = []
    forwards = 0
    for start in range(0, len(order), block):
        block_order = order[start:start + block]
        revealed_at += [forwards + step + 1 for step in block_order]
        forwards += max(block_order) + 1
    return Trace(pieces, revealed_at, prompt, forwards, block)


def from_iterations(prompt: str, pieces: list[str], iterations, block: int) -> Trace:
    """The trace of speculative decoding. iterations[i] is the iteration, from 0, that accepted token i."""
    revealed_at = [int(iteration) + 1 for iteration in iterations]
    counts = f"{len(revealed_at)} iterations for {len(pieces)} tokens"
    assert len(revealed_at) == len(pieces), f"{counts}: pass one iteration per token"
    return Trace(pieces, revealed_at, prompt, max(revealed_at, default=0), block, speculative=True)


# 1. text ------------------------------------------------------------------------------------------

def visible(text: str) -> str:
    """The text with control characters, except newline and tab, replaced by visible ones."""
    return text.translate(UNSAFE)


def state_text(pieces: list[str], masked) -> str:
    """A partially masked text, with one ▢ per masked token: `Lily had a▢▢ ball`."""
    tokens = zip(pieces, masked, strict=True)
    return "".join(MASK_SIGN if hidden else visible(piece) for piece, hidden in tokens)


def show(tokenizer, ids) -> str:
    """Ids as text, with one ▢ per MASK. The MASK id is the one above the tokenizer's vocabulary."""
    masked = [int(token) >= tokenizer.vocab_size for token in ids]
    revealed_ids = [int(token) for token, hidden in zip(ids, masked) if not hidden]
    revealed_pieces = iter(tokenizer.pieces(revealed_ids))
    pieces = ["" if hidden else next(revealed_pieces) for hidden in masked]
    return state_text(pieces, masked)


def coloured(trace: Trace, colour: bool) -> str:
    """The whole text; with `colour`, each token in the colour of its step (see `legend`)."""
    text = visible(trace.prompt)
    for piece, step in zip(trace.pieces, trace.steps):
        piece = visible(piece)
        text += paint(piece, step, trace.num_steps) if colour else piece
    return text


def legend(num_steps: int, meaning: str = "step of its block that revealed it") -> str:
    """One line that shows the colours of `coloured`, for traces with this `num_steps`."""
    names = [paint(name, first, num_steps) for name, first in colour_groups(num_steps)]
    return f"{meaning} " + " ".join(names)


def colour_groups(num_steps: int) -> list[tuple[str, int]]:
    """Which steps share a colour: (name, first step) of each group. Names, e.g. "3-4", count steps from 1."""
    found = []
    for _, group in itertools.groupby(range(num_steps), lambda step: colour_index(step, num_steps)):
        steps = list(group)
        first = steps[0]
        last = steps[-1]
        name = str(first + 1) if first == last else f"{first + 1}-{last + 1}"
        found.append((name, first))
    return found


def colour_index(step: int, num_steps: int) -> int:
    """The index into RAMP of a step; the ramp is spread over `num_steps` steps."""
    step = min(step, num_steps - 1)
    return step * (len(RAMP) - 1) // max(num_steps - 1, 1)


def paint(text: str, step: int, num_steps: int) -> str:
    """The text in the colour of a step, as an ANSI sequence."""
    return f"\x1b[38;5;{RAMP[colour_index(step, num_steps)]}m{text}\x1b[0m"


def supports_ansi(stream) -> bool:
    """Whether the stream is a terminal that understands ANSI sequences (cursor movement, colour)."""
    supported = stream.isatty() and os.environ.get("TERM") != "dumb"
    if supported and os.name == "nt":
        os.system("")                                            # enables ANSI in old Windows consoles
    return supported


def wants_colour(stream) -> bool:
    """Whether to write colours to the stream. NO_COLOR with any value says no (https://no-color.org)."""
    return supports_ansi(stream) and not os.environ.get("NO_COLOR")


# 2. picture ---------------------------------------------------------------------------------------

# The four states of a token after a forward pass.
NOT_BEGUN = 0       # its block has not begun
MASKED = 1
NEW = 2             # revealed by this pass
OLD = 3             # revealed by an earlier pass

GREY = "#4b5563"
DARK = "#1f2937"
VERMILLION = "#D55E00"                          # this and BLUE: Okabe and Ito's colours for the colour-blind
BLUE = "#0072B2"
LIGHT_BLUE = "#d6e8f5"
CELL_STYLE = {                                  # face, edge, text colour, font weight
    NEW: (VERMILLION, VERMILLION, "white", "bold"),
    OLD: (LIGHT_BLUE, LIGHT_BLUE, DARK, "normal"),
    MASKED: ("white", "#9ca3af", GREY, "normal"),
}

FONT = "DejaVu Sans Mono"
CHARACTER_WIDTH = 0.0836                        # inches, at 10 points
ROW_HEIGHT = 0.27                               # inches
LEGEND_WIDTH = 76                               # characters: the picture's least width


def grid(trace: Trace) -> list[list[int]]:
    """(forwards, tokens): the state of each token after each forward pass: NOT_BEGUN, MASKED, NEW or OLD."""
    tokens = list(zip(trace.revealed_at, trace.forwards_before))
    rows = []
    for forward in range(1, trace.forwards + 1):
        row = [token_state(forward, revealed_at, before) for revealed_at, before in tokens]
        rows.append(row)
    return rows


def token_state(forward: int, revealed_at: int, forwards_before: int) -> int:
    """The state of one token after a forward pass."""
    if forward > revealed_at:
        return OLD
    if forward == revealed_at:
        return NEW
    return MASKED if forward > forwards_before else NOT_BEGUN


def readable_part(trace: Trace, columns: float = 112, rows: int = 26) -> tuple[list[float], int]:
    """The part that the picture shows: the whole blocks that fit into `columns` characters and `rows` passes.

    If even the first block does not fit, its first tokens. Returns the edges of the tokens' cells in
    characters, one more than there are tokens, and the number of forward passes.
    """
    edges = [0.0]
    for piece in trace.pieces:
        cell_width = max(len(short_label(piece)), 2) + 1.4
        edges.append(edges[-1] + cell_width)
    fitting = 0
    for right, before in zip(edges[1:], trace.forwards_before):
        fitting += right <= columns and before < rows
    whole_blocks = max((stop for _, stop in trace.groups if stop <= fitting), default=0)
    tokens = whole_blocks or fitting
    forwards = min(rows, max(trace.revealed_at[:tokens], default=0))
    return edges[:tokens + 1], forwards


def picture(trace: Trace, path) -> None:
    """Write the rollout as an image: a row per forward pass, a column per token, as much as is readable."""
    save(figure(trace), path)


def figure(trace: Trace):
    """The picture as a matplotlib figure. x counts characters, y counts rows."""
    from matplotlib.figure import Figure

    edges, forwards = readable_part(trace)
    tokens = len(edges) - 1
    width = max(edges[-1], LEGEND_WIDTH)
    margin = len(trace.unit) + 2                                 # for the row numbers and their heading
    size = ((width + margin + 3) * CHARACTER_WIDTH, (forwards + 5) * ROW_HEIGHT)
    fig = Figure(figsize=size, dpi=160, facecolor="white")
    axes = fig.add_axes((0, 0, 1, 1), xlim=(-margin, width + 3), ylim=(forwards + 0.8, -4.2))
    axes.set_axis_off()
    draw_headings(axes, trace, tokens, forwards)
    for row, states in enumerate(grid(trace)[:forwards]):
        draw_text(axes, -1, row + 0.5, str(row + 1), ha="right")
        for token, state in enumerate(states[:tokens]):
            cell_width = edges[token + 1] - edges[token]
            draw_cell(axes, edges[token], row, cell_width, state, short_label(trace.pieces[token]))
    draw_frames(axes, trace, edges, forwards)
    return fig


def draw_headings(axes, trace: Trace, tokens: int, forwards: int) -> None:
    """The title, what is shown, and the legend of the cells."""
    title = f"{len(trace.pieces)} tokens in {trace.forwards} {trace.unit}s"
    if tokens < len(trace.pieces):
        title += f": the first {tokens} tokens, {forwards} {trace.unit}s"
    draw_text(axes, 0, -3.45, title, size=13, weight="bold", color="black")

    subtitle = f"{'drafts' if trace.speculative else 'blocks'} of {trace.block}"
    if trace.prompt:
        subtitle += f", after “{short_label(trace.prompt[-60:], 60)}”"
    draw_text(axes, 0, -2.35, subtitle)

    draw_text(axes, -1, -0.95, trace.unit, ha="right")
    meanings = [(0, NEW, "revealed now"), (19, OLD, "revealed before")]
    if not trace.speculative:                                    # there no mask is seen
        meanings.append((39, MASKED, "still masked"))
    for left, state, meaning in meanings:
        draw_cell(axes, left, -1.45, 3, state, "")
        draw_text(axes, left + 3.4, -0.95, meaning)


def draw_frames(axes, trace: Trace, edges: list[float], forwards: int) -> None:
    """A frame around each block and the forward passes that worked on it: together they form a staircase."""
    from matplotlib.patches import Rectangle

    tokens = len(edges) - 1
    forwards_before = trace.forwards_before
    for start, stop in trace.groups:
        if start >= tokens:
            break
        stop = min(stop, tokens)
        top = forwards_before[start]
        bottom = min(max(trace.revealed_at[start:stop]), forwards)
        corner = (edges[start], top)
        width = edges[stop] - edges[start]
        axes.add_patch(Rectangle(corner, width, bottom - top, fill=False, ec=DARK, lw=1.4))


def draw_cell(axes, left: float, top: float, width: float, state: int, text: str) -> None:
    """One token after one forward pass. Nothing is drawn if its block has not begun."""
    from matplotlib.patches import FancyBboxPatch

    if state == NOT_BEGUN:
        return
    face, edge, text_colour, weight = CELL_STYLE[state]
    corner = (left + 0.35, top + 0.2)
    axes.add_patch(FancyBboxPatch(corner, width - 0.7, 0.6, "round,pad=0.15", fc=face, ec=edge, lw=0.8))
    shown = "" if state == MASKED else text
    draw_text(axes, left + width / 2, top + 0.52, shown, ha="center", color=text_colour, weight=weight)


def draw_text(axes, x: float, y: float, text: str, **style) -> None:
    style = {"ha": "left", "color": GREY, "size": 10, **style}
    axes.text(x, y, text, va="center", family=FONT, parse_math=False, **style)


def short_label(text: str, limit: int = 14) -> str:
    """The text on one line: ⏎ for a newline, ␣ for a lone space, � for a character missing in the font."""
    stripped = visible(text).strip(" ")
    if not stripped and text:
        stripped = "␣"
    line = stripped.replace("\n", "⏎").replace("\t", "⇥")
    line = "".join(sign if ord(sign) in font_characters() else "\ufffd" for sign in line)
    return line if len(line) <= limit else line[:limit - 1] + "…"


@functools.cache
def font_characters() -> frozenset[int]:
    """The code points that FONT has; matplotlib, which ships it, would warn about others."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font
    font = FT2Font(findfont(FONT))
    return frozenset(font.get_charmap())


# 3. files -----------------------------------------------------------------------------------------

def save(fig, path) -> None:
    """Write a figure; the suffix of the path decides the format."""
    suffix = Path(path).suffix[1:] or "png"
    write_atomically(path, lambda unfinished: fig.savefig(unfinished, format=suffix))


def write_atomically(path, write: Callable[[Path], object]) -> None:
    """Make a file, whole or not at all: `write(unfinished)` writes another file, which is then renamed.

    The folder is made if needed. If `path` is a symbolic link, its target is written. OSError if the file
    cannot be written.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        if error.strerror:
            error.filename = str(path)                           # not the name of the unfinished file
        raise
    finally:
        unfinished.unlink(missing_ok=True)
