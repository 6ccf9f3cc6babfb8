"""Pieces of the report's page. Everything that comes from a run goes through `text`, which escapes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any


def text(value: Any) -> str:
    """Escaped for HTML, in content and in quoted attributes; control characters become the replacement character."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in str(value))
    return escape(clean, quote=True)


def absent(what: str, why: str) -> str:
    """One line in the place of a part that cannot be shown."""
    return f'<p class="absent">{text(what)}: not shown, {text(why)}.</p>'


def card(title: str, svg: str, caption: str) -> str:
    """A figure with its title above and how to read it below. `caption` is HTML."""
    return f"<figure><h3>{text(title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def switch_card(title: str, choices: Mapping[str, str], caption: str, key: str) -> str:
    """A figure in two or more versions with a switch above it that needs no script. choices: label -> SVG."""
    parts = [f'<figure class="switch"><h3>{text(title)}</h3>']
    for turn, label in enumerate(choices):
        checked = " checked" if turn == 0 else ""
        parts.append(f'<input type="radio" name="{key}" id="{key}-{turn}"{checked}>')
        parts.append(f'<label for="{key}-{turn}">{text(label)}</label>')
    parts += [f'<div class="choice">{svg}</div>' for svg in choices.values()]
    return "".join(parts) + f"<figcaption>{caption}</figcaption></figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str, kind: str = "") -> str:
    """A table in a box that scrolls by itself. Cells are HTML; the first of each row is its header."""
    lines = [f'<div class="scroll" role="region" aria-label="{text(label)}" tabindex="0"><table class="{kind}"><thead><tr>']
    lines += [f'<th scope="col">{cell}</th>' for cell in head]
    lines.append("</tr></thead><tbody>")
    for row in rows:
        lines.append(f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>")
    return "".join(lines) + "</tbody></table></div>"


def key_values(values: Mapping[str, Any], label: str) -> str:
    """A nested mapping as a two-column table, keys joined by dots."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for place, item in enumerate(value):
                walk(f"{prefix}[{place}]", item)
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            rows.append((text(prefix), "not recorded" if shown is None or shown in ("", {}) else text(shown)))

    walk("", values)
    return table(["what", "value"], rows, label, "plain")


@dataclass
class Section:
    """A headed part of the page: an intro line, figures in a grid, then further HTML. The parts of the report add to it."""

    key: str
    title: str
    intro: str = ""
    cards: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def html(self) -> str:
        intro = f"<p>{self.intro}</p>" if self.intro else ""
        cards = f'<div class="grid">{"".join(self.cards)}</div>' if self.cards else ""
        return f'<section id="{self.key}"><h2>{text(self.title)}</h2>{intro}{cards}{"".join(self.body)}</section>'


def page(title: str, top: str, sections: Sequence[Section]) -> str:
    """The whole file. Its content policy forbids the browser to load anything from elsewhere."""
    style = (resources.files("lldfast") / "assets" / "report.css").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{section.key}">{text(section.title)}</a>' for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title>\n<style>\n{style}</style></head>\n<body><header>{top}</header>"
        f'<nav aria-label="Sections">{links}</nav>\n<main>\n{"".join(section.html() + chr(10) for section in sections)}</main>'
        "</body></html>\n"
    )
