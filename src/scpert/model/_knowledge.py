"""Prior knowledge about genes as features: annotations, nets and embeddings, all as unit vectors whose products are kernels."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from .. import _keys as K
from .._checks import check_net, listing
from ..errors import ScpertError

__all__ = ["GeneFeatures", "read_knowledge"]

logger = logging.getLogger("scpert")

GENE, TERM = "gene", "term"


@dataclass
class GeneFeatures:
    """One table of knowledge as unit feature vectors of genes.

    The kernel of two genes is the product of their vectors, so every kernel is symmetric and positive semi-definite,
    whatever the table was.

    Attributes
    ----------
    name, kind
        Name given by the user; ``"annotations"``, ``"net"`` or ``"embedding"``.
    genes
        Genes that the table knows something of.
    values
        CSR ``(gene, feature)``, rows of length 1.
    content
        Information content by which the features were weighted, ``(feature,)``; ``None`` for an embedding.
    """

    name: str
    kind: str
    genes: pd.Index
    values: sparse.csr_matrix
    content: np.ndarray | None = None

    @cached_property
    def known(self) -> frozenset[str]:
        """The genes as a set."""
        return frozenset(self.genes)

    def rows(self, genes: Sequence[str]) -> sparse.csr_matrix:
        """Vectors of ``genes``; a zero row for a gene that the table does not know."""
        where = self.genes.get_indexer(pd.Index(list(genes), dtype=object))
        inside = np.flatnonzero(where >= 0)
        pick = sparse.csr_matrix((np.ones(len(inside)), (inside, where[inside])), shape=(len(where), len(self.genes)))
        return (pick @ self.values).tocsr()

    def kernel(self, a: Sequence[str], b: Sequence[str] | None = None) -> np.ndarray:
        """Similarities in [-1, 1], float64 ``(len(a), len(b))``; 1 for a known gene with itself, 0 for unknown ones."""
        left = self.rows(a)
        right = left if b is None else self.rows(b)
        return np.clip((left @ right.T).toarray(), -1.0, 1.0)

    def coherent(self, genes: Sequence[str], scores: np.ndarray, prior_pairs: float = 20.0) -> GeneFeatures:
        r"""The same genes, with features weighted by how alike the effects of the genes are that share them.

        The coherence of a feature is the mean of :math:`u_i^\top u_j` over the pairs of its genes, shrunk with the weight of
        ``prior_pairs`` pairs to the mean coherence of the features that have about as many genes; a feature is weighted by its
        root. The features of each gene of ``genes`` are weighted without this gene's own pairs, so that what is learned
        from its leave-one-out prediction has not seen its effect here.

        Parameters
        ----------
        genes
            Distinct genes whose effects are known.
        scores
            :math:`u`, ``(gene, component)``: effects as unit vectors, or their leading components.
        """
        if self.content is None:
            return self
        member = self.rows(genes)
        member.data = np.ones_like(member.data)
        own = (scores**2).sum(axis=1)
        total = member.T @ scores
        count = np.asarray(member.sum(axis=0)).ravel()
        together, pairs = (total**2).sum(axis=1) - member.T @ own, count * (count - 1)
        size = np.bincount(self.values.indices, minlength=self.values.shape[1])
        group = np.minimum(np.log2(np.maximum(size, 1)).astype(np.int64), 9)
        overall = max(float(together.sum() / max(pairs.sum(), 1.0)), 0.0)
        has = pairs > 0
        summed = np.bincount(group[has], together[has] / pairs[has], minlength=10) + 5 * overall
        prior = np.maximum(summed / (np.bincount(group[has], minlength=10) + 5), 1e-3)[group]
        least = 0.02 * float(prior.max(initial=0.0))

        weight = np.sqrt(np.maximum((together + prior_pairs * prior) / (pairs + prior_pairs), least))
        raw = sparse.csr_matrix(self.values @ sparse.diags_array(1.0 / self.content)).tocoo()
        values = raw.data * weight[raw.col]
        where = pd.Index(list(genes), dtype=object).get_indexer(self.genes)[raw.row]
        known = np.flatnonzero(where >= 0)
        for at in np.array_split(known, len(known) // 50_000 + 1):
            i, t = where[at], raw.col[at]
            without = together[t] - 2 * (np.einsum("ij,ij->i", scores[i], total[t]) - own[i])
            less = pairs[t] - 2 * (count[t] - 1)
            values[at] = raw.data[at] * np.sqrt(
                np.maximum((without + prior_pairs * prior[t]) / (less + prior_pairs), least)
            )
        weighted = sparse.csr_matrix((values, (raw.row, raw.col)), shape=raw.shape)
        return GeneFeatures(self.name, self.kind, *_unit(weighted, self.genes.to_numpy(dtype=object)), self.content)


def _unit(values: sparse.csr_matrix, genes: np.ndarray) -> tuple[pd.Index, sparse.csr_matrix]:
    length = np.sqrt(np.asarray(values.multiply(values).sum(axis=1)).ravel())
    keep = np.flatnonzero(length > 1e-12)
    scale = sparse.diags_array(1.0 / length[keep])
    return pd.Index(np.asarray(genes, dtype=object)[keep]), sparse.csr_matrix(scale @ values[keep])


def _annotations(name: str, table: pd.DataFrame) -> GeneFeatures:
    pairs = table[[GENE, TERM]].dropna().astype(str).drop_duplicates()
    pairs = pairs[(pairs[GENE] != "") & (pairs[TERM] != "")]
    gene, genes = pd.factorize(pairs[GENE].to_numpy(dtype=object), sort=True)
    term, terms = pd.factorize(pairs[TERM].to_numpy(dtype=object), sort=True)
    member = sparse.csr_matrix((np.ones(len(pairs)), (gene, term)), shape=(len(genes), len(terms)))
    size = np.asarray(member.sum(axis=0)).ravel()
    content = np.log((1 + len(genes)) / size)
    weighted = sparse.csr_matrix(member @ sparse.diags_array(content))
    return GeneFeatures(name, "annotations", *_unit(weighted, genes), content)


def _net(name: str, table: pd.DataFrame) -> GeneFeatures:
    net = check_net(table, f"knowledge[{name!r}]")
    if len(net) == 0:
        raise ScpertError(
            f"knowledge[{name!r}] has no edge between two different genes: it says nothing. Leave it out or give edges."
        )
    weight = net[K.WEIGHT].to_numpy()
    code, genes = pd.factorize(np.concatenate([net[K.SOURCE], net[K.TARGET]]).astype(object), sort=True)
    i, j = np.split(code, 2)
    n = len(genes)
    edges = pd.DataFrame({"edge": np.concatenate([i * n + j, j * n + i]), "weight": np.concatenate([weight, weight])})
    edges = edges.iloc[np.lexsort((edges["weight"], edges["weight"].abs()))].drop_duplicates("edge", keep="last")
    both = sparse.csr_matrix(
        (edges["weight"], np.divmod(edges["edge"].to_numpy(), n)), shape=(n, n)
    )  # the stronger direction
    strongest = abs(both).max(axis=1).toarray().ravel()
    linked = both + sparse.diags_array(np.where(strongest > 0, strongest, 0.0))
    degree = np.maximum(np.asarray((linked != 0).sum(axis=0)).ravel(), 1)
    content = np.log((1 + n) / degree)
    weighted = sparse.csr_matrix(linked @ sparse.diags_array(content))
    return GeneFeatures(name, "net", *_unit(weighted, genes), content)


def _embedding(name: str, table: pd.DataFrame) -> GeneFeatures:
    values = table.to_numpy(dtype=np.float64)
    if not np.isfinite(values).all():
        bad = table.index[~np.isfinite(values).all(axis=1)]
        raise ScpertError(
            f"knowledge[{name!r}] has NaN or infinite numbers for {len(bad)} gene(s), e.g. {listing(bad, 3)}. Drop these rows: "
            "genes that are missing from a table are handled."
        )
    genes = table.index.astype(str)
    if not genes.is_unique:
        raise ScpertError(
            f"knowledge[{name!r}] has more than one row for {listing(genes[genes.duplicated()].unique(), 5)}. Keep one row a gene "
            "(table.groupby(level=0).mean())."
        )
    centred = values - values.mean(axis=0) if len(values) > 2 else values
    return GeneFeatures(name, "embedding", *_unit(sparse.csr_matrix(centred), genes.to_numpy(dtype=object)))


def read_knowledge(knowledge: Mapping[str, pd.DataFrame] | pd.DataFrame | None) -> dict[str, GeneFeatures]:
    r"""Tables of prior knowledge as unit vectors of genes.

    Parameters
    ----------
    knowledge
        Name -> table, told apart by its columns: annotations (``gene``, ``term``), a net (``source``, ``target``, optional
        ``weight``) or an embedding (genes as index, numbers as columns). One table alone gets the name ``"knowledge"``.

    Returns
    -------
    Name -> features. An annotation is weighted by its information content
    :math:`\log(N / n_\mathrm{term})`; a gene of a net is described by its neighbours and itself, a neighbour being weighted by
    the information content of its degree, an edge with two directions by the stronger one; an embedding is centred.

    Raises
    ------
    ScpertError
        If a table is none of the three, is empty, has NaN or more than one row for a gene.
    """
    if knowledge is None:
        return {}
    if isinstance(knowledge, pd.DataFrame):
        knowledge = {"knowledge": knowledge}
    if not isinstance(knowledge, Mapping):
        raise ScpertError(
            f"knowledge must map names to tables, e.g. {{'go': annotations}}; got {type(knowledge).__name__}."
        )
    out: dict[str, GeneFeatures] = {}
    for name, table in knowledge.items():
        if not isinstance(table, pd.DataFrame):
            raise ScpertError(f"knowledge[{name!r}] must be a DataFrame; got {type(table).__name__}.")
        if len(table) == 0 or table.shape[1] == 0:
            raise ScpertError(f"knowledge[{name!r}] is empty. Leave it out or give rows.")
        out[str(name)] = _features_of(str(name), table)
    return out


def _features_of(name: str, table: pd.DataFrame) -> GeneFeatures:
    columns = set(map(str, table.columns))
    if {GENE, TERM} <= columns:
        return _annotations(name, table)
    if {K.SOURCE, K.TARGET} <= columns:
        return _net(name, table)
    if all(pd.api.types.is_numeric_dtype(t) for t in table.dtypes) and not pd.api.types.is_numeric_dtype(
        table.index.dtype
    ):
        return _embedding(name, table)
    raise ScpertError(
        f"knowledge[{name!r}] has the columns {listing(table.columns, 8)}, which is none of: annotations (columns gene, term), "
        "a net (columns source, target and optional weight), an embedding (genes as index, only numbers as columns). "
        "Rename the columns with table.rename(columns=...)."
    )


def usable(features: Mapping[str, GeneFeatures], targets: Sequence[str], model: str) -> dict[str, GeneFeatures]:
    """The tables that know at least two of the training targets; the others are named in a warning."""
    out = {}
    for name, f in features.items():
        known = sum(t in f.known for t in targets)
        if known < 2:
            logger.warning(
                "%s: knowledge[%r] knows %d of the %d training targets (it has genes such as %s, the data %s): it is ignored. "
                "Bring both to the same kind of gene names.",
                model,
                name,
                known,
                len(targets),
                listing(f.genes, 3),
                listing(targets, 3),
            )
        else:
            logger.info(
                "%s: knowledge[%r] (%s) knows %d of the %d training targets", model, name, f.kind, known, len(targets)
            )
            out[name] = f
    return out


def as_options(knowledge: Any) -> Any:
    """The knowledge as it is kept in a saved model."""
    if knowledge is None or isinstance(knowledge, pd.DataFrame):
        return knowledge
    return {str(k): v for k, v in knowledge.items()}
