"""What is seen in a terminal: the states that the network read, and at the end what is printed if nobody watches."""
import io
import re
import time

import pytest

from report import terminal, trace
from report.trace import AHEAD, HIDDEN, MASKED, NEW
from tests.report.test_trace import NASTY, SHAPES, rollout

WIDE = "漢字かな한국어😀🐶"
WORDS = [" a", " dog", "\n", " found\nthe", "\n\n", "漢字", " 😀🐶", "e\u0301", "\u0301\u0302", "", "\t|", " 한국어",
         "extraordinarily", "👩‍👩‍👧", "❤️", ".", NASTY[::7]]
PIECES = [WORDS[7 * i % len(WORDS)] for i in range(3 * len(WORDS))]
JOIN = "\u200d\ufe0f\u0301\u0302"                # what stands on the sign before it, or at a row's beginning on none
BEFORE = "$ python sample.py --watch\n"
CODE = re.compile(r"\x1b\[(\??)(\d*(?:;\d+)*)([A-Za-z])")


class Screen(io.StringIO):
    """A terminal: it obeys what watch.py tells it, and refuses all else. `above` has scrolled out."""

    def __init__(self, columns: int, lines: int, wide: str = WIDE):
        super().__init__()
        self.columns, self.lines, self.wide, self.said = columns, lines, wide, ""
        self.rows, self.above, self.y, self.x = [[] for _ in range(lines)], [], 0, 0
        self.wraps = self.cursor = True
        self.colour, self.clipped = False, 0

    def isatty(self):
        return True

    def write(self, text):
        at, self.said = 0, self.said + text
        while at < len(text):
            code = CODE.match(text, at)
            if code:
                self.obey(code[1] + code[3], code[2])
            else:
                self.put(text[at])
            at = code.end() if code else at + 1

    def obey(self, what, number):
        row = self.rows[self.y]
        if what == "A":
            self.y = max(0, self.y - int(number))
        elif what in ("K", "J"):
            if what == "J" and self.x == self.y == 0:        # as tmux does
                self.above += self.rows
            del row[min(self.x, self.columns - 1):]          # behind the last column, the cursor is still on it
            for below in range(self.y + 1, self.lines) if what == "J" else ():
                self.rows[below] = []
        elif what == "m":
            self.colour = number != "0"
        else:
            assert what in ("?h", "?l") and number in ("7", "25"), f"ESC[{what}{number}"
            setattr(self, "wraps" if number == "7" else "cursor", what == "?h")

    def put(self, sign):
        if sign == "\r":
            self.x = 0
        elif sign == "\n":
            self.down()
        elif sign == "\t":
            while self.x < self.columns - 1 and (self.blank() or self.x % 8):
                pass
        elif sign not in JOIN:
            self.show(sign, 1 + (sign in self.wide))
        elif self.x:
            self.rows[self.y][self.x - 1] += sign
        assert sign in "\r\n\t" or ord(sign) >= 32 and not 127 <= ord(sign) < 160, ascii(sign)

    def blank(self):
        self.show(" ", 1)
        return False

    def show(self, sign, wide):
        if self.x + wide > self.columns:
            if self.wraps:
                self.down()
            else:
                self.clipped, self.x = self.clipped + 1, self.columns - wide
        row = self.rows[self.y]
        row += [" "] * (self.x - len(row))
        row[self.x:self.x + wide] = [sign] + [""] * (wide - 1)
        self.x += wide

    def down(self):
        self.x, self.y = 0, self.y + 1
        if self.y == self.lines:
            self.above.append(self.rows.pop(0))
            self.rows, self.y = [*self.rows, []], self.y - 1

    def seen(self):
        """All rows, but the empty ones at the end."""
        return "\n".join("".join(row) for row in self.above + self.rows).rstrip("\n").split("\n")


@pytest.fixture
def play(monkeypatch):
    """Plays a trace on a screen and prints it, as sample.py does; `each(screen)` is called while a frame is seen."""
    monkeypatch.setenv("TERM", "xterm")

    def on(screen, seen, each=lambda screen: None, fps=8.0, colour=True):
        monkeypatch.setenv("COLUMNS", str(screen.columns))
        monkeypatch.setenv("LINES", str(screen.lines))
        slept = []
        monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) or each(screen))
        screen.write(BEFORE)
        terminal.play(seen, screen, fps, colour)
        screen.write(trace.coloured(seen, colour) + "\n\n")
        return slept
    return on


def plain(parts):
    return "".join(text for text, _ in parts)


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_a_frame_is_the_state_that_the_next_forward_reads(tokens, block):
    """A mask for what it or a later one reveals, in its block; nothing of the blocks after it."""
    seen = rollout(tokens, block)[0]
    for forward, line in enumerate(trace.states(seen)):
        masked = [state in (NEW, MASKED) for state in line if state != AHEAD]
        text = "Once" + trace.state_text(seen.pieces[:len(masked)], masked)
        assert plain(terminal.frame(seen, forward)) == text
        wanted = [(piece if when <= forward else HIDDEN) for piece, when in zip(seen.pieces, seen.when)]
        assert text == "Once" + "".join(wanted[:len(masked)])
    assert plain(terminal.frame(seen, 0)) == "Once" + HIDDEN * min(block, tokens)


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_the_last_frame_is_the_finished_text_in_its_colours(tokens, block):
    pieces = 2 * [word for word in PIECES if "\n" not in word and word]
    seen = rollout(tokens, block, pieces=pieces[:tokens])[0]
    last = terminal.frame(seen, seen.forwards)
    assert plain(last) == trace.coloured(seen, False)
    assert [step for text, step in last[1:]] == seen.steps
    row, = terminal.rows(last, 10**9)
    for colour in True, False:
        assert letters(terminal.painted(row, block, colour)) == letters(trace.coloured(seen, colour).replace("\t", "    "))


