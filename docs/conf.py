"""How the documentation is built: ``make docs``."""

import re

from megatron_gspo import __version__

project = "megatron_gspo"
author = "The megatron_gspo contributors"
copyright = author
release = __version__
extensions = [
    "myst_parser",
    "sphinx.ext.apidoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
apidoc_modules = [
    {
        "path": "../megatron_gspo",
        "destination": "api",
        "exclude_patterns": ["**/sglang/server.py", "**/__main__.py"],  # the server's lives in another environment
        "separate_modules": False,  # a page a package: of each page the theme makes the whole tree of pages anew
        "module_first": True,
    }
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "undoc-members": False, "show-inheritance": True}
napoleon_numpy_docstring = False
# An attribute's docstring "of what: meaning" is read as "type: meaning", and several classes have an attribute `value`.
suppress_warnings = ["ref.python"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"megatron_gspo {release}"
html_copy_source = False


def setup(app):
    app.connect("autodoc-process-docstring", keep_bars)


def keep_bars(app, what, name, obj, options, lines):
    """Docstrings write |y| for a length, which reStructuredText takes for a substitution."""
    for index, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        lines[index] = "".join(part if part.startswith("``") else part.replace("|", r"\|") for part in parts)
