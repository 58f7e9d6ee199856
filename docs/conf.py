"""Configuration of the site; `make docs` builds it. See "Documentation" in CONTRIBUTING.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import featnorm

project = "featnorm"
author = "The featnorm maintainers"
copyright = author
release = version = featnorm.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "myst_parser",
    "docstrings",
    "mathml",
    "reference_pages",
]
# Links to the parts of a page, and formulas, as GitHub shows them too.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
# The console's prompts and outputs are not copied.
copybutton_prompt_text = r"\$ |>>> |\.\.\. "
copybutton_prompt_is_regexp = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_inherit_docstrings = False
napoleon_google_docstring = False
napoleon_use_ivar = True
default_role = "py:obj"

html_theme = "furo"
html_title = "featnorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
html_show_sphinx = False
html_copy_source = False
