"""The command line: errors are one sentence and exit code 2."""

from __future__ import annotations

import re

import pytest

import scpert
from scpert.cli import main


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "screen.h5ad"
    scpert.datasets.simulated(n_cells=300, n_genes=30, n_targets=5, n_combinations=0, random_state=0).write_h5ad(path)
    return path


def _refused(capsys, *arguments: str) -> str:
    code = main(["quickstart", *arguments])
    error = capsys.readouterr().err.strip()
    assert code == 2
    assert error.startswith("scpert: ") and "Traceback" not in error
    assert len(error.splitlines()) == 1
    return error


def test_runs_and_prints_the_table(file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["quickstart", str(file), "--model", "perturbedmean", "--out", str(out), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "ceiling" in printed and str(out / "report.html") in printed
    assert (out / "results.h5ad").is_file()


def test_missing_file(tmp_path, capsys):
    assert "no file" in _refused(capsys, str(tmp_path / "nothing.h5ad"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_truncated_file(file, tmp_path, capsys):
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(file.read_bytes()[:3000])
    assert "truncated" in _refused(capsys, str(cut), "--out", str(tmp_path / "out"))


def test_unknown_model_is_corrected(file, tmp_path, capsys):
    assert re.search("gpovae", _refused(capsys, str(file), "--model", "gpovea", "--out", str(tmp_path / "out")), re.I)


def test_missing_column_names_those_there(file, tmp_path, capsys):
    error = _refused(capsys, str(file), "--perturbation-key", "perturbations", "--out", str(tmp_path / "out"))
    assert "'perturbations'" in error and "'perturbation'" in error


def test_missing_control(file, tmp_path, capsys):
    assert "'ctrl'" in _refused(capsys, str(file), "--control", "ctrl", "--out", str(tmp_path / "out"))


def test_output_folder_that_is_a_file(file, tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("mine")
    error = _refused(capsys, str(file), "--model", "perturbedmean", "--out", str(taken))
    assert "taken" in error
    assert taken.read_text() == "mine"


@pytest.mark.parametrize("option", [["--max-epochs", "0"], ["--max-epochs", "many"], ["--split", "rows"], ["--nope"]])
def test_bad_options(option, file):
    with pytest.raises(SystemExit) as stopped:
        main(["quickstart", str(file), *option])
    assert stopped.value.code == 2


def test_version_and_help(capsys):
    for option, text in (["--version", scpert.__version__], ["--help", "quickstart"]):
        with pytest.raises(SystemExit) as stopped:
            main([option])
        assert stopped.value.code == 0
        assert text in capsys.readouterr().out


def test_benchmark_options_and_total_failure(file, tmp_path, capsys):
    assert main(["benchmark", "--data", str(file), "--seeds", "x", "--out", str(tmp_path / "a")]) == 2
    assert "--seeds 'x': give numbers" in capsys.readouterr().err
    given = ["benchmark", "--data", str(file), "--split", "given", "--out", str(tmp_path / "b"), "--seeds", "1"]
    assert main([*given, "--models", "NoChange", "--metrics", "mse"]) == 1
    assert "Nothing could be computed" in capsys.readouterr().out
    other = scpert.datasets.simulated(n_cells=300, n_genes=30, n_targets=5, n_combinations=0, random_state=0)
    scpert.pp.split(other, kind="perturbations", key_added="part")
    other.write_h5ad(tmp_path / "other.h5ad")
    given[2], given[6] = str(tmp_path / "other.h5ad"), str(tmp_path / "c")
    assert (
        main([*given, "--split-key", "part", "--covariate-keys", "batch", "--models", "Additive", "--metrics", "mse"])
        == 0
    )
    assert "Additive" in capsys.readouterr().out
