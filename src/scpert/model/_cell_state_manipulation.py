"""Virtual manipulation with :class:`scpert.model.CellState`: single experiments, screens, gene networks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import Tensor

from .. import _keys as K
from .._checks import check_choice, check_obs_key, check_positive, check_seed, listing, suggest
from .._progress import progress
from ..errors import MissingKeyError, ScpertError, UnknownTargetError
from ._cell_state_stats import adjust, matched_null
from ._cell_state_transfer import Transfer

__all__ = ["Manipulation"]

logger = logging.getLogger("scpert")

MODES = ("knockout", "overexpress", "set")
METHODS = ("paired", "fixed_point", "conditional", "jacobian")


class Manipulation(Transfer):
    """Manipulation of genes; a part of :class:`~scpert.model.CellState`."""

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

    def _pull(
        self: Any, z: Tensor, genes: Tensor, level: Tensor, max_iter: int, tol: float, cov: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The nearest latent state whose decoded ``genes`` have ``level``: Gauss-Newton steps ``(z, converged)``.

        Each step is the shortest that brings the linearised decoder to the level, in the Mahalanobis distance of
        ``cov``; with the identity, the limit is that of reconstructing and clamping in turn. Steps are halved where they
        do not help.
        """
        start, current = z, z
        gap = level - self.module.decode(current, genes)
        for _ in range(max_iter):
            if bool((gap.abs().amax(dim=1) < tol).all()):
                break
            J = self._decoder_rows(current, genes)
            towards = cov @ J.transpose(1, 2)
            gram = J @ towards
            ridge = 1e-6 * torch.diagonal(gram, dim1=1, dim2=2).mean(dim=1)[:, None, None] + 1e-10
            step = (towards @ torch.linalg.solve(gram + ridge * torch.eye(gram.shape[1]), gap.unsqueeze(-1))).squeeze(
                -1
            )
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
              limit is found by Gauss-Newton steps in the latent space. The negative binomial head never puts out zero:
              0.1 counts per ``target_sum`` are its lowest level here.
            - ``"conditional"``: as ``"fixed_point"``, but the nearest state in the Mahalanobis distance of the training
              samples: the most probable state in which the genes have the level, the rest free to follow as it does in
              the training samples. Of counts, the total of a sample is held: what goes with depth alone is not counted.
            - ``"jacobian"``: :math:`\partial f/\partial y\,(y' - y)`, the first-order part of ``"paired"``.
        max_iter, tol
            Steps and tolerance (standardised units) of ``"fixed_point"`` and ``"conditional"``.
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
        cov = torch.eye(self.n_latent)
        if method == "conditional":
            cov = torch.from_numpy(self.reference_["cov_at_depth"]).float()
            cov = cov / cov.diagonal().mean()
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
                elif method in ("fixed_point", "conditional"):
                    # both arms start from decoded values, so that the reconstruction error of the genes cancels
                    level_z = own[:, index] + change
                    if self.module.head == "nb":  # puts out shares of the counts, which are never zero
                        least = (np.log1p(0.1) - self._mean[positions]) / self._scale[positions]
                        level_z = level_z.maximum(torch.from_numpy(least).float())
                    z_new, ok = self._pull(z, index, level_z, max_iter, tol, cov)
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
        random_state = check_seed(random_state)
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
        standardise: bool = False,
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
        standardise
            Divide by :math:`\sqrt{w_{gg} w_{jj}}`, how much of each gene the state holds: genes that vary much are
            otherwise ahead. Genes that the state does not hold at all have no edges.
        random_state
            Seed of the draw.

        Returns
        -------
        A net ``source, target, weight``, strongest first. It is an association: what the model expects of ``target`` if
        ``source`` is seen higher, everything else as it is.
        """
        random_state = check_seed(random_state)
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
        used = np.union1d(sources, targets)
        own = np.zeros(len(used), dtype=np.float32)
        at_s, at_t = np.searchsorted(used, sources), np.searchsorted(used, targets)
        index = torch.from_numpy(used)
        for i in progress(range(len(rows)), total=len(rows), description="gene network", unit="sample"):
            x = y[i : i + 1].clone().requires_grad_(True)
            with torch.enable_grad():
                z = self.module.encode(x)
                by_input = torch.stack(
                    [torch.autograd.grad(z[0, j], x, retain_graph=True)[0][0, index] for j in range(z.shape[1])]
                )
            eye = torch.eye(self.n_latent)
            point = z.detach().repeat(self.n_latent, 1)
            with torch.no_grad():
                by_latent = torch.func.jvp(lambda v: self.module.decode(v, index), (point,), (eye,))[1]
            total += (by_input[:, at_s].T @ by_latent[:, at_t]).numpy()
            own += (by_input * by_latent).sum(dim=0).numpy()
        total /= len(rows)
        if standardise:
            own = np.where(own > 0, own / len(rows), np.inf)
            total /= np.sqrt(own[at_s, None] * own[None, at_t])
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
