"""The terminal shows the states that the network reads, and after them what is printed without --watch."""
import io
import re
import time

import pytest

from report import terminal, trace
from report.trace import MASK_SIGN, MASKED, NEW, NOT_BEGUN
from tests.report.test_trace import NASTY, SHAPES, rollout

WIDE = "漢字かな한국어😀🐶"
WORDS = [" a", " dog", "\n", " found\nthe", "\n\n", "漢字", " 😀🐶", "e\u0301", "\u0301\u0302", "", "\t|",
         " 한국어", "extraordinarily", "👩‍👩‍👧", "❤️", ".", NASTY[::7]]
PIECES = [WORDS[7 * i % len(WORDS)] for i in range(3 * len(WORDS))]
JOIN = "\u200d\ufe0f\u0301\u0302"                # characters that combine with the one before them
BEFORE = "$ python sample.py --watch\n"
CODE = re.compile(r"\x1b\[(\??)(\d*(?:;\d+)*)([A-Za-z])")


class Screen(io.StringIO):
    """A strict terminal: it obeys the codes that report/terminal.py uses and fails on all others.

    `rows` are on the screen, `above` are the rows that have scrolled out; (x, y) is the cursor.
    """

    def __init__(self, columns: int, lines: int, wide: str = WIDE):
        super().__init__()
        self.columns = columns
        self.lines = lines
        self.wide = wide                             # the characters that take two columns
        self.written = ""
        self.rows = [[] for _ in range(lines)]
        self.above = []
        self.x = 0
        self.y = 0
        self.wraps = True
        self.cursor = True
        self.colour = False
        self.clipped = 0                             # characters written over the last column

    def isatty(self):
        return True

    def write(self, text):
        self.written += text
        i = 0
        while i < len(text):
            code = CODE.match(text, i)
            if code:
                self.obey(code[1] + code[3], code[2])
                i = code.end()
            else:
                self.put(text[i])
                i += 1

    def obey(self, command, number):
        row = self.rows[self.y]
        if command == "A":
            self.y = max(0, self.y - int(number))
        elif command in ("K", "J"):
            if command == "J" and self.x == self.y == 0:     # as tmux does
                self.above += self.rows
            del row[min(self.x, self.columns - 1):]          # after the last column the cursor is still on it
            for below in range(self.y + 1, self.lines) if command == "J" else ():
                self.rows[below] = []
        elif command == "m":
            self.colour = number != "0"
        else:
            assert command in ("?h", "?l") and number in ("7", "25"), f"ESC[{command}{number}"
            setattr(self, "wraps" if number == "7" else "cursor", command == "?h")

    def put(self, character):
        if character == "\r":
            self.x = 0
        elif character == "\n":
            self.line_feed()
        elif character == "\t":
            self.tab()
        elif character not in JOIN:
            self.show(character, 2 if character in self.wide else 1)
        elif self.x:
            self.rows[self.y][self.x - 1] += character
        is_printable = ord(character) >= 32 and not 127 <= ord(character) < 160
        assert character in "\r\n\t" or is_printable, ascii(character)

    def tab(self):
        while self.x < self.columns - 1:
            self.show(" ", 1)
            if self.x % 8 == 0:
                break

    def show(self, character, width):
        if self.x + width > self.columns:
            if self.wraps:
                self.line_feed()
            else:
                self.clipped += 1
                self.x = self.columns - width
        row = self.rows[self.y]
        row += [" "] * (self.x - len(row))
        row[self.x:self.x + width] = [character] + [""] * (width - 1)
        self.x += width

    def line_feed(self):
        self.x = 0
        self.y += 1
        if self.y == self.lines:
            self.above.append(self.rows.pop(0))
            self.rows.append([])
            self.y -= 1

    def content(self):
        """All rows, without the empty ones at the end."""
        return "\n".join("".join(row) for row in self.above + self.rows).rstrip("\n").split("\n")


