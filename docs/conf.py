"""How Sphinx builds the manual: ``./run docs``."""

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

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # the names that GitHub gives to headings
default_role = "literal"  # a name of another package, in a docstring

# ---- The reference ---------------------------------------------------------------------------------------------------

autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "groupwise"
autodoc_typehints = "none"  # the docstrings name the types, in words
napoleon_use_ivar = True
napoleon_use_rtype = False

# Every reference to pyreg's own names leads somewhere.  Other projects' would have to be asked over the network, and
# types in words, such as array_like, are no names.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!pyreg\.).*")]

_FRAMEWORKS = {"jax": "jax", "nnx": "flax", "linen": "flax", "equinox": "equinox", "haiku": "haiku", "keras": "keras"}
_MISSING = [page for page, package in {**_FRAMEWORKS, "torch": "torch"}.items() if not find_spec(package)]
if _MISSING:  # the page is there, but empty
    logging.getLogger(__name__).info("not installed, so that their reference is left out: %s", ", ".join(_MISSING))
    suppress_warnings = ["autodoc.import_object"]
    nitpick_ignore_regex.append(("py:.*", rf"pyreg\.({'|'.join(_MISSING)})\b.*"))
