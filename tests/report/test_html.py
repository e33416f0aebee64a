"""The page shows what the terminal does, at every forward; and whatever the text says, it stays text."""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from report import html, terminal, trace
from tests.report.test_trace import NASTY, SHAPES, rollout

HOSTILE = ["</script><img src=x onerror=alert(1)>", "</p></body>", "<!--", "]]>", "&lt;", "&amp", "&#60;b>",
           "\u2028\u2029", '"><script>alert(1)</script>', "' onload='", "${alert(1)}", "$tokens", "$$", "\\u003c",
           "\x1b[2J", "\ud83d", "</span><span data-when=0>", "\r\n", "\n", "", "漢😀e\u0301", "<svg/onload=1>", NASTY]


class Parsed(HTMLParser):
    """The tags in their order, and of each span and the prompt the attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.spans, self.prompt, self.script, self.within = [], [], [], "", "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.within.append(tag)
        if tag == "span":
            self.spans.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        self.tags.append("/" + tag)
        while self.within and self.within.pop() != tag:
            pass

    def handle_comment(self, data):
        self.tags.append("!--")

    def handle_data(self, data):
        inside = self.within[-1] if self.within else ""
        if inside == "span":
            self.spans[-1][1] += data
        self.prompt += data if inside == "b" else ""
        self.script += data if inside == "script" else ""

    def tokens(self):
        return [(piece, int(about["data-when"]), int(about["data-began"])) for about, piece in self.spans
                if "data-when" in about]


def hostile():
    order = [(7 * i) % 4 for i in range(len(HOSTILE))]
    return trace.from_order("".join(HOSTILE), HOSTILE, order, 4)


def test_hostile_text_stays_in_its_place():
    """The page is that of harmless text but for the text itself."""
    seen = hostile()
    harmless = trace.from_order("a", ["a"] * len(HOSTILE), [(7 * i) % 4 for i in range(len(HOSTILE))], 4)
    made, plain = Parsed(html.page(seen)), Parsed(html.page(harmless))
    assert (made.tags, made.attributes, made.script) == (plain.tags, plain.attributes, plain.script)
    assert [piece for piece, _, _ in made.tokens()] == [trace.visible(piece) for piece in HOSTILE]
    assert made.prompt == trace.visible("".join(HOSTILE)) and plain.prompt == "a"
    assert made.tags.count("script") == 1 and html.page(seen).count("<script") == 1
    html.page(seen).encode("utf-8")


@pytest.mark.parametrize("tokens, block", SHAPES)
def test_the_page_has_the_whole_trace(tokens, block):
    """Another trace can be made of it; the colours are the terminal's."""
    seen = rollout(tokens, block)[0]
    parsed = Parsed(html.page(seen))
    assert parsed.tokens() == list(zip(seen.pieces, seen.when, seen.began)) and parsed.prompt == "Once"
    assert dict(parsed.attributes)["max"] == str(seen.forwards)
    painted = re.findall(r"38;5;(\d+)m", trace.coloured(seen, True) + trace.legend(block))
    classes = [about["class"] for about, piece in parsed.spans]
    legend = len(trace.scale(block))
    assert classes[legend:] + classes[:legend] == [f"s{trace.RAMP.index(int(code))}" for code in painted]


def test_the_page_asks_nobody_for_anything():
    text = html.page(rollout(40, 4)[0])
    policy = dict(Parsed(text).attributes)["content"] if "http-equiv" in text else ""
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert not {name for name, _ in Parsed(text).attributes} & {"src", "href", "srcset", "action", "data"}
    assert not re.search(r"//|url\(|@import|fetch|XMLHttp|import\(", text.replace("          //", ""))
    assert text.startswith("<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">")


def test_controls_have_names():
    """For a screen reader: a slider with a label, a button with a text; what it says is said as the slider's value."""
    text = html.page(rollout(40, 4)[0])
    assert re.search(r'<label for="forward">\w+</label>\s*<input id="forward" type="range"', text)
    assert re.search(r'<button [^>]*type="button">\w+</button>', text) and 'setAttribute("aria-valuetext"' in text


def luminance(levels):
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (level / 255 for level in levels)]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear))


