"""Shows the figures of gallery scripts.  They are made without pyplot, which Sphinx-Gallery's own scraper looks in."""

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def scraper(block: tuple, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save each figure that the script has bound to a name since the block before."""
    namespace = block_vars["example_globals"]
    drawn: list[Figure] = namespace.setdefault("_drawn", [])
    new = [value for value in namespace.values() if isinstance(value, Figure) and not any(value is f for f in drawn)]
    paths = []
    for figure in new:
        drawn.append(figure)
        path = next(block_vars["image_path_iterator"])
        figure.savefig(path, dpi=110)
        paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"])
