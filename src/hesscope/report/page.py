"""Writing a page: figures to files and into the HTML, everything in one self-contained file, atomically."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from hesscope.core.files import atomic_path
from hesscope.report.style import number, one_part_in, percent, styled

PNG_DPI = 140


@dataclass(frozen=True)
class Picture:
    """A finished figure on a page: its file name (without ending), the PNG in base64, what it shows in words."""

    name: str
    data: str
    alt: str

    @property
    def html(self) -> Markup:
        """The image tag."""
        return Markup('<img src="data:image/png;base64,{}" alt="{}">').format(Markup(self.data), self.alt)


def picture(folder: Path, name: str, fig: Figure, alt: str) -> Picture:
    """Save a figure as PNG and PDF under folder/figures, and return it for the page."""
    target = folder / "figures"
    with styled():
        fig.draw_without_rendering()  # lays the figure out once, for both formats
        fig.set_layout_engine("none")
        contents = {}
        for ending in ("png", "pdf"):
            content = io.BytesIO()
            # No date in the file: equal results give equal bytes.
            fig.savefig(content, format=ending, dpi=PNG_DPI, metadata={"CreationDate": None} if ending == "pdf" else {})
            contents[ending] = content.getvalue()
            with atomic_path(target / f"{name}.{ending}") as temporary:
                temporary.write_bytes(contents[ending])
    return Picture(name, base64.b64encode(contents["png"]).decode(), alt)


def write_page(path: Path, template: str, context: Mapping[str, Any]) -> Path:
    """Render a template of report/templates to `path`."""
    environment = Environment(
        loader=PackageLoader("hesscope.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(number=number, percent=percent, one_part_in=one_part_in)
    with atomic_path(path) as temporary:
        temporary.write_text(environment.get_template(template).render(context), encoding="utf-8")
    return path
