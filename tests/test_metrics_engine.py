"""Kernels against scipy, scikit-learn, scanpy and POT."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control, mannwhitneyu, wasserstein_distance

import scpert
from scpert.metrics import _distribution as dist
from scpert.metrics._de import RankSum, auroc, average_precision, wilcoxon


def _matrix(seed: int, n: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.8, (n, 25)).astype(np.float32)
    counts[:, 3] = 0
    if kind == "counts":
        return counts
    if kind == "logs":
        return np.log1p(counts * rng.random((n, 1)).astype(np.float32))
    if kind == "signed":
        return counts * rng.choice([-1, 1], counts.shape).astype(np.float32)
    return rng.random((n, 25)).astype(np.float32)


@pytest.mark.parametrize("kind", ["counts", "logs", "signed", "dense"])
@pytest.mark.parametrize("sizes", [(60, 41), (200, 7), (5, 1)])
def test_rank_sum_is_scipys(kind, sizes):
    control, group = _matrix(0, sizes[0], kind), _matrix(1, sizes[1], kind)
    engine = RankSum(sparse.csr_matrix(control))
    for continuity in (True, False):
        z, p = engine.test(sparse.csr_matrix(group), continuity=continuity)
        with np.errstate(invalid="ignore", divide="ignore"):
            want = mannwhitneyu(
                group.astype(float), control.astype(float), axis=0, method="asymptotic", use_continuity=continuity
            )
        expected = np.where(np.isnan(want.pvalue), 1.0, want.pvalue)  # a gene that is equal in all cells
        np.testing.assert_allclose(p, expected, rtol=1e-10, atol=1e-12)
        off = want.statistic - sizes[0] * sizes[1] / 2
        assert (np.sign(z[np.abs(off) > 0.5]) == np.sign(off[np.abs(off) > 0.5])).all()


@pytest.fixture(scope="module")
def screen():
    return scpert.datasets.simulated(500, 60, 6, n_combinations=1, random_state=3)


@pytest.mark.parametrize("tie_correct", [True, False])
def test_wilcoxon_is_scanpys(screen, tie_correct):
    import scanpy as sc

    logs = screen.copy()
    logs.X = scpert.data.Screen(screen).rows(np.arange(screen.n_obs))
    logs.layers.clear()
    if tie_correct is False:  # scanpy's z of genes without any count is 0/0 there
        logs = logs[:, np.asarray(logs.X.sum(axis=0)).ravel() > 0].copy()
    logs.uns["log1p"] = {"base": None}
    ours = wilcoxon(logs, continuity=False, tie_correct=tie_correct)
    logs.obs["perturbation"] = pd.Categorical(logs.obs["perturbation"].astype(str))
    sc.tl.rank_genes_groups(logs, "perturbation", reference="control", method="wilcoxon", tie_correct=tie_correct)
    for label in logs.obs["perturbation"].cat.categories.drop("control"):
        theirs = sc.get.rank_genes_groups_df(logs, group=str(label)).set_index("names")
        mine = ours[ours["perturbation"] == label].set_index("gene")
        theirs = theirs.loc[mine.index]
        np.testing.assert_allclose(mine["zscore"], theirs["scores"], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(mine["pvals"], theirs["pvals"], rtol=1e-5, atol=1e-12)


def test_wilcoxon_adjusts_within_each_perturbation(screen):
    table = wilcoxon(screen)
    part = table[table["perturbation"] == table["perturbation"].iloc[0]]
    np.testing.assert_allclose(part["pvals_adj"], false_discovery_control(part["pvals"]))


def test_wilcoxon_reads_backed_files(screen, tmp_path):
    import anndata

    screen.write_h5ad(tmp_path / "s.h5ad")
    backed = anndata.read_h5ad(tmp_path / "s.h5ad", backed="r")
    pd.testing.assert_frame_equal(wilcoxon(backed), wilcoxon(screen))
    backed.file.close()


def test_curves_are_sklearns():
    from sklearn.metrics import average_precision_score, roc_auc_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        labels, scores = rng.random(80) < 0.3, np.round(rng.normal(size=80), 1)
        assert average_precision(labels, scores) == pytest.approx(average_precision_score(labels, scores))
        assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    assert np.isnan(auroc(np.zeros(5, bool), np.arange(5.0)))
    assert np.isnan(average_precision(np.ones(5, bool), np.arange(5.0)))


def test_distances_are_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(700, 12)), rng.normal(size=(1100, 12)) + 0.5
    assert dist.mean_distance(x, y) == pytest.approx(cdist(x, y).mean(), rel=1e-9)
    assert dist.within_distance(x) == pytest.approx(cdist(x, x).mean(), rel=1e-9)
    want = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    assert dist.energy(x, y) == pytest.approx(want, rel=1e-8)
    assert dist.energy(x, x.copy()) == 0


@pytest.mark.parametrize("sizes", [(40, 40), (37, 50), (3, 8), (1, 5)])
def test_wasserstein_is_scipys(sizes):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(sizes[0], 6)), rng.normal(size=(sizes[1], 6)) + 1
    want = [wasserstein_distance(x[:, j], y[:, j]) for j in range(6)]
    np.testing.assert_allclose(dist.wasserstein_1d(x, y), want)


def test_squared_wasserstein_is_pots():
    import ot

    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(37, 4)), rng.normal(size=(50, 4)) + 1
    want = [ot.wasserstein_1d(x[:, j], y[:, j], p=2) for j in range(4)]
    np.testing.assert_allclose(dist.wasserstein_1d(x, y, 2), want, rtol=1e-8)


def test_mmd_is_its_definition():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 3)), rng.normal(size=(20, 3)) + 1
    both = np.vstack([x, y])
    square = cdist(both, both, "sqeuclidean")
    median = np.median(square[np.triu_indices(50, 1)])
    total = 0.0
    for factor in (0.5, 1, 2):
        k = np.exp(-square / (2 * factor**2 * median))
        total += k[:30, :30][~np.eye(30, dtype=bool)].mean() + k[30:, 30:][~np.eye(20, dtype=bool)].mean()
        total -= 2 * k[:30, 30:].mean()
    assert dist.mmd2(x, y) == pytest.approx(total / 3)


def test_neighbour_graph_is_scanpys():
    import scanpy as sc
    from anndata import AnnData

    for seed, n in ((0, 33), (1, 9)):
        points = np.random.default_rng(seed).random((n, 20))
        points[: n // 2] += 0.3
        table = AnnData(X=points)
        k = min(15, n - 1)
        sc.pp.neighbors(table, n_neighbors=k, use_rep="X")
        ours = dist.fuzzy_graph(points, k)
        assert np.abs((ours - table.obsp["connectivities"]).toarray()).max() < 1e-5


def test_clusters_need_igraph_or_say_so(screen):
    table = scpert.metrics.evaluate(scpert.metrics.pseudobulk(screen), screen, metrics=["clustering_agreement"])
    value = table["clustering_agreement"].iloc[0]
    try:
        import igraph  # noqa: F401
    except ModuleNotFoundError:
        assert np.isnan(value)
        assert "igraph" in table.attrs["reasons"]["clustering_agreement"]["all"]
    else:
        assert value == pytest.approx(1.0) or value == 0.0  # one cluster only: no agreement to speak of


def test_parity_with_cell_eval(screen, tmp_path):
    """The common metrics agree to 1e-6 where cell-eval is installed (scpert[eval])."""
    cell_eval = pytest.importorskip("cell_eval", reason="install scpert[eval] to compare with cell-eval")
    logs = scpert.data.Screen(screen)
    adata = screen.copy()
    adata.X = logs.rows(np.arange(adata.n_obs)).astype(np.float64)
    adata.layers.clear()
    rng = np.random.default_rng(0)
    predicted = adata[rng.permutation(adata.n_obs)].copy()
    predicted.X = sparse.csr_matrix(predicted.X.multiply(rng.uniform(0.7, 1.3, predicted.shape)))
    evaluator = cell_eval.MetricsEvaluator(
        predicted, adata, control_pert="control", pert_col="perturbation", num_threads=1, outdir=str(tmp_path)
    )
    theirs = evaluator.compute(write_csv=False)[0].to_pandas().set_index("perturbation").astype(float)
    ours = scpert.metrics.evaluate(predicted, adata).loc[theirs.index]
    for name in theirs.columns.intersection(ours.columns):
        both = theirs[name].notna() & ours[name].notna()
        np.testing.assert_allclose(ours.loc[both, name], theirs.loc[both, name], atol=1e-6, err_msg=name)


def test_adjusted_mutual_information_is_scikit_learns():
    from sklearn.metrics import adjusted_mutual_info_score

    from scpert.metrics._distribution import adjusted_mutual_information

    rng = np.random.default_rng(0)
    for _ in range(50):
        n = rng.integers(4, 60)
        a, b = rng.integers(0, rng.integers(1, 8), n), rng.integers(0, rng.integers(1, 8), n)
        assert adjusted_mutual_information(a, b) == pytest.approx(adjusted_mutual_info_score(a, b), abs=1e-12)
    assert adjusted_mutual_information(np.arange(9), np.arange(9)) == 1.0


def test_halves_of_a_reference_read_cells_of_their_own():
    adata = scpert.datasets.simulated(300, 30, 4, 0, random_state=0)
    reference = scpert.metrics.Reference(adata)
    options = {"metrics": ["wasserstein"], "n_draws": 2, "random_state": 0}
    fresh = scpert.metrics.ceiling(reference, **options)
    for label in reference.perturbations:
        reference.cells(label)  # the whole groups are in memory now
    again = scpert.metrics.ceiling(reference, **options)
    other = scpert.metrics.ceiling(reference, **(options | {"random_state": 1}))
    assert np.array_equal(fresh, again)
    assert not np.allclose(fresh, other)
