"""Sphinx: the pages of this folder, the API from the docstrings, and the gallery from ``examples/``."""

import sys
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

import gradkern

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "docs")]

project = "gradkern"
author = copyright = "gradkern authors"
release = version = gradkern.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"  # `jacobian` in a docstring
autodoc_typehints = "description"
autodoc_member_order = "bysource"
sphinx_gallery_conf = {
    "examples_dirs": [str(ROOT / "examples")],
    "gallery_dirs": ["gallery"],
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"(demo|arrowhead)\.py",
    "image_scrapers": ("gradkern_figures.scraper",),
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "min_reported_time": 1e9,  # rates are printed by the scripts themselves
}
suppress_warnings = ["config.cache"]
exclude_patterns = []

html_theme = "furo"
html_title = f"gradkern {release}"


def without_captums_text(app, what, name, obj, options, lines: list[str]) -> None:
    """Methods that are Captum's have Captum's docstrings, which belong to Captum's own pages."""
    home = getattr(obj, "__module__", None) or ""
    if home.startswith("captum") or getattr(getattr(obj, "__wrapped__", None), "__module__", "").startswith("captum"):
        lines[:] = [f"As `captum.attr`'s ``{name.rsplit('.', 1)[-1]}``: same arguments, same results."]


def without_overloads(module: str) -> None:
    """A function of that module shows one signature: its overloads are for type checkers."""
    analyzer = ModuleAnalyzer.for_module(module)
    analyzer.analyze()
    analyzer.overloads.clear()


def setup(app) -> None:
    without_overloads("gradkern.api")
    app.connect("autodoc-process-docstring", without_captums_text)
