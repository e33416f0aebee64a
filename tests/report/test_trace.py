"""A trace is the order of a rollout, counted over all blocks; texts, colours and pictures agree with it."""
import io
import random
import re
import warnings

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba

from report import trace
from report.trace import MASKED, NEW, NOT_BEGUN, OLD

ANSI = re.compile(r"\x1b\[[0-9;]*m")
DIRECTION_MARKS = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
NASTY = "".join(map(chr, [*range(0xA0), *DIRECTION_MARKS, 0xD800, 0xDFFF]))


def rollout(tokens: int, block: int, seed: int = 0, pieces: list[str] | None = None):
    """(trace, order, log) of a random rollout; log has the set of revealed tokens after each forward pass."""
    rng = random.Random(seed)
    order = [0] * tokens
    log = []
    revealed = set()
    for start in range(0, tokens, block):
        masked = list(range(start, min(start + block, tokens)))
        step = 0
        while masked:
            for token in rng.sample(masked, rng.randint(1, min(3, len(masked)))):
                order[token] = step
                masked.remove(token)
                revealed = revealed | {token}
            log.append(revealed)
            step += 1
    pieces = pieces or [f" {rng.choice(['a', 'dog', 'found', 'little'])}{i}" for i in range(tokens)]
    return trace.from_order("Once", pieces, order, block), order, log


SHAPES = [(1, 1), (7, 1), (12, 4), (13, 4), (5, 8), (64, 16), (40, 64)]


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_revealed_at_is_the_forward_pass_that_revealed_a_token(tokens, block):
    seen, order, log = rollout(tokens, block)
    assert seen.forwards == len(log)
    for token in range(tokens):
        first = next(forward for forward, revealed in enumerate(log, 1) if token in revealed)
        assert seen.revealed_at[token] == first
    assert len(seen.revealed_at) == tokens
    assert [at - 1 - before for at, before in zip(seen.revealed_at, seen.forwards_before)] == order


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_the_grid_replays_the_rollout(tokens, block):
    seen, _, log = rollout(tokens, block, seed=1)
    grid = trace.grid(seen)
    assert len(grid) == len(log)
    for row, revealed, revealed_before in zip(grid, log, [set(), *log]):
        new = revealed - revealed_before
        assert {i for i, state in enumerate(row) if state == NEW} == new
        assert {i for i, state in enumerate(row) if state == OLD} == revealed_before
        current = min(new) // block                  # has all the masks; no block after it has begun
        for i, state in enumerate(row):
            if i not in revealed:
                assert (state == MASKED) == (i // block == current)
                assert (state == NOT_BEGUN) == (i // block > current)


def test_an_order_that_does_not_fit_the_tokens_is_refused():
    for pieces, order, block in (["a"], [0, 1], 4), (["a"], [-1], 4), (["a"], [0], 0):
        with pytest.raises(AssertionError):
            trace.from_order("", pieces, order, block)
    assert trace.from_order("", [], [], 4).forwards == 0


def test_state_text_has_one_sign_per_masked_token():
    pieces = ["Lily", " had", " a ", "red", " big", " ball"]
    assert trace.state_text(pieces, [False, False, False, True, True, False]) == "Lily had a ▢▢ ball"
    assert trace.state_text(pieces, [False] * 6) == "".join(pieces)
    assert trace.state_text(pieces, [True] * 6) == "▢" * 6
    with pytest.raises(ValueError):
        trace.state_text(pieces, [True] * 5)


def test_colours_do_not_change_the_text():
    seen = rollout(30, 4, pieces=[f" it{i}\n" for i in range(30)])[0]
    plain = trace.coloured(seen, False)
    assert plain == "Once" + "".join(seen.pieces)
    painted = trace.coloured(seen, True)
    assert painted != plain
    assert ANSI.sub("", painted) == plain


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 64])
def test_a_colour_shows_the_step_and_the_legend_agrees(block):
    seen, order, _ = rollout(128, block, seed=2)
    painted = [int(code) for code in re.findall(r"38;5;(\d+)m", trace.coloured(seen, True))]
    line = trace.legend(block)
    assert "\n" not in line
    colour_of_step = {}                              # steps counted from 1
    for code, first, last in re.findall(r"38;5;(\d+)m(\d+)-?(\d*)\x1b", line):
        steps = range(int(first), int(last or first) + 1)
        colour_of_step |= dict.fromkeys(steps, int(code))
    assert sorted(colour_of_step) == list(range(1, block + 1))
    assert painted == [colour_of_step[step + 1] for step in order]
    assert len(set(colour_of_step.values())) == min(block, len(trace.RAMP))
    ramp = [trace.RAMP.index(colour_of_step[step]) for step in sorted(colour_of_step)]
    assert ramp == sorted(ramp)
    assert ramp[0] == 0


