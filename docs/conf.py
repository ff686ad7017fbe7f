"""Configuration of the documentation: ``uv run sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from importlib.metadata import metadata
from pathlib import Path

os.environ.setdefault("SCPERT_PROGRESS", "0")
os.environ.setdefault("MPLBACKEND", "agg")

HERE = Path(__file__).parent

# -- Project ---------------------------------------------------------------------------------------

info = metadata("scpert")
project = "scpert"
author = "The scpert developers"
copyright = f"{datetime.now(tz=UTC):%Y}, {author}"
version = release = info["Version"]

# -- Extensions ------------------------------------------------------------------------------------

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinxcontrib.bibtex",
]
templates_path = ["_templates"]
exclude_patterns = [
    "_build",
    "_templates",
    "scripts",
    "jupyter_execute",
    "**.ipynb_checkpoints",
    "Thumbs.db",
    ".DS_Store",
]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb", ".rst": "restructuredtext"}
# A pattern of a page list that matches nothing yet is no mistake.
suppress_warnings = ["toc.empty_glob", "config.cache"]

# Other projects' indices need the network, and a build has to work without it.
if os.environ.get("READTHEDOCS") == "True":
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
        "numpy": ("https://numpy.org/doc/stable/", None),
        "pandas": ("https://pandas.pydata.org/pandas-docs/stable/", None),
        "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
        "scipy": ("https://docs.scipy.org/doc/scipy/", None),
        "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
        "sklearn": ("https://scikit-learn.org/stable/", None),
    }

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_include_init_with_doc = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_use_param = True
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "html_image"]
myst_heading_anchors = 4
nb_execution_mode = "off"
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# -- HTML ------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "scpert"
html_static_path = ["_static"]
html_extra_path = ["llms.txt"]
html_theme_options = {
    "repository_url": "https://github.com/scpert/scpert",
    "use_repository_button": True,
    "path_to_docs": "docs/",
    "show_navbar_depth": 1,
}


# -- Pages made at build time ------------------------------------------------------------------------


def copy_tutorials() -> None:
    """Copy the notebooks, which live outside of this folder, to ``docs/tutorials``."""
    target = HERE / "tutorials"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for notebook in sorted((HERE.parent / "tutorials").glob("*.ipynb")):
        shutil.copy2(notebook, target / notebook.name)


#: Pages that index.md places itself.
_PLACED = {"index", "changelog", "contributing", "references", "tutorials", "which_model"}
_PLACED_FOLDERS = {"api", "developer", "models", "tutorials", "scripts"}


def list_guides(app, docname: str, source: list[str]) -> None:
    """Put every further page of this folder, and of its sub-folders, in the list of guides of index.md."""
    if docname != "index":
        return
    found = sorted({Path(name).parts for name in app.env.found_docs})
    guides = ["which_model"] if ("which_model",) in found else []
    guides += [path[0] for path in found if len(path) == 1 and path[0] not in _PLACED]
    guides += ["/".join(path) for path in found if len(path) > 1 and path[0] not in _PLACED_FOLDERS]
    source[0] = source[0].replace("GUIDES", "\n".join(guides))


def setup(app) -> None:
    """Connect the functions above."""
    copy_tutorials()
    app.connect("source-read", list_guides)
