# SPDX-License-Identifier: Apache-2.0
"""What the page of runs is made of: tables, figures and its style. Everything from outside is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

# Colours of the plots that follow the reader's light or dark scheme; data keep theirs.
_THEMED = {
    "#1f2937": "ink",
    "#000000": "ink",
    "#4b5563": "muted",
    "#9aa5b4": "faint",
    "#c3cad4": "faint",
    "#b0b0b0": "faint",
    "#edeff2": "rule",
    "#ffffff": "card",
}
_SHORT = 26  # letters of a cell that stays on one line
_FONTS = "'DejaVu Sans', Verdana, sans-serif"


def figure(svg: bytes | str, caption: str, name: str, *, themed: bool = True, wide: int = 0) -> str:
    """A picture within the page. `name`: unlike every other figure's; `wide`: the least width in pixels, else scrolled.

    Not `themed`: it keeps its colours, on white.
    """
    kind = "plot" if themed else "plot paper"
    body = inline_svg(svg, name, caption, themed=themed)
    style = f' style="min-width:{wide}px"' if wide else ""
    # a focusable box, so that it can be scrolled by keys
    scroll = f' tabindex="0" role="group" aria-label="{escape(caption)}"' if wide else ""
    return (
        f'<figure class="{kind}"><div class="scroll"{scroll}><div{style}>{body}</div></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def inline_svg(svg: bytes | str, name: str, label: str, *, themed: bool = True) -> str:
    """An SVG file as an element of a page: names of its own, no size of its own, its colours by the page's scheme."""
    text = svg.decode() if isinstance(svg, bytes) else svg
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)  # styles would leak out
    used = set(re.findall(r"""(?:url\(|href=["'])#([^)"']+)""", text))

    def own(match: re.Match[str]) -> str:  # a name that nothing refers to may stand twice in a file
        return f' id="{name}-{match[2]}"' if match[2] in used else ""

    text = re.sub(r"""\sid=(["'])(.*?)\1""", own, text)
    text = re.sub(r"""url\(#|(?<=href=["'])#""", lambda match: match[0] + f"{name}-", text)
    text = text.replace("'DejaVu Sans'", _FONTS)
    if themed:
        text = re.sub(r"#[0-9a-fA-F]{6}\b", lambda match: _themed(match[0]), text)
    head, _, rest = text.partition(">")
    width = re.search(r"""\bwidth=["']([\d.]+)pt""", head)
    # as wide as there is room, but no picture grows far beyond its size
    widest = f' style="max-width:{float(width[1]) * 1.6:.0f}px"' if width else ""
    head = re.sub(r"""\s(?:width|height|id)=(["']).*?\1""", "", head)
    return f'{head}{widest} role="img" aria-label="{escape(label)}">{rest.strip()}'


def _themed(colour: str) -> str:
    found = _THEMED.get(colour.lower())
    return f"var(--{found})" if found else colour


def table(columns: Mapping[str, Sequence[str]], *, left: Iterable[str] = (), raw: Iterable[str] = ()) -> str:
    """Columns of equal length as a table that scrolls where it does not fit. `raw` columns are HTML already."""
    left, raw = set(left), set(raw)

    def kind(name: str, cell: str) -> str:
        long = len(re.sub(r"<[^>]*>", "", cell)) > _SHORT
        return ("long" if long else "short") if name in left else "n"

    head = "".join(f'<th scope="col" class="{kind(name, name)}">{escape(name)}</th>' for name in columns)
    lines = []
    for cells in zip(*columns.values(), strict=True):
        line = [
            (kind(name, cell), cell if name in raw else escape(cell)) for name, cell in zip(columns, cells, strict=True)
        ]
        lines.append("".join(f'<td class="{name}">{cell}</td>' for name, cell in line))
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="table"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with their values."""
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs if value)
        + "</dl>"
    )


def notes(lines: Iterable[str], kind: str = "") -> str:
    """Small print, a paragraph a line."""
    mark = f" {kind}" if kind else ""
    return "".join(f'<p class="note{mark}">{escape(line)}</p>\n' for line in lines)


def section(title: str, body: str, name: str, *, level: int = 2) -> str:
    """A titled part with an address of its own."""
    return f'<section id="{escape(name)}"><h{level}>{escape(title)}</h{level}>\n{body}\n</section>\n'


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document: nothing in it is loaded from elsewhere, and nothing in it runs."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


STYLE = """
:root { --ink: #1f2937; --muted: #4b5563; --faint: #9aa5b4; --rule: #e2e6ec; --card: #ffffff; --ground: #f4f6f8;
  --link: #0060a0; --bar: #bcd9ee; --warn: #9a3b00; color-scheme: light; }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e5e9ef; --muted: #b3bcc8; --faint: #78838f; --rule: #333c47; --card: #1a2027; --ground: #11151a;
    --link: #7fc8f8; --bar: #1f4c6b; --warn: #ffb27a; color-scheme: dark; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.6rem; margin: .4em 0; } h2 { font-size: 1.25rem; margin: 1.6em 0 .5em; }
section.run > h2, .card > h3 { margin-top: .2em; }
h3 { font-size: 1.02rem; margin: 1.2em 0 .4em; overflow-wrap: anywhere; }
a { color: var(--link); } p { margin: .4em 0; }
nav ul { display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; padding: 0; margin: .5em 0; }
nav a { display: inline-block; padding: 4px 0; overflow-wrap: anywhere; }
section.run, .card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 16px;
  margin: 12px 0; }
.scroll { overflow-x: auto; max-width: 100%; } .scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; background: var(--card); }
th, td { padding: 4px 10px; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th { color: var(--muted); font-weight: 600; } .n { text-align: right; }
.long { white-space: normal; min-width: 14em; max-width: 24em; overflow-wrap: break-word; }
.note { color: var(--muted); font-size: .84rem; overflow-wrap: anywhere; } .warn { color: var(--warn); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); gap: 6px 18px;
  margin: .6em 0; }
.facts dt { color: var(--muted); font-size: .78rem; } .facts dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 10px 0; min-width: 0; } figcaption { color: var(--muted); font-size: .82rem; }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg * { stroke-linejoin: round; } .plot:not(.paper) svg text { fill: var(--ink); }
.plot.paper { color: #1f2937; } .plot.paper .scroll { background: #ffffff; border-radius: 6px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); gap: 4px 18px; }
.panels figcaption { display: none; }
.bits { display: inline-block; min-width: 2em; padding: 0 5px; border-radius: 3px; text-align: center; }
.bar { display: inline-block; height: .75em; min-width: 1px; background: var(--bar); vertical-align: baseline; }
.share { display: inline-block; width: 90px; text-align: left; }
code { font-family: "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: .86em; overflow-wrap: anywhere; }
.flag { white-space: nowrap; }
summary { cursor: pointer; padding: 4px 0; }
@media (max-width: 520px) { main { padding: 8px; } section.run, .card { padding: 8px 10px; } }
@media print {
  body { background: none; font-size: 10.5pt; } main { max-width: none; padding: 0; } nav { display: none; }
  .scroll { overflow: visible; } .scroll > div { min-width: 0 !important; }
  table { font-size: 7.5pt; } th, td { padding: 2px 4px; white-space: normal; overflow-wrap: anywhere; }
  .long { min-width: 0; }
  figure, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  section.run { border: 0; padding: 0; break-before: page; }
  details::details-content { content-visibility: visible; height: auto; }
}
"""