def letters(text):
    """Each sign with the colour it has."""
    found, colour = [], None
    for code, sign in re.findall(r"(\x1b\[[\d;]*m)|(.)", text):
        colour = code or colour if code else colour
        if sign:
            found.append((sign, None if colour in (None, "\x1b[0m") else colour))
    return found


@pytest.mark.parametrize("columns, lines", [(80, 24), (80, 3), (33, 7), (20, 200), (9, 12), (2, 5), (80, 2)])
@pytest.mark.parametrize("colour", [True, False])
def test_nothing_is_left_of_what_was_drawn(play, columns, lines, colour):
    """Whatever widths, newlines and heights: on the screen and above it stands what would stand there anyway."""
    watched, unwatched = Screen(columns, lines), Screen(columns, lines)
    seen = rollout(len(PIECES), 4, pieces=PIECES)[0]
    play(watched, seen, colour=colour)
    unwatched.write(BEFORE + trace.coloured(seen, colour) + "\n\n")
    assert watched.seen() == unwatched.seen() and watched.x == 0 and not any(watched.rows[watched.y - 1:])
    assert watched.clipped == 0 or columns == 2
    assert (watched.wraps, watched.cursor, watched.colour) == (True, True, False)
    assert ("38;5" in watched.said) is colour


@pytest.mark.parametrize("wide", ["", WIDE + HIDDEN + "|.\u2028", "".join(map(chr, range(0x2000, 0x2800)))])
def test_a_terminal_with_other_widths_is_left_as_clean(play, wide):
    """Some draw ▢ over two columns, or an emoji over one: a row may be cut there, but never becomes two."""
    watched, unwatched = Screen(33, 300, wide), Screen(33, 300, wide)
    seen = rollout(len(PIECES), 4, pieces=PIECES)[0]
    play(watched, seen)
    unwatched.write(BEFORE + trace.coloured(seen, True) + "\n\n")
    assert watched.seen() == unwatched.seen()


@pytest.mark.parametrize("columns, lines", [(80, 24), (33, 7), (9, 12), (80, 2)])
def test_each_frame_is_on_the_screen(play, columns, lines):
    """All of it, or its end if it is higher; above it what was there before."""
    seen, frames = rollout(40, 4, pieces=[word for word in WORDS if "\t" not in word][:13] * 3 + ["."])[0], []

    def look(screen):
        view = terminal.rows(terminal.frame(seen, len(frames)), columns - 1)
        wanted = ["".join(sign for sign, _ in row).lstrip(JOIN) for row in view]
        shown = ["".join(row) for row in screen.rows]
        if len(wanted) < lines:
            assert shown[:screen.y + 1][-len(wanted):] == wanted and not any(shown[screen.y + 1:])
        else:
            assert shown == wanted[-lines:]
        signs = "".join(sign for row in view for sign, _ in row)
        assert signs == plain(terminal.frame(seen, len(frames))).replace("\n", "")
        assert not screen.cursor and (screen.above + screen.rows)[0][:1] == ["$"]
        frames.append(shown)
    play(Screen(columns, lines), seen, look)
    assert len(frames) == seen.forwards + 1


def test_a_frame_stays_its_time(play):
    seen = rollout(40, 4)[0]
    for fps in (2.0, 8.0, 100.0):
        assert play(Screen(80, 24), seen, fps=fps) == [1 / fps] * (seen.forwards + 1)


def test_a_window_that_grows_or_shrinks_is_drawn_in_as_it_is(play, monkeypatch):
    def half(screen):
        screen.columns = 20
        monkeypatch.setenv("COLUMNS", "20")
    screen = Screen(80, 50)
    play(screen, rollout(60, 4)[0], half)
    assert screen.clipped == 0 and max(len(row) for row in screen.rows[1:]) <= 20


@pytest.mark.parametrize("moment", [0, 3, 9])
def test_after_ctrl_c_the_terminal_is_as_it_was(play, moment):
    """What was seen stays, and what comes next begins below it."""
    screen, seen, frames = Screen(33, 40), rollout(40, 4)[0], []

    def stop(screen):
        frames.append(screen.seen())
        if len(frames) > moment:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        play(screen, seen, stop)
    assert (screen.wraps, screen.cursor, screen.colour, screen.x) == (True, True, False, 0)
    assert screen.seen() == frames[-1] and not any(screen.rows[screen.y:])
    assert screen.said.endswith(terminal.END)


def test_hostile_text_sends_no_code(play):
    """The screen refuses what watch.py has no business with; all the rest of these codes would be the text's."""
    pieces = [NASTY, "\x1b[2J", "\x1b[?1049h", "\x9b31m", "\r"]
    seen = trace.from_order(NASTY + "\x1b]0;title\x07", pieces, [1, 0, 2, 1, 0], 4)
    screen = Screen(80, 24)
    play(screen, seen)
    text = CODE.sub("", screen.said)
    assert not set(text) & {chr(code) for code in [*range(32), *range(127, 160)]} - set("\n\t\r")
    assert "␛[2J" in text and text.count("\r") == seen.forwards + 3
    text.encode("utf-8")


@pytest.mark.parametrize("terminal, term", [(False, "xterm"), (True, "dumb")])
def test_where_nobody_obeys_nothing_is_shown(play, monkeypatch, terminal, term):
    screen = Screen(80, 24)
    screen.isatty = lambda: terminal
    monkeypatch.setenv("TERM", term)
    seen = rollout(40, 4)[0]
    assert play(screen, seen, colour=False) == [] and screen.said == BEFORE + trace.coloured(seen, False) + "\n\n"
