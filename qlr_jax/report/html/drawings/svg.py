"""What every drawing is made of: scales, gridlines, marks, labels; inline SVG, or a file of its own."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from qlr_jax.report.html.style import LIGHT, SVG_RULES

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 44
LETTER = 6.4  # pixels that a letter of the 12-pixel font takes on average, on the safe side


def marker(shape: str, x: float, y: float, colour: str, radius: float = 5.5, title: str = "") -> str:
    """A mark with the page's colour as outline; shapes differ so that they can be distinguished without colour.

    Args:
        shape: circle, square, triangle or diamond.
        x, y: its centre, pixels.
        colour: its name in the style sheet.
        radius: pixels.
        title: shown where the mouse rests.
    """
    style = f'class="mark" style="fill:var(--{colour})"'
    inner = f"<title>{escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" {style}>{inner}</circle>'
    if shape == "square":
        side = 1.8 * radius
        return f'<rect x="{x - side / 2:.1f}" y="{y - side / 2:.1f}" width="{side:.1f}" height="{side:.1f}" {style}>{inner}</rect>'
    points = ((0, -1.2), (1.1, 0.85), (-1.1, 0.85)) if shape == "triangle" else ((0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0))
    path = " ".join(f"{x + a * radius:.1f},{y + b * radius:.1f}" for a, b in points)
    return f'<polygon points="{path}" {style}>{inner}</polygon>'


def line(points: Iterable[tuple[float, float]], style: str = "", title: str = "") -> str:
    """A curve through points.

    Args:
        points: (x, y), pixels.
        style: CSS that goes over that of the page's curves.
        title: shown where the mouse rests.
    """
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    own = f' style="{style}"' if style else ""
    return f'<polyline class="curve" points="{path}"{own}>' + (f"<title>{escape(title)}</title>" if title else "") + "</polyline>"


def label(text: str, x: float, y: float, anchor: str = "start", kind: str = "label") -> str:
    """Text.

    Args:
        text: plain.
        x, y: where its anchor lies, pixels.
        anchor: start, middle or end.
        kind: its class: "label" (ink, bold) or none.
    """
    own = f' class="{kind}"' if kind else ""
    return f'<text{own} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The heights nearest to those wanted that keep apart, in the order given.

    Args:
        wanted: heights, pixels.
        gap: the least distance of two.
        low, high: the ends of the range.

    Example:
        >>> apart([10.0, 12.0, 50.0], 10.0, 0.0, 100.0), apart([99.0, 98.0], 10.0, 0.0, 100.0)
        ([10.0, 20.0, 50.0], [100.0, 90.0])
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    floor = low
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def ticks(low: float, high: float, log: bool = False, count: int = 5) -> list[float]:
    """Round numbers for an axis; on a log scale 1, 2, 5 times powers of ten.

    Args:
        low, high: the ends of the axis.
        log: whether it is logarithmic.
        count: about how many, on a linear axis.

    Example:
        >>> ticks(0.0, 10.0), ticks(0.01, 1.0, log=True)
        ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.01, 0.1, 1.0])
    """
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            values = (float(f"{step}e{power}") for power in powers for step in steps)
            found = [value for value in values if low <= value <= high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / 8)]
    slack = 1e-9 * (high - low)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [round(at * step, 12) for at in range(math.ceil((low - slack) / step), math.floor((high + slack) / step) + 1)]


def ends(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """The ends of an axis that these values fit into, with some room; never below 0 for values that are not."""
    low, high = min(values), max(values)
    if log:
        stretch = max((high / low) ** 0.06, 1.08)
        return low / stretch, high * stretch
    margin = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


@dataclass(frozen=True)
class Plane:
    """Data to pixels, with gridlines, ticks and axis titles.

    Attributes:
        x, y: the ends of the axes.
        log_x, log_y: whether an axis is logarithmic.
        box: left, top, right and bottom of the area, pixels.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    log_x: bool = False
    log_y: bool = False
    box: tuple[float, float, float, float] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)

    @classmethod
    def around(cls, x: Sequence[float], y: Sequence[float], log_x: bool = False, log_y: bool = False, **more: tuple) -> Plane:
        """The plane that these values fit into, with some room.

        Args:
            x, y: values.
            log_x, log_y: whether an axis is logarithmic.
            more: other fields, such as `box`.
        """
        return cls(ends(x, log_x), ends(y, log_y), log_x, log_y, **more)

    @staticmethod
    def _at(value: float, between: tuple[float, float], log: bool) -> float:
        low, high = between
        return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)

    def px(self, value: float) -> float:
        """Pixels from the left."""
        return self.box[0] + self._at(value, self.x, self.log_x) * (self.box[2] - self.box[0])

    def py(self, value: float) -> float:
        """Pixels from the top."""
        return self.box[3] - self._at(value, self.y, self.log_y) * (self.box[3] - self.box[1])

    def grid(
        self,
        x_text: Callable[[float], str] = "{:g}".format,
        y_text: Callable[[float], str] = "{:g}".format,
        x_ticks: Sequence[float] | None = None,
        y_ticks: Sequence[float] | None = None,
    ) -> list[str]:
        """Gridlines with their values, and the horizontal axis.

        Args:
            x_text, y_text: how a value is written.
            x_ticks, y_ticks: where the lines are; at round numbers where None.
        """
        left, top, right, bottom = self.box
        out = []
        for value in ticks(*self.y, log=self.log_y) if y_ticks is None else y_ticks:
            y = self.py(value)
            out.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            out.append(label(y_text(value), left - 6, y + 4, "end", ""))
        for value in ticks(*self.x, log=self.log_x) if x_ticks is None else x_ticks:
            x = self.px(value)
            out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
            out.append(label(x_text(value), x, bottom + 16, "middle", ""))
        out.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        return out

    def titles(self, x_title: str, y_title: str) -> list[str]:
        """What the axes mean: under the one, along the other."""
        left, top, right, bottom = self.box
        along = f'<text transform="translate(11 {(top + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
        return [label(x_title, (left + right) / 2, bottom + 38, "middle", ""), along]


def svg(parts: Iterable[str], description: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """The drawing for a page, whose style sheet gives it its colours.

    Args:
        parts: SVG elements, in the order of drawing.
        description: what is read out where the drawing cannot be seen.
        width, height: pixels.
    """
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}">{"".join(parts)}</svg>'


def standalone(drawing: str) -> str:
    """The drawing as a file of its own. The light colours are written out, because many viewers know no CSS variables.

    >>> standalone(svg(['<rect style="fill:var(--page)"/>'], "nothing", 10, 20)).splitlines()[0][:64]
    '<svg xmlns="http://www.w3.org/2000/svg" width="10" height="20" v'
    """
    found = re.match(r'<svg viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)
    if not drawing or not found:
        raise ValueError("this is no drawing of `svg`")
    head, rest = drawing[: drawing.index(">") + 1], drawing[drawing.index(">") + 1 :]
    head = head.replace("<svg ", f'<svg xmlns="http://www.w3.org/2000/svg" width="{found[1]}" height="{found[2]}" ', 1)
    page = f'<style>{SVG_RULES}</style><rect width="{found[1]}" height="{found[2]}" style="fill:var(--card)"/>'
    return re.sub(r"var\(--(\w+)\)", lambda name: LIGHT[name[1]], f"{head}\n{page}\n{rest}\n")
