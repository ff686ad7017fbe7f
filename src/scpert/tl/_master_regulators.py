"""Master regulators of a state, by a fitted CellState."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import ScpertError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

__all__ = ["master_regulators"]


def master_regulators(
    adata: AnnData, model: Any, *, groupby: str, start: str, goal: str, net: pd.DataFrame, **kwargs: Any
) -> pd.DataFrame:
    """Rank the regulators of a goal state by regulon activity and virtual manipulation.

    Parameters
    ----------
    adata
        Samples by genes, of both states.
    model
        A trained :class:`scpert.model.CellState`.
    groupby, start, goal
        Column of the states, and the two states (``start="rest"``: all but the goal).
    net
        Signed regulons ``source, target, weight``.
    **kwargs
        As in :meth:`scpert.model.CellState.master_regulators`.

    Returns
    -------
    DataFrame ``regulator, activity, virtual, score, rank ...``, best first.

    Raises
    ------
    ScpertError
        If the model cannot do it, the net has no signs, or the states make no sense.

    Examples
    --------
    >>> import pandas as pd, scpert
    >>> adata = scpert.datasets.simulated(n_cells=200, n_genes=40, n_targets=5)
    >>> adata.obs["state"] = (adata.obs["perturbation"] == "control").map({True: "start", False: "goal"})
    >>> scpert.model.CellState.setup_anndata(adata)
    >>> model = scpert.model.CellState(adata, hidden=(16,), n_latent=8)
    >>> model.train(max_epochs=1)
    >>> g = list(adata.var_names)
    >>> net = pd.DataFrame({"source": [g[0]] * 8, "target": g[1:9], "weight": [1.0, -1.0] * 4})
    >>> table = scpert.tl.master_regulators(
    ...     adata, model, groupby="state", start="start", goal="goal", net=net, n_boot=2
    ... )
    >>> len(table)
    1
    """
    if not hasattr(model, "master_regulators"):
        raise ScpertError(
            f"A {type(model).__name__} has no virtual manipulation: pass a trained scpert.model.CellState."
        )
    return model.master_regulators(adata, groupby=groupby, start=start, goal=goal, net=net, **kwargs)