def test_the_ramp_is_legible_on_black_and_on_white():
    def channel(level: int) -> float:                # WCAG's relative luminance of xterm's 6 x 6 x 6 cube
        return ((55 + 40 * level) / 255 / 1.055 + 0.055 / 1.055) ** 2.4 if level else 0.0
    for code in trace.RAMP:
        red, green, blue = ((code - 16) // 36, (code - 16) // 6 % 6, (code - 16) % 6)
        light = 0.2126 * channel(red) + 0.7152 * channel(green) + 0.0722 * channel(blue)
        assert (light + 0.05) / 0.05 >= 3 and 1.05 / (light + 0.05) >= 3, code


def test_no_control_character_survives():
    text = trace.visible(NASTY)
    assert len(text) == len(NASTY)
    assert trace.visible("Zoë ▢ 😀 \t\n") == "Zoë ▢ 😀 \t\n"
    seen = trace.from_order(NASTY, [NASTY, "\x1b]0;title\x07"], [0, 1], 2)
    printed = "".join(ANSI.sub("", trace.coloured(seen, colour)) for colour in (False, True))
    printed += trace.state_text([NASTY], [False])
    printable = set("\t\n") | set(map(chr, range(32, 127)))
    assert not set(printed) & (set(NASTY) - printable)
    printed.encode("utf-8")


@pytest.mark.parametrize("terminal, environment, expected", [
    (True, {}, True), (False, {}, False),
    (True, {"NO_COLOR": "1"}, False), (True, {"NO_COLOR": "0"}, False), (True, {"NO_COLOR": ""}, True),
    (True, {"TERM": "dumb"}, False), (True, {"TERM": "xterm-256color"}, True)])
def test_colour_depends_on_the_terminal_and_on_no_color(terminal, environment, expected, monkeypatch):
    for name in "NO_COLOR", "TERM":
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert trace.wants_colour(stream) is expected


@pytest.mark.parametrize("rows", [5, 20])            # first the rows limit what is shown, then the columns
@pytest.mark.parametrize("tokens, block", [*SHAPES, (400, 4), (400, 5), (400, 1), (400, 64)])
def test_the_readable_part_is_whole_blocks_that_fit(tokens, block, rows):
    seen = rollout(tokens, block)[0]
    edges, forwards = trace.readable_part(seen, columns=100, rows=rows)
    shown = len(edges) - 1
    assert shown >= 1
    assert edges[-1] <= 100
    assert forwards <= rows
    assert edges == sorted(set(edges))
    assert shown == tokens or shown % block == 0 or shown < block
    assert forwards == min(max(seen.revealed_at[:shown]), rows)
    assert seen.forwards_before[shown - 1] < rows
    _, all_forwards = trace.readable_part(seen, 1e9, 10**9)
    assert all_forwards == seen.forwards


def test_the_picture_has_a_cell_for_every_state_and_the_text_of_revealed_tokens():
    seen = rollout(12, 4, seed=3)[0]
    edges, forwards = trace.readable_part(seen)
    assert len(edges) == 13
    axes = trace.figure(seen).axes[0]
    cells = [state for row in trace.grid(seen) for state in row]
    boxes = [patch for patch in axes.patches if type(patch).__name__ == "FancyBboxPatch"]
    for state, (face, *_) in trace.CELL_STYLE.items():   # the legend has one more of each
        assert sum(box.get_facecolor() == to_rgba(face) for box in boxes) == cells.count(state) + 1
    texts = [text.get_text() for text in axes.texts]
    for token, piece in enumerate(seen.pieces):
        assert texts.count(piece.strip()) == forwards - seen.revealed_at[token] + 1
    assert len(axes.patches) - len(boxes) == 3       # frames of blocks
    assert f"12 tokens in {seen.forwards} forwards" in texts


def test_a_cut_picture_says_so():
    seen = rollout(200, 4)[0]
    edges, forwards = trace.readable_part(seen)
    texts = [text.get_text() for text in trace.figure(seen).axes[0].texts]
    shown = f"the first {len(edges) - 1} tokens, {forwards} forwards"
    assert f"200 tokens in {seen.forwards} forwards: {shown}" in texts


def test_any_text_can_be_drawn_and_a_picture_is_written_whole_or_not_at_all(tmp_path):
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


def test_the_message_of_a_file_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "folder.html").mkdir()
    for path in (tmp_path / "folder.html", tmp_path / "missing" / "x.html"):
        with pytest.raises(OSError) as caught:
            trace.write_atomically(path, lambda unfinished: open(tmp_path / "nowhere" / "x"))
        assert caught.value.filename == str(path)
    with pytest.raises(OSError) as caught:
        trace.write_atomically(tmp_path / "folder.html", lambda unfinished: unfinished.write_text("x"))
    assert caught.value.filename == str(tmp_path / "folder.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.html", "missing"]


def test_speculative_decoding_has_groups_instead_of_blocks():
    """Tokens accepted together share a colour ramp and a frame, and are never shown masked."""
    seen = trace.from_iterations("Hi", list("abcdef"), [0, 0, 0, 1, 2, 2], 4)
    assert seen.groups == [(0, 3), (3, 4), (4, 6)]
    assert seen.steps == [0, 1, 2, 0, 0, 1]
    assert seen.num_steps == 3
    assert trace.grid(seen) == [
        [NEW] * 3 + [NOT_BEGUN] * 3,
        [OLD] * 3 + [NEW] + [NOT_BEGUN] * 2,
        [OLD] * 4 + [NEW] * 2,
    ]
    axes = trace.figure(seen).axes[0]
    assert sum(type(patch).__name__ == "Rectangle" for patch in axes.patches) == 3
    texts = [text.get_text() for text in axes.texts]
    assert "6 tokens in 3 iterations" in texts
    assert "still masked" not in texts


@pytest.mark.parametrize("method", ["rollout", "speculative"])
def test_no_text_of_a_picture_is_cut_off(method):
    """Every text of a picture lies within it, including the heading of the row numbers."""
    if method == "rollout":
        seen, _, _ = rollout(9, 4)
    else:
        seen = trace.from_iterations("Once", list("abcdefg"), [0, 0, 1, 1, 1, 2, 3], 4)
    figure = trace.figure(seen)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for text in figure.axes[0].texts:
        box = text.get_window_extent(canvas.get_renderer())
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text
        assert box.y0 >= 0 and box.y1 <= figure.bbox.height, text