@pytest.fixture
def play(monkeypatch):
    """Plays a trace on a screen and prints it, as sample.py does; `look(screen)` is called at every frame.

    Returns how long each frame stays, in seconds.
    """
    monkeypatch.setenv("TERM", "xterm")

    def on(screen, seen, look=lambda screen: None, fps=8.0, colour=True):
        monkeypatch.setenv("COLUMNS", str(screen.columns))
        monkeypatch.setenv("LINES", str(screen.lines))
        slept = []

        def sleep(seconds):
            slept.append(seconds)
            look(screen)
        monkeypatch.setattr(time, "sleep", sleep)
        screen.write(BEFORE)
        terminal.play(seen, screen, fps, colour)
        screen.write(trace.coloured(seen, colour) + "\n\n")
        return slept
    return on


def plain(parts):
    return "".join(text for text, _ in parts)


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_a_frame_is_the_state_that_the_next_forward_pass_reads(tokens, block):
    """It has a mask for each token of the current block that is revealed later, and no block after it."""
    seen = rollout(tokens, block)[0]
    for forward, states in enumerate(trace.grid(seen)):
        masked = [state in (NEW, MASKED) for state in states if state != NOT_BEGUN]
        text = "Once" + trace.state_text(seen.pieces[:len(masked)], masked)
        assert plain(terminal.frame_text(seen, forward)) == text
        expected = [piece if at <= forward else MASK_SIGN for piece, at in zip(seen.pieces, seen.revealed_at)]
        assert text == "Once" + "".join(expected[:len(masked)])
    assert plain(terminal.frame_text(seen, 0)) == "Once" + MASK_SIGN * min(block, tokens)


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_the_last_frame_is_the_finished_text_in_its_colours(tokens, block):
    pieces = 2 * [word for word in PIECES if "\n" not in word and word]
    seen = rollout(tokens, block, pieces=pieces[:tokens])[0]
    last = terminal.frame_text(seen, seen.forwards)
    assert plain(last) == trace.coloured(seen, False)
    assert [step for text, step in last[1:]] == seen.steps
    row, = terminal.wrap(last, 10**9)
    for colour in True, False:
        printed = trace.coloured(seen, colour).replace("\t", "    ")
        assert with_colours(terminal.paint_row(row, block, colour)) == with_colours(printed)


def with_colours(text):
    """Each character with its colour."""
    found = []
    colour = None
    for code, character in re.findall(r"(\x1b\[[\d;]*m)|(.)", text):
        if code:
            colour = None if code == "\x1b[0m" else code
        if character:
            found.append((character, colour))
    return found


@pytest.mark.parametrize("columns, lines", [(80, 24), (80, 3), (33, 7), (20, 200), (9, 12), (2, 5), (80, 2)])
@pytest.mark.parametrize("colour", [True, False])
def test_nothing_remains_of_the_frames(play, columns, lines, colour):
    """With any widths, newlines and heights: screen and scrollback are the same as without --watch."""
    watched = Screen(columns, lines)
    unwatched = Screen(columns, lines)
    seen = rollout(len(PIECES), 4, pieces=PIECES)[0]
    play(watched, seen, colour=colour)
    unwatched.write(BEFORE + trace.coloured(seen, colour) + "\n\n")
    assert watched.content() == unwatched.content()
    assert watched.x == 0
    assert not any(watched.rows[watched.y - 1:])
    assert watched.clipped == 0 or columns == 2
    assert (watched.wraps, watched.cursor, watched.colour) == (True, True, False)
    assert ("38;5" in watched.written) is colour


@pytest.mark.parametrize("wide", [
    "", WIDE + MASK_SIGN + "|.\u2028", "".join(map(chr, range(0x2000, 0x2800)))])
def test_nothing_remains_on_a_terminal_with_other_widths(play, wide):
    """Some draw ▢ over two columns, or an emoji over one: rows may be cut there, but never wrapped."""
    watched = Screen(33, 300, wide)
    unwatched = Screen(33, 300, wide)
    seen = rollout(len(PIECES), 4, pieces=PIECES)[0]
    play(watched, seen)
    unwatched.write(BEFORE + trace.coloured(seen, True) + "\n\n")
    assert watched.content() == unwatched.content()


