"""What the pages are made of beside drawings: the document, tiles, tables, bars, figures with captions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Any

from qlr_jax.report.html.style import CSS
from qlr_jax.report.words import is_number


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page with its style sheet; sections that are empty are left out."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def header(title: str, text: str, tiles: Iterable[tuple[str, str]]) -> str:
    """The head of a page: its title, a sentence, and the main figures as tiles.

    Args:
        title: of the page.
        text: a sentence on what the page is about.
        tiles: (figure, what it is), one a tile.
    """
    cells = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(meaning)}</span></div>' for value, meaning in tiles)
    about = f'<p class="soft">{escape(text)}</p>'
    return f'<header><h1>{escape(title)}</h1>{about}</header><div class="tiles">{cells}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], chosen: Collection[int] = ()) -> str:
    """A table that scrolls sideways where the page is too narrow for it.

    Args:
        heads: of the columns, plain text.
        rows: of cells, each of them HTML.
        chosen: which rows stand out.
    """
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr{' class=chosen' if at in chosen else ''}>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
        for at, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    """Content that is folded away under a line until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def meter(value: Any, most: float, colour: str) -> str:
    """A bar; empty where there is nothing to show.

    Args:
        value: what the bar stands for.
        most: the value of a bar of full length.
        colour: its name in the style sheet.
    """
    width = 100 * value / most if is_number(value) else 0
    bar = f'<i style="width:{max(width, 1):.0f}%;background:var(--{colour})"></i>'
    return f'<span class="meter">{bar}</span>' if width > 0 else ""


def figure(anchor: str, title: str, drawing: str, caption: str) -> str:
    """A section of one drawing with its caption; empty where there is no drawing.

    Args:
        anchor: the section's id.
        title: its heading.
        drawing: inline SVG.
        caption: plain text.
    """
    return f'<section id="{anchor}"><h2>{escape(title)}</h2>{captioned(drawing, caption)}</section>' if drawing else ""


def captioned(drawing: str, caption: str) -> str:
    """A drawing with its caption under it."""
    return f"<figure>{drawing}<figcaption>{escape(caption)}</figcaption></figure>"


def pair(parts: Iterable[str]) -> str:
    """Two sections side by side where there is room, one below the other elsewhere; those that are empty are left out."""
    found = [part for part in parts if part]
    return f'<div class="pair">{"".join(found)}</div>' if len(found) == 2 else "".join(found)
