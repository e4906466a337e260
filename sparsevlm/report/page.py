"""One HTML page of a run, with everything in it: no script, no file beside it, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sparsevlm import __version__
from sparsevlm.report.read import Run, read_run
from sparsevlm.report.routing_sections import routing_section
from sparsevlm.report.sections import Section, closing_sections, training_sections
from sparsevlm.report.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = "page.html.jinja"
REPORT = "report.html"
SCALE = 1080 / 1152
"""Of the plots on the page: the widest are as wide as the page."""


@dataclass(frozen=True)
class Written:
    """What `write_report` wrote.

    Attributes:
        page: The HTML file.
        run: What it shows.
        plots: Number of plots.
    """

    page: Path
    run: Run
    plots: int


def write_report(path: str | Path, output: Path | None = None, png: Path | None = None) -> Written:
    """Write the report of a run.

    Args:
        path: A run directory (it may be in progress), one stage of it, or a folder with a ``routing.json``.
        output: The page; default ``report.html`` in that directory. A page that is there is replaced.
        png: Folder for the plots as PNG files too.

    Raises:
        ValueError: There is no run.
    """
    run = read_run(path)
    page = run.path / REPORT if output is None else output
    if page.is_dir():
        raise ValueError(f"--output {page} is a directory; give the name of the page, e.g. {page / REPORT}")
    sections = make_sections(run)
    images = {plot.name: render_png(plot.figure) for section in sections for plot in section.plots}
    html = render_page(run, sections, images)
    page.parent.mkdir(parents=True, exist_ok=True)
    beside = page.with_name(f".{page.name}.part")  # whoever reloads the page while it is written sees the old one
    beside.write_text(html, encoding="utf-8")
    beside.replace(page)
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            (png / f"{name}.png").write_bytes(data)
    return Written(page, run, len(images))


def make_sections(run: Run) -> list[Section]:
    """Return the page's sections in order."""
    stages = [group for stage in run.stages for group in (stage, *stage.others)]
    routed = [section for stage in stages if (section := routing_section(stage)) is not None]
    return [*training_sections(run), *routed, *closing_sections(run)]


@styled
def render_png(figure: Figure) -> bytes:
    """Draw a figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    return buffer.getvalue()


def render_page(run: Run, sections: list[Section], images: dict[str, bytes]) -> str:
    """Return the page as HTML.

    Args:
        run: The run.
        sections: `make_sections`.
        images: PNG of each plot, by name.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(TEMPLATE).render(
        title=run.path.resolve().name,
        version=__version__,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        in_progress=bool(run.waiting) or not all(stage.complete for stage in run.stages if stage.rows),
        faults=run.faults,
        sections=sections,
        images={
            name: {
                "base64": base64.b64encode(data).decode("ascii"),
                "width": round(int.from_bytes(data[16:20], "big") * SCALE),  # of the header: pixels
            }
            for name, data in images.items()
        },
        recipe=run.recipe,
    )
