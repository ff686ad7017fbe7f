"""Loaders of the public screens: standard form from the forms in which they are released, online and offline."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import threading
import types
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import ModuleSpec
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import scpert
from scpert.datasets import _screens
from scpert.errors import DownloadError, FileFormatError, LabelError, MissingKeyError, ScaleError, ScpertError

GENES = ["KLF1", "CBL", "CNN1", "GAPDH", "SPI1", "EIF2AK3"]


def screen(labels, column="perturbation", genes=GENES, X=None, **obs):
    counts = np.random.default_rng(0).poisson(2.0, (len(labels), len(genes))) + 1
    X = sparse.csr_matrix(counts.astype(np.float32)) if X is None else X
    frame = pd.DataFrame({column: labels, **obs}, index=[f"c{i}" for i in range(len(labels))])
    return ad.AnnData(X, obs=frame, var=pd.DataFrame(index=list(genes)))


@pytest.fixture
def write(tmp_path):
    def _write(adata, name="screen.h5ad"):
        adata.write_h5ad(tmp_path / name)
        return tmp_path / name

    return _write


def test_norman_scperturb_form(write):
    path = write(screen(["control", "KLF1", "CBL", "CNN1", "CNN1_CBL", "KLF1_CBL"], guide_id=list("abcdef")))
    adata = scpert.datasets.norman_2019(path)
    assert list(adata.obs["perturbation"]) == ["control", "KLF1", "CBL", "CNN1", "CBL+CNN1", "CBL+KLF1"]
    assert list(adata.obs["perturbation_as_published"])[4] == "CNN1_CBL"
    assert list(adata.obs["guide_id"]) == list("abcdef")
    assert adata.X.format == "csr"
    assert adata.uns["scpert"]["source"]["path"] == "screen.h5ad"


def test_norman_gears_form_and_standard_form(write):
    labels = ["ctrl", "KLF1+ctrl", "ctrl+CBL", "KLF1+CBL"]
    adata = scpert.datasets.norman_2019(write(screen(labels, column="condition")))
    assert list(adata.obs["perturbation"]) == ["control", "KLF1", "CBL", "CBL+KLF1"]
    again = scpert.datasets.norman_2019(write(adata, "again.h5ad"))
    assert list(again.obs["perturbation"]) == list(adata.obs["perturbation"])
    np.testing.assert_array_equal(again.X.toarray(), adata.X.toarray())


@pytest.mark.parametrize("loader", ["replogle_2022_k562_essential", "replogle_2022_rpe1"])
def test_replogle_takes_the_column_of_genes(write, loader):
    guides = ["chr1.10050_top_two_chr11.1801_top_two", "KLF1_P1P2_ENSG1", "CBL_P1_ENSG2", "nan"]
    adata = screen(guides, gene=["non-targeting", "KLF1", "CBL", "nan"])
    out = getattr(scpert.datasets, loader)(write(adata))
    assert list(out.obs["perturbation"]) == ["control", "KLF1", "CBL"]
    assert out.uns["scpert"]["source"]["unassigned_cells_dropped"] == 1
    assert list(out.obs_names) == ["c0", "c1", "c2"]


def test_adamson_constructs(write):
    labels = ["63(mod)_pBA580", "Gal4-4(mod)_pBA582", "SPI1_pDS255", "PERK_only_pMJ146", "*", None, "KLF1_pDS111"]
    adata = scpert.datasets.adamson_2016(write(screen(labels)))
    assert list(adata.obs["perturbation"]) == ["control", "control", "SPI1", "EIF2AK3", "KLF1"]
    assert adata.uns["scpert"]["source"]["unassigned_cells_dropped"] == 2


def test_dense_file_becomes_csr(write):
    dense = np.random.default_rng(1).poisson(1.0, (5, 6)).astype(np.float32) + np.eye(5, 6, dtype=np.float32)
    adata = screen(["control", "control", "KLF1", "CBL", "CNN1"], X=dense)
    adata.layers["spliced"] = sparse.csc_matrix(dense)
    adata.obsm["X_pca"] = np.ones((5, 2))
    out = scpert.datasets.replogle_2022_rpe1(write(adata))
    assert sparse.issparse(out.X) and out.X.format == "csr"
    np.testing.assert_array_equal(out.X.toarray(), dense)
    np.testing.assert_array_equal(out.layers["spliced"].toarray(), dense)
    assert out.obsm["X_pca"].shape == (5, 2)


def test_counts_layer_beside_log_values(write):
    adata = screen(["control", "KLF1", "CBL"])
    adata.layers["counts"] = adata.X.toarray()
    adata.X = sparse.csr_matrix(
        np.log1p(1e4 * adata.layers["counts"] / adata.layers["counts"].sum(axis=1, keepdims=True))
    )
    out = scpert.datasets.norman_2019(write(adata))
    assert out.layers["counts"].format == "csr"
    assert scpert.data.Screen(out).scale == "counts"


def test_neither_counts_nor_logs_is_refused(write):
    X = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    with pytest.raises(ScaleError, match="norman_2019: neither .* holds counts"):
        scpert.datasets.norman_2019(write(screen(["control", "KLF1", "CBL"], X=X)))


def test_symbols_replace_ensembl_identifiers(write):
    adata = screen(["control", "KLF1", "CBL"], genes=[f"ENSG0000000000{i}" for i in range(6)])
    adata.var["gene_name"] = ["KLF1", "CBL", "CBL", "nan", "SPI1", "GAPDH"]
    out = scpert.datasets.replogle_2022_k562_essential(write(adata))
    assert list(out.var_names) == ["KLF1", "CBL", "CBL-1", "ENSG00000000003", "SPI1", "GAPDH"]
    assert out.var["ensembl_id"].iloc[0] == "ENSG00000000000"


def test_key_and_control_by_hand(write):
    path = write(screen(["mine", "KLF1", "CBL"], column="label"))
    with pytest.raises(LabelError, match="none of the columns of labels .* 'label'"):
        scpert.datasets.norman_2019(path)
    adata = scpert.datasets.norman_2019(path, key="label", control="mine")
    assert list(adata.obs["perturbation"]) == ["control", "KLF1", "CBL"]
    with pytest.raises(MissingKeyError, match="key='lable' is not a column .* 'label'"):
        scpert.datasets.norman_2019(path, key="lable")


def test_no_control_or_no_assigned_cell(write):
    with pytest.raises(LabelError, match="control"):
        scpert.datasets.norman_2019(write(screen(["KLF1", "CBL"])))
    with pytest.raises(LabelError, match="No cell is assigned"):
        scpert.datasets.adamson_2016(write(screen(["*", "*"])))


def test_missing_truncated_and_foreign_files(write, tmp_path):
    with pytest.raises(FileFormatError, match="There is no file .*absent.h5ad"):
        scpert.datasets.norman_2019(tmp_path / "absent.h5ad")
    path = write(screen(["control", "KLF1"]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FileFormatError, match="cannot be read as an AnnData"):
        scpert.datasets.norman_2019(path)
    path.write_text("label\n")
    with pytest.raises(FileFormatError, match="cannot be read as an AnnData"):
        scpert.datasets.norman_2019(path)


def test_unknown_way(write):
    with pytest.raises(ScpertError, match="via='scPerturb' is not known"):
        scpert.datasets.norman_2019(via="scPerturb")


# ---------------------------------------------------------------------------------------------- download


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch, write):
    """A registry whose Norman screen lies on a loopback server."""
    folder = tmp_path / "server"
    folder.mkdir()
    path = write(screen(["control", "KLF1", "CBL", "KLF1_CBL"]), "server/norman.h5ad")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(scpert.settings, "cache_dir", tmp_path / "cache")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    entry = dataclasses.replace(
        _screens.REGISTRY["norman_2019"],
        url=f"http://127.0.0.1:{httpd.server_port}/norman.h5ad",
        md5=hashlib.md5(path.read_bytes()).hexdigest(),
    )
    monkeypatch.setitem(_screens.REGISTRY, "norman_2019", entry)
    yield types.SimpleNamespace(entry=entry, cache=tmp_path / "cache", stop=httpd.shutdown)
    httpd.shutdown()
    httpd.server_close()


def test_download_is_cached_and_its_origin_kept(served):
    adata = scpert.datasets.norman_2019(via="scperturb")
    assert list(adata.obs["perturbation"]) == ["control", "KLF1", "CBL", "CBL+KLF1"]
    source = adata.uns["scpert"]["source"]
    assert source["url"] == served.entry.url and len(source["sha256"]) == 64
    served.stop()  # from now on only the cache answers
    again = scpert.datasets.norman_2019(via="scperturb")
    np.testing.assert_array_equal(again.X.toarray(), adata.X.toarray())


def test_wrong_hash(served, monkeypatch):
    monkeypatch.setitem(_screens.REGISTRY, "norman_2019", dataclasses.replace(served.entry, md5="0" * 32))
    with pytest.raises(DownloadError, match="not the file that was expected"):
        scpert.datasets.norman_2019(via="scperturb")
    assert [p for p in served.cache.rglob("*") if p.is_file()] == []


def test_registry_is_complete():
    for name, entry in _screens.REGISTRY.items():
        assert callable(getattr(scpert.datasets, name))
        assert entry.url.startswith("https://") and entry.url.endswith(".h5ad")
        assert entry.md5 is None or len(entry.md5) == 32


# ---------------------------------------------------------------------------------------------- pertpy


@pytest.fixture
def pertpy(monkeypatch):
    module = types.ModuleType("pertpy")
    module.__spec__ = ModuleSpec("pertpy", None)
    module.data = types.SimpleNamespace(
        norman_2019=lambda: screen(["control", "KLF1", "CBL", "KLF1+CBL"], column="perturbation_name")
    )
    monkeypatch.setitem(sys.modules, "pertpy", module)
    return module


def test_pertpy_is_used_where_it_is_installed(pertpy):
    adata = scpert.datasets.norman_2019()
    assert list(adata.obs["perturbation"]) == ["control", "KLF1", "CBL", "CBL+KLF1"]
    assert adata.uns["scpert"]["source"]["via"] == "pertpy.data.norman_2019"


def test_pertpy_that_fails(pertpy):
    def fail():
        raise ConnectionError("no route")

    pertpy.data.norman_2019 = fail
    with pytest.raises(DownloadError, match="failed: ConnectionError: no route. Pass via='scperturb'"):
        scpert.datasets.norman_2019()
    with pytest.raises(DownloadError, match="pertpy's loader adamson_2016_upr_perturb_seq cannot be used"):
        scpert.datasets.adamson_2016()


def test_without_pertpy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pertpy", None)
    with pytest.raises(DownloadError, match=r"scpert\[loaders\]"):
        scpert.datasets.norman_2019(via="pertpy")


@pytest.mark.skipif("SCPERT_TEST_DATA" not in os.environ, reason="SCPERT_TEST_DATA is not set")
def test_real_norman_panel():
    path = Path(os.environ["SCPERT_TEST_DATA"]) / "norman2019_k562_crispra_perturbench.h5ad"
    adata = scpert.datasets.norman_2019(path)
    raw = ad.read_h5ad(path)
    assert adata.shape == raw.shape
    expected = ["+".join(sorted(str(label).split("+"))) for label in raw.obs["perturbation"]]
    assert list(adata.obs["perturbation"].astype(str)) == expected
