"""The page shows what the terminal does, at every forward pass, and no text of a trace becomes code."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from report import html, terminal, trace
from tests.report.test_trace import NASTY, SHAPES, rollout

HOSTILE = ["</script><img src=x onerror=alert(1)>", "</p></body>", "<!--", "]]>", "&lt;", "&amp", "&#60;b>",
           "\u2028\u2029", '"><script>alert(1)</script>', "' onload='", "${alert(1)}", "$tokens", "$$",
           "\\u003c", "\x1b[2J", "\ud83d", "</span><span data-revealed-at=0>", "\r\n", "\n", "",
           "漢😀e\u0301", "<svg/onload=1>", NASTY]


class Parsed(HTMLParser):
    """The tags of a page, all attributes, the attributes and text of each span, the prompt and the script."""

    def __init__(self, html):
        super().__init__()
        self.tags = []
        self.attributes = []
        self.spans = []
        self.prompt = ""
        self.script = ""
        self.open_tags = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open_tags.append(tag)
        if tag == "span":
            self.spans.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)
        while self.open_tags and self.open_tags.pop() != tag:
            pass

    def handle_comment(self, data):
        self.tags.append("!--")

    def handle_data(self, data):
        inside = self.open_tags[-1] if self.open_tags else ""
        if inside == "span":
            self.spans[-1][1] += data
        self.prompt += data if inside == "b" else ""
        self.script += data if inside == "script" else ""

    def tokens(self):
        found = []
        for attributes, piece in self.spans:
            if "data-revealed-at" in attributes:
                revealed_at = int(attributes["data-revealed-at"])
                forwards_before = int(attributes["data-forwards-before"])
                found.append((piece, revealed_at, forwards_before))
        return found


ORDER = [(7 * i) % 4 for i in range(len(HOSTILE))]


def hostile():
    return trace.from_order("".join(HOSTILE), HOSTILE, ORDER, 4)


def test_hostile_text_stays_text():
    """The page of hostile text equals that of harmless text except for the text itself."""
    page = html.page(hostile())
    harmless = trace.from_order("a", ["a"] * len(HOSTILE), ORDER, 4)
    parsed = Parsed(page)
    plain = Parsed(html.page(harmless))
    assert parsed.tags == plain.tags
    assert parsed.attributes == plain.attributes
    assert parsed.script == plain.script
    assert [piece for piece, _, _ in parsed.tokens()] == [trace.visible(piece) for piece in HOSTILE]
    assert parsed.prompt == trace.visible("".join(HOSTILE))
    assert plain.prompt == "a"
    assert parsed.tags.count("script") == 1
    assert page.count("<script") == 1
    page.encode("utf-8")


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_the_page_has_the_whole_trace(tokens, block):
    """The trace can be rebuilt from the page, and the colours are the terminal's."""
    seen = rollout(tokens, block)[0]
    parsed = Parsed(html.page(seen))
    assert parsed.tokens() == list(zip(seen.pieces, seen.revealed_at, seen.forwards_before))
    assert parsed.prompt == "Once"
    assert dict(parsed.attributes)["max"] == str(seen.forwards)
    painted = re.findall(r"38;5;(\d+)m", trace.coloured(seen, True) + trace.legend(block))
    classes = [attributes["class"] for attributes, _ in parsed.spans]
    num_legend = len(trace.colour_groups(block))
    terminal_classes = [f"s{trace.RAMP.index(int(code))}" for code in painted]
    assert classes[num_legend:] + classes[:num_legend] == terminal_classes


