"""What a rollout looks like: the trace is its order counted over all blocks, and all that is printed agrees."""
import io
import random
import re
import warnings

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from report import trace
from report.trace import AHEAD, MASKED, NEW, OLD

ANSI = re.compile(r"\x1b\[[0-9;]*m")
TURNS = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
NASTY = "".join(map(chr, [*range(0xA0), *TURNS, 0xD800, 0xDFFF]))


def rollout(tokens: int, block: int, seed: int = 0, pieces: list[str] | None = None):
    """(trace, order, log): a random rollout played move by move; log has the tokens there after each forward."""
    rng = random.Random(seed)
    order, log, shown = [0] * tokens, [], set()
    for start in range(0, tokens, block):
        left, step = list(range(start, min(start + block, tokens))), 0
        while left:
            for token in rng.sample(left, rng.randint(1, min(3, len(left)))):
                order[token] = step
                left.remove(token)
                shown = shown | {token}
            log.append(shown)
            step += 1
    pieces = pieces or [f" {rng.choice(['a', 'dog', 'found', 'little'])}{i}" for i in range(tokens)]
    return trace.from_order("Once", pieces, order, block), order, log


SHAPES = [(1, 1), (7, 1), (12, 4), (13, 4), (5, 8), (64, 16), (40, 64)]


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_when_is_the_forward_that_revealed_it(tokens, block):
    seen, order, log = rollout(tokens, block)
    assert seen.forwards == len(log)
    assert seen.when == [next(f for f, shown in enumerate(log, 1) if token in shown) for token in range(tokens)]
    assert [when - 1 - began for when, began in zip(seen.when, seen.began)] == order


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_the_grid_is_the_rollout_played_again(tokens, block):
    seen, _, log = rollout(tokens, block, seed=1)
    grid = trace.states(seen)
    assert len(grid) == len(log)
    for row, shown, before in zip(grid, log, [set(), *log]):
        assert {i for i, state in enumerate(row) if state == NEW} == shown - before
        assert {i for i, state in enumerate(row) if state == OLD} == before
        current = min(shown - before) // block        # block by block: masks stand in this one only, nothing behind it
        assert all((state == MASKED) == (i // block == current) for i, state in enumerate(row) if i not in shown)
        assert all((state == AHEAD) == (i // block > current) for i, state in enumerate(row) if i not in shown)


def test_an_order_that_does_not_fit_is_refused():
    for pieces, order, block in (["a"], [0, 1], 4), (["a"], [-1], 4), (["a"], [0], 0):
        with pytest.raises(AssertionError):
            trace.from_order("", pieces, order, block)
    assert trace.from_order("", [], [], 4).forwards == 0


def test_state_text_is_the_text_with_holes():
    pieces = ["Lily", " had", " a ", "red", " big", " ball"]
    assert trace.state_text(pieces, [False, False, False, True, True, False]) == "Lily had a ▢▢ ball"
    assert trace.state_text(pieces, [False] * 6) == "".join(pieces)
    assert trace.state_text(pieces, [True] * 6) == "▢" * 6
    with pytest.raises(ValueError):
        trace.state_text(pieces, [True] * 5)


def test_colours_change_no_character():
    seen = rollout(30, 4, pieces=[f" it{i}\n" for i in range(30)])[0]
    plain = trace.coloured(seen, False)
    assert plain == "Once" + "".join(seen.pieces)
    assert trace.coloured(seen, True) != plain and ANSI.sub("", trace.coloured(seen, True)) == plain


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 64])
def test_a_colour_is_the_step_and_the_legend_has_the_same(block):
    seen, order, _ = rollout(128, block, seed=2)
    painted = [int(code) for code in re.findall(r"38;5;(\d+)m", trace.coloured(seen, True))]
    line, meaning = trace.legend(block), {}
    assert "\n" not in line
    for code, first, last in re.findall(r"38;5;(\d+)m(\d+)-?(\d*)\x1b", line):
        meaning |= dict.fromkeys(range(int(first), int(last or first) + 1), int(code))
    assert sorted(meaning) == list(range(1, block + 1))
    assert painted == [meaning[step + 1] for step in order]
    assert len(set(meaning.values())) == min(block, len(trace.RAMP))
    ramp = [trace.RAMP.index(meaning[step]) for step in sorted(meaning)]
    assert ramp == sorted(ramp) and ramp[0] == 0


def test_the_ramp_is_legible_on_black_and_on_white():
    def channel(level: int) -> float:                # WCAG's relative luminance of xterm's 6 x 6 x 6 cube
        return ((55 + 40 * level) / 255 / 1.055 + 0.055 / 1.055) ** 2.4 if level else 0.0
    for code in trace.RAMP:
        red, green, blue = ((code - 16) // 36, (code - 16) // 6 % 6, (code - 16) % 6)
        light = 0.2126 * channel(red) + 0.7152 * channel(green) + 0.0722 * channel(blue)
        assert (light + 0.05) / 0.05 >= 3 and 1.05 / (light + 0.05) >= 3, code


def test_no_control_character_survives():
    text = trace.visible(NASTY)
    assert len(text) == len(NASTY) and trace.visible("Zoë ▢ 😀 \t\n") == "Zoë ▢ 😀 \t\n"
    seen = trace.from_order(NASTY, [NASTY, "\x1b]0;title\x07"], [0, 1], 2)
    printed = "".join(ANSI.sub("", trace.coloured(seen, colour)) for colour in (False, True))
    printed += trace.state_text([NASTY], [False])
    assert not set(printed) & (set(NASTY) - set(" \t\n") - set(map(chr, range(32, 127))))
    printed.encode("utf-8")


@pytest.mark.parametrize("terminal, environment, wanted", [
    (True, {}, True), (False, {}, False), (True, {"NO_COLOR": "1"}, False), (True, {"NO_COLOR": "0"}, False),
    (True, {"NO_COLOR": ""}, True), (True, {"TERM": "dumb"}, False), (True, {"TERM": "xterm-256color"}, True)])
def test_who_wants_colour(terminal, environment, wanted, monkeypatch):
    for name in "NO_COLOR", "TERM":
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert trace.wants_colour(stream) is wanted


@pytest.mark.parametrize("rows", [5, 20])            # the rows are what is short, then the columns
@pytest.mark.parametrize("tokens, block", [*SHAPES, (400, 4), (400, 5), (400, 1), (400, 64)])
def test_what_is_readable_is_whole_blocks_and_no_more(tokens, block, rows):
    seen = rollout(tokens, block)[0]
    edges, forwards = trace.readable(seen, columns=100, rows=rows)
    shown = len(edges) - 1
    assert 1 <= shown and edges[-1] <= 100 and forwards <= rows and edges == sorted(set(edges))
    assert shown == tokens or shown % block == 0 or shown < block
    assert forwards == min(max(seen.when[:shown]), rows) and seen.began[shown - 1] < rows
    assert trace.readable(seen, 1e9, 10**9) == (trace.readable(seen, 1e9, 10**9)[0], seen.forwards)


def test_the_picture_has_a_cell_for_every_state_and_the_text_of_what_is_revealed():
    seen = rollout(12, 4, seed=3)[0]
    edges, forwards = trace.readable(seen)
    assert len(edges) == 13
    axes = trace.figure(seen).axes[0]
    cells = [state for row in trace.states(seen) for state in row]
    boxes = [patch for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    for state, (face, *_) in trace.LOOK.items():     # one more of each stands in the legend
        assert sum(box.get_facecolor() == to_rgba(face) for box in boxes) == cells.count(state) + 1
    texts = [text.get_text() for text in axes.texts]
    for token, piece in enumerate(seen.pieces):
        assert texts.count(piece.strip()) == forwards - seen.when[token] + 1
    assert len(axes.patches) - len(boxes) == 3       # frames of blocks
    assert f"12 tokens in {seen.forwards} forwards" in texts


def test_a_cut_picture_says_so():
    seen = rollout(200, 4)[0]
    edges, forwards = trace.readable(seen)
    texts = [text.get_text() for text in trace.figure(seen).axes[0].texts]
    assert f"200 tokens in {seen.forwards} forwards: the first {len(edges) - 1} tokens, {forwards} forwards" in texts


def test_any_text_can_be_drawn_and_a_picture_is_whole_or_not_there(tmp_path):
    pieces = ["\n", " ", "", "$x^{$", "漢字", "😀", "\x1b[2J", "e\u0301", "\ud800", "a" * 500, *NASTY]
    seen = trace.from_order(NASTY, pieces, [0] * len(pieces), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace.picture(seen, tmp_path / "new" / "states.png")
        trace.picture(trace.from_order("", [], [], 4), tmp_path / "new" / "empty.png")
    assert (tmp_path / "new" / "states.png").read_bytes().startswith(b"\x89PNG")

    class Broken:
        def savefig(self, path, **how):
            path.write_bytes(b"half")
            raise OSError("disk full")
    before = (tmp_path / "new" / "states.png").read_bytes()
    with pytest.raises(OSError):
        trace.save(Broken(), tmp_path / "new" / "states.png")
    assert (tmp_path / "new" / "states.png").read_bytes() == before
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["empty.png", "states.png"]


def test_verified_text_comes_in_runs():
    """What was accepted together is one colour ramp, one frame, and was never seen masked."""
    seen = trace.from_turns("Hi", list("abcdef"), [0, 0, 0, 1, 2, 2], 4)
    assert seen.parts == [(0, 3), (3, 4), (4, 6)] and seen.steps == [0, 1, 2, 0, 0, 1] and seen.most == 3
    assert trace.states(seen) == [[NEW] * 3 + [AHEAD] * 3, [OLD] * 3 + [NEW] + [AHEAD] * 2, [OLD] * 4 + [NEW] * 2]
    axes = trace.figure(seen).axes[0]
    assert sum(type(patch).__name__ == "Rectangle" for patch in axes.patches) == 3
    texts = [text.get_text() for text in axes.texts]
    assert "6 tokens in 3 iterations" in texts and "still masked" not in texts


@pytest.mark.parametrize("made", ["rollout", "verified"])
def test_nothing_that_is_said_is_cut_off(made):
    """Every text of a picture lies within it, the heading of the rows too."""
    turns = [0, 0, 1, 1, 1, 2, 3]
    seen = rollout(9, 4)[0] if made == "rollout" else trace.from_turns("Once", list("abcdefg"), turns, 4)
    figure = trace.figure(seen)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for text in figure.axes[0].texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height, text
