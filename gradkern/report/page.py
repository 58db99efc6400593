"""A report as data (sections of text, tables and pictures), and its conversion to one HTML file."""

from __future__ import annotations

import base64
import io
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("template.html")


@dataclass(frozen=True)
class Block:
    """One piece of a section; ``kind`` is the name of its branch in the template."""

    kind: str
    content: object
    caption: str = ""
    alt: str = ""  # what a picture shows, for those who cannot see it


@dataclass
class Section:
    """A heading and the blocks under it, in the order of the calls."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    def text(self, text: str) -> Section:
        """A paragraph of plain text."""
        self.blocks.append(Block("text", text))
        return self

    def facts(self, items: Iterable[tuple[str, str]]) -> Section:
        """A row of key figures: ``(value, meaning)``."""
        self.blocks.append(Block("facts", list(items)))
        return self

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> Section:
        """A table; cells are shown as ``str`` gives them."""
        body = [[str(cell) for cell in row] for row in rows]
        for row in body:
            if len(row) != len(head):
                raise ValueError(f"a row has {len(row)} cells under {len(head)} headings: {row}; give one per heading")
        self.blocks.append(Block("table", {"head": list(head), "body": body}, caption))
        return self

    def picture(self, figure: Figure, caption: str, *, vector: bool = False, alt: str | None = None) -> Section:
        """A matplotlib figure, embedded: as PNG, or as SVG with ``vector`` (for lines and bars).

        ``alt``: what it shows, for those who cannot see it; by default its panels and axes by their titles.
        """
        shown = panels_of(figure) if alt is None else alt
        self.blocks.append(Block("picture", data_uri(figure, "svg" if vector else "png"), caption, shown))
        return self

    def printed(self, text: str, caption: str = "", *, folded: bool = True) -> Section:
        """Text in columns, as a terminal shows it; if ``folded``, it is hidden under its caption until opened."""
        self.blocks.append(Block("folded" if folded else "printed", text, caption))
        return self


@dataclass
class Report:
    """A report of several sections.  `write` makes one HTML file that loads no other files."""

    title: str
    summary: str = ""
    sections: list[Section] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # where the data and the model are from, for the last line

    def section(self, title: str) -> Section:
        """Appends a new section and returns it to be filled."""
        self.sections.append(Section(title))
        return self.sections[-1]

    def html(self) -> str:
        """The whole page."""
        from jinja2 import Environment

        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        return template.render(report=self, colophon=self._colophon())

    def _colophon(self) -> str:
        """When, from what and with which versions the page was made."""
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "captum", "numpy"))
        made = f"Made on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC with gradkern {__version__}, {versions}, "
        return made + f"Python {platform.python_version()}." + "".join(f" {source}" for source in self.sources)

    def write(self, path: str | Path) -> Path:
        """Writes the page, making folders as needed, into a folder as ``index.html``; returns its absolute path."""
        path = Path(path).absolute()
        path = path / "index.html" if path.is_dir() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(), encoding="utf-8")
        return path


def panels_of(figure: Figure) -> str:
    """The text alternative of a figure: its panels by their titles, and what their axes are."""
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    titles = [t for axes in panels for t in (axes.get_title(loc="left") or axes.get_title(),) if t]
    across = sorted({axes.get_xlabel() for axes in panels} - {""})
    up = sorted({axes.get_ylabel().replace("\n", ", ") for axes in figure.axes} - {""})
    parts = [f"{len(panels)} panel{'s' * (len(panels) != 1)}" + (": " + "; ".join(titles[:12]) if titles else "")]
    parts += [f"across: {', '.join(across)}"] if across else []
    parts += [f"up or in colour: {', '.join(up[:12])}"] if up else []
    return ". ".join(parts) + "."


def data_uri(figure: Figure, kind: str) -> str:
    """The figure as a data URI; ``kind`` is ``png`` or ``svg``.  Text is shown as it is: a ``$`` begins no formula."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    buffer = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    dated, mime = (None, "image/png") if kind == "png" else ({"Date": None}, "image/svg+xml")
    with rc_context({"text.parse_math": False}):
        figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=dated)
    return f"data:{mime};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
