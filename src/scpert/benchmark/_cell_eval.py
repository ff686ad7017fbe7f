"""Exchange with cell-eval: the pair of h5ad files that it reads, and the tables that it writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._files import written_whole
from ..errors import FileFormatError, ScpertError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["export_cell_eval", "import_cell_eval"]

REAL, PREDICTED = "adata_real.h5ad", "adata_pred.h5ad"


def export_cell_eval(
    predicted: AnnData,
    observed: AnnData,
    out: str | os.PathLike,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    layer: str | None = None,
    scale: str = K.SCALE_AUTO,
    library_size_key: str | None = None,
) -> tuple[Path, Path]:
    """Write a prediction and the real cells as cell-eval wants them.

    Both files hold the same perturbations and genes in the same order, log1p CP10k values without negatives, and control
    cells (the prediction's own, else the observed ones). With a prediction of mean profiles cell-eval can compute its
    metrics of profiles only (``skip_de=True``).

    Parameters
    ----------
    predicted, observed, perturbation_key, control, layer, scale, library_size_key
        As in :func:`scpert.metrics.evaluate`.
    out
        Folder; ``adata_real.h5ad`` and ``adata_pred.h5ad`` are written there. On the command line::

            cell-eval run -ap adata_pred.h5ad -ar adata_real.h5ad --control-pert control --pert-col perturbation

    Returns
    -------
    Paths of the real and of the predicted cells.

    Examples
    --------
    >>> import tempfile
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, random_state=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     real, predicted = scpert.benchmark.export_cell_eval(scpert.metrics.pseudobulk(adata), adata, folder)
    >>> real.name
    'adata_real.h5ad'
    """
    from ..metrics import Reference
    from ..metrics._pair import Pair

    reference = Reference(
        observed,
        perturbation_key=perturbation_key,
        control=control,
        layer=layer,
        scale=scale,
        library_size_key=library_size_key,
    )
    if reference.scale == K.SCALE_EFFECTS:
        raise ScpertError("cell-eval compares cells: a table of effects cannot be exported.")
    pair = Pair(predicted, reference)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, cells in ((REAL, pair.observed_cells), (PREDICTED, pair.predicted_cells)):
        blocks = {p: cells(p) for p in (*pair.perturbations, control)}
        X = sparse.vstack(list(blocks.values()), format="csr", dtype=np.float32)
        X.data = np.maximum(X.data, 0)
        labels = np.repeat(np.array(list(blocks), dtype=object), [b.shape[0] for b in blocks.values()])
        paths.append(_write(folder / name, X, labels, perturbation_key, pair.genes))
    return paths[0], paths[1]


def _write(path: Path, X: sparse.csr_matrix, labels: np.ndarray, key: str, genes: np.ndarray) -> Path:
    from anndata import AnnData

    obs = pd.DataFrame({key: labels.astype(str)}, index=pd.Index([f"cell{i}" for i in range(len(labels))]))
    table = AnnData(X=X, obs=obs, var=pd.DataFrame(index=pd.Index(genes.astype(str))))
    with written_whole(path) as draft:
        table.write_h5ad(draft)
    return path


def import_cell_eval(
    folder: str | os.PathLike, *, pert_col: str = K.PERTURBATION, control_pert: str = K.CONTROL
) -> tuple[AnnData | None, AnnData | None, pd.DataFrame | None]:
    """Read what :func:`export_cell_eval` or cell-eval wrote into a folder.

    Parameters
    ----------
    folder
        Holds ``adata_pred.h5ad`` and ``adata_real.h5ad``, or ``results.csv``, or all of them.
    pert_col, control_pert
        Their column of labels and label of the control; labels become ``perturbation`` and ``control``.

    Returns
    -------
    ``(predicted, observed, table)``; ``None`` for what is not there. The table has the form of
    :func:`scpert.metrics.evaluate`, so that :func:`scpert.metrics.compare` and ``summarise`` take it.

    Examples
    --------
    >>> import tempfile
    >>> import scpert
    >>> adata = scpert.datasets.simulated(300, 40, 5, random_state=0)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = scpert.benchmark.export_cell_eval(scpert.metrics.pseudobulk(adata), adata, folder)
    ...     predicted, observed, table = scpert.benchmark.import_cell_eval(folder)
    >>> table is None
    True
    """
    import anndata

    base = Path(folder)
    out: list[AnnData | None] = []
    for name in (PREDICTED, REAL):
        if not (base / name).exists():
            out.append(None)
            continue
        adata = anndata.read_h5ad(base / name)
        if pert_col not in adata.obs:
            raise FileFormatError(f"{base / name} has no column {pert_col!r}: name theirs with pert_col=.")
        labels = np.asarray(adata.obs[pert_col].astype(str), dtype=object)
        adata.obs[K.PERTURBATION] = np.where(labels == control_pert, K.CONTROL, labels).astype(object)
        out.append(adata)
    table = None
    if (base / "results.csv").exists():
        table = pd.read_csv(base / "results.csv")
        if "perturbation" not in table.columns:
            raise FileFormatError(f"{base / 'results.csv'} has no column 'perturbation': it is no table of cell-eval.")
        table = table.set_index("perturbation").astype(float)
    if table is None and all(part is None for part in out):
        raise FileFormatError(f"{base} holds neither {PREDICTED}, {REAL} nor results.csv.")
    return out[0], out[1], table
