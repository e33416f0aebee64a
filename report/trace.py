"""One row's rollout, made visible: any state as text, the text coloured by when, and a picture of every forward.

A trace is the finished text and, for each token, the forward that revealed it; every state is read off those two.
"""
from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HIDDEN = "▢"
RAMP = (33, 31, 29, 64, 130, 160, 162, 129)      # xterm's 256 colours, contrast at least 3 on black and on white
AHEAD, MASKED, NEW, OLD = range(4)               # after a forward: block not begun, masked, just revealed, earlier
UNSAFE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}      # ESC becomes ␛
UNSAFE |= dict.fromkeys([*range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A),
                         *range(0xD800, 0xE000)], 0xFFFD)       # DEL, C1, marks that turn the line round, surrogates

GREY, DARK = "#6b7280", "#33415c"
LOOK = {NEW: ("#d9480f", "#d9480f", "white", "bold"), OLD: ("#e3ecf7", "#e3ecf7", DARK, "normal"),
        MASKED: ("white", "#b8c1cf", GREY, "normal")}     # of a cell: face, edge, ink, weight
COLUMN, ROW = 0.0836, 0.27                       # inches: a character of the picture's font at 10 points, a row


@dataclass
class Trace:
    """A prompt, the response's tokens as text, and the forward, counted from 1, that revealed each."""
    pieces: list[str]
    when: list[int]
    prompt: str
    forwards: int        # that denoised: prefill and commits are no part of the picture
    block: int           # tokens; blocks are counted from the end of the prompt
    runs: bool = False   # verified text: no blocks, but the tokens that one forward accepted

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Where each block, or run, begins and ends."""
        n = len(self.when)
        starts = ([i for i in range(n) if i == 0 or self.when[i] > self.when[i - 1]] if self.runs
                  else range(0, n, self.block))
        return list(zip(starts, [*starts[1:], n]))

    @property
    def began(self) -> list[int]:
        """For each token, the forwards that were over when its block began."""
        return [max(self.when[:start], default=0) for start, stop in self.parts for _ in range(start, stop)]

    @property
    def steps(self) -> list[int]:
        """For each token, the step of its block, from 0, that revealed it, or its place in its run: its colour."""
        if self.runs:
            return [i for start, stop in self.parts for i in range(stop - start)]
        return [when - 1 - began for when, began in zip(self.when, self.began)]

    @property
    def most(self) -> int:
        """Steps among which the colours are parted."""
        return max(self.steps, default=0) + 1 if self.runs else self.block

    @property
    def unit(self) -> str:
        """What is counted: verified text may take two forwards, a draft's and its verifier's."""
        return "iteration" if self.runs else "forward"

    @property
    def colours(self) -> str:
        """What they mean."""
        return "its place among those accepted together" if self.runs else "revealed in its block's step"


def from_order(prompt: str, pieces: list[str], order, block: int) -> Trace:
    """The trace of a rollout; order[i] is the step within its block, from 0, at which token i was revealed."""
    order = [int(step) for step in order]
    assert len(order) == len(pieces), f"{len(order)} steps for {len(pieces)} tokens: cut both to the same text"
    assert block >= 1 and min(order, default=0) >= 0, f"block {block}, steps {order}: wanted at least 1, and all from 0"
    when, forwards = [], 0
    for start in range(0, len(order), block):
        steps = order[start:start + block]
        when += [forwards + step + 1 for step in steps]
        forwards += max(steps) + 1
    return Trace(pieces, when, prompt, forwards, block)


def from_turns(prompt: str, pieces: list[str], turns, block: int) -> Trace:
    """The trace of verified text; turns[i] is the iteration, from 0, in which token i was accepted."""
    when = [int(turn) + 1 for turn in turns]
    assert len(when) == len(pieces), f"{len(when)} iterations for {len(pieces)} tokens: cut both to the same text"
    return Trace(pieces, when, prompt, max(when, default=0), block, runs=True)


# text ---------------------------------------------------------------------------------------------------------------

def visible(text: str) -> str:
    """text without what a terminal would obey: control characters but newline and tab become signs for them."""
    return text.translate(UNSAFE)


def state_text(pieces: list[str], masked) -> str:
    """A state as text, one ▢ for each masked token: `Lily had a▢▢ ball`."""
    return "".join(HIDDEN if hidden else visible(piece) for piece, hidden in zip(pieces, masked, strict=True))


def show(tokenizer, ids) -> str:
    """Any row of ids as text; [MASK] is the id that the tokenizer has not got."""
    masked = [int(i) >= tokenizer.vocab_size for i in ids]
    pieces = iter(tokenizer.pieces([int(i) for i, hidden in zip(ids, masked) if not hidden]))
    return state_text(["" if hidden else next(pieces) for hidden in masked], masked)


def coloured(trace: Trace, colour: bool) -> str:
    """The whole text, each token in the colour of the step of its block that revealed it (see `legend`)."""
    def painted(piece: str, step: int) -> str:
        return paint(visible(piece), step, trace.most) if colour else visible(piece)
    return visible(trace.prompt) + "".join(map(painted, trace.pieces, trace.steps))


def legend(steps: int, meaning: str = "revealed in its block's step") -> str:
    """One line of colours for blocks of at most so many steps: `coloured` uses them with steps = the trace's most."""
    return f"{meaning} " + " ".join(paint(name, step, steps) for name, step in scale(steps))


