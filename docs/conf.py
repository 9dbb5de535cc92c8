"""The documentation site: Markdown by MyST, API from docstrings, formulas as MathML, no network."""

import sys
from pathlib import Path

from moebalance import __version__

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "moebalance"
author = copyright = "The moebalance authors"
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "docstrings",
    "exported",
    "sphinx.ext.napoleon",
    "mathml",
    "offline",
]
exclude_patterns = ["_ext"]
html_theme = "furo"
html_title = "moebalance"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
# Docstrings write `name` for code, as Markdown does.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
