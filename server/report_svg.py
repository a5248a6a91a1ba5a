"""The drawing board of the report's figures: SVG elements, colours, escaping.

Lives here: what every figure shares. Does not live here: any figure (server/plots).
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

INK, MUTED, LINE, PAPER = "#1d2733", "#66727f", "#dfe4ea", "#ffffff"
BLUE, RUST, GREY = "#245f94", "#b4552d", "#8b96a3"
SITE_COLOURS = (
    *("#245f94", "#c0792a", "#3d8168", "#9a4a6b", "#6d6aa8"),
    *("#7a8b2f", "#b4552d", "#3b94a6", "#8a6a4f", "#555f6b"),
)
"""Colours of the sites, in the order of the label space; with more sites than colours they repeat."""


def site_colour(site: int) -> str:
    """Return the colour of a site."""
    return SITE_COLOURS[site % len(SITE_COLOURS)]


def shade(share: float, colour: str) -> str:
    """Mix white and `colour`: 0 is white, 1 the colour."""
    share = min(1.0, max(0.0, share))
    parts = (round(255 + (int(colour[i : i + 2], 16) - 255) * share) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in parts)


class Canvas:
    """Collects SVG elements; every text that comes in is escaped."""

    def __init__(self) -> None:
        self.parts: list[Markup] = []

    def line(
        self, x1: float, y1: float, x2: float, y2: float, colour: str = LINE, width: float = 1, **more: str
    ) -> None:
        """Add a straight line."""
        self._add("line", {"x1": x1, "y1": y1, "x2": x2, "y2": y2, "stroke": colour, "stroke-width": width}, more)

    def rect(self, x: float, y: float, w: float, h: float, fill: str, title: str = "", **more: str) -> None:
        """Add a rectangle; `title` is shown when the pointer rests on it."""
        self._add("rect", {"x": x, "y": y, "width": w, "height": h, "fill": fill}, more, title)

    def circle(self, x: float, y: float, r: float, fill: str, title: str = "") -> None:
        """Add a disc."""
        self._add("circle", {"cx": x, "cy": y, "r": r, "fill": fill}, {}, title)

    def path(self, d: str, title: str = "", **more: str) -> None:
        """Add a path in SVG's own notation."""
        self._add("path", {"d": d}, more, title)

    def text(self, x: float, y: float, text: str, size: float = 12, colour: str = MUTED, **more: str) -> None:
        """Add a line of text; `x`, `y` is its baseline's start."""
        attributes = self._attributes({"x": x, "y": y, "font-size": size, "fill": colour}, more)
        self.parts.append(Markup("<text{}>{}</text>").format(attributes, text))

    def svg(self, width: float, height: float, label: str) -> Markup:
        """Return the drawing; `label` says in words what it shows."""
        head = Markup(
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{}" viewBox="0 0 {:.0f} {:.0f}" '
            'width="{:.0f}" height="{:.0f}" font-family="inherit">'
        ).format(label, width, height, width, height)
        return head + Markup("").join(self.parts) + Markup("</svg>")

    def _add(self, tag: str, numbers: dict[str, object], more: dict[str, str], title: str = "") -> None:
        inner = Markup("<title>{}</title>").format(title) if title else Markup("")
        self.parts.append(Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), self._attributes(numbers, more), inner))

    @staticmethod
    def _attributes(numbers: dict[str, object], more: dict[str, str]) -> Markup:
        texts = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in numbers.items()}
        texts |= {k.rstrip("_").replace("_", "-"): v for k, v in more.items()}
        return Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in texts.items())


def legend(names: Sequence[str]) -> Markup:
    """Return the sites' colours as HTML, for as many sites as there are colours."""
    items = (
        Markup('<span class="key"><i style="background:{}"></i>{}</span>').format(site_colour(i), name)
        for i, name in enumerate(names[: len(SITE_COLOURS)])
    )
    return Markup("").join(items)