def scale(steps: int) -> list[tuple[str, int]]:
    """Which of so many steps share a colour: their name, counted from 1, and the first of them."""
    groups = [list(group) for _, group in itertools.groupby(range(steps), lambda step: shade(step, steps))]
    return [(f"{g[0] + 1}-{g[-1] + 1}" if len(g) > 1 else str(g[0] + 1), g[0]) for g in groups]


def supports_ansi(stream) -> bool:
    """Is stream a terminal that moves its cursor, and changes colours, when it is told to?"""
    terminal = stream.isatty() and os.environ.get("TERM") != "dumb"
    if terminal and os.name == "nt":
        os.system("")                            # an old Windows console obeys only after this
    return terminal


def wants_colour(stream) -> bool:
    """Is stream a terminal that wants colours? NO_COLOR with any value says no (https://no-color.org)."""
    return supports_ansi(stream) and not os.environ.get("NO_COLOR")


def shade(step: int, steps: int) -> int:
    """The place in the ramp of a step, the ramp being spread over so many."""
    return min(step, steps - 1) * (len(RAMP) - 1) // max(steps - 1, 1)


def paint(text: str, step: int, steps: int) -> str:
    """text in the colour of step."""
    return f"\x1b[38;5;{RAMP[shade(step, steps)]}m{text}\x1b[0m"


# the picture --------------------------------------------------------------------------------------------------------

def states(trace: Trace) -> list[list[int]]:
    """forwards x tokens: what each token is after each forward, one of AHEAD, MASKED, NEW, OLD."""
    def state(forward: int, when: int, began: int) -> int:
        if forward < when:
            return MASKED if forward > began else AHEAD
        return NEW if forward == when else OLD
    return [[state(f, *token) for token in zip(trace.when, trace.began)] for f in range(1, trace.forwards + 1)]


def readable(trace: Trace, columns: float = 112, rows: int = 26) -> tuple[list[float], int]:
    """Where each cell begins and the last ends, in characters, and the forwards: as many whole blocks as fit a slide,
    or, if the first alone is too much, its first tokens."""
    edges = [0.0, *itertools.accumulate(max(len(_label(piece)), 2) + 1.4 for piece in trace.pieces)]
    fit = sum(edge <= columns and began < rows for edge, began in zip(edges[1:], trace.began))
    whole = max((stop for _, stop in trace.parts if stop <= fit), default=0)
    tokens = whole or fit
    return edges[:tokens + 1], min(rows, max(trace.when[:tokens], default=0))


def picture(trace: Trace, path) -> None:
    """Write the rollout as an image: a row a forward, a column a token, as much of it as is readable."""
    save(figure(trace), path)