@pytest.mark.parametrize("columns, lines", [(80, 24), (33, 7), (9, 12), (80, 2)])
def test_each_frame_is_on_the_screen(play, columns, lines):
    """All of a frame, or its end if it is higher than the screen; above it what was there before."""
    pieces = [word for word in WORDS if "\t" not in word][:13] * 3 + ["."]
    seen = rollout(40, 4, pieces=pieces)[0]
    frames = []

    def look(screen):
        parts = terminal.frame_text(seen, len(frames))
        rows = terminal.wrap(parts, columns - 1)
        expected = ["".join(character for character, _ in row).lstrip(JOIN) for row in rows]
        shown = ["".join(row) for row in screen.rows]
        if len(expected) < lines:
            assert shown[:screen.y + 1][-len(expected):] == expected
            assert not any(shown[screen.y + 1:])
        else:
            assert shown == expected[-lines:]
        characters = "".join(character for row in rows for character, _ in row)
        assert characters == plain(parts).replace("\n", "")
        assert not screen.cursor
        assert (screen.above + screen.rows)[0][:1] == ["$"]
        frames.append(shown)
    play(Screen(columns, lines), seen, look)
    assert len(frames) == seen.forwards + 1


def test_a_frame_stays_for_one_over_fps_seconds(play):
    seen = rollout(40, 4)[0]
    for fps in (2.0, 8.0, 100.0):
        assert play(Screen(80, 24), seen, fps=fps) == [1 / fps] * (seen.forwards + 1)


def test_a_resized_window_is_used_at_its_new_size(play, monkeypatch):
    def shrink(screen):
        screen.columns = 20
        monkeypatch.setenv("COLUMNS", "20")
    screen = Screen(80, 50)
    play(screen, rollout(60, 4)[0], shrink)
    assert screen.clipped == 0
    assert max(len(row) for row in screen.rows[1:]) <= 20


@pytest.mark.parametrize("moment", [0, 3, 9])
def test_after_ctrl_c_the_terminal_is_as_it_was(play, moment):
    """The last frame stays on the screen, and later output begins below it."""
    screen = Screen(33, 40)
    seen = rollout(40, 4)[0]
    frames = []

    def stop(screen):
        frames.append(screen.content())
        if len(frames) > moment:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        play(screen, seen, stop)
    assert (screen.wraps, screen.cursor, screen.colour, screen.x) == (True, True, False, 0)
    assert screen.content() == frames[-1]
    assert not any(screen.rows[screen.y:])
    assert screen.written.endswith(terminal.END)


def test_hostile_text_sends_no_code(play):
    """The screen fails on codes that report/terminal.py does not use; the text must not send the others."""
    pieces = [NASTY, "\x1b[2J", "\x1b[?1049h", "\x9b31m", "\r"]
    seen = trace.from_order(NASTY + "\x1b]0;title\x07", pieces, [1, 0, 2, 1, 0], 4)
    screen = Screen(80, 24)
    play(screen, seen)
    text = CODE.sub("", screen.written)
    controls = {chr(code) for code in [*range(32), *range(127, 160)]}
    assert not set(text) & controls - set("\n\t\r")
    assert "␛[2J" in text
    assert text.count("\r") == seen.forwards + 3
    text.encode("utf-8")


@pytest.mark.parametrize("terminal, term", [(False, "xterm"), (True, "dumb")])
def test_without_ansi_support_nothing_is_shown(play, monkeypatch, terminal, term):
    screen = Screen(80, 24)
    screen.isatty = lambda: terminal
    monkeypatch.setenv("TERM", term)
    seen = rollout(40, 4)[0]
    assert play(screen, seen, colour=False) == []
    assert screen.written == BEFORE + trace.coloured(seen, False) + "\n\n"
