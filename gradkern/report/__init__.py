"""Pictures of gradients, and a report of one self-contained HTML file.

Needs the ``demo`` extra (matplotlib and jinja2): ``pip install 'gradkern[demo]'``.

    report = Report("My network", summary="What it looks at.")
    section = report.section("Class saliency")
    section.picture(figures.signal_classes(x, importance, labels, names), "Mean |gradient| per class.")
    section.table(["class", "features"], rows)
    report.write("report.html")
"""

from . import datafigures, figures, findings
from .page import Report, Section

__all__ = ["Report", "Section", "datafigures", "figures", "findings"]