@pytest.mark.parametrize("paper", [html.PAPER, html.DARK_PAPER])
def test_colours_can_be_read_on_both_papers(paper):
    """WCAG 2's contrast for small text, 4.5; with the terminal's own colours it would be 3."""
    for code in trace.RAMP:
        light, dark = sorted((luminance(html.ink(code, paper)), luminance([paper] * 3)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, code


def test_a_page_is_whole_or_not_there(tmp_path, monkeypatch):
    seen, path = hostile(), tmp_path / "new" / "text.html"
    html.save(seen, path)
    before = path.read_bytes()
    assert before.decode("utf-8") == html.page(seen)
    monkeypatch.setattr(html, "page", lambda seen: "half" * (1 / 0))
    with pytest.raises(ZeroDivisionError):
        html.save(seen, path)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == ["text.html"]


BROWSER = """
const clamped = to => Math.min(Math.max(Number(to), 0), MAX);
const node = more => ({textContent: "", attributes: {}, setAttribute(name, value) { this.attributes[name] = value; },
  ...more});
const text = TOKENS.map(([piece, when, began]) => {
  const classes = new Set(), toggle = (name, on) => classes[on ? "add" : "delete"](name);
  return node({textContent: piece, dataset: {when: String(when), began: String(began)}, classes, classList: {toggle}});
});
let at = MAX;
const slider = node({max: String(MAX)});
Object.defineProperty(slider, "value", {get: () => String(at), set: to => { at = clamped(to); }});
const nodes = {forward: slider, said: node(), play: node(), controls: node({hidden: true}),
  text: node({querySelectorAll: () => text})};
globalThis.document = {getElementById: id => nodes[id]};
let tick = null;
globalThis.setInterval = run => { tick = run; return 1; };
globalThis.clearInterval = () => { tick = null; };
const seen = [];
const look = () => seen.push([at, text.map(span => span.textContent).join(""), nodes.said.textContent,
  text.map(span => span.classes.has("new")), slider.attributes["aria-valuetext"]]);
let ours = 0;
const key = (key, more) => document.onkeydown({key, preventDefault() { ours += 1; }, ...more});
SCRIPT
look();
for (let i = 0; i < MAX + 1; i++) { key("ArrowLeft"); look(); }
for (let i = 0; i < MAX + 1; i++) { key("ArrowRight"); look(); }
key("Home"); look();
key("End"); look();
key("ArrowLeft", {altKey: true}); key("PageDown"); key("a"); look();
slider.value = 1; slider.oninput(); look();
key("End"); nodes.play.onclick(); look();
tick(); key("ArrowRight"); if (tick) throw Error("a key does not pause");
key("End"); nodes.play.onclick(); nodes.play.onclick(); if (tick) throw Error("the button does not pause");
key("End"); nodes.play.onclick();
while (tick) { tick(); look(); }
console.log(JSON.stringify({seen, ours, hidden: nodes.controls.hidden, label: nodes.play.textContent}));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="nothing here runs the page's script: no node")
@pytest.mark.parametrize("tokens, block", [(1, 1), (7, 1), (13, 4), (5, 8), (40, 16)])
def test_the_page_s_script_shows_what_the_terminal_does(tokens, block):
    """At each forward, whichever way it was come to: keys, slider, play."""
    seen, last = rollout(tokens, block)[0], rollout(tokens, block)[0].forwards
    parsed, code = Parsed(html.page(seen)), BROWSER
    values = {"SCRIPT": "{" + parsed.script + "}", "MAX": str(last), "TOKENS": json.dumps(parsed.tokens())}
    for name, value in values.items():
        code = code.replace(name, value)
    run = subprocess.run(["node", "-"], input=code, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    asked = [last, *range(last - 1, -1, -1), 0, *range(1, last + 1), last, 0, last, last, 1, *range(last + 1)]
    assert [at for at, *_ in said["seen"]] == asked and not said["hidden"] and said["label"] == "play"
    assert said["ours"] == 2 * (last + 1) + 6                        # the browser keeps all the other keys
    for at, text, line, new, spoken in said["seen"]:
        assert text == "".join(text for text, _ in terminal.frame(seen, at)[1:])
        there = sum(when <= at for when in seen.when)
        line, _, rate = line.partition("tokens")
        assert line == f"after forward {at} of {last}: {there} " and spoken == line + "tokens" + rate
        assert not at and rate == "" or float(rate[2:6]) == pytest.approx(there / at, abs=0.00501)
        assert new == [when == at for when in seen.when]
