"""GEARS and BioDSNN on one network; what they share is in :class:`_GraphModel`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse

from .. import _keys as K
from .._checks import check_choice, check_net, check_positive, check_whole, listing
from ..data._loader import PerturbationSplitter, ScreenTensors
from ..data._perturbation import parse
from ..errors import ScpertError
from ..module._graph_models import CellStream, GraphModule, KnowledgeStream
from ..module._graph_prior import GraphPrior
from ..nn._graph import net_matrix, normalised_adjacency
from ._base import PerturbationModel, Prediction, Reference
from ._knowledge import GeneFeatures, read_knowledge
from ._response import NORMAL_90, limit_widths

__all__ = ["GEARS", "BioDSNN"]

logger = logging.getLogger("scpert")

_MANY_GENES = 3000  # above which attention without a mask is announced as slow
_FEWEST_JUDGES = 5  # perturbations needed to learn how far the network is to be trusted
_HELD_OUT = 0.2  # share of the training perturbations that judge the network, where no validation ones are given


class _Halving(lightning.Callback):
    """The published schedule: the learning rate is halved after every epoch."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        for optimiser in trainer.optimizers:
            for group in optimiser.param_groups:
                group["lr"] *= 0.5


class _GraphModel(PerturbationModel):
    """Nets to tensors, the linear graph model under the network, prediction and explanation."""

    scope = "unseen"
    _scales = K.SCALES
    _uses = ("library_size_key", "covariate_keys", "matched_control_key")
    _stratified = True
    _reads_covariates = False
    _judged_by_perturbed = True
    _group_labels = 2
    _max_epochs = 20
    _monitor = "reconstruction_loss_validation"
    _prior: GraphPrior

    def _setup(
        self,
        *,
        gene_net: pd.DataFrame | None,
        perturbation_net: pd.DataFrame | Mapping[str, pd.DataFrame] | None,
        pathway_net: pd.DataFrame | None,
        anchor: str,
        published: bool,
    ) -> tuple[pd.DataFrame, dict[str, pd.DataFrame] | None, pd.DataFrame | None]:
        """Check the nets and make what depends on them; returns them as they are to be remembered."""
        from ..pp import similarity_net

        check_choice("anchor", anchor, ("graph", "none"))
        self._anchored = anchor == "graph" and not published
        if published:
            self._batch_size = 32
        self._plan_defaults = {**self._plan_defaults, "lr": 1e-3, "weight_decay": 5e-4}
        self._trainer_defaults = (
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"} if published else {"gradient_clip_val": 10.0}
        )
        self._partners = () if self.scale_ == K.SCALE_EFFECTS else ("control",)
        if gene_net is None:
            gene_net = self._coexpression()
        else:
            gene_net = check_net(gene_net, "gene_net", known=self.genes_)
        terms: dict[str, GeneFeatures] = {}
        if perturbation_net is None:
            self._uncovered = "fallback"
            nets = {"coexpression": gene_net}
        else:
            given = perturbation_net if isinstance(perturbation_net, Mapping) else {"graph": perturbation_net}
            if not given:
                raise ScpertError("perturbation_net is an empty dict: give at least one net, or None.")
            nets, perturbation_net = {}, {}
            for name, table in ((str(k), v) for k, v in given.items()):
                if isinstance(table, pd.DataFrame) and {"gene", "term"} <= set(table.columns):
                    table = table[["gene", "term"]].dropna().drop_duplicates()
                    terms[name] = read_knowledge({name: table})[name]
                    nets[name] = check_net(similarity_net(table), f"perturbation_net[{name!r}]")
                    perturbation_net[name] = table
                else:
                    nets[name] = perturbation_net[name] = check_net(table, f"perturbation_net[{name!r}]")
            edgeless = [name for name, net in nets.items() if len(net) == 0]
            if edgeless:
                raise ScpertError(f"perturbation_net {listing(edgeless)} has no edge between two genes.")
            known = {g for net in nets.values() for g in (*net[K.SOURCE], *net[K.TARGET])}
            if not known & set(self.targets_):
                raise ScpertError(
                    f"perturbation_net holds none of the data's {len(self.targets_)} targets, such as "
                    f"{listing(self.targets_, 4)}; it has genes such as {listing(sorted(known), 4)}. Bring both to the "
                    "same kind of gene names."
                )
        self._nets = nets
        self._in_graph = frozenset(g for net in nets.values() for g in (*net[K.SOURCE], *net[K.TARGET]))
        self._nodes: list[str] = sorted(self._in_graph | set(self.targets_))
        self._node = {t: i for i, t in enumerate(self._nodes)}
        if pathway_net is not None:
            outside = pathway_net.attrs.get("outside")
            pathway_net = check_net(pathway_net, "pathway_net", known={*self.genes_, *self._nodes})
            if outside is not None:  # pathway_mask says which genes no pathway holds
                pathway_net.attrs["outside"] = sorted({*map(str, outside)} & {*self.genes_})
            if net_matrix(pathway_net, self.genes_).nnz == 0:
                raise ScpertError(
                    "pathway_net has no pair of two different genes of the data: the mask would be empty."
                )
        self._gene_adjacency = normalised_adjacency(net_matrix(gene_net, self.genes_))
        self._target_adjacencies = {n: normalised_adjacency(net_matrix(net, self._nodes)) for n, net in nets.items()}
        # what the linear graph model joins targets by: the graphs, their annotations, and pathways
        self._relations: dict[str, sparse.csr_matrix] = {n: _joining(a) for n, a in self._target_adjacencies.items()}
        self._relations.update({f"{name}, terms": f.rows(self._nodes) for name, f in terms.items()})
        if pathway_net is not None:
            shared = net_matrix(pathway_net, self._nodes)
            if shared.nnz:
                self._relations["pathway_net"] = _joining(normalised_adjacency(shared.maximum(shared.T)))
        self._trust = {K.UNSEEN: 0.0, K.COMBINATION: 0.0}
        self._base_shift = np.zeros(self.n_genes, dtype=np.float32)
        self._calibration: dict[str, Any] = {}
        return gene_net, perturbation_net, pathway_net  # type: ignore[return-value]

    def _coexpression(self) -> pd.DataFrame:
        from ..pp import coexpression_net

        s = self.setup_args_
        if self.adata is None:
            raise ScpertError("gene_net=None: the co-expression net is computed from data, and there is none.")
        return coexpression_net(
            self.adata,
            split_key=s["split_key"],
            layer=self._field_state["layer"],
            scale=self.scale_,
            library_size_key=s["library_size_key"],
            covariate_keys=list(self.covariates_) if self.scale_ != K.SCALE_EFFECTS else None,
        )

    def _mask(self, gene_net: pd.DataFrame, pathway_net: pd.DataFrame | None, use_mask: bool) -> sparse.csr_matrix:
        """Pairs of genes that may attend to each other, symmetric ``(gene, gene)``."""
        if not use_mask:
            if self.n_genes > _MANY_GENES:
                logger.warning(
                    "use_mask=False: attention between all %d x %d genes is slow", self.n_genes, self.n_genes
                )
            return sparse.csr_matrix(np.ones((self.n_genes, self.n_genes), dtype=np.int8))
        correlated = (net_matrix(gene_net, self.genes_, symmetric=False) != 0).astype(np.int8)
        correlated = correlated.maximum(correlated.T)
        if pathway_net is None:
            return correlated.tocsr()
        shared = (net_matrix(pathway_net, self.genes_) != 0).astype(np.int8)
        shared = shared.maximum(shared.T)
        if "outside" in pathway_net.attrs:
            outside = np.isin(self.genes_, pathway_net.attrs["outside"])
        else:
            outside = np.asarray(shared.sum(axis=1)).ravel() == 0
        keep = sparse.diags(outside.astype(np.int8), dtype=np.int8) @ correlated
        return (shared + keep + keep.T).astype(bool).astype(np.int8).tocsr()

    def _network(self) -> GraphModule:
        """A new network from the options."""
        raise NotImplementedError

    def _build(self, seed: int) -> None:
        with self._seeded(seed):
            self.module = self._network()
            self.module.reset_by_name(self.genes_)

    # ------------------------------------------------------------------------------------------ training

    def train(
        self,
        max_epochs: int | None = None,
        *,
        accelerator: str = "auto",
        devices: Any = "auto",
        batch_size: int | None = None,
        early_stopping: bool | None = None,
        train_size: float | None = None,
        plan_kwargs: dict | None = None,
        random_state: int = 0,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model; see :meth:`PerturbationModel.train`. ``random_state`` also draws the start weights."""
        if self._options.get("published"):
            trainer_kwargs["callbacks"] = [*trainer_kwargs.get("callbacks", ()), _Halving()]
        super().train(
            max_epochs,
            accelerator=accelerator,
            devices=devices,
            batch_size=batch_size,
            early_stopping=early_stopping,
            train_size=train_size,
            plan_kwargs=plan_kwargs,
            random_state=random_state,
            **trainer_kwargs,
        )

    @property
    def _tempered(self) -> bool:
        """Whether the sizes of effects are tempered: in tables of single perturbations without standard errors."""
        e = self.effects_
        return (
            self.scale_ == K.SCALE_EFFECTS
            and not np.isfinite(e.std_error).any()
            and all(len(t) == 1 for t in e.targets)
        )

    def _sets(self, targets: Sequence[tuple[str, ...]]) -> list[list[int]]:
        return [[self._node[t] for t in row] for row in targets]

    def _before_training(self, random_state: int) -> None:
        if not self.is_trained_:
            self._build(random_state)
        e = self.effects_
        self.__dict__.pop("_trained_targets", None)
        module = self.module
        module.control_mean = torch.as_tensor(e.control_mean, device=module.control_mean.device)
        fitted = e.without_own()
        square = e.sampling_variance
        noise = square.mean(axis=1)
        self._prior = GraphPrior(self._relations).fit(
            self._sets(e.targets),
            fitted,
            noise,
            random_state,
            gene_noise=square,
            by_reliability=self.scale_ == K.SCALE_EFFECTS,
            temper=self._tempered,
        )
        # which perturbations judge the network
        rng = np.random.default_rng(random_state)
        position = {label: i for i, label in enumerate(self.labels_)}
        learn = np.ones(len(self.labels_), dtype=bool)
        self._judges: list[str] = []
        if self._anchored:
            offset = np.zeros((len(self.labels_), self.n_genes), dtype=np.float32)
            offset[[position[x] for x in e.labels]] = self._prior.loo
            others = [x for x in self.labels_ if x not in e.row]
            if others:
                sets = self._sets([parse(x, self.control_) for x in others])
                offset[[position[x] for x in others]] = self._prior.predict(sets)[0]
            module.offset = torch.as_tensor(offset)
            if len(e.labels) >= 3 * _FEWEST_JUDGES:
                n = max(_FEWEST_JUDGES, round(_HELD_OUT * len(e.labels)))
                self._judges = sorted(rng.choice(e.labels, n, replace=False))
                learn[[position[x] for x in self._judges]] = False
        else:
            module.offset = torch.zeros(1, self.n_genes)
        module.learn = torch.as_tensor(learn)

    def _after_training(self, tensors: ScreenTensors, splitter: PerturbationSplitter) -> None:
        module = self.module
        module.offset = torch.zeros(1, self.n_genes)
        e = self.effects_
        control = torch.as_tensor(self.reference_.log1p.toarray(), dtype=torch.float32, device=self.device)
        if self.scale_ != K.SCALE_EFFECTS and module.cell is not None:
            self._base_shift = (module.inference(control)["base"].mean(0) - control.mean(0)).cpu().numpy()
        else:
            self._base_shift = np.zeros(self.n_genes, dtype=np.float32)
        self._trust = {K.UNSEEN: 0.0, K.COMBINATION: 0.0}
        if self._judges:
            rows = np.array([e.row[x] for x in self._judges])
            correction = self._correction([e.targets[i] for i in rows])
            missing = e.without_own()[rows] - self._prior.loo[rows]
            seen = np.array([len(e.targets[i]) > 1 and all(t in e.singles for t in e.targets[i]) for i in rows])
            for kind, of in ((K.UNSEEN, ~seen), (K.COMBINATION, seen)):
                of = of if of.sum() >= _FEWEST_JUDGES else np.ones_like(of)  # too few of a kind: all judge
                self._trust[kind] = _trust(missing[of], correction[of])
        self._calibrate()

    def _correction(self, targets: Sequence[tuple[str, ...]]) -> np.ndarray:
        """What the network says, float32 ``(perturbation, gene)``; one pass a perturbation, no cells."""
        sets = self._sets(targets)
        codes = torch.full((len(sets), max(len(s) for s in sets)), -1, dtype=torch.int64)
        for i, s in enumerate(sets):
            codes[i, : len(s)] = torch.as_tensor(s)
        self.module.eval()
        with torch.inference_mode():
            shift = self.module.knowledge(codes.to(self.device))
        return shift.cpu().numpy() + self._base_shift

    # ------------------------------------------------------------------------------------------ on-target shift

    def _put_own(self, delta: np.ndarray, std: np.ndarray | None, targets: Sequence[tuple[str, ...]]) -> np.ndarray:
        """Targets' own genes: as measured, or, of targets that were never perturbed alone, as the others' own genes move.

        Returns where they are, boolean ``(perturbation, gene)``, with a standard deviation of their own in ``std``.
        """
        e, gene = self.effects_, {g: j for j, g in enumerate(self.genes_)}
        e.put_own(targets, delta, std)
        own, variance = np.zeros(delta.shape, dtype=bool), e.sampling_variance
        for i, row in enumerate(targets):
            label = "+".join(row)
            for t in row:
                if t not in gene:
                    continue
                j, measured = gene[t], e.row.get(label, e.singles.get(t))
                own[i, j] = measured is not None or e.own_rule is not None
                if measured is not None:
                    delta[i, j], error = e.own_shift(measured, j, float(variance[measured, j]))
                    if std is not None:
                        if error == 0:  # not known
                            error = e.own_rule[2] if e.own_rule is not None else float(std[i, j])
                        # in a combination the single's shift is not the combination's own
                        apart = 0.0 if label in e.row or e.own_rule is None else e.own_rule[2]
                        std[i, j] = np.sqrt(error**2 + apart**2)
        return own

    # ------------------------------------------------------------------------------------------ prediction

    def _calibrate(self) -> None:
        """Spread of the errors on left-out perturbations, by which predictions are given limits."""
        self._calibration = {}
        if not self._anchored or len(self.effects_.labels) < _FEWEST_JUDGES:
            return
        error = np.abs(self.effects_.without_own() - self._prior.loo)
        variance = 1.0 / np.diag(self._prior.inverse)
        scaled = error / np.sqrt(variance)[:, None]
        gene_sd = np.sqrt(np.mean(scaled**2, axis=0) + 1e-8)
        self._calibration = {
            "gene_sd": gene_sd.astype(np.float32),
            "width": limit_widths(scaled / gene_sd).astype(np.float32),
            "noise": float(np.median(self._prior.noise)),
        }

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        sets, e = self._sets(targets), self.effects_
        reach = self._prior.reach(sets)
        fallback = ~reach & np.array([not any(t in self._trained_targets for t in row) for row in targets])
        if not self._anchored:
            delta = self._correction(targets)
            delta[fallback] = e.mean
            return Prediction(delta.astype(np.float32), fallback=fallback)
        delta, variance = self._prior.predict(sets)
        if self._tempered:
            for i, row in enumerate(targets):
                if "+".join(row) in e.row:
                    delta[i] = e.delta[e.row["+".join(row)]]
        trust = np.zeros(len(targets))
        for i, row in enumerate(targets):
            if "+".join(row) not in e.row and not fallback[i]:
                kind = K.COMBINATION if len(row) > 1 and all(t in e.singles for t in row) else K.UNSEEN
                trust[i] = self._trust[kind]
        use = np.flatnonzero(trust)
        if len(use):
            delta[use] += trust[use, None] * self._correction([targets[i] for i in use])
        if not self._calibration:
            self._put_own(delta, None, targets)
            delta[fallback] = e.mean
            return Prediction(delta.astype(np.float32), fallback=fallback)
        c = self._calibration
        std = np.sqrt(variance + c["noise"])[:, None].astype(np.float32) * c["gene_sd"]
        own = self._put_own(delta, std, targets)
        delta[fallback] = e.mean
        delta = delta.astype(np.float32)
        # errors of own genes are of their own kind
        half = np.where(own, NORMAL_90, c["width"]).astype(np.float32) * std
        return Prediction(delta, std, delta - half, delta + half, fallback)

    def _predict_cells(
        self,
        targets: tuple[str, ...],
        delta: np.ndarray,
        reference: Reference,
        rng: np.random.Generator,
        batch_size: int,
    ) -> np.ndarray:
        cell = self.module.cell
        if cell is None:
            return super()._predict_cells(targets, delta, reference, rng, batch_size)
        control = torch.as_tensor(reference.log1p.toarray(), dtype=torch.float32, device=self.device)
        noise = torch.as_tensor(
            rng.standard_normal((len(control), cell.mean.out_features)), dtype=torch.float32, device=self.device
        )
        with torch.inference_mode():
            generated = cell(control, noise)["x_hat"].clamp_min(0.0)
            drift = (generated.mean(0) - control.mean(0)).cpu().numpy()
        base = Reference(
            sparse.csr_matrix(generated.cpu().numpy()), reference.library, reference.covariates, K.SCALE_LOG1P
        )
        return super()._predict_cells(targets, delta - drift, base, rng, batch_size)

    # ------------------------------------------------------------------------------------------ what it knows

    def _graph_targets(self) -> frozenset[str]:
        return self._in_graph

    def _covers(self, target: str) -> bool:
        """Whether a graph holds the target and, after training, joins it to a measured one."""
        if target not in self._in_graph or not self.is_trained_:
            return target in self._in_graph
        return bool(self._prior.joined[self._node[target]])

    def _status(self, targets: tuple[str, ...]) -> str | None:
        """What a graph holds but joins to no measured target is predicted by the mean, and flagged if nothing else is known."""
        status = super()._status(targets)
        if status is None and all(t in self._trained_targets or t in self._in_graph for t in targets):
            known = any(t in self._trained_targets or self._covers(t) for t in targets)
            return K.UNSEEN if known else K.FALLBACK
        return status

    def get_perturbation_embedding(self) -> pd.DataFrame:
        """Embedding of the targets after their graphs, ``(target, hidden)``."""
        self._check_trained()
        with torch.inference_mode():
            rows = torch.as_tensor([self._node[t] for t in self.targets_], device=self.device)
            table = self.module.knowledge.perturbations(rows[:, None])
        return pd.DataFrame(table.cpu().numpy(), index=pd.Index(self.targets_, name="target"))

    def explain(self, perturbation: str, *, top_genes: int = 20, top_edges: int = 200) -> pd.DataFrame:
        r"""The part of the graphs that carries a prediction, as a net.

        Parameters
        ----------
        perturbation
            A label that the model can predict.
        top_genes
            Genes with the largest predicted shifts, whose neighbours are shown.
        top_edges
            Most edges of each kind, by absolute weight.

        Returns
        -------
        Net ``source``, ``target``, ``weight`` with the column ``kind``:

        - ``evidence``: source is a measured perturbation, target the one asked for; weight its share in the predicted
          shift, :math:`\langle k_q, \hat\delta \rangle / |\hat\delta|^2`, where :math:`k_q` is what perturbation
          :math:`q` contributes. The shares of all measured perturbations add to 1.
        - the name of a graph of perturbations: source is a neighbour of a target; weight that of the normalised
          adjacency.
        - ``effect``: source is the perturbation, target a gene; weight its predicted shift.
        - ``coexpression``: source is a neighbour of one of these genes; weight that of the normalised adjacency times
          the absolute shift of the gene.
        - ``pathway`` (models with attention): source is a gene that one of these genes attends to; weight is the
          attention, mean over heads, times the absolute shift of the gene.

        Raises
        ------
        UnknownTargetError
            If the model cannot predict the perturbation.
        """
        self._check_trained()
        check_whole("top_genes", top_genes)
        check_whole("top_edges", top_edges)
        if not isinstance(perturbation, str):
            raise ScpertError(f"perturbation={perturbation!r}: give one label, such as 'A' or 'A+B'.")
        predicted = self.predict_perturbation(perturbation)
        label = str(predicted.obs[K.PERTURBATION].iloc[0])
        targets = parse(label, self.control_)
        delta = np.asarray(predicted.layers[K.DELTA])[0]
        genes = np.argsort(-np.abs(delta), kind="stable")[: int(top_genes)]
        rows: list[tuple[str, str, float, str]] = [(label, self.genes_[g], float(delta[g]), "effect") for g in genes]
        nodes = [self._node[t] for t in targets if t in self._node]
        known = str(predicted.obs[K.STATUS].iloc[0]) != K.FALLBACK  # the mean effect has no evidence of its own
        if known and len(nodes) == len(targets) and self._anchored:
            share = self._prior.shares([nodes])[0]
            rows += [
                (str(q), label, float(w), "evidence") for q, w in zip(self.effects_.labels, share, strict=True) if w
            ]
        for name, adjacency in self._target_adjacencies.items():
            for i in nodes:
                a, b = adjacency.indptr[i], adjacency.indptr[i + 1]
                rows += [
                    (self._nodes[j], self._nodes[i], float(w), name)
                    for j, w in zip(adjacency.indices[a:b], adjacency.data[a:b], strict=True)
                    if j != i
                ]
        A = self._gene_adjacency
        for g in genes:
            rows += [
                (self.genes_[j], self.genes_[g], float(A.data[e] * abs(delta[g])), "coexpression")
                for e in range(A.indptr[g], A.indptr[g + 1])
                if (j := A.indices[e]) != g
            ]
        if self.module.knowledge.encoder is not None and len(nodes) == len(targets):
            weights = self.module.knowledge.attention(torch.as_tensor([nodes], device=self.device))[0].cpu().numpy()
            attention = self.module.knowledge.encoder[0].attention
            indptr, indices = attention.indptr.cpu().numpy(), attention.indices.cpu().numpy()
            for g in genes:
                rows += [
                    (self.genes_[indices[e]], self.genes_[g], float(weights[e] * abs(delta[g])), "pathway")
                    for e in range(indptr[g], indptr[g + 1])
                    if indices[e] != g
                ]
        net = pd.DataFrame(rows, columns=[K.SOURCE, K.TARGET, K.WEIGHT, "kind"])
        order = net[K.WEIGHT].abs().sort_values(ascending=False, kind="stable").index
        net = net.loc[order].groupby("kind", sort=False).head(int(top_edges))
        return net.sort_values("kind", kind="stable").reset_index(drop=True)

    # ------------------------------------------------------------------------------------------ files

    def _get_state(self) -> dict[str, Any]:
        return {
            **super()._get_state(),
            "prior": self._prior.state(),
            "relations": "joined targets",
            "trust": self._trust,
            "base_shift": self._base_shift,
            "calibration": self._calibration,
            "judges": list(map(str, self._judges)),
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        super()._set_state(state)
        if state.get("relations") != "joined targets":
            raise ScpertError(
                f"This {type(self).__name__} was saved before targets that a graph joins to no other were left out of it, and would predict "
                "something else now: train and save it again."
            )
        self._prior = GraphPrior(self._relations).restore(state["prior"])
        self._trust, self._base_shift, self._calibration = state["trust"], state["base_shift"], state["calibration"]
        self._judges = state["judges"]


def _joining(adjacency: sparse.csr_matrix) -> sparse.csr_matrix:
    """Rows of a graph, zero for nodes that it joins to no other: by their self loop alone it would say that they move more."""
    degree = np.diff(adjacency.indptr) + np.bincount(adjacency.indices, minlength=adjacency.shape[0])
    return (sparse.diags((degree > 2).astype(np.float64)) @ adjacency).tocsr()


def _trust(missing: np.ndarray, correction: np.ndarray) -> float:
    """How much of the network's correction to apply: least squares on left-out perturbations, less its error.

    The slope of what is missing on the correction, minus one jackknife standard error over perturbations, in [0, 1].
    """
    if len(missing) < _FEWEST_JUDGES:
        return 0.0
    product, square = (missing * correction).sum(axis=1), (correction**2).sum(axis=1)
    if square.sum() <= 0:
        return 0.0
    n = len(product)
    slope = product.sum() / square.sum()
    without = (product.sum() - product) / np.maximum(square.sum() - square, 1e-12)
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return float(np.clip(slope - error, 0.0, 1.0))


class GEARS(_GraphModel):
    r"""Graph network over co-expression and functional similarity (Roohani et al. 2024), once per perturbation.

    .. math::
        h_u = \mathrm{MLP}(\mathrm{relu}(g_u) + 0.2\,[\hat A_{gene} G W]_u),\quad
        h_p = \mathrm{MLP}\big(\textstyle\sum_{a \in p} [\hat A_{pert} E W']_a\big),\quad
        \hat x_u = x_u + w_u^T\,\mathrm{MLP}(\mathrm{relu}(h_u + h_p)) + \text{cross-gene}

    By default the network corrects the linear graph model, which is solved exactly and knows the mean effect and, for
    combinations of measured targets, additivity; how far the correction is trusted is learned on left-out training
    perturbations. ``published=True`` is the article's form and schedule.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    gene_net
        Net of measured genes; ``None``: :func:`scpert.pp.coexpression_net` of the training cells.
    perturbation_net
        Net of targets (:func:`scpert.pp.similarity_net` of Gene Ontology), or a dict of nets; ``None``: the gene net,
        which knows measured genes only. Best of all genes, not of the perturbed ones alone: others join them. A table of annotations (``gene``, ``term``) may stand in the place of a net:
        its similarity net is the graph, and the linear graph model also sees the terms themselves, weighted by their
        information content.
    n_hidden
        Width of all tables.
    autofocus
        :math:`\gamma` of the loss :math:`|x-\hat x|^{2+\gamma}`.
    direction_weight, direction_temperature
        Weight and :math:`\tau` of the direction term.
    anchor
        ``"graph"``: the network corrects the linear graph model. ``"none"``: it predicts alone.
    gene_weight
        Weights of genes in the loss ``(gene,)``; scaled to the mean 1.
    published
        The article's settings: no anchor, learning rate halved every epoch, 20 epochs, batches of 32 cells, gradients
        clipped by value.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.GEARS.setup_anndata(adata)
    >>> model = scpert.model.GEARS(adata, n_hidden=8)
    >>> model.train(max_epochs=1, accelerator="cpu")
    >>> model.predict_perturbation().n_vars
    40
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        gene_net: pd.DataFrame | None = None,
        perturbation_net: pd.DataFrame | Mapping[str, pd.DataFrame] | None = None,
        n_hidden: int = 64,
        autofocus: float = 2.0,
        direction_weight: float = 0.1,
        *,
        direction_temperature: float = 0.1,
        anchor: str = "graph",
        gene_weight: Any = None,
        published: bool = False,
        registry: dict | None = None,
    ):
        super().__init__(adata, registry)
        gene_net, perturbation_net, pathway_net = self._setup(
            gene_net=gene_net,
            perturbation_net=perturbation_net,
            pathway_net=None,
            anchor=anchor,
            published=published,
        )
        del pathway_net
        gene_weight = _gene_weight(gene_weight, self.genes_)
        _check_sizes(n_hidden=n_hidden)
        _check_weights(autofocus=autofocus, direction_weight=direction_weight)
        check_positive("direction_temperature", direction_temperature)
        self._remember(locals())
        self._build(0)

    def _network(self) -> GraphModule:
        o = self._options
        knowledge = KnowledgeStream(self._gene_adjacency, self._target_adjacencies, n_hidden=o["n_hidden"])
        return GraphModule(
            knowledge,
            None,
            len(self.labels_),
            self.scale_,
            autofocus=o["autofocus"],
            direction_weight=o["direction_weight"],
            direction_temperature=o["direction_temperature"],
            gene_weight=o["gene_weight"],
        )


class BioDSNN(_GraphModel):
    r"""Two streams (Tan et al. 2025): a VAE of the control cell and attention over pathways of a knowledge graph.

    .. math::
        \hat x = \mathrm{VAE}(x)\cdot 1[x>0] + w^T\,\mathrm{Encoder}_{mask}(\mathrm{relu}(h_u + h_p))

    with :math:`h_u` and :math:`h_p` as in :class:`GEARS`, and an encoder in whose attention a gene sees only genes
    that share a pathway with it, and itself. It runs once per distinct perturbation, on the mask's edges alone.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    gene_net, perturbation_net
        As in :class:`GEARS`.
    pathway_net
        Pairs of genes that may attend to each other (:func:`scpert.pp.pathway_mask`); a measured gene that no pathway holds
        (``attrs["outside"]``; without it, one that has no partner) takes its neighbours in ``gene_net``. ``None``: ``gene_net`` for all. Pairs of targets in it are one more
        graph of the linear graph model: make the mask of measured genes and targets together, from the lowest pathways
        (``level=1``).
    n_hidden, n_heads, n_feedforward
        Widths of the encoder; heads divide ``n_hidden``.
    n_latent
        Dimensions of the VAE.
    use_vae, use_attention, use_mask
        The article's ablations: the control cell itself as base; the cross-gene layer of GEARS in the place of
        attention; attention between all genes.
    autofocus, direction_weight, direction_temperature
        As in :class:`GEARS`.
    kl_weight
        Weight of the VAE's KL; that of its reconstruction error is 1.
    cell_hidden
        Widths of the VAE's encoder; its decoder mirrors them.
    cell_output
        ``"softplus"`` or ``"linear"``.
    n_layers
        Encoder layers.
    anchor, gene_weight, published
        As in :class:`GEARS`.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5, n_combinations=0)
    >>> scpert.model.BioDSNN.setup_anndata(adata)
    >>> model = scpert.model.BioDSNN(adata, n_hidden=8, n_feedforward=16)
    >>> model.train(max_epochs=1, accelerator="cpu")
    >>> model.predict_perturbation(level="cell", n_samples=2).n_obs
    10
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        gene_net: pd.DataFrame | None = None,
        perturbation_net: pd.DataFrame | Mapping[str, pd.DataFrame] | None = None,
        pathway_net: pd.DataFrame | None = None,
        n_hidden: int = 64,
        n_heads: int = 2,
        n_feedforward: int = 512,
        n_latent: int = 16,
        use_vae: bool = True,
        use_attention: bool = True,
        use_mask: bool = True,
        autofocus: float = 2.0,
        direction_weight: float = 0.1,
        kl_weight: float = 1e-3,
        *,
        direction_temperature: float = 0.1,
        cell_hidden: tuple[int, ...] = (32,),
        cell_output: str = "softplus",
        n_layers: int = 1,
        anchor: str = "graph",
        gene_weight: Any = None,
        published: bool = False,
        registry: dict | None = None,
    ):
        super().__init__(adata, registry)
        _check_sizes(
            n_hidden=n_hidden, n_heads=n_heads, n_feedforward=n_feedforward, n_latent=n_latent, n_layers=n_layers
        )
        _check_weights(autofocus=autofocus, direction_weight=direction_weight, kl_weight=kl_weight)
        check_positive("direction_temperature", direction_temperature)
        if n_hidden % n_heads:
            raise ScpertError(
                f"n_hidden={n_hidden} cannot be shared by n_heads={n_heads}: choose a divisor of n_hidden."
            )
        check_choice("cell_output", cell_output, ("softplus", "linear"))
        gene_net, perturbation_net, pathway_net = self._setup(
            gene_net=gene_net,
            perturbation_net=perturbation_net,
            pathway_net=pathway_net,
            anchor=anchor,
            published=published,
        )
        gene_weight = _gene_weight(gene_weight, self.genes_)
        cell_hidden = tuple(check_whole("cell_hidden", h) for h in np.atleast_1d(np.asarray(cell_hidden)).tolist())
        self._remember(locals())
        self._build(0)

    def _network(self) -> GraphModule:
        o = self._options
        mask = self._mask(o["gene_net"], o["pathway_net"], o["use_mask"]) if o["use_attention"] else None
        knowledge = KnowledgeStream(
            self._gene_adjacency,
            self._target_adjacencies,
            mask,
            n_hidden=o["n_hidden"],
            n_heads=o["n_heads"],
            n_feedforward=o["n_feedforward"],
            n_layers=o["n_layers"],
        )
        cell = None
        if o["use_vae"] and self.scale_ != K.SCALE_EFFECTS:
            cell = CellStream(
                self.n_genes, n_latent=o["n_latent"], hidden=tuple(o["cell_hidden"]), output=o["cell_output"]
            )
        return GraphModule(
            knowledge,
            cell,
            len(self.labels_),
            self.scale_,
            autofocus=o["autofocus"],
            direction_weight=o["direction_weight"],
            direction_temperature=o["direction_temperature"],
            kl_weight=o["kl_weight"],
            gene_weight=o["gene_weight"],
        )

    def get_latent_representation(self, adata: AnnData | None = None, *, batch_size: int | None = None) -> np.ndarray:
        """Mean of the VAE's latent for each cell, float32 ``(cell, latent)``."""
        self._check_trained()
        if self.module.cell is None:
            raise ScpertError(
                "This BioDSNN has no VAE (use_vae=False, or a table of effects): there is no latent space."
            )
        screen = self._screen_of(adata, labels=False)
        out = []
        with torch.inference_mode():
            for _, block in screen.chunks(chunk=batch_size or 1024):
                x = torch.as_tensor(block.toarray(), dtype=torch.float32, device=self.device)
                out.append(self.module.cell.encode(x)[0].cpu().numpy())
        return np.concatenate(out)


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        check_whole(name, value)


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        check_positive(name, value, zero=True)


def _gene_weight(value: Any, genes: Sequence[str]) -> np.ndarray | None:
    if value is None:
        return None
    if isinstance(value, pd.Series):
        missing = [g for g in genes if g not in value.index]
        if missing:
            raise ScpertError(f"gene_weight has no value for {listing(missing, 5)}.")
        value = value.loc[list(genes)]
    weight = np.asarray(value, dtype=np.float32).ravel()
    if len(weight) != len(genes) or not np.isfinite(weight).all() or (weight < 0).any() or weight.sum() == 0:
        raise ScpertError(f"gene_weight: give {len(genes)} finite numbers >= 0, not all zero (or a Series by gene).")
    return weight / weight.mean()
