import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scpert
from scpert.errors import LabelError, MissingKeyError


def column(labels, genes=("G1", "G2"), dtype=object):
    obs = pd.DataFrame({"raw": pd.Series(list(labels), dtype=dtype)})
    obs.index = [f"c{i}" for i in range(len(obs))]
    return ad.AnnData(np.ones((len(obs), len(genes)), dtype=np.float32), obs=obs, var=pd.DataFrame(index=list(genes)))


def read(labels, genes=("G1", "G2"), **kwargs):
    adata = column(labels, genes)
    scpert.pp.annotate_perturbations(adata, "raw", **kwargs)
    return list(adata.obs["perturbation"].astype(str))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["ctrl", "KLF1+ctrl", "ctrl+CEBPA", "KLF1+CEBPA"], ["control", "KLF1", "CEBPA", "CEBPA+KLF1"]),
        (["NT", "A", "B", "B_A"], ["control", "A", "B", "A+B"]),
        (["NTC", "A;B"], ["control", "A+B"]),
        (["NT-5", "A|B", "B|A|C"], ["control", "A+B", "A+B+C"]),
        (["control", "A, B"], ["control", "A+B"]),
        (["non-targeting", "non_targeting", "Non-Targeting_00027", "NT_3", "sgNT-1"] + ["A"], ["control"] * 5 + ["A"]),
        (
            [
                "NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0",
                "KLF1_NegCtrl0__KLF1_NegCtrl0",
                "CBL_KLF1__CBL_KLF1",
                "NegCtrl0_CBL__NegCtrl0_CBL",
            ],
            ["control", "KLF1", "CBL+KLF1", "CBL"],
        ),
        (["NTg1", "IFNGR2g1", "IFNGR2g2"], ["control", "IFNGR2", "IFNGR2"]),
        (["NT", "KLF1_sg1", "KLF1-2", "sgKLF1_3", "KLF1_4", "KLF1_ACGTACGTACGTACGTACGT"], ["control"] + ["KLF1"] * 5),
        (
            ["NT", "CPQ_+_97657557.23-P1P2", "CPQ_-_97657557.23-P1P2|KLF1_+_12995238.23-P1"],
            ["control", "CPQ", "CPQ+KLF1"],
        ),
        (["NT", "KLF1_sg1;KLF1_sg2"], ["control", "KLF1"]),
        (["ctrl", "ENSG00000105610", "ENSG00000105610.5"], ["control", "ENSG00000105610", "ENSG00000105610"]),
        (
            ["control", "HLA-A", "NKX2-1", "lin-12", "MT-ND1", "RPS6KA1"],
            ["control", "HLA-A", "NKX2-1", "lin-12", "MT-ND1", "RPS6KA1"],
        ),
        (["WT", "WT1"], ["control", "WT1"]),
        (["control", "GATA1", "GATA1_enh", "HS2_enh"], ["control", "GATA1", "GATA1_enh", "HS2_enh"]),
        (["control", "B+A", "A"], ["control", "A+B", "A"]),
        (
            ["NT", "chr8:128045-128545", "chr8:128045-128545_2+KLF1", "KLF1"],
            ["control", "chr8:128045-128545", "KLF1+chr8:128045-128545", "KLF1"],
        ),
    ],
)
def test_reads(labels, expected):
    assert read(labels) == expected


def test_evidence_of_the_measured_genes():
    assert read(["control", "A_B"], genes=["A", "B"]) == ["control", "A+B"]
    assert read(["control", "A_B"], genes=["A_B", "C"]) == ["control", "A_B"]
    assert read(["control", "KLF1-2"], genes=["KLF1", "C"]) == ["control", "KLF1"]
    assert read(["control", "KLF1-2"], genes=["KLF1-2", "C"]) == ["control", "KLF1-2"]


