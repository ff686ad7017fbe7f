"""Regulators of a state with :class:`scpert.model.CellState`: single ones by two lines of evidence, and cooperative sets."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.stats import t as student
from torch import Tensor

from .. import _keys as K
from .._checks import check_net, check_positive, check_seed, listing
from ..errors import ScpertError
from ._cell_state_manipulation import Manipulation
from ._cell_state_stats import adjust, rank_product, regulon_activity, tail_pvalues
from ._cell_state_surface import ResponseSurfaces, Surfaces, n_columns

__all__ = ["Regulators"]

logger = logging.getLogger("scpert")


class Regulators(Manipulation):
    """Master and cooperative regulators; a part of :class:`~scpert.model.CellState`."""

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
        random_state = check_seed(random_state)
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
        moves = np.abs(change) > 1e-6
        slope = np.median(np.where(moves, shifts, 0.0) / np.where(moves, change, 1.0), axis=1)
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
        r"""Sets of regulators that move the state further together than one by one.

        The state of a sample is :math:`s = \langle z, u \rangle`, its latent state along the unit vector from start to
        goal, as in :meth:`screen`. It is linear in what the decoder puts out, so a goal that follows the *sum* of two
        regulators is additive in it. For each set a surface of :math:`s` over the levels of its members is fitted to the
        samples of **all** states (:math:`x = 0` at the start's mean, 1 at the goal's; a curve for each member, and all
        products). With :math:`\Delta_S` the rise of the surface where all members go from start to goal,

        .. math:: \mathrm{synergy}(S) = \min_{r \in S} (\Delta_S - \Delta_{S \setminus r} - \Delta_r)

        for pairs :math:`\Delta_{AB} - \Delta_A - \Delta_B`.

        Parameters
        ----------
        adata, groupby, start, goal
            As in :meth:`screen`. Samples of other states matter: where two regulators are always on or off together,
            nothing can tell cooperation from addition.
        regulators
            Regulators to combine; by default the 40 genes of the strongest single shift.
        k
            Size of the sets.
        beam
            Sets of each size that are extended (beam search); all pairs are looked at.
        n_null
            Random sets in the null of each set, of genes that go with the state as closely as its members do.
        max_samples
            Start samples in the table at most (``per_sample=True``).
        per_sample
            One row per start sample and set: shift and synergy from the levels of that sample to the goal's.
        random_state
            Seed.

        Returns
        -------
        DataFrame, best first: ``regulators`` (``A+B``), ``shift`` (:math:`\Delta_S`, latent units), ``additive`` (the
        largest :math:`\Delta_{S \setminus r} + \Delta_r`), ``synergy``, ``zscore``, ``pvals`` (one-sided: more than
        additive), ``pvals_adj`` (Benjamini-Hochberg).

        Raises
        ------
        ScpertError
            If there are too few samples to fit a surface, or ``k`` is below 2 or above the number of regulators.

        Notes
        -----
        ``zscore`` is the robust t of the synergy (HC3), less the median and over the spread of the t of the matched random
        sets, but never less strict than without them; ``pvals`` is the larger of the t law's and the place among the null
        sets. Curvature in a single regulator is not synergy. A set that only stands in for a better one, as its members go
        with that one's, is explained away: sets are tested again after the surface of each set called at a false discovery
        rate of 0.1 is taken out of the score. Levels are logs: two regulators that multiply are additive.
        Regulators that are measured with much noise and go together can look like cooperation.
        """
        random_state = check_seed(random_state)
        self._check_trained()
        if int(k) < 2:
            raise ScpertError(f"k={k}: a set of cooperating regulators has two members at least.")
        k = int(k)
        check_positive("beam", beam)
        check_positive("n_null", n_null)
        s, g, labels = self._states(adata, groupby, start, goal)
        rng = np.random.default_rng(random_state)
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
        # samples of every state, at most 500 of the goal and of the others
        rows = np.concatenate([_some(g, 500, rng), _some(np.setdiff1d(np.arange(len(labels)), g), 500, rng)])
        n, df = len(rows), 3 if len(rows) >= 150 else 2
        if n < 3 * n_columns(k, df):
            raise ScpertError(
                f"{n} samples are too few to tell a set of {k} regulators from their sum: {3 * n_columns(k, df)} are needed."
            )
        reader = self._reader(adata)
        y = self._values(reader, rows)
        y_goal, y_start = (self._values(reader, _some(x, 2000, rng)) for x in (g, s))
        with torch.no_grad():
            z, z_goal, z_start = (self.module.encode(x).numpy().astype(np.float64) for x in (y, y_goal, y_start))
        direction = z_goal.mean(axis=0) - z_start.mean(axis=0)
        score = z @ (direction / max(np.linalg.norm(direction), 1e-12))
        others = np.setdiff1d(np.flatnonzero(self.range_[1] > self.range_[0]), positions)
        everyone = np.concatenate([positions, others])
        follows = _correlation(y.numpy()[:, everyone], score)
        m = len(names)
        mates = _mates(follows, m)
        used = np.unique(np.concatenate([np.arange(m), *mates]))
        mates = [np.searchsorted(used, x) for x in mates]
        levels, at_start, at_goal = (x.numpy()[:, everyone[used]].astype(np.float64) for x in (y, y_start, y_goal))
        surfaces = ResponseSurfaces(score, levels, at_start.mean(axis=0), at_goal.mean(axis=0), df)
        found = surfaces.fit(np.array(list(itertools.combinations(range(m), 2))), "pairs")
        for size in range(3, k + 1):
            best = found.sets[np.argsort(-found.t.min(axis=1), kind="stable")[: int(beam)]]
            grown = {tuple(sorted((*row, r))) for row in best.tolist() for r in range(m) if r not in row}
            found = surfaces.fit(np.array(sorted(grown)), f"sets of {size}")
        last = found.interaction.argmin(axis=1)  # the split that leaves least beyond addition
        synergy = found.interaction.min(axis=1)
        null = _MatchedSets(surfaces, found.sets, mates, int(n_null), n - n_columns(k, df), rng)
        zscore, pvals = null.judge(_explained_away(surfaces, found, null))
        order = np.argsort(-zscore, kind="stable")
        table = pd.DataFrame(
            {
                "regulators": ["+".join(sorted(names[j] for j in row)) for row in found.sets],
                "shift": found.total,
                "additive": found.total - synergy,
                "synergy": synergy,
                "zscore": zscore,
                "pvals": pvals,
                "pvals_adj": adjust(pvals),
            }
        ).iloc[order]
        if per_sample:
            some = _some(s, max_samples, rng)
            own = self._values(reader, some).numpy()[:, everyone[used]].astype(np.float64)
            shift, beyond = (x[order] for x in surfaces.of_samples(found, last, own))
            table = pd.concat(
                [
                    table.assign(shift=shift[:, j], additive=shift[:, j] - beyond[:, j], synergy=beyond[:, j])
                    for j in range(len(some))
                ],
                keys=adata.obs_names[some].astype(str),
                names=["sample", None],
            ).reset_index("sample")
        table = table.reset_index(drop=True)
        table.attrs = {"groupby": groupby, "start": str(start), "goal": str(goal)}
        return table


def _signature(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Welch t of goal against start for each gene, with a floor under the standard error."""
    error = np.sqrt(a.var(axis=0, ddof=1) / len(a) + b.var(axis=0, ddof=1) / len(b))
    return (b.mean(axis=0) - a.mean(axis=0)) / (error + np.median(error[error > 0]) if (error > 0).any() else 1.0)


