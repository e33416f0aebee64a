"""A rollout in the terminal, forward by forward: what each one read, every token in the colour of its step.

Rows are wrapped here and never reach the last column, so that exactly what was drawn can be drawn over. At the end it
is all taken away: the caller prints the finished text as if nobody had watched, and the terminal wraps it its own way.
"""
from __future__ import annotations

import itertools
import shutil
import time
import unicodedata
from operator import itemgetter

from report.trace import HIDDEN, Trace, paint, supports_ansi, visible

PLAIN = -1                                   # the step of what nobody reveals: the prompt, and masks
BEGIN = "\x1b[?25l\x1b[?7l"                  # no cursor; a sign that a terminal finds wider than we do wraps no row
END = "\x1b[0m\x1b[?7h\x1b[?25h"
CLEAR_ROW, CLEAR_BELOW = "\x1b[K", "\x1b[J"  # what stands behind the cursor


def frame(trace: Trace, forward: int) -> list[tuple[str, int]]:
    """The state after so many forwards, which the next one reads, as texts and their steps: where(when > forward, ▢,
    token) in the blocks that have begun by then. After the last forward it is the finished text."""
    tokens = zip(trace.pieces, trace.when, trace.began, trace.steps)
    return [(visible(trace.prompt), PLAIN), *((HIDDEN, PLAIN) if when > forward else (visible(piece), step)
                                              for piece, when, began, step in tokens if began <= forward)]


def width(sign: str) -> int:
    """Columns of a sign, at most: terminals differ on signs that join into one, counted here as if they did not."""
    if unicodedata.category(sign) in ("Mn", "Me") and sign != "\ufe0f":      # which can make the sign before it wide
        return 0
    return 2 if unicodedata.east_asian_width(sign) in "WF" else 1


def rows(parts: list[tuple[str, int]], columns: int) -> list[list[tuple[str, int]]]:
    """The signs of all parts with their steps, in rows of at most so many columns; a tab is four blanks."""
    made, used = [[]], 0
    for text, step in parts:
        for sign in text.replace("\t", "    "):
            wide = width(sign)
            if sign == "\n" or used + wide > columns:
                made.append([])
                used = 0
            if sign != "\n":
                made[-1].append((sign, step))
                used += wide
    return made


def painted(row: list[tuple[str, int]], block: int, colour: bool) -> str:
    """A row as it is written, each run of one step in its colour."""
    runs = ((step, "".join(sign for sign, _ in run)) for step, run in itertools.groupby(row, key=itemgetter(1)))
    return "".join(paint(text, step, block) if colour and step != PLAIN else text for step, text in runs)


def back(drawn: int) -> str:
    """To the first sign of so many rows, from the last of them."""
    return "\r" + f"\x1b[{drawn - 1}A" * (drawn > 1)


def away(drawn: int) -> str:
    """Clears so many rows one by one: some terminals keep a screen that is cleared at once among what scrolled out."""
    return back(drawn) + "\n".join([CLEAR_ROW] * drawn) + back(drawn)


def play(trace: Trace, stream, fps: float, colour: bool) -> None:
    """Show the rollout at so many forwards a second, then clear it away; nothing, if stream is no terminal that obeys.
    Of a text higher than the terminal, its end. Whatever happens, the cursor and its attributes come back."""
    if not supports_ansi(stream):
        return
    drawn = 0
    try:
        stream.write(BEGIN)
        for forward in range(trace.forwards + 1):
            columns, lines = shutil.get_terminal_size()                      # anew each time: a window can be resized
            view = rows(frame(trace, forward), max(columns - 1, 1))[-lines:]
            text = f"{CLEAR_ROW}\n".join(painted(row, trace.most, colour) for row in view)
            stream.write(back(drawn) + text + CLEAR_BELOW)
            stream.flush()
            drawn = len(view)
            time.sleep(1 / fps)
        stream.write(away(drawn))
    except KeyboardInterrupt:
        stream.write("\n")                                                   # what is there stays
        raise
    finally:
        stream.write(END)
        stream.flush()