def test_the_page_loads_nothing():
    text = html.page(rollout(40, 4)[0])
    attributes = Parsed(text).attributes
    policy = dict(attributes)["content"] if "http-equiv" in text else ""
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert not {name for name, _ in attributes} & {"src", "href", "srcset", "action", "data"}
    assert not re.search(r"//|url\(|@import|fetch|XMLHttp|import\(", text.replace("          //", ""))
    assert text.startswith("<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">")


def test_controls_have_names():
    """For screen readers: the slider has a label, the button a text, and the status is the slider's value."""
    text = html.page(rollout(40, 4)[0])
    assert re.search(r'<label for="forward">\w+</label>\s*<input id="forward" type="range"', text)
    assert re.search(r'<button [^>]*type="button">\w+</button>', text)
    assert 'setAttribute("aria-valuetext"' in text


def luminance(levels):
    """WCAG's relative luminance of an sRGB colour with levels 0 to 255."""
    total = 0.0
    for weight, level in zip((0.2126, 0.7152, 0.0722), levels):
        x = level / 255
        linear = x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
        total += weight * linear
    return total


@pytest.mark.parametrize("paper", [html.LIGHT_PAPER, html.DARK_PAPER])
def test_colours_are_legible_on_both_papers(paper):
    """WCAG 2 asks for a contrast of 4.5 for small text; the terminal's own colours have 3."""
    for code in trace.RAMP:
        text = luminance(html.text_colour(code, paper))
        background = luminance([paper] * 3)
        contrast = (max(text, background) + 0.05) / (min(text, background) + 0.05)
        assert contrast >= 4.5, code


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    seen = hostile()
    path = tmp_path / "new" / "text.html"
    html.save(seen, path)
    before = path.read_bytes()
    assert before.decode("utf-8") == html.page(seen)
    monkeypatch.setattr(html, "page", lambda seen: "half" * (1 / 0))
    with pytest.raises(ZeroDivisionError):
        html.save(seen, path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["text.html"]


# The parts of a browser that the script of the page uses. SCRIPT, MAX and TOKENS are filled in by the test.
BROWSER = """
const clamp = value => Math.min(Math.max(Number(value), 0), MAX);
const makeNode = more => ({
  textContent: "",
  attributes: {},
  setAttribute(name, value) { this.attributes[name] = value; },
  ...more,
});
const spans = TOKENS.map(([piece, revealedAt, forwardsBefore]) => {
  const classes = new Set();
  const toggle = (name, on) => classes[on ? "add" : "delete"](name);
  const dataset = {revealedAt: String(revealedAt), forwardsBefore: String(forwardsBefore)};
  return makeNode({textContent: piece, dataset, classes, classList: {toggle}});
});
let position = MAX;
const sliderNode = makeNode({max: String(MAX)});
Object.defineProperty(sliderNode, "value", {
  get: () => String(position),
  set: value => { position = clamp(value); },
});
const nodes = {
  forward: sliderNode,
  status: makeNode(),
  play: makeNode(),
  controls: makeNode({hidden: true}),
  text: makeNode({querySelectorAll: () => spans}),
};
globalThis.document = {getElementById: id => nodes[id]};
let tick = null;
globalThis.setInterval = run => { tick = run; return 1; };
globalThis.clearInterval = () => { tick = null; };

const seen = [];
const look = () => seen.push([
  position,
  spans.map(span => span.textContent).join(""),
  nodes.status.textContent,
  spans.map(span => span.classes.has("new")),
  sliderNode.attributes["aria-valuetext"],
]);
let handledKeys = 0;
const key = (key, more) => document.onkeydown({key, preventDefault() { handledKeys += 1; }, ...more});
SCRIPT
look();
for (let i = 0; i < MAX + 1; i++) { key("ArrowLeft"); look(); }
for (let i = 0; i < MAX + 1; i++) { key("ArrowRight"); look(); }
key("Home"); look();
key("End"); look();
key("ArrowLeft", {altKey: true}); key("PageDown"); key("a"); look();
sliderNode.value = 1; sliderNode.oninput(); look();
key("End"); nodes.play.onclick(); look();
tick(); key("ArrowRight"); if (tick) throw Error("a key does not pause");
key("End"); nodes.play.onclick(); nodes.play.onclick(); if (tick) throw Error("the button does not pause");
key("End"); nodes.play.onclick();
while (tick) { tick(); look(); }
const result = {seen, handledKeys, hidden: nodes.controls.hidden, label: nodes.play.textContent};
console.log(JSON.stringify(result));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the script of the page")
@pytest.mark.parametrize("tokens, block", [(1, 1), (7, 1), (13, 4), (5, 8), (40, 16)])
def test_the_script_of_the_page_shows_what_the_terminal_does(tokens, block):
    """At each forward pass, reached by keys, by the slider or by playing."""
    seen = rollout(tokens, block)[0]
    last = seen.forwards
    parsed = Parsed(html.page(seen))
    code = BROWSER
    values = {"SCRIPT": "{" + parsed.script + "}", "MAX": str(last), "TOKENS": json.dumps(parsed.tokens())}
    for name, value in values.items():
        code = code.replace(name, value)
    run = subprocess.run(["node", "-"], input=code, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr

    result = json.loads(run.stdout)
    keys = [last, *range(last - 1, -1, -1), 0, *range(1, last + 1), last, 0, last, last, 1]
    played = range(last + 1)
    assert [forward for forward, *_ in result["seen"]] == [*keys, *played]
    assert not result["hidden"]
    assert result["label"] == "play"
    assert result["handledKeys"] == 2 * (last + 1) + 6               # all other keys are left to the browser
    for forward, text, status, new, spoken in result["seen"]:
        assert text == "".join(text for text, _ in terminal.frame_text(seen, forward)[1:])
        revealed = sum(at <= forward for at in seen.revealed_at)
        line, _, rate = status.partition("tokens")
        assert line == f"after forward {forward} of {last}: {revealed} "
        assert spoken == status
        if forward == 0:
            assert rate == ""
        else:
            assert float(rate[2:6]) == pytest.approx(revealed / forward, abs=0.00501)
        assert new == [at == forward for at in seen.revealed_at]
