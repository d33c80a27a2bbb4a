"""The paper a report is printed on: its style, its small script, and how words from a run become words on a page.

Everything that came from a file goes through `text`: a model may write anything, and so may whoever names a file.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

JOINERS = "\u200c\u200d"  # they hold together letters of some scripts, and emoji


def visible(value: str, most: int = 400) -> str:
    """The text with characters that cannot be seen, or that move others, shown: ␛, ⟨U+202E⟩; cut above
    `most` bytes of HTML."""
    out: list[str] = []
    length = 0
    for place, c in enumerate(value):
        if length >= most:
            return "".join(out) + f"… ({len(value) - place:,} more characters)"
        if c in "\n\t" or c.isprintable() or c in JOINERS or c.isspace() and c > "\x9f" and c not in "\u2028\u2029":
            shown = c
        elif c < "\x20" or c == "\x7f":
            shown = "\u2421" if c == "\x7f" else chr(0x2400 + ord(c))
        else:
            shown = f"⟨U+{ord(c):04X}⟩"
        out.append(shown)
        length += 6 if shown in "&<>\"'" else len(shown.encode())  # as the file will have it
    return "".join(out)


def text(value: Any, most: int = 400) -> str:
    """Anything from a file, safe between tags and in quoted attributes."""
    try:
        words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        words = "(nested too deep to be shown)"
    words = "none" if value is None else words
    return html.escape(visible(words, most), quote=True)


def table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (),
          bar: int = -1, caption: bool = True) -> str:  # fmt: skip
    """A table of cells that are HTML already. It scrolls in its own box.

    label     what it is, for those who listen; above it where `caption`
    numbers   columns set to the right
    bar       the column that has bars
    """

    def row(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        styles = [' class="number"' if i in numbers else ' class="bar"' if i == bar else "" for i in range(len(cells))]
        made = [f"<{tag}{scope}{style}>{cell}</{tag}>" for style, cell in zip(styles, cells, strict=True)]
        return "<tr>" + "".join(made) + "</tr>"

    body = "\n".join(row(cells, "td") for cells in rows)
    named = f"<caption>{label}</caption>" if caption else ""
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>{named}'
        f"<thead>{row(head, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values (HTML already) as a list of two columns; pairs without a value are left out."""
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in pairs if value)
        + "</dl>"
    )


def details(summary: str, content: str) -> str:
    """What is shown after a click on its summary."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def section(key: str, title: str, content: str) -> str:
    """A part of the page under its heading; nothing where there is no content."""
    return f'<section aria-labelledby="{key}">\n<h2 id="{key}">{title}</h2>\n{content}\n</section>\n' if content else ""


def document(title: str, content: str) -> str:
    """The whole file. Its policy lets a browser load nothing and run nothing but the one script below."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
{content}</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


# --- numbers in words ---------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes in the unit that reads best, three digits: 1.18 GB, 60.8 MB, 702 MB"""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            whole = count / scale
            return f"{whole:,.0f} {unit}" if whole >= 99.95 else f"{whole:.3g} {unit}"
    return f"{count:,.0f} bytes"


def duration(seconds: float) -> str:
    """4 -> 4.0 s, 94 -> 1 min 34 s, 11520 -> 3 h 12 min, 1e6 -> 11.6 days"""
    if seconds < 59.5:
        return f"{seconds:.1f}\u00a0s" if seconds < 9.95 else f"{seconds:.0f}\u00a0s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60}\u00a0h {minutes % 60}\u00a0min"
    return f"{seconds / 86400:,.1f}\u00a0days"


def large(count: float) -> str:
    """1377408 -> 1.4 million; small numbers as they are."""
    for unit, scale in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:,.0f}"


def moment(value: Any) -> str:
    """An ISO 8601 time, to the second; whatever else it is, as it came."""
    if not isinstance(value, str):
        return ""
    try:
        time = datetime.fromisoformat(value)
    except ValueError:
        return text(value, 40)
    zone = time.strftime("%z")
    return time.strftime("%Y-%m-%d %H:%M:%S") + (" UTC" if zone == "+0000" else f" {zone}" if zone else "")


