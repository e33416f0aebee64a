"""A rollout as one web page: a slider over the forward passes, arrow keys, a play button. It loads nothing.

The page holds the finished text, one span per token in the colour of its step, and is readable without its
script. The script shows earlier states: ▢ for tokens revealed later, nothing of blocks that have not begun.
"""
from __future__ import annotations

from html import escape
from string import Template

from report.trace import MASK_SIGN, RAMP, Trace, colour_groups, colour_index, visible, write_atomically

LIGHT_PAPER = 255           # grey levels of the background
DARK_PAPER = 20
FPS = 8                     # forward passes per second while the page plays

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: $light_paper; --ink: #1f2937; --soft: #5b6472;
        $light_colours }
@media (prefers-color-scheme: dark) {
  :root { --paper: $dark_paper; --ink: #e5e7eb; --soft: #a3acb9;
          $dark_colours }
}
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
<small>$groups of $block; $colour_meaning $legend</small>
<div id="controls" hidden>
<div><button id="play" type="button">play</button><label for="forward">$unit</label>
<input id="forward" type="range" min="0" max="$forwards" value="$forwards" autocomplete="off"></div>
<output id="status" for="forward" aria-live="off"></output><br>
<small>underlined: revealed by this $unit; arrow keys: previous, next $unit; Home, End: first, last</small>
</div>
<p id="text"><b>$prompt</b>$tokens</p>
<script>
"use strict";
const byId = id => document.getElementById(id);
const controls = byId("controls"), slider = byId("forward"), statusLine = byId("status");
const button = byId("play"), text = byId("text");
const tokens = Array.from(text.querySelectorAll("span"), span => ({
  span,
  piece: span.textContent,
  revealedAt: Number(span.dataset.revealedAt),
  forwardsBefore: Number(span.dataset.forwardsBefore),
}));
let timer = 0;

function show(target) {
  slider.value = target;                     // the slider limits it to its range
  const forward = Number(slider.value);
  for (const {span, piece, revealedAt, forwardsBefore} of tokens) {
    const masked = revealedAt > forward;
    const begun = forwardsBefore <= forward;
    span.textContent = !begun ? "" : masked ? "$mask_sign" : piece;
    span.classList.toggle("masked", masked);
    span.classList.toggle("new", revealedAt === forward);
  }
  const revealed = tokens.filter(token => token.revealedAt <= forward).length;
  const rate = forward ? ", " + (revealed / forward).toFixed(2) + " tokens per $unit" : "";
  const place = "after $unit " + forward + " of " + slider.max;
  statusLine.textContent = place + ": " + revealed + " tokens" + rate;
  slider.setAttribute("aria-valuetext", statusLine.textContent);
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
  }, $milliseconds);
}

button.onclick = () => timer ? pause() : play();
slider.oninput = () => { pause(); show(slider.value); };
document.onkeydown = event => {
  const forward = Number(slider.value);
  const targets = {ArrowLeft: forward - 1, ArrowRight: forward + 1, Home: 0, End: slider.max};
  const target = targets[event.key];
  if (target === undefined || event.ctrlKey || event.altKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  pause();
  show(target);
};
controls.hidden = false;
show(slider.max);
</script>
""")


def save(trace: Trace, path) -> None:
    """Write the page, whole or not at all."""
    write_atomically(path, lambda unfinished: unfinished.write_text(page(trace), encoding="utf-8"))


def page(trace: Trace) -> str:
    """The page as HTML. All text of the trace is escaped."""
    tokens = zip(trace.pieces, trace.revealed_at, trace.forwards_before, trace.steps)
    token_spans = ""
    for piece, revealed_at, forwards_before, step in tokens:
        data = f' data-revealed-at="{revealed_at}" data-forwards-before="{forwards_before}"'
        token_spans += token_span(visible(piece), step, trace.num_steps, data)
    legend = [token_span(name, step, trace.num_steps) for name, step in colour_groups(trace.num_steps)]
    classes = [f".s{i} {{ color: var(--s{i}) }}" for i in range(len(RAMP))]
    return PAGE.substitute(
        title=f"{len(trace.pieces)} tokens in {trace.forwards} {trace.unit}s",
        unit=trace.unit,
        forwards=trace.forwards,
        block=trace.block,
        groups="drafts" if trace.speculative else "blocks",
        colour_meaning=trace.colour_meaning,
        legend=" ".join(legend),
        mask_sign=MASK_SIGN,
        milliseconds=1000 // FPS,
        prompt=escape(visible(trace.prompt)),
        tokens=token_spans,
        classes="\n".join(classes),
        light_paper=hex_colour([LIGHT_PAPER] * 3),
        light_colours=colour_variables(LIGHT_PAPER),
        dark_paper=hex_colour([DARK_PAPER] * 3),
        dark_colours=colour_variables(DARK_PAPER),
    )


def token_span(text: str, step: int, num_steps: int, data: str = "") -> str:
    """A span in the colour of a step; `data` holds further attributes."""
    return f'<span class="s{colour_index(step, num_steps)}"{data}>{escape(text)}</span>'


def colour_variables(paper: int) -> str:
    """The colours of RAMP as CSS variables --s0, --s1, ..., legible on this paper."""
    variables = [f"--s{i}: {hex_colour(text_colour(code, paper))};" for i, code in enumerate(RAMP)]
    return " ".join(variables)


def text_colour(code: int, paper: int) -> list[int]:
    """Red, green and blue of an xterm colour (6 x 6 x 6 cube), mixed with 25 % black or 40 % white.

    Small text in the mixed colour has enough contrast on the paper (4.5, WCAG 2).
    """
    cube = [(code - 16) // 36, (code - 16) // 6 % 6, (code - 16) % 6]
    share, end = (0.25, 0) if paper > 127 else (0.4, 255)
    mixed = []
    for coordinate in cube:
        level = 55 * (coordinate > 0) + 40 * coordinate
        mixed.append(round((1 - share) * level + share * end))
    return mixed


def hex_colour(rgb: list[int]) -> str:
    return "#" + "".join(f"{level:02x}" for level in rgb)