@pytest.mark.parametrize(
    ("labels", "genes", "offending", "cure", "expected"),
    [
        (["control", "A_B", "C_D"], ["x", "y"], "C_D", {"delimiter": "_"}, ["control", "A+B", "C+D"]),
        (["control", "A_B", "C_D"], ["x", "y"], "A_B", {"delimiter": "+"}, ["control", "A_B", "C_D"]),
        (["control", "A_B", "A"], ["A", "B", "A_B"], "A_B", {"delimiter": "+"}, ["control", "A_B", "A"]),
        (["control", "QRS-2"], ["x", "y"], "QRS-2", {"guides": True}, ["control", "QRS"]),
        (["control", "QRS-2"], ["x", "y"], "QRS-2", {"guides": False}, ["control", "QRS-2"]),
        (["control", "A-B", "A", "B"], ["x", "y"], "A-B", {"delimiter": "-"}, ["control", "A+B", "A", "B"]),
        (
            ["NT", "safe-targeting", "A"],
            ["x", "y"],
            "safe-targeting",
            {"control": ["NT", "safe-targeting"]},
            ["control", "control", "A"],
        ),
    ],
)
def test_refuses_ambiguity_and_takes_the_answer(labels, genes, offending, cure, expected):
    with pytest.raises(LabelError, match=offending):
        read(labels, genes)
    assert read(labels, genes, **cure) == expected


@pytest.mark.parametrize(
    ("labels", "kwargs", "match"),
    [
        (["control", None, "A", np.nan], {}, "NaN in 2 of 4"),
        (["control", " ", "A"], {}, "empty"),
        (["control", "A+B;C"], {}, "more than one kind of delimiter"),
        (["control", "A+"], {}, "empty target"),
        (["A", "B"], {}, "control="),
        (["ctrl", "A"], {"control": "control"}, "ctrl"),
        (["ctrl", "A", "None"], {}, "'None'"),
        (["NT", "safe-targeting", "A"], {"control": "NT"}, "safe-targeting"),
    ],
)
def test_refuses(labels, kwargs, match):
    adata = column(labels)
    before = adata.copy()
    with pytest.raises(LabelError, match=match):
        scpert.pp.annotate_perturbations(adata, "raw", **kwargs)
    assert list(adata.obs.columns) == list(before.obs.columns) and not adata.uns


def test_missing_column_is_named():
    with pytest.raises(MissingKeyError, match="Did you mean 'raw'"):
        scpert.pp.annotate_perturbations(column(["control"]), "rav")


@pytest.mark.parametrize("dtype", [object, "category", "str", "string"])
def test_kinds_of_strings(dtype):
    adata = column(["NT", "A_sg1", "A_sg2"], dtype=dtype)
    scpert.pp.annotate_perturbations(adata, "raw")
    assert adata.obs["perturbation"].dtype == "category"
    assert list(adata.obs["perturbation"].cat.categories) == ["control", "A"]
    with pytest.raises(LabelError, match="NaN in 1"):
        scpert.pp.annotate_perturbations(column(["NT", "A", None], dtype=dtype), "raw")


def test_copy_view_idempotent_and_round_trip(tmp_path):
    adata = column(["NT", "A_sg1", "B", "A;B"])
    out = scpert.pp.annotate_perturbations(adata, "raw", copy=True)
    assert "perturbation" not in adata.obs
    again = scpert.pp.annotate_perturbations(out, "perturbation", copy=True)
    assert list(again.obs["perturbation"]) == list(out.obs["perturbation"])
    view = adata[:3]
    scpert.pp.annotate_perturbations(view, "raw")
    assert list(view.obs["perturbation"]) == ["control", "A", "B"]
    out.write_h5ad(tmp_path / "a.h5ad")
    out.write_zarr(tmp_path / "a.zarr")
    for back in (ad.read_h5ad(tmp_path / "a.h5ad"), ad.read_zarr(tmp_path / "a.zarr")):
        assert list(back.obs["perturbation"]) == list(out.obs["perturbation"])
        table = back.uns["scpert"]["annotate_perturbations"]["labels"]
        assert dict(zip(table["label"], table["perturbation"], strict=True))["A_sg1"] == "A"
