"""Configuration of the documentation: ``uv run sphinx-build -W -b html docs docs/_build/html``."""

from __future__ import annotations

import os
import re
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
# autosummary writes its pages, which are reST, with the first of these suffixes
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}

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
# UnknownTargetError is also exported by scpert.model: two addresses of one class
suppress_warnings = ["ref.python"]
nb_execution_mode = "off"
nb_merge_streams = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# -- HTML ------------------------------------------------------------------------------------------

html_theme = "sphinx_book_theme"
html_title = "scpert"
html_css_files = ["wide.css"]
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


def _pages(app, what: str) -> list[str]:
    """Names of the pages of a folder, or, for ``guides``, of all that stand nowhere else."""
    found = sorted({Path(name).parts for name in app.env.found_docs})
    if what == "guides":
        first = ["which_model"] if ("which_model",) in found else []
        single = [path[0] for path in found if len(path) == 1 and path[0] not in _PLACED]
        folders = [path for path in found if len(path) > 1 and path[0] not in _PLACED_FOLDERS]
        # of a folder with an index, the index alone: it lists the others
        shown = [path for path in folders if path[1:] == ("index",) or (path[0], "index") not in found]
        return first + single + ["/".join(path) for path in shown]
    return ["/" + "/".join(path) for path in found if path[:-1] == tuple(what.split("/")) and path[-1] != "index"]


def list_pages(app, docname: str, source: list[str]) -> None:
    """Put a list of pages where ``<!-- pages: folder -->`` stands; a pattern without a match would be a warning."""

    def toctree(match: re.Match) -> str:
        pages = _pages(app, match[1])
        options = ":caption: Guides and evidence\n:hidden:\n" if match[1] == "guides" else ""
        return f"```{{toctree}}\n:maxdepth: 1\n{options}\n" + "\n".join(pages) + "\n```" if pages else ""

    source[0] = re.sub(r"^<!-- pages: ([\w/]+) -->$", toctree, source[0], flags=re.M)


def outdated(app, env, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Read the lists again when a page has come or gone."""
    return ["index", "tutorials", "developer/index", "models/index"] if added or removed else []


def prose_returns(app, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Returns in prose, without ``type`` and description: napoleon would take every line for a type."""
    heads = [i for i in range(len(lines) - 1) if lines[i].strip() and set(lines[i + 1].strip()) == {"-"}]
    for at, end in reversed(list(zip(heads, [*heads, len(lines)][1:], strict=True))):
        body = lines[at + 2 : end]
        if lines[at].strip() == "Returns" and body and not any(line.startswith(" ") for line in body):
            lines[at + 2 : end] = [":", *("    " + line if line.strip() else "" for line in body)]


def setup(app) -> None:
    """Connect the functions above."""
    copy_tutorials()
    app.connect("autodoc-process-docstring", prose_returns, priority=400)
    app.connect("source-read", list_pages)
    app.connect("env-get-outdated", outdated)
