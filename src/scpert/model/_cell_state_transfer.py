"""Transfer of a :class:`scpert.model.CellState` to other data, other genes and other tasks."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor, nn

from .. import _keys as K
from .._checks import check_choice, check_obs_key, check_positive, check_seed, check_unique_names, listing
from .._progress import progress
from ..errors import LabelError, MissingKeyError, ScpertError
from ._cell_state_fit import closed_form_start, fit, group_folds, pca_imputed, principal_axes

__all__ = ["Transfer"]

logger = logging.getLogger("scpert")

TASKS = ("reconstruction", "classification", "perturbation")


class Transfer:
    """Fine-tuning; a part of :class:`~scpert.model.CellState`."""

    def fine_tune(
        self: Any,
        adata: AnnData,
        *,
        task: str = "reconstruction",
        groupby: str | None = None,
        freeze: str = "encoder",
        adapter_rank: int | None = None,
        group_key: str | None = None,
        control: str = K.CONTROL,
        max_epochs: int | None = None,
        lr: float = 1e-3,
        n_folds: int = 3,
        compare: bool = True,
        random_state: int = 0,
    ) -> Any:
        """Carry the model over to other data; the model itself stays as it is.

        Parameters
        ----------
        adata
            New samples, on the scale of the model. Genes are aligned by name: those that the model lacks are added (the
            decoder learns them by ridge regression from the latent state, the encoder starts blind to them), those that
            the data lack are dropped and the encoder's input rescaled. Both are counted in ``report_`` and logged.
        task
            ``"reconstruction"``: adapt the autoencoder (below); ``"classification"``: predict ``groupby`` from the latent state;
            ``"perturbation"``: the latent shift of each perturbation in ``groupby`` against ``control``.
        groupby
            Column of the classes or perturbations.
        freeze
            ``"encoder"``: the weights of the encoder's network stay; ``"none"``: all weights move.
        adapter_rank
            Add a low-rank path from the genes to the latent state; with ``freeze="encoder"`` it alone moves in the encoder.
        group_key
            Column of the groups that must not be torn apart by the folds of the report.
        control
            Label of the control samples (``task="perturbation"``).
        max_epochs, lr
            Of the gradient steps. After the closed form of a reconstruction there are none by default below 100 samples.
        n_folds
            Folds of the report; each fits on the rest only.
        compare
            Compare with training from scratch and with PCA (plus logistic regression), in ``report_``.
        random_state
            Seed.

        Returns
        -------
        A new trained CellState over the genes of ``adata``. ``report_``: DataFrame, a row a method
        (``fine_tuned``, ``from_scratch``, ``pca`` ...), scores on held-out folds. After a classification it has
        :meth:`predict_class`, after a perturbation :meth:`predict_shift`.

        Raises
        ------
        LabelError
            If a class is missing in some samples, has a single sample, or there is one class only.

        Notes
        -----
        For ``task="reconstruction"`` the centre and scale of each gene are estimated anew, shrunken towards the source's,
        and the axes of the linear path are those of a mixture of the new samples' covariance and the source's. Its share,
        from 0 to 1, is the one with the least error at masked genes of groups left out within the new samples: with few
        samples the source carries the model, with many it fades. There may be fewer samples than latent dimensions.
        """
        random_state = check_seed(random_state)
        from ._cell_state import CellState

        self._check_trained()
        check_choice("task", task, TASKS)
        check_choice("freeze", freeze, ("encoder", "none"))
        if adapter_rank is not None:
            check_positive("adapter_rank", adapter_rank)
        check_unique_names(adata)
        labels: Any = None  # given for every task that has some: checked below
        if task != "reconstruction":
            if groupby is None:
                raise ScpertError(f"task={task!r} needs groupby=, the column of the labels.")
            column = check_obs_key(adata, groupby, "groupby")
            if column.isna().any():
                raise LabelError(
                    f"adata.obs[{groupby!r}] is missing in {int(column.isna().sum())} of {len(column)} samples. Drop them "
                    f"first: adata[adata.obs[{groupby!r}].notna()].copy()."
                )
            labels = column.astype(str).to_numpy()
            names, counts = np.unique(labels, return_counts=True)
            if len(names) < 2:
                raise LabelError(
                    f"adata.obs[{groupby!r}] has one class only ({listing(names)}): nothing to tell apart."
                )
            if (counts < 2).any():
                raise LabelError(
                    f"{listing(names[counts < 2], 5)} in adata.obs[{groupby!r}] "
                    f"{'has' if (counts < 2).sum() == 1 else 'have'} a single sample: two at least are needed to learn and to test."
                )
            if hasattr(column, "cat"):
                empty = [c for c in column.cat.categories if str(c) not in set(names)]
                if empty:
                    raise LabelError(
                        f"The classes {listing(empty, 5)} of adata.obs[{groupby!r}] have no sample. Add samples, or drop them: "
                        "adata.obs[key] = adata.obs[key].cat.remove_unused_categories()."
                    )
            if task == "perturbation" and control not in names:
                raise LabelError(f"control={control!r} is not in adata.obs[{groupby!r}], which has {listing(names)}.")
        shared = [g for g in adata.var_names if g in self._position]
        if len(shared) < max(2, 0.05 * self.n_genes):
            raise MissingKeyError(
                f"The data share {len(shared)} of the model's {self.n_genes} genes, such as {listing(self.genes_[:3])}; adata "
                f"has genes such as {listing(adata.var_names[:3])}. Bring both to the same kind of names."
            )
        own = adata.copy() if not adata.isbacked else adata
        layer = self._layer if self._layer in [None, *adata.layers] else None
        CellState.setup_anndata(own, layer=layer, scale=self.scale_, group_key=group_key)
        options = {**self._options, "n_latent": self.n_latent, "adapter_rank": adapter_rank, "n_genes": None}
        options["n_source"] = len(self.train_names_) + int(self._options.get("n_source") or 0)
        if own.n_obs < 4:
            raise ScpertError(f"{own.n_obs} samples are too few: fine-tuning needs four at least.")
        tuned = CellState(own, **options)
        rows = np.arange(own.n_obs)
        reader = tuned._reader()
        n_new = self._transplant(tuned, reader, rows)
        n_dropped = self.n_genes - len(shared)
        logger.info("%d genes shared, %d new, %d dropped", len(shared), n_new, n_dropped)
        tuned.is_trained_ = True
        groups = own.obs[group_key].astype(str).to_numpy() if group_key is not None else rows.astype(str)
        counts_genes = {"genes_shared": len(shared), "genes_new": n_new, "genes_missing": n_dropped}
        settings = {"freeze": freeze, "lr": lr, "max_epochs": max_epochs, "random_state": random_state}
        if task == "reconstruction":
            report = _tune_reconstruction(self, tuned, own, groups, settings, n_folds if compare else 0)
        elif task == "classification":
            report = _tune_classification(tuned, reader, labels, groups, settings, n_folds, compare)
        else:
            report = _tune_perturbation(tuned, reader, labels, control, groups, n_folds)
        for key, value in counts_genes.items():
            report[key] = value
        tuned._learn_reference(rows, groups)
        tuned.extra_ = {**getattr(tuned, "extra_", {}), "task": task, "report": report.reset_index()}
        tuned.history_ = {}
        tuned.module.eval()
        return tuned

    @property
    def report_(self) -> pd.DataFrame:
        """What :meth:`fine_tune` found on held-out folds, beside methods without transfer."""
        extra = getattr(self, "extra_", {})
        if "report" not in extra:
            raise ScpertError("This model was not fine-tuned: there is no report.")
        return extra["report"].set_index("method")

    def _transplant(self: Any, tuned: Any, reader: Any, rows: np.ndarray) -> int:
        """Copy weights gene by gene into a model over other genes; fit the decoder of new genes. Number of new genes."""
        place = np.array([self._position.get(g, -1) for g in tuned.genes_])
        here, there = np.flatnonzero(place >= 0), place[place >= 0]
        i, j = torch.from_numpy(here), torch.from_numpy(there)
        tuned._standardise(reader, rows)
        gain = self.n_genes / len(here)
        with torch.no_grad():
            source, target = self.module.state_dict(), tuned.module.state_dict()
            for name, value in source.items():
                new = target.get(name)
                if new is None:
                    continue
                if new.shape == value.shape and self.n_genes not in value.shape:
                    new.copy_(value)
                elif name in ("encoder.first.weight",):
                    new.zero_()
                    new[:, i] = value[:, j] * gain
                elif name in ("A", "down"):
                    new.zero_()
                    new[i] = value[j] * gain
                elif name == "B":
                    new.zero_()
                    new[:, i] = value[:, j]
                elif name in ("output.weight", "output.bias"):
                    new.zero_()
                    new[i] = value[j]
                elif name in ("mean", "scale", "log_fraction", "log_theta") and len(value):
                    new[i] = value[j]
            tuned.module.load_state_dict(target)
            new_genes = np.flatnonzero(place < 0)
            if len(new_genes):
                some = rows if len(rows) <= 2000 else rows[np.linspace(0, len(rows) - 1, 2000).astype(int)]
                y = tuned._values(reader, some)
                z = tuned.module.encode(y)
                goal = y[:, torch.from_numpy(new_genes)]
                if tuned.module.linear:
                    gram = z.T @ z
                    ridge = 0.1 * torch.diagonal(gram).mean() * torch.eye(len(gram))
                    tuned.module.B[:, torch.from_numpy(new_genes)] = torch.linalg.solve(gram + ridge, z.T @ goal)
                else:
                    h = tuned.module.features(z)
                    gram = h.T @ h
                    ridge = 0.1 * torch.diagonal(gram).mean() * torch.eye(len(gram))
                    tuned.module.output.weight[torch.from_numpy(new_genes)] = torch.linalg.solve(
                        gram + ridge, h.T @ goal
                    ).T
        return len(new_genes)

    def predict_class(self: Any, adata: AnnData | None = None) -> pd.DataFrame:
        """Probability of each class, a row a sample; after ``fine_tune(task="classification")``."""
        extra = getattr(self, "extra_", {})
        if "classes" not in extra:
            raise ScpertError("predict_class needs a model from fine_tune(task='classification').")
        z = self.get_latent_representation(adata)
        logits = ((z - extra["centre"]) / extra["spread"]) @ extra["weight"].T + extra["bias"]
        e = np.exp(logits - logits.max(axis=1, keepdims=True))
        index = (self.adata if adata is None else adata).obs_names
        return pd.DataFrame(e / e.sum(axis=1, keepdims=True), index=index, columns=list(extra["classes"]))

    def predict_shift(self: Any, adata: AnnData, perturbations: list[str] | None = None) -> AnnData:
        """Shift of control samples by learned perturbations: ``X`` perturbation x gene, log scale, against the control.

        The control state is moved by the perturbation's latent vector and decoded.
        """
        extra = getattr(self, "extra_", {})
        if "perturbations" not in extra:
            raise ScpertError("predict_shift needs a model from fine_tune(task='perturbation').")
        known = list(extra["perturbations"])
        wanted = known if perturbations is None else list(perturbations)
        unknown = [p for p in wanted if p not in known]
        if unknown:
            raise LabelError(f"{listing(unknown, 5)} were not learned; the model knows {listing(known)}.")
        z = torch.from_numpy(self.get_latent_representation(adata)).mean(dim=0, keepdim=True)
        moves = torch.from_numpy(extra["moves"][[known.index(p) for p in wanted]]).float()
        with torch.no_grad():
            X = (self.module.decode(z + moves) - self.module.decode(z)).numpy() * self._scale
        return AnnData(
            X,
            obs=pd.DataFrame(index=pd.Index(wanted, dtype=str)),
            var=pd.DataFrame(index=pd.Index(self.genes_, dtype=str)),
        )


# ---------------------------------------------------------------------------------------------- tasks


def _tune_reconstruction(
    old: Any, tuned: Any, own: AnnData, groups: np.ndarray, settings: dict[str, Any], n_folds: int
) -> pd.DataFrame:
    """Carry over in closed form, then gradient steps; scores on held-out folds by the error at masked genes."""
    from ._cell_state import CellState

    if old.module.head == "nb":
        raise ScpertError(
            "fine_tune(task='reconstruction') of a negative binomial head is not possible: use head='gaussian'."
        )
    reader = tuned._reader()
    n = own.n_obs
    rng = np.random.default_rng(settings["random_state"])
    scores: dict[str, list[float]] = {"fine_tuned": [], "before": [], "from_scratch": [], "pca": []}
    if n_folds:
        folds = group_folds(groups, n_folds, rng)
        hidden = rng.random((n, own.n_vars)) < 0.25
        for f in np.unique(folds):
            train, test = np.flatnonzero(folds != f), np.flatnonzero(folds == f)
            if len(train) < 4:
                logger.warning("folds have fewer than four samples: no report")
                break
            log, mask = reader.rows(test), hidden[test]
            observed = torch.from_numpy(~mask)
            centre = reader.rows(train).mean(axis=0)
            base = float((((log - centre) ** 2)[mask]).sum())

            def impute(model: Any, test: np.ndarray = test, observed: Tensor = observed) -> np.ndarray:
                with torch.no_grad():
                    guess = model.module(model._values(reader, test), observed.float()).numpy()
                return guess * model._scale + model._mean

            def score(guess: np.ndarray, log: np.ndarray = log, mask: np.ndarray = mask, base: float = base) -> float:
                return 1.0 - float((((guess - log) ** 2)[mask]).sum()) / base

            candidate = CellState(own, **tuned._options)
            old._transplant(candidate, reader, train)
            scores["before"].append(score(impute(candidate)))
            _carry_over(old, candidate, reader, train, groups, settings)
            scores["fine_tuned"].append(score(impute(candidate)))
            k = min(old.n_latent, len(train) - 1)
            scratch = CellState(own, **{**tuned._options, "n_latent": k, "adapter_rank": None})
            with scratch._seeded(settings["random_state"]):
                scratch._fit_rows(
                    train,
                    train[:0],
                    groups,
                    "closed_form" if scratch.module.linear else "random",
                    32,
                    max_epochs=0 if scratch.module.linear else 20,
                    early_stopping=False,
                    device=torch.device("cpu"),
                    lr=1e-3,
                    weight_decay=1e-2,
                    optimizer="adamw",
                    mask=old.mask,
                    masked_weight=1.0,
                    patience=4,
                    precision="32",
                    seed=settings["random_state"],
                )
            scores["from_scratch"].append(score(impute(scratch)))
            Z, Y = scratch._values(reader, train), scratch._values(reader, test)
            guess = pca_imputed(principal_axes(Z - Z.mean(0), k), Z.mean(0), Y, observed)
            scores["pca"].append(score(guess.numpy() * scratch._scale + scratch._mean))
    chosen = _carry_over(old, tuned, reader, np.arange(n), groups, settings)
    tuned.extra_ = {"closed_form": chosen}
    report = pd.DataFrame(
        {
            m: {"r2_imputed": float(np.mean(v)) if v else np.nan, "r2_imputed_sd": float(np.std(v)) if v else np.nan}
            for m, v in scores.items()
        }
    ).T
    report.index.name = "method"
    return report


def _carry_over(
    old: Any, model: Any, reader: Any, rows: np.ndarray, groups: np.ndarray, settings: dict[str, Any]
) -> dict[str, float]:
    r"""Bring a transplanted model to new samples.

    The centre of each gene becomes :math:`(n \bar x_g + \kappa \mu_g) / (n + \kappa)` with the source's :math:`\mu_g` and
    :math:`\kappa` the ratio of the variance within the new samples to that between the two centres over all shared genes
    (empirical Bayes); variances are pooled as if the source's came from five samples. Then :func:`closed_form_start` with
    the source's covariance as the prior, and gradient steps where they are asked for or there are 100 samples.
    """
    n, prior = len(rows), None
    with torch.no_grad():
        carried = old.reference_["cov"]
        root = torch.from_numpy(np.linalg.cholesky(carried).T).float()
        if model.module.linear:
            prior = root @ model.module.B * model.module.scale  # log units
        model._standardise(reader, rows)
        place = np.array([old._position.get(g, -1) for g in model.genes_])
        here, there = np.flatnonzero(place >= 0), place[place >= 0]
        mean, sd = model._mean.astype(np.float64), model.range_[2].astype(np.float64)
        source_mean, source_sd = old._mean[there].astype(np.float64), old.range_[2][there].astype(np.float64)
        within = sd[here] ** 2 * n / max(n - 1, 1)
        between = float(((mean[here] - source_mean) ** 2 - within / n).sum())
        kappa = min(float(within.sum()) / max(between, 1e-12), 1e3)
        mean[here] = (n * mean[here] + kappa * source_mean) / (n + kappa)
        sd[here] = np.sqrt((n * within + 5.0 * source_sd**2) / (n + 5.0))
        typical = float(np.sqrt(np.mean(sd**2)))
        model.module.mean.copy_(torch.from_numpy(mean))
        model.module.scale.copy_(torch.from_numpy(np.sqrt(sd**2 + (model.noise_floor * typical) ** 2)))
    Y = model._values(reader, rows)
    chosen = {}
    if prior is not None:
        rng = np.random.default_rng(settings["random_state"])
        chosen = closed_form_start(model.module, Y, groups[rows], rng, model.mask, prior / model.module.scale)
        logger.info(
            "share of the source in the axes %.2f, ridge of the output layer %g", chosen["share"], chosen["ridge"]
        )
    epochs = settings["max_epochs"] or (10 if prior is None or n >= 100 else 0)
    if epochs and n >= 8:
        _steps(model, Y, {**settings, "max_epochs": epochs})
    return chosen


def _steps(model: Any, Y: Tensor, settings: dict[str, Any]) -> None:
    """Gradient steps on the denoising loss with a part frozen; a tenth of the samples says when to stop."""
    module = model.module
    for name, p in module.named_parameters():
        p.requires_grad_(settings["freeze"] == "none" or not (name == "A" or name.startswith("encoder.")))
    rng = np.random.default_rng(settings["random_state"])
    order = rng.permutation(len(Y))
    n_val = max(2, len(Y) // 10)
    val, train = Y[order[:n_val]], Y[order[n_val:]]

    def batches(rng: np.random.Generator) -> Any:
        for part in np.array_split(rng.permutation(len(train)), max(1, len(train) // 32)):
            yield train[part], None

    fit(
        module,
        batches,
        lambda: iter([(val, None)]),
        device=torch.device("cpu"),
        max_epochs=int(settings["max_epochs"]),
        lr=min(settings["lr"], 1e-4),
        weight_decay=1e-2,
        optimizer="adamw",
        mask=model.mask,
        masked_weight=1.0,
        early_stopping=True,
        patience=3,
        precision="32",
        seed=settings["random_state"],
        evaluate_start=True,
    )
    for p in module.parameters():
        p.requires_grad_(True)


def _logistic(x: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.1, class_weight="balanced", max_iter=500).fit(x, labels)


def _balanced(truth: np.ndarray, guess: np.ndarray) -> float:
    return float(np.mean([np.mean(guess[truth == c] == c) for c in np.unique(truth)]))


def _tune_encoder(model: Any, Y: Tensor, labels: np.ndarray, settings: dict[str, Any]) -> None:
    """Gradient steps through the encoder (or its adapter alone) on the cross entropy of the classes."""
    module = model.module
    classes, code = np.unique(labels, return_inverse=True)
    with torch.no_grad():
        z = module.encode(Y)
        centre, spread = z.mean(0), z.std(0).mean() + 1e-6
    fitted = _logistic(((z - centre) / spread).numpy(), labels)
    head = nn.Linear(module.n_latent, len(classes))
    with torch.no_grad():
        weight = torch.from_numpy(fitted.coef_).float()
        bias = torch.from_numpy(fitted.intercept_).float()
        if len(classes) == 2:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    only_adapter = settings["freeze"] == "encoder"
    moving = [
        p
        for n, p in module.named_parameters()
        if (n in ("down", "up")) or (not only_adapter and (n == "A" or n.startswith("encoder.")))
    ]
    optimizer = torch.optim.AdamW([*moving, *head.parameters()], lr=settings["lr"] * 0.1, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(settings["random_state"])
    target = torch.from_numpy(code.reshape(-1))
    counts = torch.bincount(target).float()
    loss_function = nn.CrossEntropyLoss(weight=counts.sum() / counts / len(counts))
    epochs = int(settings["max_epochs"] or 10)
    module.train()
    for _ in progress(range(epochs), total=epochs, description="fine-tune", unit="epoch"):
        for part in torch.randperm(len(Y), generator=generator).split(32):
            y = Y[part]
            observed = (torch.rand(y.shape, generator=generator) >= model.mask[0]).float()
            loss = loss_function(head((module.encode(y, observed) - centre) / spread), target[part])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    module.eval()


def _tune_classification(
    tuned: Any,
    reader: Any,
    labels: np.ndarray,
    groups: np.ndarray,
    settings: dict[str, Any],
    n_folds: int,
    compare: bool,
) -> pd.DataFrame:
    """Logistic regression on the latent state, the encoder moved or not; scores on held-out folds of groups."""
    n = len(labels)
    Y = tuned._values(reader, np.arange(n))
    moves = settings["freeze"] == "none" or tuned.module.adapter_rank
    start = {k: v.detach().clone() for k, v in tuned.module.state_dict().items()}
    rng = np.random.default_rng(settings["random_state"])
    guess = {m: np.empty(n, dtype=object) for m in ("fine_tuned", "from_scratch", "pca_logistic", "most_frequent")}
    scored = np.zeros(n, dtype=bool)
    if compare:
        folds = _class_folds(labels, groups, n_folds, rng)
        for f in np.unique(folds):
            tr, te = np.flatnonzero(folds != f), np.flatnonzero(folds == f)
            if set(labels[te]) - set(labels[tr]) or len(set(labels[tr])) < 2:
                logger.warning("fold %d holds a class that the rest lacks: it is left out of the report", f)
                continue
            scored[te] = True
            tuned.module.load_state_dict(start)
            if moves:
                _tune_encoder(tuned, Y[tr], labels[tr], settings)
            with torch.no_grad():
                a, b = tuned.module.encode(Y[tr]).numpy(), tuned.module.encode(Y[te]).numpy()
            guess["fine_tuned"][te] = _predict(a, labels[tr], b)
            k = min(tuned.n_latent, len(tr) - 1)
            centre = Y[tr].mean(0)
            V = principal_axes(Y[tr] - centre, k)
            guess["pca_logistic"][te] = _predict(
                ((Y[tr] - centre) @ V).numpy(), labels[tr], ((Y[te] - centre) @ V).numpy()
            )
            guess["from_scratch"][te] = _from_scratch(Y[tr], labels[tr], Y[te], tuned.n_latent, settings)
            values, counts = np.unique(labels[tr], return_counts=True)
            guess["most_frequent"][te] = values[np.argmax(counts)]
        tuned.module.load_state_dict(start)
    if moves:
        _tune_encoder(tuned, Y, labels, settings)
    with torch.no_grad():
        z = tuned.module.encode(Y).numpy()
    centre, spread = z.mean(0), float(z.std(0).mean()) + 1e-6
    fitted = _logistic((z - centre) / spread, labels)
    weight, bias = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.r_[0.0, bias]
    tuned.extra_ = {
        "classes": np.asarray(fitted.classes_, dtype=object),
        "weight": weight.astype(np.float64),
        "bias": np.asarray(bias, dtype=np.float64),
        "centre": centre.astype(np.float64),
        "spread": spread,
    }
    rows = {}
    for method, values in guess.items():
        ok = scored
        rows[method] = {
            "balanced_accuracy": _balanced(labels[ok], values[ok]) if ok.any() else np.nan,
            "accuracy": float(np.mean(values[ok] == labels[ok])) if ok.any() else np.nan,
        }
    report = pd.DataFrame(rows).T
    report.index.name = "method"
    return report


def _class_folds(labels: np.ndarray, groups: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Folds of whole groups, the classes spread as evenly as the groups allow."""
    fold = np.zeros(len(labels), dtype=int)
    names, first = np.unique(groups, return_index=True)
    of_group = labels[first]
    n_folds = max(2, min(n_folds, len(names)))
    chosen: dict[str, int] = {}
    for c in np.unique(of_group):
        for i, g in enumerate(rng.permutation(names[of_group == c])):
            chosen[g] = i % n_folds
    for i, g in enumerate(groups):
        fold[i] = chosen[g]
    return fold


