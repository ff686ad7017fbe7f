"""``scpert quickstart``: from a screen to predictions, baselines, a network and a report, in one call."""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import _keys as K
from ._checks import check_choice, check_seed, listing
from ._files import written_whole
from .errors import LabelError, MissingKeyError, ScpertError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["QuickstartResult", "quickstart"]

logger = logging.getLogger("scpert")

METRICS = ("pearson_delta", "pearson_delta_centroid", "pearson_delta_top20_no_target", "mse_delta", "centroid_accuracy")
NAMES = {
    "pearson_delta": "r of the shift",
    "pearson_delta_centroid": "r against the mean perturbed cell",
    "pearson_delta_top20_no_target": "r, top 20 genes",
    "mse_delta": "squared error",
    "centroid_accuracy": "centroid accuracy",
}
_EMBEDDED: dict[str, Any] = {
    "n_cells": 4000,
    "n_genes": 200,
    "n_targets": 12,
    "n_combinations": 4,
    "platform": "targeted",
}
#: Enough test cells for a noise ceiling that means something.
_FRACTIONS = {"cells": (0.6, 0.1, 0.3), "perturbations": (0.7, 0.1, 0.2), "combinations": (0.7, 0.1, 0.2)}


@dataclass
class QuickstartResult:
    """What :func:`quickstart` made.

    Attributes
    ----------
    adata
        The screen with ``obs["split"]``, ``obsm["X_<model>"]``, ``varp["grn"]`` and the tables in ``uns["scpert"]``.
    model
        The trained model.
    prediction
        Its prediction for the held-out cells' perturbations.
    scores
        One row per model and metric: value, calibrated score with limits.
    per_perturbation
        The metrics of every perturbation for the model.
    grn
        The network as a net.
    out
        Folder with ``results.h5ad``, ``report.html``, figures and the saved model.
    seconds
        Time of each step.
    """

    adata: AnnData
    model: Any
    prediction: AnnData
    scores: pd.DataFrame
    per_perturbation: pd.DataFrame
    grn: pd.DataFrame
    out: Path
    seconds: dict[str, float] = field(default_factory=dict)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> _Clock:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.start = time.perf_counter()
        print(f"  {self.name} ...", end="", flush=True)

    def __exit__(self, *error: object) -> None:
        self.seconds[self.name] = time.perf_counter() - self.start
        print(f" {self.seconds[self.name]:.0f} s", flush=True)


def data_hash(adata: AnnData, perturbation_key: str) -> str:
    """SHA-256 of values, gene names and labels, as hexadecimal digits."""
    from .data import iter_rows

    digest = hashlib.sha256()
    for _, block in iter_rows(adata.X):
        for part in (block.indptr, block.indices, block.data):
            digest.update(np.ascontiguousarray(part).tobytes())
    digest.update("\n".join(map(str, adata.var_names)).encode())
    digest.update("\n".join(adata.obs[perturbation_key].astype(str)).encode())
    return digest.hexdigest()


def _load(data: str | Path | AnnData | None) -> tuple[AnnData, str]:
    import anndata as ad

    if data is None:
        from . import datasets

        return datasets.simulated(**_EMBEDDED, random_state=0), "the embedded simulated screen"
    if isinstance(data, ad.AnnData):
        return data.copy(), "an AnnData"
    path = Path(data)
    if not path.is_file():
        raise MissingKeyError(
            f"There is no file {str(path)!r}. Give the path of an .h5ad file, or none for simulated data."
        )
    try:
        adata = ad.read_h5ad(path)
    except (OSError, KeyError, ValueError) as error:
        raise ScpertError(
            f"{str(path)!r} cannot be read as h5ad ({error}). Is it truncated, or of another format?"
        ) from error
    return adata, path.name


