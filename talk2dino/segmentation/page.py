"""A self-contained HTML page: nothing is loaded from elsewhere; light or dark."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfa;--card:#fff;--ink:#1d2126;--faint:#68707a;
--line:#e2e4e8;--accent:#2f6fb5;--accent-soft:#dce8f5;--mark:#d8572a;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--paper:#15181c;--card:#1d2126;--ink:#e8eaed;
--faint:#99a1ab;--line:#343a42;--accent:#6aa9ea;--accent-soft:#24384d;--mark:#ff9062;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:20px;margin:40px 0 12px;letter-spacing:-.005em}
h3{font-size:15px;margin:28px 0 8px}
p{margin:0 0 12px}.sub,.note{color:var(--faint)}.note{font-size:13px;margin-top:8px}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;
margin:0 0 20px}
.card>h3:first-child{margin-top:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(140px,1fr));gap:12px;
margin:18px 0 20px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tile b{display:block;font-size:26px;line-height:1.2;font-variant-numeric:tabular-nums}
.tile:first-child b{color:var(--accent)}
.tile span{color:var(--faint);font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:600;color:var(--faint);font-size:13px}
th:first-child,td:first-child{text-align:left;white-space:normal}
table.texts th,table.texts td{text-align:left}
table.texts td{white-space:normal;overflow-wrap:anywhere}
table.texts td:first-child{width:190px;color:var(--faint)}
tr.published td{color:var(--faint);font-style:italic}tr.first td{border-top:2px solid var(--line)}
td.best{font-weight:700}td.failed{color:var(--bad)}
tbody tr:last-child td{border-bottom:0}
.bars{columns:3 280px;column-gap:32px}
.bar{display:grid;grid-template-columns:8.5em 1fr 3em;gap:8px;align-items:center;
break-inside:avoid;padding:1.5px 0;font-size:13px}
.bar span{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;text-align:right}
.bar>div{position:relative;height:13px;background:var(--accent-soft);border-radius:3px}
.bar b{display:block;height:100%;background:var(--accent);border-radius:3px}
.bar i{position:absolute;top:-2px;bottom:-2px;border-left:1px dashed var(--faint)}
.bar u{position:absolute;top:0;bottom:0;border-left:3px solid var(--mark)}
.bar em{font-style:normal;text-align:right;font-variant-numeric:tabular-nums}
svg{display:block;width:100%;height:auto}svg text{fill:var(--faint)}
.heat rect{fill:var(--accent)}.heat rect.frame{fill:none;stroke:var(--line);
vector-effect:non-scaling-stroke}
.histogram{max-width:640px}.histogram rect{fill:var(--accent)}
.histogram line{stroke:var(--line);stroke-width:2}
.two{display:grid;grid-template-columns:minmax(0,3fr) minmax(0,2fr);gap:20px;align-items:start}
@media (max-width:820px){.two{grid-template-columns:minmax(0,1fr)}}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:16px}
@media (max-width:520px){.examples{grid-template-columns:1fr}}
figure{margin:0}figure img{display:block;width:100%;border-radius:6px}
figcaption{font-size:13px;margin-top:6px}
.three{display:grid;grid-template-columns:repeat(3,1fr);font-size:12px;color:var(--faint);
text-align:center;margin-bottom:3px}
.chip{display:inline-block;margin:2px 10px 0 0;white-space:nowrap}
.chip i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:5px;
vertical-align:-1px}
.chip small{color:var(--faint)}
details{margin:0 0 12px}summary{cursor:pointer;padding:4px 0}
details.run{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:8px 18px}
details.run>summary{font-weight:600}
details.run .card{border:0;padding:0}
pre{background:var(--paper);border:1px solid var(--line);border-radius:6px;padding:12px;
font:12px/1.45 ui-monospace,SFMono-Regular,Menlo,monospace;overflow:auto;max-height:420px}
@media print{details.run{break-before:page}}
"""


def page(title: str, body: str) -> str:
    """A whole page."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main>{body}</main></body></html>\n"
    )


def card(heading: str, body: str) -> str:
    """A framed part with a heading."""
    return f'<section class="card"><h3>{escape(heading)}</h3>{body}</section>'


def tiles(entries: Iterable[tuple[str, str]]) -> str:
    """Large figures: pairs of value and what it is."""
    cells = (
        f'<div class="tile"><b>{escape(v)}</b><span>{escape(n)}</span></div>' for v, n in entries
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def text_table(rows: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    lines = (f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in rows)
    return f'<table class="texts"><tbody>{"".join(lines)}</tbody></table>'


def grid(header: Sequence[str], rows: Iterable[str]) -> str:
    """A table of figures; rows are `<tr>` already."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(cells: Iterable[str], style: str = "", cell_styles: Sequence[str] = ()) -> str:
    """A table row, with a class for itself and one per cell."""
    styles = [*cell_styles]
    parts = []
    for number, cell in enumerate(cells):
        name = styles[number] if number < len(styles) else ""
        parts.append(
            f'<td class="{name}">{escape(cell)}</td>' if name else f"<td>{escape(cell)}</td>"
        )
    opening = f'<tr class="{style}">' if style else "<tr>"
    return f"{opening}{''.join(parts)}</tr>"


def picture(file: Path, description: str) -> str:
    """An image inside the page."""
    kind = "jpeg" if file.suffix in (".jpg", ".jpeg") else file.suffix[1:]
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<img alt="{escape(description)}" src="data:image/{kind};base64,{data}">'