def _predict(a: np.ndarray, labels: np.ndarray, b: np.ndarray) -> np.ndarray:
    centre, spread = a.mean(0), float(a.std(0).mean()) + 1e-6
    return _logistic((a - centre) / spread, labels).predict((b - centre) / spread)


def _from_scratch(a: Tensor, labels: np.ndarray, b: Tensor, n_latent: int, settings: dict[str, Any]) -> np.ndarray:
    """A network of the same bottleneck, trained on the labels alone."""
    classes, code = np.unique(labels, return_inverse=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["random_state"])
        net = nn.Sequential(
            nn.Linear(a.shape[1], n_latent),
            nn.LayerNorm(n_latent),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(n_latent, len(classes)),
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)
        target = torch.from_numpy(code.reshape(-1))
        counts = torch.bincount(target).float()
        loss_function = nn.CrossEntropyLoss(weight=counts.sum() / counts / len(counts))
        net.train()
        for _ in range(int(settings["max_epochs"] or 15)):
            for part in torch.randperm(len(a)).split(32):
                if len(part) < 2:
                    continue
                loss = loss_function(net(a[part]), target[part])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        net.eval()
        with torch.no_grad():
            return classes[net(b).argmax(1).numpy()]


def _tune_perturbation(
    tuned: Any, reader: Any, labels: np.ndarray, control: str, groups: np.ndarray, n_folds: int
) -> pd.DataFrame:
    """A latent vector for each perturbation; scored on held-out cells by the correlation of decoded and measured shift."""
    names = [c for c in np.unique(labels) if c != control]
    rng = np.random.default_rng(0)
    z = tuned.get_latent_representation().astype(np.float64)

    def moves(rows: np.ndarray) -> np.ndarray:
        base = z[rows][labels[rows] == control].mean(axis=0)
        return np.stack([z[rows][labels[rows] == c].mean(axis=0) - base for c in names])

    def means(rows: np.ndarray) -> np.ndarray:
        out = np.zeros((len(names) + 1, tuned.n_genes))
        for i, c in enumerate([control, *names]):
            out[i] = tuned._values(reader, rows[labels[rows] == c]).numpy().mean(axis=0)
        return out[1:] - out[0]

    def correlation(a: np.ndarray, b: np.ndarray) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = [
                np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else 0.0 for x, y in zip(a, b, strict=True)
            ]
        return float(np.mean(values))

    folds = _class_folds(labels, np.arange(len(labels)).astype(str), 2, rng)
    scores: dict[str, list[float]] = {"fine_tuned": [], "pca": [], "mean_shift": [], "train_mean": []}
    for f in (0, 1):
        tr, te = np.flatnonzero(folds != f), np.flatnonzero(folds == f)
        if any((labels[part] == c).sum() == 0 for part in (tr, te) for c in (control, *names)):
            continue
        truth, train_shift = means(te), means(tr)
        base = torch.from_numpy(z[tr][labels[tr] == control].mean(axis=0)[None]).float()
        with torch.no_grad():
            decoded = tuned.module.decode(base + torch.from_numpy(moves(tr)).float()) - tuned.module.decode(base)
        Y = tuned._values(reader, tr if len(tr) <= 2000 else rng.choice(tr, 2000, replace=False))
        V = principal_axes(Y - Y.mean(0), min(tuned.n_latent, len(Y) - 1)).numpy()
        scores["fine_tuned"].append(correlation(decoded.numpy(), truth))
        scores["pca"].append(correlation(train_shift @ V @ V.T, truth))
        scores["mean_shift"].append(correlation(np.tile(train_shift.mean(axis=0), (len(names), 1)), truth))
        scores["train_mean"].append(correlation(train_shift, truth))
    tuned.extra_ = {"perturbations": np.asarray(names, dtype=object), "moves": moves(np.arange(len(labels)))}
    report = pd.DataFrame({m: {"correlation": float(np.mean(v)) if v else np.nan} for m, v in scores.items()}).T
    report.index.name = "method"
    return report
