"""A rollout in the terminal, one frame per forward pass, each token in the colour of its step.

Rows are wrapped here and stay one column short of the terminal's width, so that a frame covers exactly the
one before it. At the end everything is erased, and the caller prints the finished text as usual.
"""
from __future__ import annotations

import itertools
import shutil
import time
import unicodedata
from operator import itemgetter

from report.trace import MASK_SIGN, Trace, paint, supports_ansi, visible

NO_STEP = -1                    # the step of text that is not revealed: the prompt, and masks

# Terminals differ on the width of some characters, so their own wrapping is off while frames are shown.
HIDE_CURSOR = "\x1b[?25l"
NO_WRAPPING = "\x1b[?7l"
BEGIN = HIDE_CURSOR + NO_WRAPPING
END = "\x1b[0m\x1b[?7h\x1b[?25h"    # default colour, wrapping, cursor
CLEAR_TO_END_OF_ROW = "\x1b[K"
CLEAR_BELOW = "\x1b[J"


def frame_text(trace: Trace, forward: int) -> list[tuple[str, int]]:
    """The text after `forward` forward passes, as (text, step) pairs: all blocks that have begun by then.

    It is what the next pass reads; after the last pass it is the finished text.
    """
    parts = [(visible(trace.prompt), NO_STEP)]
    tokens = zip(trace.pieces, trace.revealed_at, trace.forwards_before, trace.steps)
    for piece, revealed_at, forwards_before, step in tokens:
        if forwards_before > forward:
            continue
        if revealed_at > forward:
            parts.append((MASK_SIGN, NO_STEP))
        else:
            parts.append((visible(piece), step))
    return parts


def display_width(character: str) -> int:
    """The largest number of columns that a terminal may use for a character.

    Terminals differ on characters that combine into one (emoji sequences); here each of them counts.
    """
    is_combining = unicodedata.category(character) in ("Mn", "Me")
    if is_combining and character != "\ufe0f":  # U+FE0F can make the character before it wider
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(parts: list[tuple[str, int]], columns: int) -> list[list[tuple[str, int]]]:
    """Rows of (character, step) pairs, each row at most `columns` wide. A tab becomes four spaces."""
    rows = [[]]
    used = 0
    for text, step in parts:
        for character in text.replace("\t", "    "):
            width = display_width(character)
            if character == "\n" or used + width > columns:
                rows.append([])
                used = 0
            if character != "\n":
                rows[-1].append((character, step))
                used += width
    return rows


def paint_row(row: list[tuple[str, int]], num_steps: int, colour: bool) -> str:
    """A row as text; with `colour`, each token in the colour of its step."""
    painted = ""
    for step, group in itertools.groupby(row, key=itemgetter(1)):
        text = "".join(character for character, _ in group)
        painted += paint(text, step, num_steps) if colour and step != NO_STEP else text
    return painted


def move_to_top(num_rows: int) -> str:
    """Move the cursor from the last of `num_rows` rows to the beginning of the first."""
    up = f"\x1b[{num_rows - 1}A" if num_rows > 1 else ""
    return "\r" + up


def erase(num_rows: int) -> str:
    """Erase rows one by one: some terminals move a screen that is cleared at once into their scrollback."""
    clear_rows = "\n".join([CLEAR_TO_END_OF_ROW] * num_rows)
    return move_to_top(num_rows) + clear_rows + move_to_top(num_rows)


def play(trace: Trace, stream, fps: float, colour: bool) -> None:
    """Show `fps` forward passes per second on a terminal, then erase them; do nothing without ANSI support.

    Of a text higher than the terminal the end is shown. The cursor and the terminal's settings are always
    restored, after Ctrl-C too.
    """
    if not supports_ansi(stream):
        return
    num_rows = 0                # of the frame on the screen
    try:
        stream.write(BEGIN)
        for forward in range(trace.forwards + 1):
            columns, lines = shutil.get_terminal_size()          # asked each time: the window may be resized
            rows = wrap(frame_text(trace, forward), max(columns - 1, 1))
            rows = rows[-lines:]
            painted = [paint_row(row, trace.num_steps, colour) for row in rows]
            text = f"{CLEAR_TO_END_OF_ROW}\n".join(painted)
            stream.write(move_to_top(num_rows) + text + CLEAR_BELOW)
            stream.flush()
            num_rows = len(rows)
            time.sleep(1 / fps)
        stream.write(erase(num_rows))
    except KeyboardInterrupt:
        stream.write("\n")                                       # the frame stays on the screen
        raise
    finally:
        stream.write(END)
        stream.flush()