# --- style and script ---------------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--box:#f6f8fa;--ink:#24292f;--grey:#57606a;--grid:#e6e8eb;--edge:#d0d7de;
--blue:#0072b2;--pale:#a9cfe6;--orange:#d55e00;--green:#009e73;--pink:#cc79a7;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--paper:#14181d;--box:#1c2229;--ink:#e6e9ed;--grey:#a3adb8;--grid:#29313a;
--edge:#3a444f;--blue:#56b4e9;--pale:#2c5270;--orange:#f08a3c;--green:#2bbd92;--pink:#dd97bd;--bad:#ff8a80}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:64rem;margin:0 auto;padding:3rem 1.5rem 4rem}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.015em;font-weight:650;margin:0 0 .5rem;text-wrap:balance}
h2{font-size:1.3rem;line-height:1.3;font-weight:650;margin:3.25rem 0 1rem;letter-spacing:-.005em}
h3{font-size:1rem;font-weight:650;margin:0}
p{margin:.5rem 0}
.under{color:var(--grey);margin:0 0 1.1rem}
.lede{font-size:1.2rem;line-height:1.5;max-width:46rem;margin:0}
.lede b{font-weight:650}
.small,.legend,caption,summary{font-size:.9rem}
.grey,.under,.legend,caption,dt{color:var(--grey)}
.state{display:inline-block;border:1px solid var(--edge);border-radius:99px;padding:.05rem .7rem;font-size:.85rem;
color:var(--ink);margin-right:.5rem;white-space:nowrap}
.state::before{content:"";display:inline-block;width:.6em;height:.6em;border-radius:50%;background:var(--grey);
margin-right:.45em}
.state.finished::before{background:var(--green)}
.state.stopped::before{background:var(--orange)}
.state.failed::before{background:var(--bad)}
.note{border-left:3px solid var(--orange);padding:.1rem 0 .1rem .9rem;margin:1rem 0}
.note.failed{border-color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(3,minmax(0,1fr));gap:1px;
border:1px solid var(--grid);border-radius:8px;overflow:hidden;margin:2rem 0 0;padding:0}
.tiles div{box-shadow:0 0 0 1px var(--grid);padding:.9rem 1.1rem 1rem}
.tiles dt{font-size:.85rem}
.tiles dd{margin:0}
.tiles .value{font-size:1.65rem;line-height:1.25;font-weight:600;letter-spacing:-.01em;
font-variant-numeric:tabular-nums}
.tiles .value small{font-size:.95rem;font-weight:400;letter-spacing:0;color:var(--grey)}
.tiles .more{font-size:.85rem;color:var(--grey)}
figure{margin:0}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:2.25rem 2.5rem;margin-top:2.25rem}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;margin:.15rem 0 0;padding:0;list-style:none;
font-variant-numeric:tabular-nums}
.legend li{display:inline-flex;align-items:center;gap:.45rem}
.legend b{font-weight:600;color:var(--ink)}
.legend svg{width:22px;height:12px;flex:none;overflow:visible}
.plot{position:relative;padding:14px 0 34px 46px}
.named .plot{padding-right:92px}
.plot svg{display:block;overflow:visible}
.plot svg.cut{overflow:hidden}
.grid{stroke:var(--grid)}
.axis{stroke:var(--grey)}
.tick,.end{font-size:12px;fill:var(--grey);font-variant-numeric:tabular-nums}
.end{font-size:13px;fill:var(--ink)}
path{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.line{stroke-width:2.4}.raw{stroke-width:1}.level{stroke-width:1.7;stroke-dasharray:7 5}
.train{stroke:var(--blue)}.raw.train,.swatch.each{stroke:var(--pale)}.held{stroke:var(--orange);stroke-width:1.8}
.gzip{stroke:var(--pink)}.xz,.planned{stroke:var(--green)}.limit{stroke:var(--bad)}
.halo{stroke:var(--paper);stroke-width:12;stroke-linecap:round}.dot{stroke-width:8;stroke-linecap:round}
.across{stroke-width:1.2;stroke-dasharray:2 3}
.mark{stroke-width:5;stroke-linecap:round}.mark.resume,.mark.error,.mark.warning{stroke-width:8}
.mark.warning,.mark.error{stroke-linecap:square}
.checkpoint{stroke:var(--grey)}.resume{stroke:var(--blue)}.warning{stroke:var(--orange)}.error{stroke:var(--bad)}
.glass{position:absolute;inset:14px 0 34px 46px;touch-action:pan-y}
.named .glass{right:92px}
.hair{position:absolute;top:0;bottom:0;width:1px;background:var(--grey);pointer-events:none}
.tip{position:absolute;top:6px;background:var(--paper);border:1px solid var(--edge);border-radius:6px;
padding:.25rem .6rem;font-size:.8rem;line-height:1.45;pointer-events:none;white-space:nowrap;
font-variant-numeric:tabular-nums;box-shadow:0 2px 8px #0002}
pre{background:var(--box);border-radius:8px;padding:1rem 1.1rem;margin:.6rem 0 1.4rem;overflow:auto;
font:13.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;tab-size:4;max-height:32rem;
overflow-wrap:normal}
pre.wrap{white-space:pre-wrap;overflow-wrap:anywhere}
pre .prompt{color:var(--grey)}
dl.answers{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1rem;margin:.4rem 0 1.6rem}
dl.answers dt{color:var(--grey)}dl.answers dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--blue);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:0 0 .4rem}
th{font-weight:600;text-align:left;color:var(--grey);font-size:.85rem}
th,td{padding:.4rem 1rem .4rem 0;border-bottom:1px solid var(--grid);vertical-align:top}
td{overflow-wrap:break-word;min-width:4rem}
th.number,td.number{text-align:right;white-space:nowrap}
tr.sum td{font-weight:600;border-bottom-color:var(--edge)}
td.bar{min-width:6rem;width:32%;vertical-align:middle}
td.bar i{display:block;height:.6rem;background:var(--blue);border-radius:2px;min-width:1px}
.kind{white-space:nowrap}
.kind.failed{color:var(--bad)}
.facts{margin:0;display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 2.5rem}
.facts div{display:flex;gap:1rem;padding:.4rem 0;border-bottom:1px solid var(--grid);font-size:.95rem}
.facts dt{flex:0 0 9rem}
.facts dd{margin:0;min-width:0;font-variant-numeric:tabular-nums}
.gap{margin-top:1.75rem}.signs{margin:.2rem 0 0 46px}
.commands{margin:0}.commands div{padding:.45rem 0;border-bottom:1px solid var(--grid)}.commands dt{font-size:.9rem}
.commands dd{margin:0}
details{margin:.75rem 0}
summary{cursor:pointer;color:var(--blue);padding:.25rem 0}
footer{margin-top:4rem;padding-top:1rem;border-top:1px solid var(--grid);color:var(--grey);font-size:.85rem}
@media (max-width:720px){
main{padding:1.75rem 1rem 3rem}h1{font-size:1.6rem}.lede{font-size:1.08rem}h2{margin-top:2.5rem}
.charts{grid-template-columns:minmax(0,1fr)}.named .plot{padding-right:0}.named .glass{right:0}.end{display:none}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr))}.tiles div{padding:.7rem .8rem .8rem}
.tiles .value{font-size:1.3rem}
.facts{grid-template-columns:minmax(0,1fr)}.facts dt{flex-basis:7.5rem}pre{font-size:12px;padding:.8rem}}
@media print{:root{--paper:#fff;--box:#f6f8fa;--ink:#000;--grey:#444;--grid:#ddd;--edge:#bbb;--blue:#0072b2;
--pale:#a9cfe6;--orange:#d55e00;--green:#009e73;--pink:#cc79a7;--bad:#b3261e}
body{font-size:11pt}main{max-width:none;padding:0}pre{max-height:none;white-space:pre-wrap}.glass{display:none}
figure,.tiles,tr,pre{break-inside:avoid}h2{break-after:avoid}}
"""

# Values under the pointer, read back from the drawn lines; and all details open on paper. The page reads without it.
SCRIPT = """
"use strict";
for (const svg of document.querySelectorAll("svg[data-last]")) {
  const { last, low, high, log, unit } = svg.dataset, scale = [+low, +high].map(v => +log ? Math.log10(v) : v);
  const lines = [...svg.querySelectorAll("path[data-name]")].map(path => ({ name: path.dataset.name,
    points: path.getAttribute("d").slice(1).split("L").map(pair => pair.split(" ").map(Number)) }));
  if (!lines.length) continue;
  const make = (name, parent) => {
    const made = document.createElement("div");
    made.className = name;
    return parent.appendChild(made);
  };
  const glass = make("glass", svg.parentNode), hair = make("hair", glass), tip = make("tip", glass);
  const worded = value => unit === "bytes" ? (value / 1e6).toLocaleString("en", { maximumFractionDigits: 1 }) + " MB"
    : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2)
    : value.toLocaleString("en", { maximumSignificantDigits: 4 });
  const hide = () => { hair.hidden = tip.hidden = true; };
  const show = event => {
    const box = glass.getBoundingClientRect(), share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const near = lines.map(line => line.points.reduce((best, point) =>
      Math.abs(point[0] - 1000 * share) < Math.abs(best[0] - 1000 * share) ? point : best));
    const x = near.reduce((best, point) =>
      Math.abs(point[0] - 1000 * share) < Math.abs(best[0] - 1000 * share) ? point : best)[0];
    const rows = ["step " + Math.round(x / 1000 * Math.max(1, +last)).toLocaleString("en")];
    lines.forEach((line, i) => {
      if (Math.abs(near[i][0] - x) > 15) return;
      const up = scale[0] + (1 - near[i][1] / 1000) * (scale[1] - scale[0]);
      rows.push(line.name + " " + worded(+log ? 10 ** up : up));
    });
    tip.replaceChildren(...rows.map(row => Object.assign(document.createElement("div"), { textContent: row })));
    hair.hidden = tip.hidden = false;
    hair.style.left = x / 10 + "%";
    tip.style.left = x < 500 ? "calc(" + x / 10 + "% + 10px)" : "auto";
    tip.style.right = x < 500 ? "auto" : "calc(" + (100 - x / 10) + "% + 10px)";
  };
  hide();
  glass.addEventListener("pointermove", show);
  glass.addEventListener("pointerdown", show);
  glass.addEventListener("pointerleave", hide);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
"""