def _combined_rank(ulm: np.ndarray, viper: np.ndarray, virtual: np.ndarray) -> np.ndarray:
    score = rank_product(-rank_product(ulm, viper), virtual)
    return pd.Series(score).rank(method="min").to_numpy()


def _some(rows: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= n else np.sort(rng.choice(rows, n, replace=False))


def _correlation(y: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Absolute correlation of each column with the score."""
    y, score = y - y.mean(axis=0), score - score.mean()
    return np.abs(score @ y) / np.maximum(np.linalg.norm(y, axis=0) * np.linalg.norm(score), 1e-12)


def _mates(follows: np.ndarray, m: int, width: int = 20) -> list[np.ndarray]:
    """For each of the first ``m`` genes the others that follow the score about as closely; few others: themselves too."""
    others = np.arange(m, len(follows)) if len(follows) - m >= width else np.arange(len(follows))
    return [others[np.argsort(np.abs(follows[others] - follows[j]), kind="stable")[:width]] for j in range(m)]


class _MatchedSets:
    """Null of each set's least t: sets of mates of its members, and the t law."""

    def __init__(
        self,
        surfaces: ResponseSurfaces,
        sets: np.ndarray,
        mates: list[np.ndarray],
        n_null: int,
        freedom: int,
        rng: np.random.Generator,
    ):
        n_each = min(n_null, max(50, 20_000 // len(sets)))
        draws = [np.sort(np.column_stack([rng.choice(mates[j], n_each) for j in row]), axis=1) for row in sets]
        draws = [d[(np.diff(d, axis=1) > 0).all(axis=1)] for d in draws]
        flat, place = np.unique(np.concatenate(draws), axis=0, return_inverse=True)
        null_t = surfaces.fit(flat, "matched random sets").t.min(axis=1)[place.reshape(-1)]
        parts = np.split(null_t, np.cumsum([len(d) for d in draws])[:-1])
        parts = [x if len(x) >= 10 else null_t for x in parts]
        middle = np.array([np.median(x) for x in parts])
        spread = np.array([1.4826 * np.median(np.abs(x - m)) for x, m in zip(parts, middle, strict=True)])
        # never less strict than the t law
        self.middle, self.spread, self.freedom = np.maximum(middle, 0.0), np.maximum(spread, 1.0), freedom
        self.pool = np.concatenate([(x - m) / w for x, m, w in zip(parts, self.middle, self.spread, strict=True)])

    def judge(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Z and one-sided p."""
        z = (t - self.middle) / self.spread
        return z, np.maximum(tail_pvalues(z, self.pool), student.sf(z, self.freedom))


def _explained_away(surfaces: ResponseSurfaces, found: Surfaces, null: _MatchedSets, fdr: float = 0.1) -> np.ndarray:
    """Least t of each set, also after the surfaces of better sets are taken out of the score.

    Otherwise ``A+C`` is called where ``A+B`` cooperate and C merely goes with B. At most 20 sets are taken out.
    """
    t, score = found.t.min(axis=1), surfaces.score
    taken: list[int] = []
    while len(taken) < 20:
        z, p = null.judge(t)
        left = np.setdiff1d(np.flatnonzero(adjust(p) < fdr), taken)
        if len(left) == 0 or len(left) + len(taken) == 1:
            break
        best = int(left[np.argmax(z[left])])
        taken.append(best)
        score = score - surfaces.fitted(found, best)
        rest = np.setdiff1d(np.arange(len(t)), taken)
        t[rest] = np.minimum(t[rest], surfaces.fit(found.sets[rest], "without the best", score).t.min(axis=1))
    return t