def _standard_labels(adata: AnnData, key: str, control: str) -> None:
    """Bring the labels to the standard form in ``obs["perturbation"]``."""
    from . import pp
    from ._checks import check_obs_key
    from .data import check_labels

    series = check_obs_key(adata, key, "perturbation_key")
    try:
        labels = check_labels(series, control, key=key, genes=adata.var_names)
        adata.obs[K.PERTURBATION] = pd.Categorical(np.where(labels == control, K.CONTROL, labels))
    except LabelError as error:
        logger.info("labels are not in the standard form (%s): annotate_perturbations is tried", error)
        pp.annotate_perturbations(adata, key, control=None if control == K.CONTROL else control)


def quickstart(
    data: str | Path | AnnData | None = None,
    *,
    perturbation_key: str = K.PERTURBATION,
    control: str = K.CONTROL,
    library_size_key: str | None = None,
    model: str = "gpovae",
    split: str = "cells",
    max_epochs: int | None = None,
    out: str | Path = "scpert-quickstart",
    random_state: int = 0,
) -> QuickstartResult:
    """Split, train, predict what was held out, compare with baselines and the noise ceiling, infer the network.

    Parameters
    ----------
    data
        An h5ad file, an AnnData (not changed), or nothing: a simulated screen with known truth.
    perturbation_key, control
        Column of the labels and label of the control; other conventions than ``GENE`` and ``A+B`` are recognised by
        :func:`scpert.pp.annotate_perturbations`.
    library_size_key
        Column with the full library size, for small panels. ``obs["library_size"]`` is taken, and said so, if it is
        there.
    model
        Name of a model in :data:`scpert.model.MODELS`, in any case.
    split
        ``"cells"`` (every perturbation is seen), ``"perturbations"`` or ``"combinations"`` (labels are held out).
    max_epochs
        Passes over the training cells; by default so many that a laptop takes a minute or two.
    out
        Folder for ``results.h5ad``, ``prediction.h5ad``, ``scores.csv``, ``figures/``, ``model/`` and ``report.html``.
    random_state
        Seed of split, training and sampling.

    Returns
    -------
    QuickstartResult

    Examples
    --------
    >>> import scpert  # doctest: +SKIP
    >>> result = scpert.quickstart(out="first-look")  # doctest: +SKIP
    >>> result.scores  # doctest: +SKIP
    """
    random_state = check_seed(random_state)
    from . import get, metrics, pp, tl
    from ._report import write_report
    from .model import MODELS

    names = {name.casefold(): name for name in MODELS}
    check_choice("model", model.casefold(), sorted(names))
    check_choice("split", split, ("cells", "perturbations", "combinations"))
    cls = MODELS[names[model.casefold()]]
    if not hasattr(cls, "predict_perturbation"):
        able = sorted(key for key, name in names.items() if hasattr(MODELS[name], "predict_perturbation"))
        raise ScpertError(f"{cls.__name__} does not predict perturbations. Choose one of {listing(able, 30)}.")
    clock = _Clock()
    print("scpert quickstart")
    with clock("read and check"):
        adata, origin = _load(data)
        _standard_labels(adata, perturbation_key, control)
        if library_size_key is None and "library_size" in adata.obs:
            library_size_key = "library_size"
            logger.info("obs['library_size'] is taken as the full library size")
        digest = data_hash(adata, K.PERTURBATION)
        audit = pp.audit(adata)
        pp.split(adata, kind=split, fractions=_FRACTIONS[split], random_state=random_state)
    folder = _folder(out)
    parts = {part: adata[adata.obs[K.SPLIT].astype(str) == part].copy() for part in (K.TRAIN, K.TEST)}

    options = {"split_key": K.SPLIT, "library_size_key": library_size_key}
    print(
        f"  {adata.n_obs} cells x {adata.n_vars} genes, {adata.obs[K.PERTURBATION].nunique() - 1} perturbations of {origin}"
    )
    with clock(f"train {cls.__name__}"):
        cls.setup_anndata(adata, **options)
        trained = cls(adata)
        epochs = int(np.clip(round(200_000 / parts[K.TRAIN].n_obs), 12, 50)) if max_epochs is None else max_epochs
        trained.train(max_epochs=epochs, random_state=random_state)
    with clock("predict, and baselines"):
        held = sorted(set(parts[K.TEST].obs[K.PERTURBATION].astype(str)) - {K.CONTROL})
        predictions = {cls.__name__: trained.predict_perturbation(held, on_unknown="mean", random_state=random_state)}
        for name, title in (
            ("NoChange", "no change"),
            ("PerturbedMean", "perturbed mean"),
            ("Additive", "training-cell mean" if split == "cells" else "additive"),
        ):
            baseline_cls = MODELS[name]
            if baseline_cls is cls:
                continue
            baseline_cls.setup_anndata(adata, **options)
            baseline = baseline_cls(adata)
            baseline.train()
            predictions[title] = baseline.predict_perturbation(held, on_unknown="mean")
    with clock("score on held-out cells"):
        reference = metrics.Reference(parts[K.TEST], train=parts[K.TRAIN], library_size_key=library_size_key)
        tables = {name: metrics.evaluate(p, reference, metrics=METRICS) for name, p in predictions.items()}
        top = metrics.ceiling(reference, metrics=METRICS, n_draws=10, random_state=random_state)
        base = metrics.evaluate(metrics.training_mean(reference), reference, metrics=METRICS)
        scores = pd.concat(
            {
                name: metrics.summarise(table, base, top, random_state=random_state).rename(columns={"model": "value"})
                for name, table in tables.items()
            },
            names=["model", "metric"],
        ).reset_index()
    with clock("infer the network"):
        tl.infer_grn(adata, library_size_key=library_size_key, split_key=K.SPLIT)
        net = get.grn_df(adata, unmeasured=True)
    try:
        adata.obsm[f"X_{cls.__name__.lower()}"] = trained.get_latent_representation()
    except ScpertError:
        pass
    per_perturbation = tables[cls.__name__]
    adata.uns[K.UNS] = {
        **dict(adata.uns.get(K.UNS, {})),
        "quickstart": {
            "scores": scores.astype({c: str for c in scores.columns if scores[c].dtype == object}),
            "per_perturbation": per_perturbation.reset_index(),
            "data_hash": digest,
            "model": cls.__name__,
            "random_state": random_state,
        },
    }
    for key in ("_scvi_uuid", "_scvi_manager_uuid"):
        adata.uns.pop(key, None)

    result = QuickstartResult(
        adata, trained, predictions[cls.__name__], scores, per_perturbation, net, folder, clock.seconds
    )
    with clock("write report and results"):
        with written_whole(folder / "results.h5ad") as draft:
            adata.write_h5ad(draft)
        with written_whole(folder / "prediction.h5ad") as draft:
            result.prediction.write_h5ad(draft)
        scores.to_csv(folder / "scores.csv", index=False)
        trained.save(folder / "model", overwrite=True)
        write_report(
            result,
            audit=audit,
            origin=origin,
            digest=digest,
            observed=parts[K.TEST],
            library_size_key=library_size_key,
            split=split,
        )
    print()
    print(score_table(scores).to_string())
    print(f"\nreport: {folder / 'report.html'}")
    return result


def _folder(out: str | Path) -> Path:
    """The folder of the results, made before the long work so that an unwritable place is known at once."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ScpertError(
            f"Results cannot be written to {str(folder)!r} ({error}). Name another folder with out=."
        ) from error
    return folder


def score_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Models by metrics, with the training mean and the ceiling as rows; the calibrated score in its own column."""
    rows: dict[str, dict[str, Any]] = {}
    for model, part in scores.groupby("model", sort=False):
        part = part.set_index("metric")
        rows[str(model)] = {NAMES[m]: part.loc[m, "value"] for m in METRICS}
        r = part.loc["pearson_delta"]
        rows[str(model)]["score (0 = mean, 1 = replicate)"] = (
            f"{r['score']:.2f} [{r['lower']:.2f}, {r['upper']:.2f}]" if np.isfinite(r["score"]) else str(r["verdict"])
        )
    first = scores[scores["model"] == scores["model"].iloc[0]].set_index("metric")
    rows["ceiling (replicate of the test cells)"] = {NAMES[m]: first.loc[m, "ceiling"] for m in METRICS}
    return pd.DataFrame(rows).T
