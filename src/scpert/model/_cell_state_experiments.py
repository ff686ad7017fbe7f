"""Virtual experiments with :class:`scpert.model.CellState`: manipulation, screens, master regulators, gene networks."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from .. import _keys as K
from .._checks import check_choice, check_net, check_obs_key, check_positive, listing, suggest
from .._progress import progress
from ..errors import MissingKeyError, ScpertError, UnknownTargetError
from ._cell_state_stats import adjust, match_nearest, matched_null, rank_product, regulon_activity, tail_pvalues
from ._cell_state_transfer import Transfer

__all__ = ["Experiments"]

logger = logging.getLogger("scpert")

MODES = ("knockout", "overexpress", "set")
METHODS = ("paired", "fixed_point", "jacobian")


class Experiments(Transfer):
    """The virtual experiments; a part of :class:`~scpert.model.CellState`."""

    # ------------------------------------------------------------------------------------------ pieces

    def _gene_positions(self: Any, genes: str | Sequence[str], argument: str) -> tuple[list[str], np.ndarray]:
        names = [genes] if isinstance(genes, str) else [str(g) for g in genes]
        if len(names) == 1 and "+" in names[0] and names[0] not in self._position:
            names = names[0].split("+")
        if not names:
            raise ScpertError(f"{argument} is empty: name at least one gene.")
        if len(set(names)) < len(names):
            raise ScpertError(f"{argument} names a gene twice: {listing(names)}.")
        if len(names) > self.n_genes:
            raise ScpertError(f"{argument} names {len(names)} genes, but only {self.n_genes} are measured.")
        unknown = [g for g in names if g not in self._position]
        if unknown:
            hints = {g: self._suggest(g) for g in unknown[:20]}
            near = "; ".join(f"{g}: {', '.join(h)}" for g, h in list(hints.items())[:3] if h)
            raise UnknownTargetError(
                f"{listing(unknown, 5)} {'is' if len(unknown) == 1 else 'are'} not measured: the model knows "
                f"{self.n_genes} genes by adata.var_names, such as {listing(self.genes_[:2])}."
                + (f" Similar names: {near}." if near else ""),
                tuple(unknown),
                hints,
            )
        return names, np.array([self._position[g] for g in names])

    def _suggest(self: Any, gene: str) -> list[str]:
        prefixed = [g for g in self.genes_ if g.split("|")[0].casefold() == gene.casefold()][:3]
        return prefixed or suggest(gene, self.genes_)

    @property
    def _position(self: Any) -> dict[str, int]:
        cache = self.__dict__.get("_position_cache")
        if cache is None:
            cache = self.__dict__["_position_cache"] = {g: i for i, g in enumerate(self.genes_)}
        return cache

    def _check_informed(self: Any, names: list[str], genes: np.ndarray) -> None:
        flat = self.range_[1][genes] <= self.range_[0][genes]
        if flat.any():
            raise ScpertError(
                f"{listing(np.asarray(names)[flat], 5)}: constant in the training samples (all zero, say), so nothing was "
                "learned about it and a manipulation would mean nothing."
            )

    def _levels(self: Any, y: np.ndarray, names: list[str], genes: np.ndarray, mode: str, level: Any) -> np.ndarray:
        """Log levels ``(sample, manipulated gene)`` that the genes are set to."""
        check_choice("mode", mode, MODES)
        own = y[:, genes] * self._scale[genes] + self._mean[genes]
        if level is None:
            if mode == "set":
                raise ScpertError(
                    "mode='set' needs level=: a number, or one for each gene, on the log1p scale of the model."
                )
            if mode == "knockout":
                return np.zeros_like(own)
            # up to the highest training level, and by a doubling at least
            return np.maximum(self.range_[1][genes][None], own + np.log(2.0)).astype(np.float32)
        if isinstance(level, Mapping):
            missing = [g for g in names if g not in level]
            if missing:
                raise ScpertError(f"level= has no value for {listing(missing)}.")
            level = [level[g] for g in names]
        values = np.asarray(level, dtype=np.float32)
        if values.ndim > 2 or values.shape[-1:] not in ((), (1,), (len(names),)):
            raise ScpertError(
                f"level= has the shape {values.shape}; give a number or one for each of the {len(names)} genes."
            )
        if not np.isfinite(values).all() or (values < 0).any():
            raise ScpertError("level= holds a negative or infinite value; log1p expression cannot be negative.")
        return np.broadcast_to(values, own.shape).astype(np.float32)

    def _ood(self: Any, y: Tensor, z: Tensor, decoded: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Robust z of reconstruction error and of latent Mahalanobis distance, against the training samples."""
        r = self.reference_
        error = np.log((decoded - y).square().mean(dim=1).sqrt().numpy() + 1e-8)
        d = z.numpy().astype(np.float64) - r["centre"]
        distance = np.sqrt(np.einsum("nk,kl,nl->n", d, np.linalg.inv(r["cov"]), d))
        return (error - r["error"][0]) / r["error"][1], (distance - r["distance"][0]) / r["distance"][1]

    def _decoder_rows(self: Any, z: Tensor, genes: Tensor) -> Tensor:
        """Derivative of decoded genes by the latent state, ``(sample, gene, latent)``."""
        z = z.detach().requires_grad_(True)
        with torch.enable_grad():
            out = self.module.decode(z, genes)
            rows = [
                torch.autograd.grad(out[:, j].sum(), z, retain_graph=j + 1 < out.shape[1])[0]
                for j in range(out.shape[1])
            ]
        return torch.stack(rows, dim=1).detach()

    def _pull(self: Any, z: Tensor, genes: Tensor, level: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor]:
        """The nearest latent state whose decoded ``genes`` have ``level``: Gauss-Newton steps ``(z, converged)``.

        It is the limit of reconstructing and clamping in turn: each step is the shortest (in latent distance) that
        brings the linearised decoder to the level. Steps are halved where they do not help.
        """
        start, current = z, z
        gap = level - self.module.decode(current, genes)
        for _ in range(max_iter):
            if bool((gap.abs().amax(dim=1) < tol).all()):
                break
            J = self._decoder_rows(current, genes)
            gram = J @ J.transpose(1, 2)
            ridge = 1e-6 * torch.diagonal(gram, dim1=1, dim2=2).mean(dim=1)[:, None, None] + 1e-10
            step = (
                J.transpose(1, 2) @ torch.linalg.solve(gram + ridge * torch.eye(gram.shape[1]), gap.unsqueeze(-1))
            ).squeeze(-1)
            best, best_gap = current, gap
            size = torch.ones((len(z), 1))
            for _ in range(4):
                trial = current + size * step
                trial_gap = level - self.module.decode(trial, genes)
                better = (trial_gap.square().sum(1) < best_gap.square().sum(1))[:, None]
                best, best_gap = torch.where(better, trial, best), torch.where(better, trial_gap, best_gap)
                size = torch.where(better, size, size / 2)
                if bool(better.all()):
                    break
            current, gap = best, best_gap
        converged = (gap.abs().amax(dim=1) < max(tol, 1e-3)) & torch.isfinite(current).all(dim=1)
        return torch.where(torch.isfinite(current), current, start), converged

    # ------------------------------------------------------------------------------------------ manipulation

    def manipulate(
        self: Any,
        adata: AnnData,
        genes: str | Sequence[str],
        *,
        mode: str = "knockout",
        level: float | Sequence[float] | Mapping[str, float] | None = None,
        method: str = "paired",
        max_iter: int = 30,
        tol: float = 1e-4,
        batch_size: int | None = None,
    ) -> AnnData:
        r"""Set genes to a level in each sample and see what else the model then expects.

        Parameters
        ----------
        adata
            Samples to manipulate; the model's genes, aligned by name.
        genes
            One gene or several, manipulated together (``"A+B"`` works too).
        mode
            ``"knockout"``: to zero; ``"overexpress"``: to the highest training level, and at least twice the sample's
            own; ``"set"``: to ``level``.
        level
            Log1p expression in the model's unit: a number, one for each gene, or a dict by gene.
        method
            With :math:`f` the autoencoder, :math:`y` the sample and :math:`y'` the sample with the genes set:

            - ``"paired"``: :math:`f(y') - f(y)`, one pass. All other genes are still observed, and hold the state: the
              shift is small, its direction is what counts.
            - ``"fixed_point"``: reconstruct and clamp in turn until nothing moves, so that the other genes follow. The
              limit is found by Gauss-Newton steps in the latent space.
            - ``"jacobian"``: :math:`\partial f/\partial y\,(y' - y)`, the first-order part of ``"paired"``.
        max_iter, tol
            Steps and tolerance (standardised units) of the fixed point.
        batch_size
            Samples per batch.

        Returns
        -------
        AnnData, sample x gene, log expression in the model's unit: ``X`` the manipulated profile,
        ``layers["reconstruction"]`` the sample's own reconstruction (the manipulated genes as measured),
        ``layers["delta"]`` their difference, in which the reconstruction's bias cancels; ``obs["converged"]``;
        ``obs["ood"]``, the larger of ``obs["ood_reconstruction"]`` and ``obs["ood_distance"]``: robust z of the
        reconstruction error and of the latent Mahalanobis distance against the training samples. Above about 3, do not
        believe the shift. ``adata`` is not changed.

        Raises
        ------
        UnknownTargetError
            If a gene is not measured.
        ScpertError
            If a gene was constant in training, or the level makes no sense.
        """
        self._check_trained()
        check_choice("method", method, METHODS)
        check_choice("mode", mode, MODES)
        names, positions = self._gene_positions(genes, "genes")
        self._check_informed(names, positions)
        reader = self._reader(adata)
        index = torch.from_numpy(positions)
        n = reader.shape[0]
        delta = np.empty((n, self.n_genes), dtype=np.float32)
        base = np.empty_like(delta)
        converged = np.ones(n, dtype=bool)
        ood = np.empty((n, 2))
        self.module.to("cpu")
        for rows in self._blocks(n, batch_size, "manipulate"):
            with torch.no_grad():
                y = self._values(reader, rows)
                level_log = self._levels(y.numpy(), names, positions, mode, level)
                target = torch.from_numpy((level_log - self._mean[positions]) / self._scale[positions]).float()
                change = target - y[:, index]
                parts = self.module.first(y)
                z = self.module.encode_parts(parts)
                own = self.module.decode(z)
                moved_input = y.clone()
                moved_input[:, index] = target
                if method == "paired":
                    z_new = self.module.encode_parts(
                        self.module.first_shift(parts, index.expand(len(rows), -1), change)
                    )
                    shift = self.module.decode(z_new) - own
                elif method == "fixed_point":
                    # both arms start from decoded values, so that the reconstruction error of the genes cancels
                    z_new, ok = self._pull(z, index, own[:, index] + change, max_iter, tol)
                    shift = self.module.decode(z_new) - own
                    converged[rows] = ok.numpy()
                else:
                    tangent = torch.zeros_like(y)
                    tangent[:, index] = change
                    shift = torch.func.jvp(self.module, (y,), (tangent,))[1]
                    z_new = self.module.encode(moved_input)
                shift[:, index] = change
                own[:, index] = y[:, index]
                ood[rows] = np.column_stack(self._ood(moved_input, z_new, own + shift))
                delta[rows] = shift.numpy() * self._scale
                base[rows] = own.numpy() * self._scale + self._mean
        finite = np.isfinite(delta).all(axis=1)
        converged &= finite
        if not converged.all():
            logger.warning("%d of %d samples did not converge: see obs['converged']", int((~converged).sum()), n)
        obs: Any = adata.obs.copy()
        out = AnnData(base + delta, obs=obs, var=pd.DataFrame(index=pd.Index(self.genes_, dtype=str)))
        out.layers[K.DELTA] = delta
        out.layers["reconstruction"] = base
        out.obs["converged"] = converged
        out.obs["ood_reconstruction"], out.obs["ood_distance"] = ood[:, 0], ood[:, 1]
        out.obs["ood"] = ood.max(axis=1)
        out.uns[K.UNS] = {"genes": np.array(names, dtype=str), "mode": mode, "method": method, "unit": "log1p"}
        return out

    # ------------------------------------------------------------------------------------------ screens

    def _states(
        self: Any, adata: AnnData, groupby: str, start: str, goal: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions of start and goal samples, and the labels; ``start="rest"`` is everything but the goal."""
        labels = check_obs_key(adata, groupby, "groupby").astype(str).to_numpy()
        start, goal = str(start), str(goal)
        if start == goal:
            raise ScpertError(f"start and goal are both {goal!r}: name two different states of adata.obs[{groupby!r}].")
        for name, value in (("start", start), ("goal", goal)):
            if value not in labels and not (value == "rest" and name == "start"):
                raise MissingKeyError(
                    f"{name}={value!r} is not in adata.obs[{groupby!r}], which has {listing(sorted(set(labels)))}"
                    + (" (start='rest' means all but the goal)." if name == "start" else ".")
                )
        g = np.flatnonzero(labels == goal)
        s = (
            np.flatnonzero(labels != goal)
            if start == "rest" and start not in labels
            else np.flatnonzero(labels == start)
        )
        for name, rows in ((start, s), (goal, g)):
            if len(rows) < 2:
                raise ScpertError(
                    f"{name!r} has {len(rows)} sample in adata.obs[{groupby!r}]: a state needs two at least (five to mean "
                    "anything). Merge groups or choose another."
                )
        return s, g, labels

    def _goal(self: Any, Z: np.ndarray, s: np.ndarray, g: np.ndarray) -> dict[str, np.ndarray]:
        """Direction from start to goal in the latent space, and a logistic regression of the two."""
        from sklearn.linear_model import LogisticRegression

        centre, scale = Z[np.r_[s, g]].mean(axis=0), float(np.sqrt(Z[np.r_[s, g]].var(axis=0).mean())) + 1e-12
        x = (Z[np.r_[s, g]] - centre) / scale
        label = np.r_[np.zeros(len(s)), np.ones(len(g))]
        fitted = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500).fit(x, label)
        start, goal = Z[s].mean(axis=0), Z[g].mean(axis=0)
        return {"direction": goal - start, "goal": goal, "weight": fitted.coef_[0] / scale}

    def _single_shifts(
        self: Any, y: Tensor, positions: np.ndarray, change: np.ndarray, goal: dict[str, np.ndarray], description: str
    ) -> dict[str, np.ndarray]:
        """Goal shifts of all single manipulations: tables ``(gene, sample)``.

        Only the first layer of the encoder sees the manipulated gene, and linearly: its shift is one column of weights.
        """
        module = self.module
        direction = torch.from_numpy(goal["direction"]).float()
        unit = direction / direction.norm().clamp_min(1e-12)
        weight, target = torch.from_numpy(goal["weight"]).float(), torch.from_numpy(goal["goal"]).float()
        n = len(y)
        out = {k: np.empty((len(positions), n), dtype=np.float32) for k in ("shift", "cosine", "distance", "logit")}
        with torch.no_grad():
            parts = module.first(y)
            z = module.encode_parts(parts)
            away = (z - target).norm(dim=1)
            size = max(1, 4096 // n)
            blocks = range(0, len(positions), size)
            for b in progress(blocks, total=len(blocks), description=description, unit="batch"):
                genes = torch.from_numpy(positions[b : b + size])
                m = len(genes)
                repeated = tuple(None if p is None else p.repeat(m, 1) for p in parts)
                delta = torch.from_numpy(np.ascontiguousarray(change[b : b + size])).reshape(-1, 1)
                z_new = module.encode_parts(module.first_shift(repeated, genes.repeat_interleave(n)[:, None], delta))
                dz = (z_new - z.repeat(m, 1)).reshape(m, n, -1)
                along = dz @ unit
                out["shift"][b : b + m] = along.numpy()
                out["cosine"][b : b + m] = (along / dz.norm(dim=2).clamp_min(1e-12)).numpy()
                out["distance"][b : b + m] = (away - (z_new.reshape(m, n, -1) - target).norm(dim=2)).numpy()
                out["logit"][b : b + m] = (dz @ weight).numpy()
        return out

    def _changes(
        self: Any, y: np.ndarray, goal_mean: np.ndarray, positions: np.ndarray, mode: str, level: Any
    ) -> np.ndarray:
        """Standardised change of each gene in each sample, ``(gene, sample)``."""
        own = y[:, positions].T
        if mode == "set" and level is None:
            target = np.broadcast_to(goal_mean[positions][:, None], own.shape)
        else:
            log = self._levels(y, [self.genes_[p] for p in positions], positions, mode, level)
            target = ((log - self._mean[positions]) / self._scale[positions]).T
        return (target - own).astype(np.float32)

    def screen(
        self: Any,
        adata: AnnData,
        *,
        groupby: str,
        start: str,
        goal: str,
        genes: Sequence[str] | None = None,
        mode: str = "knockout",
        level: float | Sequence[float] | None = None,
        n_null: int = 1000,
        max_samples: int = 50,
        random_state: int = 0,
    ) -> pd.DataFrame:
        r"""Manipulate every gene alone in the start samples and measure the shift towards the goal state.

        Parameters
        ----------
        adata
            Samples of both states.
        groupby, start, goal
            Column of the states, and the two states; ``start="rest"``: all samples but the goal's.
        genes
            Genes to manipulate; by default all that vary.
        mode
            ``"knockout"``, ``"overexpress"``, or ``"set"`` (without ``level``: to the mean of the goal samples).
        level
            As in :meth:`manipulate`.
        n_null
            Random genes for the null distribution.
        max_samples
            Start samples used at most (drawn at random).
        random_state
            Seed.

        Returns
        -------
        DataFrame, one row a gene, best first: ``gene``, ``shift`` (mean over start samples of
        :math:`\langle \Delta z, u\rangle`, :math:`u` the unit vector from start to goal in latent space), ``cosine``,
        ``distance`` (how much nearer the goal's mean), ``logit`` (of a logistic regression of goal against start),
        ``share`` of the samples that move towards the goal; ``zscore`` of the shift against random genes of like mean
        and spread of expression, one-sided ``pvals`` and Benjamini-Hochberg ``pvals_adj``.

        Notes
        -----
        The null says "no more than a random gene like it". It does not say that the gene causes anything.
        """
        self._check_trained()
        check_positive("n_null", n_null)
        check_choice("mode", mode, MODES)
        s, g, _ = self._states(adata, groupby, start, goal)
        informative = np.flatnonzero(self.range_[1] > self.range_[0])
        if genes is None:
            tested = informative
        else:
            names, tested = self._gene_positions(genes, "genes")
            self._check_informed(names, tested)
        rng = np.random.default_rng(random_state)
        reader = self._reader(adata)
        if len(s) > max_samples:
            s = np.sort(rng.choice(s, max_samples, replace=False))
        if len(g) > 2000:
            g = np.sort(rng.choice(g, 2000, replace=False))
        y, y_goal = self._values(reader, s), self._values(reader, g)
        with torch.no_grad():
            Z = np.concatenate([self.module.encode(y).numpy(), self.module.encode(y_goal).numpy()]).astype(np.float64)
        goal_state = self._goal(Z, np.arange(len(s)), np.arange(len(s), len(Z)))
        pool = informative if genes is None else np.setdiff1d(informative, tested)
        if len(pool) < 20:
            pool = informative
        null = np.sort(rng.choice(pool, min(int(n_null), len(pool)), replace=False))
        positions = np.union1d(tested, null)
        change = self._changes(y.numpy(), y_goal.numpy().mean(axis=0), positions, mode, level)
        shifts = self._single_shifts(y, positions, change, goal_state, "screen")
        mean = shifts["shift"].mean(axis=1).astype(float)
        place = {p: i for i, p in enumerate(positions)}
        at, at_null = np.array([place[p] for p in tested]), np.array([place[p] for p in null])
        features = np.column_stack([self._mean[positions], self.range_[2][positions]])
        z, p = matched_null(mean, at, at_null, features)
        table = pd.DataFrame(
            {
                "gene": [self.genes_[p] for p in tested],
                "shift": mean[at],
                "cosine": shifts["cosine"][at].mean(axis=1),
                "distance": shifts["distance"][at].mean(axis=1),
                "logit": shifts["logit"][at].mean(axis=1),
                "share": (shifts["shift"][at] > 0).mean(axis=1),
                "zscore": z,
                "pvals": p,
                "pvals_adj": adjust(p),
            }
        )
        table.attrs = {"groupby": groupby, "start": str(start), "goal": str(goal), "mode": mode, "n_samples": len(s)}
        return table.sort_values("zscore", ascending=False, ignore_index=True)

    # ------------------------------------------------------------------------------------------ regulators

    def master_regulators(
        self: Any,
        adata: AnnData,
        *,
        groupby: str,
        start: str,
        goal: str,
        net: pd.DataFrame,
        regulators: Sequence[str] | None = None,
        per_sample: bool = False,
        tmin: int = 5,
        n_boot: int = 100,
        random_state: int = 0,
    ) -> pd.DataFrame:
        r"""Regulators of the goal state by two independent lines of evidence, kept apart and combined.

        Regulon evidence never looks at the regulator's own expression: the ``ulm`` and ``viper`` activities (decoupler)
        of its targets in the goal's signature. Virtual evidence never looks at the net: each regulator is set to its goal
        level in the start samples and the shift towards the goal is measured (:meth:`screen`, ``mode="set"``).

        Parameters
        ----------
        adata, groupby, start, goal
            As in :meth:`screen`.
        net
            Signed regulons ``source, target, weight``, such as CollecTRI (:func:`scpert.resources.regulons`).
        regulators
            Regulators to rank; by default all of the net with ``tmin`` measured targets that are measured themselves.
        per_sample
            One row per goal sample and regulator instead: the signature of the sample against the start samples, and the
            virtual evidence as the move away from the goal if the regulator is set back to its start level in it.
        tmin
            Least number of measured targets.
        n_boot
            Bootstrap samples (over samples; per sample: half the genes at random) for limits and stability.
        random_state
            Seed.

        Returns
        -------
        DataFrame, best first: ``regulator``, ``activity`` (ulm), ``viper``, ``virtual`` (goal shift), ``score``
        (minus the log10 of the geometric mean of the two relative ranks; the regulon rank is that of ulm and viper
        together), ``rank``, ``rank_lower``, ``rank_upper`` (90 % bootstrap limits), ``stability`` (share of the bootstraps
        with the regulator among the first 5 %), ``rank_regulon``, ``rank_virtual``, ``n_targets``. Per sample there is a
        first column ``sample``.

        Raises
        ------
        ScpertError
            If the net has no signs, start equals goal, or a state has fewer than two samples.
        UnknownTargetError
            If a regulator asked for is not measured.
        """
        self._check_trained()
        s, g, _ = self._states(adata, groupby, start, goal)
        net = self._signed(net)
        counts = net.groupby(K.SOURCE).size()
        if regulators is None:
            enough = [t for t in counts.index if counts[t] >= tmin]
            names = [
                t
                for t in enough
                if t in self._position and self.range_[1][self._position[t]] > self.range_[0][self._position[t]]
            ]
            if len(names) < len(enough):
                logger.info(
                    "%d regulators of the net are not measured or constant, and left out", len(enough) - len(names)
                )
            if not names:
                raise ScpertError(
                    f"No regulator of the net is measured and has {tmin} measured targets. Same gene names?"
                )
        else:
            names, positions = self._gene_positions(regulators, "regulators")
            self._check_informed(names, positions)
            few = [t for t in names if counts.get(t, 0) < tmin]
            if few:
                raise ScpertError(
                    f"{listing(few, 5)} {'has' if len(few) == 1 else 'have'} fewer than tmin={tmin} measured targets in the "
                    "net: no activity can be told. Lower tmin or leave them out."
                )
        positions = np.array([self._position[t] for t in names])
        net = net[net[K.SOURCE].isin(names)]
        reader = self._reader(adata)
        rng = np.random.default_rng(random_state)
        y_start, y_goal = self._values(reader, s), self._values(reader, g)
        a, b = y_start.numpy(), y_goal.numpy()
        with torch.no_grad():
            Z = np.concatenate([self.module.encode(y_start).numpy(), self.module.encode(y_goal).numpy()]).astype(
                np.float64
            )
        is_goal = np.arange(len(s), len(Z))
        state = self._goal(Z, np.arange(len(s)), is_goal)
        genes = pd.Index(self.genes_)
        seen = self.range_[1] > self.range_[0]
        if per_sample:
            return self._regulators_per_sample(
                adata.obs_names[g], a, b, y_goal, state, names, positions, net, genes, seen, tmin, n_boot, rng
            )
        use = np.arange(len(a)) if len(a) <= 50 else np.sort(rng.choice(len(a), 50, replace=False))
        signatures = [_signature(a, b)]
        picks = [(np.arange(len(a)), np.arange(len(b)))]
        for _ in range(int(n_boot)):
            picks.append((rng.integers(0, len(a), len(a)), rng.integers(0, len(b), len(b))))
            signatures.append(_signature(a[picks[-1][0]], b[picks[-1][1]]))
        activity = regulon_activity(np.stack(signatures)[:, seen], genes[seen], net, tmin)
        ulm, viper = (activity[m].reindex(columns=names).to_numpy() for m in ("ulm", "viper"))
        # the shift is linear in the change of level up to curvature: measured once at the goal's mean, then scaled
        change = self._changes(a[use], b.mean(axis=0), positions, "set", None)
        shifts = self._single_shifts(y_start[use], positions, change, state, "virtual manipulation")["shift"]
        safe = np.where(np.abs(change) > 1e-6, change, np.nan)
        slope = np.nan_to_num(np.nanmedian(shifts / safe, axis=1))
        virtual = np.empty((len(picks), len(names)))
        virtual[0] = shifts.mean(axis=1)
        measured = slope * (b.mean(axis=0) - a.mean(axis=0))[positions]
        unit = state["direction"] / max(np.linalg.norm(state["direction"]), 1e-12)
        for i, (p, q) in enumerate(picks[1:], 1):
            direction = Z[len(s) + q].mean(axis=0) - Z[p].mean(axis=0)
            turn = float(direction @ unit) / max(np.linalg.norm(direction), 1e-12)
            change = b[q][:, positions].mean(axis=0) - a[p][:, positions].mean(axis=0)
            virtual[i] = virtual[0] + slope * turn * change - measured
        rank = np.stack([_combined_rank(u, v, w) for u, v, w in zip(ulm, viper, virtual, strict=True)])
        out = self._regulator_table(names, ulm[0], viper[0], virtual[0], counts)
        if n_boot:
            out["rank_lower"], out["rank_upper"] = np.quantile(rank[1:], [0.05, 0.95], axis=0)
            out["stability"] = (rank[1:] <= max(1.0, 0.05 * len(names))).mean(axis=0)
        else:
            out["rank_lower"] = out["rank_upper"] = out["stability"] = np.nan
        out.attrs = {"groupby": groupby, "start": str(start), "goal": str(goal)}
        return out.sort_values(["rank", "regulator"], ignore_index=True)

    def _signed(self: Any, net: pd.DataFrame) -> pd.DataFrame:
        if isinstance(net, pd.DataFrame) and K.SOURCE in net and K.WEIGHT not in net:
            raise ScpertError(
                "The net has no signs: it lacks the column 'weight' (positive: activates, negative: represses). Activities "
                "of regulators need it; CollecTRI and DoRothEA have it."
            )
        if isinstance(net, pd.DataFrame) and K.SOURCE in net:
            net = net[~net[K.SOURCE].astype(str).eq(net[K.TARGET].astype(str))] if K.TARGET in net else net
        sources = set(net[K.SOURCE].astype(str)) if isinstance(net, pd.DataFrame) and K.SOURCE in net else set()
        clean = check_net(net, "net", known=set(self.genes_) | sources)
        clean = clean[clean[K.TARGET].isin(self._position)]
        clean = clean[clean[K.WEIGHT] != 0]
        if clean.empty:
            raise ScpertError(
                f"The net shares no target with the model's genes, such as {listing(self.genes_[:3])}. Bring both to the "
                "same kind of gene names."
            )
        if (clean[K.WEIGHT] > 0).all() and clean[K.WEIGHT].nunique() == 1:
            raise ScpertError(
                "The net has no signs: all its weights are equal. Activities of regulators need positive (activates) and "
                "negative (represses) weights; CollecTRI and DoRothEA have them."
            )
        return clean

    def _regulator_table(
        self, names: list[str], ulm: np.ndarray, viper: np.ndarray, virtual: np.ndarray, counts: pd.Series
    ) -> pd.DataFrame:
        regulon = rank_product(ulm, viper)
        out = pd.DataFrame(
            {
                "regulator": names,
                "activity": ulm,
                "viper": viper,
                "virtual": virtual,
                "score": -np.log10(rank_product(-regulon, virtual)),
            }
        )
        out["rank"] = out["score"].rank(ascending=False, method="min").astype(int)
        out["rank_regulon"] = pd.Series(-regulon).rank(ascending=False, method="min").astype(int).to_numpy()
        out["rank_virtual"] = pd.Series(virtual).rank(ascending=False, method="min").astype(int).to_numpy()
        out["n_targets"] = counts.reindex(names).to_numpy()
        return out

    def _regulators_per_sample(
        self: Any,
        samples: pd.Index,
        a: np.ndarray,
        b: np.ndarray,
        y_goal: Tensor,
        state: dict[str, np.ndarray],
        names: list[str],
        positions: np.ndarray,
        net: pd.DataFrame,
        genes: pd.Index,
        seen: np.ndarray,
        tmin: int,
        n_boot: int,
        rng: np.random.Generator,
    ) -> pd.DataFrame:
        counts = net.groupby(K.SOURCE).size()
        centre, spread = a.mean(axis=0), np.sqrt(a.var(axis=0) + 0.25 * b.var(axis=0) + 0.05)
        signature = (b - centre) / spread
        back = (centre[positions][:, None] - b[:, positions].T).astype(np.float32)
        reverse = {**state, "direction": -state["direction"], "goal": state["goal"] - state["direction"]}
        virtual = self._single_shifts(y_goal, positions, back, reverse, "virtual manipulation")["shift"].T
        activity = regulon_activity(signature[:, seen], genes[seen], net, tmin)
        ulm, viper = (activity[m].reindex(columns=names).to_numpy() for m in ("ulm", "viper"))
        # stability: half of the genes hidden from the encoder, half of the targets from the regulons
        n_boot = min(int(n_boot), 20)
        ranks = np.empty((n_boot, len(b), len(names)))
        unit = torch.from_numpy(reverse["direction"] / np.linalg.norm(reverse["direction"])).float()
        for i in range(n_boot):
            keep = rng.random(self.n_genes) < 0.5
            part = net[keep[[self._position[t] for t in net[K.TARGET]]]]
            few = regulon_activity(signature[:, seen & keep], genes[seen & keep], part, max(2, tmin // 2))
            u, v = (few[m].reindex(columns=names).to_numpy() for m in ("ulm", "viper"))
            with torch.no_grad():
                observed = torch.from_numpy(keep).float().expand(len(b), -1).clone()
                parts = self.module.first(self.module.masked(y_goal, observed))
                z = self.module.encode_parts(parts)
                w = np.empty((len(b), len(names)), dtype=np.float32)
                for j, p in enumerate(positions):
                    moved = self.module.encode_parts(
                        self.module.first_shift(
                            parts, torch.full((len(b), 1), int(p)), torch.from_numpy(back[j][:, None])
                        )
                    )
                    w[:, j] = ((moved - z) @ unit).numpy()
            ranks[i] = np.stack([_combined_rank(x, y, q) for x, y, q in zip(u, v, w, strict=True)])
        tables = []
        for i, sample in enumerate(samples):
            table = self._regulator_table(names, ulm[i], viper[i], virtual[i], counts)
            table.insert(0, "sample", str(sample))
            if n_boot:
                table["rank_lower"], table["rank_upper"] = np.quantile(ranks[:, i], [0.05, 0.95], axis=0)
                table["stability"] = (ranks[:, i] <= max(1.0, 0.05 * len(names))).mean(axis=0)
            tables.append(table.sort_values(["rank", "regulator"]))
        return pd.concat(tables, ignore_index=True)

    def cooperative_regulators(
        self: Any,
        adata: AnnData,
        *,
        groupby: str,
        start: str,
        goal: str,
        regulators: Sequence[str] | None = None,
        k: int = 2,
        beam: int = 20,
        n_null: int = 200,
        max_samples: int = 50,
        per_sample: bool = False,
        random_state: int = 0,
    ) -> pd.DataFrame:
        r"""Sets of regulators that move the start samples further together than one by one.

        All regulators of a set are brought to their mean goal level at once (one Gauss-Newton step of the fixed point:
        the other genes follow). With :math:`F` the log-odds of goal against all other samples by a kernel density in the
        latent space and :math:`\Delta_S = F(z_S) - F(z)`,

        .. math:: \mathrm{synergy}(S) = \Delta_S - \max_{S = T \cup \{r\}} (\Delta_T + \Delta_r)

        for pairs :math:`\Delta_{AB} - \Delta_A - \Delta_B`.

        Parameters
        ----------
        adata, groupby, start, goal
            As in :meth:`screen`; samples of other states take part in :math:`F`.
        regulators
            Regulators to combine; by default the 40 genes of the strongest single shift.
        k
            Size of the sets.
        beam
            Sets of each size that are extended (beam search); all pairs are looked at.
        n_null
            Random sets in the null of each set, of genes with the nearest single shifts.
        max_samples
            Start samples used at most.
        per_sample
            One row per sample and set.
        random_state
            Seed.

        Returns
        -------
        DataFrame, best first: ``regulators`` (``A+B``), ``shift`` (:math:`\Delta_S`, mean over samples), ``additive``,
        ``synergy``, ``zscore``, ``pvals`` (permutation), ``pvals_adj``.
        """
        self._check_trained()
        s, g, labels = self._states(adata, groupby, start, goal)
        if int(k) < 2:
            raise ScpertError(f"k={k}: a set of cooperating regulators has two members at least.")
        check_positive("beam", beam)
        rng = np.random.default_rng(random_state)
        reader = self._reader(adata)
        if regulators is None:
            top = self.screen(
                adata, groupby=groupby, start=start, goal=goal, mode="set", n_null=200, random_state=random_state
            )
            names = top["gene"].head(40).tolist()
            positions = np.array([self._position[x] for x in names])
        else:
            names, positions = self._gene_positions(list(regulators), "regulators")
            self._check_informed(names, positions)
        if k > len(names):
            raise ScpertError(f"k={k} but there are {len(names)} regulators.")
        other = np.setdiff1d(np.arange(len(labels)), g)
        cap = 500
        other_ref = other if len(other) <= cap else np.sort(rng.choice(other, cap, replace=False))
        goal_ref = g if len(g) <= cap else np.sort(rng.choice(g, cap, replace=False))
        with torch.no_grad():
            z_other = self.module.encode(self._values(reader, other_ref))
            z_goal = self.module.encode(self._values(reader, goal_ref))
        use = s if len(s) <= max_samples else np.sort(rng.choice(s, max_samples, replace=False))
        y = self._values(reader, use)
        with torch.no_grad():
            z = self.module.encode(y)
        level = self._values(reader, g).mean(dim=0)
        pooled = torch.cat([z_other, z_goal])
        width = (
            float(
                torch.pdist(
                    pooled[torch.randperm(len(pooled), generator=torch.Generator().manual_seed(0))[:300]]
                ).median()
            )
            / 2
        )

        def odds(x: Tensor) -> Tensor:
            def density(points: Tensor) -> Tensor:
                d = torch.cdist(x, points).square()
                return torch.logsumexp(-d / (2 * width**2), dim=-1) - float(np.log(len(points)))

            return density(z_goal) - density(z_other)

        informative = np.flatnonzero(self.range_[1] > self.range_[0])
        pool = np.setdiff1d(informative, positions)
        if len(pool) < 20:
            pool = informative
        pool = np.sort(rng.choice(pool, min(300, len(pool)), replace=False))
        everyone = np.concatenate([positions, pool])
        with torch.no_grad():
            own = self.module.decode(z)
        J = torch.cat(
            [self._decoder_rows(z, torch.from_numpy(everyone[i : i + 50])) for i in range(0, len(everyone), 50)], dim=1
        )
        change = level[everyone][None] - own[:, everyone]
        base = odds(z)

        def shifts(sets: np.ndarray) -> np.ndarray:
            """Shift of each set (rows of places in ``everyone``) in each sample, ``(set, sample)``."""
            out = np.empty((len(sets), len(z)), dtype=np.float32)
            size = max(1, 20000 // len(z))
            blocks = range(0, len(sets), size)
            for b in progress(blocks, total=len(blocks), description="cooperation", unit="batch"):
                places = torch.from_numpy(sets[b : b + size])
                rows = J[:, places]  # sample, set, member, latent
                gap = change[:, places].unsqueeze(-1)
                gram = rows @ rows.transpose(-1, -2)
                ridge = 0.05 * torch.diagonal(gram, dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-10
                step = rows.transpose(-1, -2) @ torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1]), gap)
                moved = z[:, None] + step.squeeze(-1)
                value = odds(moved.reshape(-1, moved.shape[-1])).reshape(moved.shape[:2]) - base[:, None]
                out[b : b + len(places)] = value.T.numpy()
            return out

        with torch.no_grad():
            single = shifts(np.arange(len(everyone))[:, None])
            mean_single = single.mean(axis=1)
            m = len(names)
            known: dict[tuple[int, ...], np.ndarray] = {(i,): single[i] for i in range(len(everyone))}
            sets = np.array(list(itertools.combinations(range(m), 2)))
            for size in range(2, int(k) + 1):
                if size > 2:
                    order = sorted(
                        (key for key in known if len(key) == size - 1 and max(key) < m),
                        key=lambda key: -float((known[key] - _additive(key, known)).mean()),
                    )
                    grown = {tuple(sorted((*key, r))) for key in order[: int(beam)] for r in range(m) if r not in key}
                    sets = np.array(sorted(grown))
                for key, value in zip(map(tuple, sets.tolist()), shifts(sets), strict=True):
                    known[key] = value
            keys = [tuple(row) for row in sets.tolist()]
            total = np.stack([known[key] for key in keys])
            # the last step up from the best split: what is beyond adding one regulator to a known set
            additive = np.stack([_additive(key, known) for key in keys])
            synergy = total - additive
            place = np.arange(m, len(everyone))
            draws = np.stack(
                [
                    place[match_nearest(mean_single[sets[:, j]], mean_single[place], rng, int(n_null))]
                    for j in range(sets.shape[1])
                ],
                axis=-1,
            )
            flat = np.unique(np.sort(draws.reshape(-1, sets.shape[1]), axis=1), axis=0)
            flat = flat[(np.diff(flat, axis=1) > 0).all(axis=1)]
            if len(flat) > 20000:
                flat = flat[np.sort(rng.choice(len(flat), 20000, replace=False))]
            null_total = shifts(flat)
            null_synergy = (null_total - single[flat].sum(axis=1)).mean(axis=1)
            lookup = {tuple(row): v for row, v in zip(flat.tolist(), null_synergy, strict=True)}
        value = synergy.mean(axis=1) if k == 2 else (total - single[sets].sum(axis=1)).mean(axis=1)
        pvals, zscore = np.ones(len(keys)), np.zeros(len(keys))
        pooled_null = np.array(list(lookup.values()))
        standard_null = []
        spread_all = float(np.std(pooled_null)) + 1e-12
        for i in range(len(keys)):
            rows = np.sort(draws[i], axis=1)
            mine = np.array([lookup[t] for t in map(tuple, rows.tolist()) if t in lookup])
            if len(mine) < 10:
                mine = pooled_null
            spread = max(1.4826 * float(np.median(np.abs(mine - np.median(mine)))), 0.1 * spread_all)
            zscore[i] = (value[i] - np.median(mine)) / spread
            standard_null.append((mine - np.median(mine)) / spread)
        pvals = tail_pvalues(zscore, np.concatenate(standard_null))
        table = pd.DataFrame(
            {
                "regulators": ["+".join(sorted(names[j] for j in key)) for key in keys],
                "shift": total.mean(axis=1),
                "additive": additive.mean(axis=1),
                "synergy": synergy.mean(axis=1),
                "zscore": zscore,
                "pvals": pvals,
                "pvals_adj": adjust(pvals),
            }
        )
        if per_sample:
            ranking = np.argsort(-zscore, kind="stable")
            parts = []
            for j, row in enumerate(use):
                part = table.iloc[ranking].copy()
                part.insert(0, "sample", str(adata.obs_names[row]))
                part["shift"], part["additive"], part["synergy"] = (
                    total[ranking, j],
                    additive[ranking, j],
                    synergy[ranking, j],
                )
                parts.append(part)
            return pd.concat(parts, ignore_index=True)
        table.attrs = {"groupby": groupby, "start": str(start), "goal": str(goal)}
        return table.sort_values("zscore", ascending=False, ignore_index=True)

    # ------------------------------------------------------------------------------------------ network

    def gene_network(
        self: Any,
        adata: AnnData | None = None,
        *,
        genes: Sequence[str] | None = None,
        regulators: Sequence[str] | None = None,
        n_states: int = 8,
        top_k: int = 20,
        symmetric: bool = False,
        random_state: int = 0,
    ) -> pd.DataFrame:
        r"""Mean Jacobian between genes: :math:`w_{gj} = \langle \partial f_j / \partial y_g \rangle` over samples.

        Parameters
        ----------
        adata
            Samples to average over; by default those of the model.
        genes
            Targets; by default the 2,000 genes that vary most.
        regulators
            Sources; by default the targets.
        n_states
            Samples averaged over (drawn at random).
        top_k
            Edges kept per source: those of the largest absolute weight. 0 keeps all.
        symmetric
            Average the two directions (needs ``regulators=None``).
        random_state
            Seed of the draw.

        Returns
        -------
        A net ``source, target, weight``, strongest first. It is an association: what the model expects of ``target`` if
        ``source`` is seen higher, everything else as it is.
        """
        self._check_trained()
        if genes is None:
            targets = np.sort(np.argsort(-self.range_[2], kind="stable")[:2000])
        else:
            targets = self._gene_positions(genes, "genes")[1]
        sources = targets if regulators is None else self._gene_positions(regulators, "regulators")[1]
        if symmetric and regulators is not None:
            raise ScpertError("symmetric=True needs sources and targets to be the same genes: leave regulators out.")
        reader = self._reader(adata)
        rng = np.random.default_rng(random_state)
        rows = np.sort(rng.choice(reader.shape[0], min(int(n_states), reader.shape[0]), replace=False))
        y = self._values(reader, rows)
        total = np.zeros((len(sources), len(targets)), dtype=np.float32)
        index_s, index_t = torch.from_numpy(sources), torch.from_numpy(targets)
        for i in progress(range(len(rows)), total=len(rows), description="gene network", unit="sample"):
            x = y[i : i + 1].clone().requires_grad_(True)
            with torch.enable_grad():
                z = self.module.encode(x)
                by_input = torch.stack(
                    [torch.autograd.grad(z[0, j], x, retain_graph=True)[0][0, index_s] for j in range(z.shape[1])]
                )
            eye = torch.eye(self.n_latent)
            point = z.detach().repeat(self.n_latent, 1)
            with torch.no_grad():
                by_latent = torch.func.jvp(lambda v: self.module.decode(v, index_t), (point,), (eye,))[1]
            total += (by_input.T @ by_latent).numpy()
        total /= len(rows)
        if symmetric:
            total[:] = (total + total.T) / 2
        names_s, names_t = np.asarray(self.genes_)[sources], np.asarray(self.genes_)[targets]
        same = names_s[:, None] == names_t[None, :]
        strength = np.where(same, -1.0, np.abs(total))
        keep = min(int(top_k), len(targets)) if top_k else len(targets)
        best = np.argpartition(-strength, keep - 1, axis=1)[:, :keep]
        source = np.repeat(np.arange(len(sources)), keep)
        target = best.ravel()
        valid = strength[source, target] > 0
        net = pd.DataFrame(
            {
                K.SOURCE: names_s[source[valid]],
                K.TARGET: names_t[target[valid]],
                K.WEIGHT: total[source[valid], target[valid]].astype(float),
            }
        )
        return net.sort_values(K.WEIGHT, key=np.abs, ascending=False, ignore_index=True)


def _signature(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Welch t of goal against start for each gene, with a floor under the standard error."""
    error = np.sqrt(a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b))
    return (b.mean(axis=0) - a.mean(axis=0)) / (error + np.median(error[error > 0]) if (error > 0).any() else 1.0)


def _combined_rank(ulm: np.ndarray, viper: np.ndarray, virtual: np.ndarray) -> np.ndarray:
    score = rank_product(-rank_product(ulm, viper), virtual)
    return pd.Series(score).rank(method="min").to_numpy()


def _additive(key: tuple[int, ...], known: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    """The largest shift that a smaller set and one more regulator add up to; parts that were not looked at are left out."""
    if len(key) == 2:
        return known[key[:1]] + known[key[1:]]
    options = []
    for i, r in enumerate(key):
        rest = key[:i] + key[i + 1 :]
        if rest in known:
            options.append(known[rest] + known[(r,)])
    if not options:
        return np.sum([known[(r,)] for r in key], axis=0)
    return options[int(np.argmax([float(o.mean()) for o in options]))]
