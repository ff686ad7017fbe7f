"""From a benchmark's table to a ranking, as a table and as a page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .._checks import check_seed, listing
from ..errors import ScpertError
from ..metrics._summary import NOTHING
from ._page import write_html
from ._run import BASELINE, CEILING, COLUMNS, MISMATCHED, costs

__all__ = ["leaderboard"]


def leaderboard(
    results: pd.DataFrame | str | os.PathLike,
    *,
    metrics: Sequence[str] | None = None,
    stratum: str | None = None,
    n_boot: int = 1000,
    random_state: int = 0,
    path: str | os.PathLike | None = None,
) -> pd.DataFrame:
    """Rank the models of a benchmark, beside the training mean and the ceiling.

    Values are means over perturbations (of all seeds). Limits come from a bootstrap over perturbations, in which all seeds
    of one perturbation are drawn together. ``score`` is the calibrated score of :func:`scpert.metrics.summarise`.

    Parameters
    ----------
    results
        The table of :func:`run`, or its folder.
    metrics
        By default all that have a best value.
    stratum
        Only perturbations of this stratum (``single``, ``seen0``, ``seen1``, ``seen2``, ...).
    n_boot, random_state
        Bootstrap.
    path
        Where to write the page (one self-contained HTML file).

    Returns
    -------
    DataFrame, one row per task, metric and model, best first: ``task``, ``metric``, ``model``, ``rank`` (1 is best; models
    without a value come last), ``value``, ``score``, ``lower``, ``upper``, ``difference`` (against the training mean,
    positive is better; no limits are claimed for a gain where a replicate has none, and no model is ranked above the mean), ``difference_lower``, ``difference_upper``, ``pvals``, ``n`` (perturbations), ``fallback``
    (share of the perturbations that the model knew nothing of), ``failed`` (seeds that failed), ``seconds`` and
    ``peak_megabytes`` (per seed), ``verdict``. ``attrs["questions"]``: what each task asks.

    Examples
    --------
    >>> import tempfile
    >>> import scpert
    >>> adata = scpert.datasets.simulated(500, 40, 10, random_state=0)
    >>> task = scpert.benchmark.Task("small", adata, "perturbations", metrics=("mse",), n_draws=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     results = scpert.benchmark.run([task], ["NoChange"], seeds=[0], out=folder)
    >>> scpert.benchmark.leaderboard(results)["model"].nunique()
    3
    """
    random_state = check_seed(random_state)
    from ..metrics import METRICS, compare, summarise

    spent = costs(results)
    if not isinstance(results, pd.DataFrame):
        results = pd.read_parquet(Path(results) / "results.parquet")
    missing = [c for c in COLUMNS if c not in results.columns]
    if missing:
        raise ScpertError(
            f"results lacks the column(s) {listing(missing)}: give the table that scpert.benchmark.run returned."
        )
    if stratum is not None:
        there = sorted(set(results["stratum"]) - {""})
        if stratum not in there:
            raise ScpertError(f"stratum={stratum!r} is not in the results, which have {listing(there) or 'none'}.")
        results = results[(results["stratum"] == stratum) | (results["status"] == "failed")]
    available = [m for m in results["metric"].unique() if m in METRICS and METRICS[m].best is not None]
    if not available:
        why = ", ".join(sorted(set(results["message"].astype(str)) - {""})[:3]) or "no metric has a best value"
        raise ScpertError(f"Nothing to rank: no cell of the benchmark has a value to rank by ({why}).")
    wanted = available if metrics is None else [metrics] if isinstance(metrics, str) else list(metrics)
    unknown = [m for m in wanted if m not in available]
    if unknown:
        raise ScpertError(
            f"The metric(s) {listing(unknown)} are not in the results, which have {listing(available, 40)}."
        )
    rows: list[dict[str, Any]] = []
    for task, part in results.groupby("task", sort=False):
        failed = part[part["status"] == "failed"].groupby("model")["seed"].nunique()
        done = part[part["status"] == "ok"]
        wide = {model: _wide(table) for model, table in done.groupby("model", sort=False)}
        models = [m for m in dict.fromkeys(part["model"]) if m != MISMATCHED]
        nothing = pd.DataFrame(np.nan, index=next(iter(wide.values())).index if wide else [], columns=wanted)
        base, top = wide.get(BASELINE, nothing), wide.get(CEILING, nothing)
        if MISMATCHED in wide:
            top = top.copy()
            top.attrs["mismatched"] = {m: wide[MISMATCHED][m].dropna().to_dict() for m in wide[MISMATCHED]}
        for model in models:
            mine = spent[(spent["task"] == task) & (spent["model"] == model)] if len(spent) else spent
            record: dict[str, Any] = {
                "task": task,
                "model": model,
                "failed": int(failed.get(model, 0)),
                "seconds": float(mine["seconds"].mean()) if len(mine) else np.nan,
                "peak_megabytes": float(mine["peak_megabytes"].mean()) if len(mine) else np.nan,
            }
            if model not in wide:
                first = part[(part["model"] == model) & (part["status"] == "failed")]["message"].iloc[0]
                rows += [record | {"metric": m, "verdict": f"failed: {first}"} for m in wanted]
                continue
            table = wide[model]
            knows = done[done["model"] == model].drop_duplicates(["seed", "perturbation"])["known"]
            record["fallback"] = float((knows == "fallback").mean())
            use = [m for m in wanted if m in table.columns]
            table = _set_rows(table, METRICS)
            given = table.notna()
            if model not in (BASELINE, CEILING):
                table = _filled(table, base)
            cluster = pd.Series([row.split("\0")[0] for row in table.index], index=table.index)
            options: dict[str, Any] = {"clusters": cluster, "n_boot": n_boot, "random_state": random_state}
            scores = summarise(table, base, top, metrics=use, **options)
            paired = compare(table, base, metrics=use, **options)
            for m in use:
                s, p = scores.loc[m], paired.loc[m]
                rows.append(
                    record
                    | {
                        "metric": m,
                        "value": float(table[m].mean()),
                        "n": int(cluster.reindex(given.index)[given[m]].nunique()),
                        **{k: s[k] for k in ("score", "lower", "upper", "verdict")},
                        "difference": p["difference"],
                        "difference_lower": p["lower"],
                        "difference_upper": p["upper"],
                        "pvals": p["pvals"],
                    }
                )
    board = _no_claims(pd.DataFrame(rows, columns=list(BOARD)), METRICS)
    order = {t: i for i, t in enumerate(results["task"].unique())}
    board["rank"] = _ranks(board, METRICS)
    board = board.sort_values(
        ["task", "metric", "rank", "model"],
        key=lambda c: (
            c.map(order)
            if c.name == "task"
            else c.map({m: i for i, m in enumerate(wanted)})
            if c.name == "metric"
            else c
        ),
        kind="stable",
    ).reset_index(drop=True)
    board.attrs["questions"] = dict(results.groupby("task", sort=False)["question"].first())
    if path is not None:
        write_html(board, path)
    return board


BOARD = (
    *("task", "metric", "model", "rank", "value", "score", "lower", "upper"),
    *("difference", "difference_lower", "difference_upper", "pvals"),
    *("n", "fallback", "failed", "seconds", "peak_megabytes", "verdict"),
)


def _wide(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each perturbation and seed, one column for each metric."""
    table = table.assign(row=table["perturbation"].astype(str) + "\0" + table["seed"].astype(str))
    return table.pivot_table(index="row", columns="metric", values="value", aggfunc="first", dropna=False, sort=False)


def _filled(table: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """What a model gave no value for (a failed seed, a perturbation left out) counts as the training mean's: nobody gains by silence."""
    there = [m for m in table.columns if m in base.columns and table[m].notna().any()]
    rows = table.index.union(base.index, sort=False)
    out, stand_in = table.reindex(rows), base.reindex(rows)
    out[there] = out[there].fillna(stand_in[there])
    return out


def _set_rows(table: pd.DataFrame, known: Any) -> pd.DataFrame:
    return table[[c for c in table.columns if c in known]]


def _loss(value: pd.Series, info: Any) -> pd.Series:
    return (value - info.best).abs() if info.target else -value if info.best == 1 else value


def _no_claims(board: pd.DataFrame, known: Any) -> pd.DataFrame:
    """Where a replicate has no gain over the training mean, claim none for a model.

    Correlations and retrieval are judged one by one. Errors are not (a replicate of half the cells has noise of its own,
    which a shrunken prediction has not): they have nothing to predict only where no other metric has, but for one in ten that
    chance alone may clear; metrics that are undefined have no say.
    """
    for _, part in board.groupby("task"):
        nothing = part["verdict"].astype(str).str.startswith(NOTHING)
        relative = part["metric"].map(lambda m: known[m].chance is not None)
        hopeless = set(part.loc[nothing & relative, "metric"])
        told = set(part.loc[relative & part["score"].notna(), "metric"]) - hopeless
        if hopeless and 10 * len(told) <= len(told | hopeless):
            hopeless |= set(part["metric"])
            failed = part["verdict"].astype(str).str.startswith("failed")
            bare = part.index[~nothing & ~failed & part["score"].isna() & part["metric"].isin(hopeless)]
            board.loc[bare, "verdict"] = f"{NOTHING}: no metric tells a replicate from the training mean"
        rows = part.index[part["metric"].isin(hopeless)]
        gain = rows[board.loc[rows, "difference"].to_numpy(dtype=float) > 0]
        board.loc[gain, ["difference_lower", "difference_upper", "pvals"]] = np.nan
        errors = part.index[nothing & ~relative & ~part["metric"].isin(hopeless)]
        board.loc[errors, "verdict"] = NO_SCORE
    return board


NO_SCORE = "no score: a replicate of half the cells has more error than the training mean; see the difference"


def _ranks(board: pd.DataFrame, known: Any) -> pd.Series:
    out = pd.Series(np.nan, index=board.index)
    for (_, m), part in board[board["model"] != CEILING].groupby(["task", "metric"]):
        loss = _loss(part["value"], known[m]).map(lambda x: float(f"{x:.5g}"))
        base = loss[part["model"] == BASELINE]
        if part["verdict"].str.startswith(NOTHING).any() and len(base):
            loss = loss.clip(lower=base.iloc[0])
        out[part.index] = loss.rank(method="min", na_option="bottom")
    return out.fillna(0).astype(int)
