"""table.html: the whole comparison in one file that needs nothing else.

No script, no external style or font; pictures are embedded and link to their files. Tables have
captions and row and column headers, pictures have texts that say what they show.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from tlora.comparison.collect import Comparison, Section
from tlora.comparison.plots import Picture
from tlora.comparison.published import NOTHING_PUBLISHED, Ledger
from tlora.comparison.tables import (
    PUBLISHED_NOTE,
    Column,
    Record,
    detail_columns,
    main_columns,
    notes,
    published_columns,
    rank_columns,
    split,
)

STYLE = """
:root { color-scheme: light; --ink: #1a1a1a; --soft: #555; --line: #cfcfcf; --band: #f4f6f8; }
body { font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: #fff;
  max-width: 76rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: .5rem 0; } h2 { font-size: 1.35rem; margin: 2.5rem 0 .5rem;
  border-top: 2px solid var(--ink); padding-top: .75rem; } h3 { font-size: 1.05rem; }
a { color: #0a58a6; } nav ul { padding-left: 1.2rem; }
.wide { overflow-x: auto; margin: .75rem 0; } .wide:focus { outline: 3px solid #0a58a6; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; vertical-align: bottom; }
th.text, td.text { text-align: left; } tbody th { font-weight: 600; text-align: left; }
thead th { border-bottom: 2px solid var(--ink); } thead span { display: block; font-weight: 400;
  color: var(--soft); } tr.base { background: var(--band); } td.failed { color: #a40000;
  font-weight: 600; } ul.notes { font-size: .85rem; color: #333; padding-left: 1.2rem;
  overflow-wrap: anywhere; } li.warning { color: #8a3b00; font-weight: 600; }
figure { margin: 1.25rem 0; } figure img { max-width: 100%; height: auto;
  border: 1px solid var(--line); } figcaption { font-size: .85rem; color: var(--soft); }
details { margin: .75rem 0; } summary { cursor: pointer; font-weight: 600; }
@media print { body { max-width: none; } details > * { display: block; } }
"""


def to_html(
    comparison: Comparison,
    found: list[Record],
    pictures: Sequence[Picture],
    plots: Path,
    published: Ledger = NOTHING_PUBLISHED,
) -> str:
    """Return the page.

    Parameters
    ----------
    comparison
        What is shown.
    found
        The records of table.csv.
    pictures
        The plots that exist.
    plots
        The folder that their paths are relative to; the page links to it as `plots/`.
    published
        Published numbers of the same models and benchmarks.
    """
    title = f"Comparison {comparison.preset}"
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        '<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style></head>",
        "<body><main>",
        f"<h1>{escape(title)}</h1>",
        f"<p>{_count(len(comparison.sections), 'table')}, one for each task and base model; every "
        'number is also in <a href="table.csv">table.csv</a>, every run in '
        '<a href="ledger.csv">ledger.csv</a>.</p>',
    ]
    if len(comparison.sections) > 1:
        entries = "".join(
            f'<li><a href="#{_anchor(section)}">{escape(section.title)}</a></li>'
            for section in comparison.sections
        )
        parts.append(f'<nav aria-label="Tables"><ul>{entries}</ul></nav>')
    for section, mine in split(comparison, found):
        shown = [p for p in pictures if (p.task, p.model) == (section.task, section.model)]
        parts += _section(section, mine, comparison.labels, shown, plots)
    ranks = rank_columns(found, comparison.labels)
    if ranks:
        parts += ["<h2>Ranks</h2>", _table(ranks, "Ranks over all benchmarks; 1: highest mean", 0)]
    if published.rows:
        columns = published_columns(published.rows, comparison.labels)
        texts = [PUBLISHED_NOTE, *(f"{doubt.kind}: {doubt.text}" for doubt in published.doubts)]
        parts += ["<h2>Published numbers</h2>", _table(columns, "Published beside ours", 1)]
        parts.append(f'<ul class="notes">{"".join(map(_note, texts))}</ul>')
    return "\n".join([*parts, "</main></body></html>", ""])


def _section(
    section: Section,
    found: list[Record],
    names: dict[str, str],
    pictures: Sequence[Picture],
    plots: Path,
) -> list[str]:
    labels = {name: names[name] for name in section.benchmarks}
    base = [bool(record["base"]) for record in found]
    parts = [
        f'<section aria-labelledby="{_anchor(section)}">',
        f'<h2 id="{_anchor(section)}">{escape(section.title)}</h2>',
        _table(
            main_columns(found, labels, details=False),
            f"Fine-tuning methods on {section.title}: accuracy (mean ± standard deviation over "
            "seeds) and costs of one run; *: highest mean, =: not distinguishable from it",
            0,
            base,
        ),
        f'<ul class="notes">{"".join(map(_note, notes(section, found, labels, digits=None)))}</ul>',
        "<h3>Per benchmark</h3>",
        _table(detail_columns(section, found, labels), "Every metric of every benchmark", 2),
        *_settings(section),
    ]
    if pictures:
        parts.append("<h3>Plots</h3>")
    parts += [_picture(picture, plots) for picture in pictures]
    return [*parts, "</section>"]


def _table(columns: list[Column], caption: str, header: int, base: Sequence[bool] = ()) -> str:
    """Render columns; the cell of column `header` names its row."""
    head = "".join(
        f'<th scope="col"{_kind(column)}>{escape(column.title)}'
        + (f"<span>({escape(column.unit)})</span>" if column.unit else "")
        + "</th>"
        for column in columns
    )
    lines = []
    for index, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        line = "".join(
            f'<th scope="row">{escape(cell)}</th>'
            if place == header
            else f"<td{_kind(column, cell)}>{escape(cell)}</td>"
            for place, (column, cell) in enumerate(zip(columns, cells, strict=True))
        )
        shade = ' class="base"' if base and base[index] else ""
        lines.append(f"<tr{shade}>{line}</tr>")
    # a region that scrolls must be reachable with the keyboard
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _kind(column: Column, cell: str = "") -> str:
    kinds = [] if column.numeric else ["text"]
    kinds += ["failed"] if "failed" in cell and column.numeric else []
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _note(note: str) -> str:
    warning = ' class="warning"' if "WARNING" in note or note.startswith("Failed") else ""
    return f"<li{warning}>{escape(note)}</li>"


def _settings(section: Section) -> list[str]:
    """Render the effective settings: those that all rows share, then those that differ."""
    rows = [(row.label, row.runs[0].settings) for row in section.rows if row.runs[0].settings]
    if not rows:
        return []
    keys = sorted({key for _, settings in rows for key in settings})
    values = {
        key: [_value(settings.get(key)) if key in settings else "–" for _, settings in rows]
        for key in keys
    }
    shared = [key for key in keys if len(set(values[key])) == 1]
    differing = [key for key in keys if key not in shared]
    parts = ["<details><summary>Settings</summary>"]
    if shared:
        columns = [
            Column("Setting", "", tuple(shared), numeric=False),
            Column("Value", "", tuple(values[key][0] for key in shared), numeric=False),
        ]
        parts.append(_table(columns, "Settings that all methods share", 0))
    if differing:
        columns = [Column("Method", "", tuple(label for label, _ in rows), numeric=False)]
        columns += [Column(key, "", tuple(values[key]), numeric=False) for key in differing]
        parts.append(_table(columns, "Settings that differ (of each row's first run)", 0))
    return [*parts, "</details>"]


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _picture(picture: Picture, plots: Path) -> str:
    data = base64.b64encode((plots / picture.path).read_bytes()).decode("ascii")
    link = escape(f"plots/{picture.path}")
    return (
        f'<figure><a href="{link}"><img src="data:image/png;base64,{data}" loading="lazy" '
        f'alt="{escape(picture.title)}. {escape(picture.description)}"></a>'
        f"<figcaption>{escape(picture.title)}</figcaption></figure>"
    )


def _anchor(section: Section) -> str:
    return escape(f"{section.task}-{section.model}".replace(" ", "-"))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
