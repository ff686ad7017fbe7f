"""Results out of an AnnData, as tidy tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from . import _keys as K
from ._checks import listing
from .errors import MissingKeyError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["effects_df", "grn_df", "interactions_df"]


def grn_df(adata: AnnData, key: str = K.GRN, *, unmeasured: bool = False) -> pd.DataFrame:
    """The network of :func:`scpert.tl.infer_grn` as a net.

    Parameters
    ----------
    adata
        With ``varp[key]``: csr, row regulates column, signed.
    key
        ``key_added`` of :func:`scpert.tl.infer_grn`.
    unmeasured
        Also the edges of regulators that are not among the measured genes (enhancers, genes outside the
        panel), which are kept in ``uns[key]["unmeasured_edges"]``.

    Returns
    -------
    DataFrame with the columns ``source``, ``target``, ``weight``, one row per edge, strongest first: a net as
    decoupler takes it. Further columns (such as ``effect``, ``pvals_adj``) where the method has them.

    Raises
    ------
    MissingKeyError
        If there is no such network.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.tl.infer_grn(adata)
    >>> list(scpert.get.grn_df(adata).columns[:3])
    ['source', 'target', 'weight']
    """
    if key not in adata.varp:
        raise MissingKeyError(
            f"adata.varp has no network {key!r}; it has {listing(adata.varp.keys()) or '(none)'}. "
            f"Call scpert.tl.infer_grn(adata, key_added={key!r}) first."
        )
    matrix = sparse.coo_matrix(adata.varp[key])
    genes = adata.var_names.to_numpy()
    net = pd.DataFrame({K.SOURCE: genes[matrix.row], K.TARGET: genes[matrix.col], K.WEIGHT: matrix.data})
    notes = adata.uns.get(key, {})
    more = notes.get("edges") if isinstance(notes, dict) or hasattr(notes, "get") else None
    if isinstance(more, pd.DataFrame) and len(more):
        more = more.astype({K.SOURCE: str, K.TARGET: str})
        net = net.astype({K.SOURCE: str, K.TARGET: str}).merge(more, on=[K.SOURCE, K.TARGET], how="left")
    if unmeasured and hasattr(notes, "get"):
        other = notes.get("unmeasured_edges")
        if isinstance(other, pd.DataFrame) and len(other):
            net = pd.concat([net, other], ignore_index=True)
    order = np.argsort(-np.abs(net[K.WEIGHT].to_numpy(dtype=float)), kind="stable")
    return net.iloc[order].reset_index(drop=True)


def effects_df(effects: AnnData) -> pd.DataFrame:
    """The effects of :func:`scpert.tl.perturbation_effects` in long form.

    Parameters
    ----------
    effects
        Perturbation x gene.

    Returns
    -------
    DataFrame with the columns ``perturbation``, ``gene``, ``effect`` and, where they are, ``std_error``,
    ``zscore``, ``pvals``, ``pvals_adj``; one row per perturbation and gene.

    Raises
    ------
    MissingKeyError
        If ``effects`` has no X.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> table = scpert.get.effects_df(scpert.tl.perturbation_effects(adata))
    >>> list(table.columns[:3])
    ['perturbation', 'gene', 'effect']
    """
    if effects.X is None:
        raise MissingKeyError("effects.X is empty: pass what scpert.tl.perturbation_effects returned.")
    labels = effects.obs[K.PERTURBATION] if K.PERTURBATION in effects.obs else effects.obs_names.to_series()

    def flat(values: Any) -> np.ndarray:
        return (values.toarray() if sparse.issparse(values) else np.asarray(values)).ravel()

    table = {
        K.PERTURBATION: np.repeat(labels.astype(str).to_numpy(), effects.n_vars),
        "gene": np.tile(effects.var_names.to_numpy(), effects.n_obs),
        "effect": flat(effects.X),
    }
    for name in (K.STD_ERROR, K.ZSCORE, K.PVALS, K.PVALS_ADJ):
        if name in effects.layers:
            table[name] = flat(effects.layers[name])
    return pd.DataFrame(table)


def interactions_df(adata: AnnData, key: str = K.INTERACTIONS) -> pd.DataFrame:
    """The table of :func:`scpert.tl.genetic_interactions`.

    Parameters
    ----------
    adata
        With ``uns[key]``.
    key
        Where the table is.

    Returns
    -------
    DataFrame, one row per combination.

    Raises
    ------
    MissingKeyError
        If there is no such table.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_combinations=3)
    >>> _ = scpert.tl.genetic_interactions(adata)
    >>> len(scpert.get.interactions_df(adata))
    3
    """
    if key not in adata.uns:
        raise MissingKeyError(f"adata.uns has no {key!r}. Call scpert.tl.genetic_interactions(adata) first.")
    table = adata.uns[key]
    return (table if isinstance(table, pd.DataFrame) else pd.DataFrame(table)).copy()
