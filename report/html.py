"""A rollout as one page that needs no network: a slider over its forwards, arrow keys, a button to play it.

The page holds the finished text, a span a token with the forward that revealed it, in the colour of its step, and can
be read without a script. The script only puts ▢ where `when > forward` and hides the blocks that have not begun.
"""
from __future__ import annotations

from html import escape
from string import Template

from report.trace import HIDDEN, RAMP, Trace, appear, scale, shade, visible

PAPER, DARK_PAPER = 255, 20                  # grey levels
FPS = 8                                      # forwards a second, when it plays

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: $paper; --ink: #1f2937; --soft: #5b6472; $light }
@media (prefers-color-scheme: dark) { :root { --paper: $dark_paper; --ink: #e5e7eb; --soft: #a3acb9; $dark } }
body { max-width: 46em; margin: 0 auto; padding: 1em; background: var(--paper); color: var(--ink);
       font: 18px/1.6 system-ui, sans-serif }
h1 { font-size: 1.3em; margin: 0 }
small, label, output, #text .masked { color: var(--soft) }
#controls { position: sticky; top: 0; padding: .5em 0; background: var(--paper) }
#controls[hidden] { display: none }
#controls div { display: flex; gap: .6em; align-items: center }
#forward { flex: 1; min-width: 6em }
button { font: inherit; min-width: 5em }
#text { white-space: pre-wrap; overflow-wrap: anywhere }
.new { text-decoration: underline 2px; text-underline-offset: .25em }
$classes
</style>
<h1>$title</h1>
<small>$what of $block; $colours $legend</small>
<div id="controls" hidden>
<div><button id="play" type="button">play</button><label for="forward">$unit</label>
<input id="forward" type="range" min="0" max="$forwards" value="$forwards" autocomplete="off"></div>
<output id="said" for="forward" aria-live="off"></output><br>
<small>underlined: revealed by this $unit; arrow keys: one $unit back or on; Home, End: the first, the last</small>
</div>
<p id="text"><b>$prompt</b>$tokens</p>
<script>
"use strict";
const [controls, slider, said, button, text] = ["controls", "forward", "said", "play", "text"].map(
  id => document.getElementById(id));
const tokens = Array.from(text.querySelectorAll("span"), span => (
  {span, piece: span.textContent, when: Number(span.dataset.when), began: Number(span.dataset.began)}));
let timer = 0;

function show(forward) {
  slider.value = forward;                    // the slider keeps it within its ends
  const at = Number(slider.value), there = tokens.filter(token => token.when <= at).length;
  for (const {span, piece, when, began} of tokens) {
    span.textContent = began > at ? "" : when > at ? "$hidden" : piece;
    span.classList.toggle("masked", when > at);
    span.classList.toggle("new", when === at);
  }
  const rate = at ? ", " + (there / at).toFixed(2) + " tokens per $unit" : "";
  said.textContent = "after $unit " + at + " of " + slider.max + ": " + there + " tokens" + rate;
  slider.setAttribute("aria-valuetext", said.textContent);
}

function pause() {
  clearInterval(timer);
  timer = 0;
  button.textContent = "play";
}

function play() {
  if (slider.value === slider.max) show(0);
  button.textContent = "pause";
  timer = setInterval(() => {
    show(Number(slider.value) + 1);
    if (slider.value === slider.max) pause();
  }, $pause);
}

button.onclick = () => timer ? pause() : play();
slider.oninput = () => { pause(); show(slider.value); };
document.onkeydown = event => {
  const at = Number(slider.value), to = {ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: slider.max}[event.key];
  if (to === undefined || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  pause();
  show(to);
};
controls.hidden = false;
show(slider.max);
</script>
""")


def save(trace: Trace, path) -> None:
    """Write the page, whole or not at all."""
    appear(path, lambda part: part.write_text(page(trace), encoding="utf-8"))


def page(trace: Trace) -> str:
    """The page; nothing of the trace's texts is more than text in it."""
    tokens = zip(trace.pieces, trace.when, trace.began, trace.steps)
    return PAGE.substitute(
        title=f"{len(trace.pieces)} tokens in {trace.forwards} {trace.unit}s", unit=trace.unit, forwards=trace.forwards,
        block=trace.block, what="drafts" if trace.runs else "blocks", colours=trace.colours,
        hidden=HIDDEN, pause=1000 // FPS, prompt=escape(visible(trace.prompt)),
        tokens="".join(_span(visible(piece), step, trace.most, f' data-when="{when}" data-began="{began}"')
                       for piece, when, began, step in tokens),
        legend=" ".join(_span(name, step, trace.most) for name, step in scale(trace.most)),
        classes="\n".join(f".s{i} {{ color: var(--s{i}) }}" for i in range(len(RAMP))),
        paper=_grey(PAPER), light=_shades(PAPER), dark_paper=_grey(DARK_PAPER), dark=_shades(DARK_PAPER))


def _span(text: str, step: int, steps: int, data: str = "") -> str:
    return f'<span class="s{shade(step, steps)}"{data}>{escape(text)}</span>'


def _grey(level: int) -> str:
    return f"#{level:02x}{level:02x}{level:02x}"


def _shades(paper: int) -> str:
    """The ramp as CSS variables, mixed with black or white until small letters can be read on the paper."""
    return " ".join(f"--s{i}: #{''.join(f'{level:02x}' for level in ink(code, paper))};" for i, code in enumerate(RAMP))


def ink(code: int, paper: int) -> list[int]:
    """Red, green and blue of one of xterm's 6 x 6 x 6 colours, a quarter of the way to black, or 2/5 to white."""
    levels = [(code - 16) // 36, (code - 16) // 6 % 6, (code - 16) % 6]
    share, end = (0.25, 0) if paper > 127 else (0.4, 255)
    return [round((1 - share) * (55 * (level > 0) + 40 * level) + share * end) for level in levels]