def figure(trace: Trace):
    """The picture as a matplotlib figure; x counts characters of its font, y rows: its size follows the text."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    edges, forwards = readable(trace)
    wide, tokens, margin = max(edges[-1], 76), len(edges) - 1, len(trace.unit) + 2
    fig = Figure(figsize=((wide + margin + 3) * COLUMN, (forwards + 5) * ROW), dpi=160, facecolor="white")
    axes = fig.add_axes((0, 0, 1, 1), xlim=(-margin, wide + 3), ylim=(forwards + 0.8, -4.2))
    axes.set_axis_off()
    _headings(axes, trace, tokens, forwards)
    for row, line in enumerate(states(trace)[:forwards]):
        _say(axes, -1, row + 0.5, str(row + 1), ha="right")
        for left, right, piece, state in zip(edges, edges[1:], trace.pieces, line):
            _cell(axes, left, row, right - left, state, _label(piece))
    for start, stop in trace.parts:                  # a frame around the forwards that worked on a block: a staircase
        if start >= tokens:
            break
        stop, top = min(stop, tokens), trace.began[start]
        high = min(max(trace.when[start:stop]), forwards) - top
        axes.add_patch(Rectangle((edges[start], top), edges[stop] - edges[start], high, fill=False, ec=DARK, lw=1.4))
    return fig


def _headings(axes, trace: Trace, tokens: int, forwards: int) -> None:
    """What one sees, how much of it, and what the three kinds of cells are."""
    part = "" if tokens == len(trace.pieces) else f": the first {tokens} tokens, {forwards} {trace.unit}s"
    title = f"{len(trace.pieces)} tokens in {trace.forwards} {trace.unit}s{part}"
    _say(axes, 0, -3.45, title, size=13, weight="bold", color="black")
    after = f", after “{_label(trace.prompt[-60:], 60)}”" if trace.prompt else ""
    _say(axes, 0, -2.35, f"{'drafts' if trace.runs else 'blocks'} of {trace.block}{after}")
    _say(axes, -1, -0.95, trace.unit, ha="right")
    meanings = (0, NEW, "revealed by it"), (19, OLD, "revealed before"), (39, MASKED, "still masked")
    for left, state, meaning in meanings[:3 - trace.runs]:                       # nothing that is accepted was masked
        _cell(axes, left, -1.45, 3, state, "")
        _say(axes, left + 3.4, -0.95, meaning)


def _cell(axes, left: float, top: float, width: float, state: int, text: str) -> None:
    """One token after one forward; a block that has not begun leaves the paper white."""
    from matplotlib.patches import FancyBboxPatch
    if state == AHEAD:
        return
    face, edge, ink, weight = LOOK[state]
    corner, size = (left + 0.35, top + 0.2), (width - 0.7, 0.6)
    axes.add_patch(FancyBboxPatch(corner, *size, "round,pad=0.15", fc=face, ec=edge, lw=0.8))
    _say(axes, left + width / 2, top + 0.52, "" if state == MASKED else text, ha="center", color=ink, weight=weight)


def _say(axes, x: float, y: float, text: str, **look) -> None:
    look = {"ha": "left", "color": GREY, "size": 10, **look}
    axes.text(x, y, text, va="center", family="DejaVu Sans Mono", parse_math=False, **look)


def _label(text: str, limit: int = 14) -> str:
    """text on one line in the picture's font: a newline as ⏎, a lone blank as ␣, a sign the font hasn't got as �."""
    text = visible(text).strip(" ").replace("\n", "⏎").replace("\t", "⇥") or "␣" * bool(text)
    text = "".join(sign if ord(sign) in _signs() else "\ufffd" for sign in text)
    return text if len(text) <= limit else text[:limit - 1] + "…"


@functools.cache
def _signs() -> frozenset[int]:
    """The code points of DejaVu Sans Mono, which comes with matplotlib; for others matplotlib would warn."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font
    return frozenset(FT2Font(findfont("DejaVu Sans Mono")).get_charmap())


def save(fig, path) -> None:
    """Write a figure to path; the kind of image is the name's ending."""
    appear(path, lambda part: fig.savefig(part, format=Path(path).suffix[1:] or "png"))


def appear(path, write: Callable[[Path], object]) -> None:
    """The file at path, made by `write` under another name: whole or not at all. OSError if it can't be written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
