"""Public screens, brought to the standard form."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import check_choice, check_obs_key, listing
from ..data._perturbation import CONTROL_NAMES
from ..data._screen import iter_rows, scale_evidence
from ..data._simulate import stack
from ..errors import DownloadError, FileFormatError, LabelError, ScaleError
from ..resources._fetch import fetch, provenance

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "REGISTRY",
    "PublicScreen",
    "adamson_2016",
    "norman_2019",
    "replogle_2022_k562_essential",
    "replogle_2022_rpe1",
]

logger = logging.getLogger("scpert")

_SCPERTURB = "https://zenodo.org/records/10044268/files/"
_UNASSIGNED = frozenset(("", "nan", "none", "na", "<na>", "*", "unassigned"))
_SYMBOLS = ("gene_symbols", "gene_symbol", "gene_name", "gene_names", "feature_name", "symbol")


@dataclass(frozen=True)
class PublicScreen:
    """Where a screen is found, and how its labels are read.

    Attributes
    ----------
    url, sha256, md5
        Address and known hashes; a hash that is not known is ``None``: the first download's is recorded then.
    pertpy
        Name of pertpy's loader.
    doi
        The paper.
    columns
        Columns of labels, as different releases call them.
    relabel
        What the screen's own names for controls and constructs mean; ``None`` is an unassigned cell.
    """

    url: str
    pertpy: str
    doi: str
    columns: tuple[str, ...]
    sha256: str | None = None
    md5: str | None = None
    relabel: Callable[[str], str | None] = lambda label: label


def _replogle(label: str) -> str | None:
    """Non-targeting guides are in some releases named after a genomic place (``chr1.10050_top_two_...``)."""
    if label.startswith("pos_control"):
        return None
    return K.CONTROL if label.startswith("non-targeting") or re.match(r"chr[\dXYM]+\.\d+_top_two", label) else label


_PROTEINS = {"PERK": "EIF2AK3", "IRE1": "ERN1"}


def _adamson(label: str) -> str | None:
    """Constructs as deposited: ``SPI1_pDS255``, ``PERK_IRE1_pMJ154``; controls ``63(mod)_pBA580``, ``Gal4-4(mod)_pBA582``."""
    if re.match(r"(62|63|Gal4-4)\(mod\)|3x_neg_ctrl", label):
        return K.CONTROL
    name = re.sub(r"_p[A-Z]{2}\d+(-\d+)?$", "", label)
    if name == label:
        return label
    name = re.sub(r"_only$", "", name)
    parts = name.split("_")
    if len(parts) > 1 and all(p in {*_PROTEINS, "ATF6"} for p in parts) or name in _PROTEINS:
        return "+".join(_PROTEINS.get(p, p) for p in parts)
    return name


#: The md5 hashes are those noted by the CASCADE project (gao-lab/CASCADE, data/download) on 17 March 2024.
REGISTRY: dict[str, PublicScreen] = {
    "norman_2019": PublicScreen(
        url=_SCPERTURB + "NormanWeissman2019_filtered.h5ad",
        md5="c870e6967d91c017d9da827bab183cd6",
        pertpy="norman_2019",
        doi="10.1126/science.aax4438",
        columns=("perturbation_name", "perturbation", "condition", "guide_identity"),
    ),
    "replogle_2022_k562_essential": PublicScreen(
        url=_SCPERTURB + "ReplogleWeissman2022_K562_essential.h5ad",
        md5="d8cba17576d1a8afc0f7d71b79cad0f7",
        pertpy="replogle_2022_k562_essential",
        doi="10.1016/j.cell.2022.05.013",
        columns=("perturbation", "gene", "condition"),
        relabel=_replogle,
    ),
    "replogle_2022_rpe1": PublicScreen(
        url=_SCPERTURB + "ReplogleWeissman2022_rpe1.h5ad",
        md5="cc7f1ec50aeb3a3e1b4a6cfa713d80fa",
        pertpy="replogle_2022_rpe1",
        doi="10.1016/j.cell.2022.05.013",
        columns=("perturbation", "gene", "condition"),
        relabel=_replogle,
    ),
    "adamson_2016": PublicScreen(
        url=_SCPERTURB + "AdamsonWeissman2016_GSM2406681_10X010.h5ad",
        md5="2fa44ea61a8dd35742af618638ec65fc",
        pertpy="adamson_2016_upr_perturb_seq",
        doi="10.1016/j.cell.2016.11.048",
        columns=("perturbation", "gene", "condition"),
        relabel=_adamson,
    ),
}

_DOC = """

    Parameters
    ----------
    path
        A local ``.h5ad`` file of the screen (scPerturb, pertpy, GEARS or the standard form): nothing is downloaded.
    via
        Where else it comes from: ``"pertpy"`` (its loader; extra ``loaders``), ``"scperturb"`` (Zenodo record
        10044268, md5 verified, kept in ``scpert.settings.cache_dir``), or ``"auto"``: the first if it is installed.
    key, control, delimiter
        Column of the labels, label(s) of the control cells and what joins the targets of a combination, where these
        are not found unaided; see :func:`scpert.pp.annotate_perturbations`.

    Returns
    -------
    AnnData
        Counts in ``X`` or in ``layers["counts"]`` (CSR; a dense file is converted in chunks);
        ``obs["perturbation"]`` in the standard form, and as it came in ``obs["perturbation_as_published"]``; all other
        columns as they were. Cells that are assigned to no guide are dropped. Genes are named by symbols where the
        file has them. Origin in ``uns["scpert"]["source"]``.

    Raises
    ------
    DownloadError
        If the file cannot be had, was cut off, or is not the one expected. Nothing half-written stays in the cache.
    FileFormatError
        If there is no such file, or it is truncated or no AnnData.
    LabelError
        If there is no control, or labels can be read in more than one way.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.{name}("{name}.h5ad")  # doctest: +SKIP
    """


def _documented(function: Callable[..., AnnData]) -> Callable[..., AnnData]:
    function.__doc__ = (function.__doc__ or "").rstrip() + _DOC.format(name=function.__name__)
    return function


@_documented
def norman_2019(
    path: str | Path | None = None,
    *,
    via: str = "auto",
    key: str | None = None,
    control: str | None = None,
    delimiter: str | None = None,
) -> AnnData:
    """K562 cells, CRISPR activation of single genes and of pairs (Norman et al., Science 2019)."""
    return _load("norman_2019", path, via, key, control, delimiter)


@_documented
def replogle_2022_k562_essential(
    path: str | Path | None = None,
    *,
    via: str = "auto",
    key: str | None = None,
    control: str | None = None,
    delimiter: str | None = None,
) -> AnnData:
    """K562 cells, CRISPR interference with essential genes (Replogle et al., Cell 2022)."""
    return _load("replogle_2022_k562_essential", path, via, key, control, delimiter)


@_documented
def replogle_2022_rpe1(
    path: str | Path | None = None,
    *,
    via: str = "auto",
    key: str | None = None,
    control: str | None = None,
    delimiter: str | None = None,
) -> AnnData:
    """RPE1 cells, CRISPR interference with essential genes (Replogle et al., Cell 2022)."""
    return _load("replogle_2022_rpe1", path, via, key, control, delimiter)


@_documented
def adamson_2016(
    path: str | Path | None = None,
    *,
    via: str = "auto",
    key: str | None = None,
    control: str | None = None,
    delimiter: str | None = None,
) -> AnnData:
    """K562 cells, CRISPR interference with the unfolded protein response (Adamson et al., Cell 2016, GSM2406681)."""
    return _load("adamson_2016", path, via, key, control, delimiter)


# ---------------------------------------------------------------------------------------------- steps


def _load(
    name: str, path: str | Path | None, via: str, key: str | None, control: str | None, delimiter: str | None
) -> AnnData:
    screen = REGISTRY[name]
    check_choice("via", via, ("auto", "pertpy", "scperturb"))
    origin: dict[str, Any] = {"name": name, "doi": screen.doi}
    if path is not None:
        path = Path(path).expanduser()
        adata = _read(path)
        origin |= {"path": path.name}
    elif via == "pertpy" or (via == "auto" and find_spec("pertpy") is not None):
        adata = _from_pertpy(screen.pertpy)
        origin |= {"via": f"pertpy.data.{screen.pertpy}"}
    else:
        filename = screen.url.rsplit("/", 1)[-1]
        file = fetch(screen.url, filename, screen.sha256, md5=screen.md5, subfolder="datasets")
        adata = _read(file)
        origin |= {k: str(v) for k, v in provenance(file).items()}
    _name_genes(adata)
    _check_counts(adata, name)
    adata, dropped = _label(adata, screen, key, control, delimiter)
    adata.uns.setdefault(K.UNS, {})["source"] = origin | {"unassigned_cells_dropped": dropped}
    return adata


def _from_pertpy(loader: str) -> AnnData:
    try:
        load = getattr(import_module("pertpy").data, loader)
    except (ImportError, AttributeError) as error:
        raise DownloadError(
            f"pertpy's loader {loader} cannot be used ({error}). Install it with pip install 'scpert[loaders]', or pass "
            "via='scperturb', or a local file as path=."
        ) from error
    try:
        return load()
    except Exception as error:
        raise DownloadError(
            f"pertpy.data.{loader}() failed: {type(error).__name__}: {error}. Pass via='scperturb' to download from "
            "scPerturb instead, or a local file as path=."
        ) from error


def _read(path: Path) -> AnnData:
    """The file in memory, its matrix as CSR (a dense one converted chunk by chunk)."""
    import anndata as ad

    if not path.is_file():
        raise FileFormatError(f"There is no file {path}. Check path=, or leave it out to download the screen.")
    try:
        backed: Any = ad.read_h5ad(path, backed="r")
        try:
            if hasattr(backed.X, "dtype") and not hasattr(backed.X, "format"):  # dense
                X = stack((block for _, block in iter_rows(backed.X)), backed.shape)
                adata = ad.AnnData(
                    X,
                    obs=backed.obs,
                    var=backed.var,
                    uns=dict(backed.uns),
                    obsm=dict(backed.obsm),
                    layers=_layers(backed),
                )
            else:
                adata = backed.to_memory()
        finally:
            backed.file.close()
    except (OSError, KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise FileFormatError(
            f"{path} cannot be read as an AnnData (.h5ad): {type(error).__name__}: {error}. It may be cut off or of "
            "another format: compare its size with the source, or download it again."
        ) from error
    names: list[str | None] = [None, *_layers(adata)]
    for layer in names:
        matrix: Any = adata.X if layer is None else adata.layers[layer]
        if sparse.issparse(matrix) and matrix.format != "csr":
            matrix = matrix.tocsr()
        elif layer == K.COUNTS and not sparse.issparse(matrix):
            matrix = stack((block for _, block in iter_rows(matrix)), adata.shape)
        else:
            continue
        if layer is None:
            adata.X = matrix
        else:
            adata.layers[layer] = matrix
    return adata


def _layers(adata: AnnData) -> dict[str, Any]:
    layers: Any = adata.layers  # newer anndata lists X under None
    return {name: layers[name] for name in layers if name is not None}


def _name_genes(adata: AnnData) -> None:
    """Symbols as names, where genes are named by Ensembl identifiers and symbols are there; unique names."""
    if adata.n_vars and adata.var_names.astype(str).str.match(r"ENS[A-Z]*G\d{11}").mean() > 0.5:
        for column in _SYMBOLS:
            if column in adata.var.columns:
                adata.var["ensembl_id"] = adata.var_names.astype(str)
                pairs = zip(adata.var[column].astype(str), adata.var["ensembl_id"], strict=True)
                adata.var_names = [e if s in ("", "nan", "None", "<NA>") else s for s, e in pairs]
                break
    for axis, names, make_unique in (
        ("genes", adata.var_names, adata.var_names_make_unique),
        ("cells", adata.obs_names, adata.obs_names_make_unique),
    ):
        if not names.is_unique:
            logger.info("%d names of %s occur more than once: numbered", int(names.duplicated().sum()), axis)
            make_unique()


def _check_counts(adata: AnnData, name: str) -> None:
    if K.COUNTS in adata.layers and scale_evidence(adata.layers[K.COUNTS]).scale == K.SCALE_COUNTS:
        return
    evidence = scale_evidence(adata.X)
    if evidence.scale == K.SCALE_LOG1P:
        logger.warning("%s: the file holds no counts, but log1p values (%s)", name, evidence)
    elif evidence.scale != K.SCALE_COUNTS:
        raise ScaleError(
            f"{name}: neither adata.X nor adata.layers['counts'] holds counts, nor does X hold log1p values: {evidence}. "
            "Take a release of the screen with raw counts."
        )


def _label(
    adata: AnnData, screen: PublicScreen, key: str | None, control: str | None, delimiter: str | None
) -> tuple[AnnData, int]:
    from ..pp import annotate_perturbations

    if key is not None:
        check_obs_key(adata, key, "key")
    columns = [c for c in ((key,) if key else screen.columns) if c in adata.obs.columns]
    if not columns:
        raise LabelError(
            f"The file has none of the columns of labels {listing(screen.columns)}, but {listing(adata.obs.columns, 20)}. "
            "Name the one with the labels as key=."
        )
    genes = set(adata.var_names)
    readings = {c: _read_labels(pd.Series(adata.obs[c]), screen.relabel) for c in columns}
    best = max(columns, key=lambda c: _score(readings[c], genes, control))
    labels = readings[best]
    assigned = labels.notna().to_numpy()
    dropped = int((~assigned).sum())
    if dropped:
        logger.info("%d cells of %d are assigned to no guide (obs[%r]): dropped", dropped, len(labels), best)
    published = pd.Series(adata.obs[best]).astype(str)
    if dropped == len(labels):
        raise LabelError(f"No cell is assigned to a guide by adata.obs[{best!r}]. Name the column of labels as key=.")
    adata = adata[assigned].copy() if dropped else adata
    labels, published = labels[assigned], published[assigned]
    adata.obs[K.PERTURBATION] = pd.Categorical(labels)
    annotate_perturbations(adata, K.PERTURBATION, control=control, delimiter=delimiter)
    name = "perturbation_as_published"
    if name not in adata.obs and (published.to_numpy() != adata.obs[K.PERTURBATION].astype(str).to_numpy()).any():
        adata.obs[name] = pd.Categorical(published)
    return adata, dropped


def _read_labels(series: pd.Series, relabel: Callable[[str], str | None]) -> pd.Series:
    """Labels in the screen's own names; missing where a cell is assigned to none."""
    distinct = series.dropna().astype(str).unique()
    reading = {d: None if d.strip().casefold() in _UNASSIGNED else relabel(d.strip()) for d in distinct}
    return series.astype(object).map(lambda label: None if pd.isna(label) else reading[str(label)]).astype(object)


def _score(labels: pd.Series, genes: set[str], control: str | None) -> tuple[bool, float]:
    """Whether there is a control, and the share of labels made of measured genes: tells the right column."""
    distinct = set(labels.dropna())
    controls = {d for d in distinct if d == control or d.casefold() in CONTROL_NAMES}
    pieces = [[p for p in re.split(r"[+_;|]", d) if p.casefold() not in CONTROL_NAMES] for d in distinct - controls]
    measured = [bool(p) and all(x in genes for x in p) for p in pieces]
    return bool(controls), float(np.mean(measured)) if measured else 0.0
