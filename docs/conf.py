"""How Sphinx builds the manual: ``./run docs``."""

import os
from importlib.util import find_spec

from sphinx.util import logging

import pyreg

# ---- The site --------------------------------------------------------------------------------------------------------

project = "pyreg"
version = release = pyreg.__version__
html_title = f"pyreg {version}"
html_theme = "furo"
html_show_copyright = html_copy_source = False
exclude_patterns = ["performance/*"]

# ---- The pages -------------------------------------------------------------------------------------------------------

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
myst_heading_anchors = 4  # the names that GitHub gives to headings
default_role = "literal"  # a name of another package, in a docstring
nitpicky = True  # every reference leads somewhere ...
nitpick_ignore_regex = [("py:.*", r"torch\..*")]  # ... but PyTorch's own are not asked for over the network

# ---- The reference ---------------------------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "groupwise"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # the docstrings name the types, in words
numpydoc_show_class_members = False  # they follow one by one
autosummary_generate = False  # nothing is in files of its own

os.environ.setdefault("KERAS_BACKEND", "jax")
_FRAMEWORKS = {"jax": "jax", "nnx": "flax", "linen": "flax", "equinox": "equinox", "haiku": "haiku", "keras": "keras"}
_MISSING = [page for page, package in {**_FRAMEWORKS, "torch": "torch"}.items() if not find_spec(package)]
if _MISSING:  # their page is there, without what it is about
    logging.getLogger(__name__).info("not installed, so that their reference is left out: %s", ", ".join(_MISSING))
    suppress_warnings = ["autodoc.import_object"]
    nitpick_ignore_regex.append(("py:.*", rf"pyreg\.({'|'.join(_MISSING)})\b.*"))
