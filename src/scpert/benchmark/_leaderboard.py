"""From a benchmark's table to a ranking, as a table and as a page."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .._checks import listing
from ..errors import ScpertError
from ..metrics._summary import NOTHING
from ._run import BASELINE, CEILING, COLUMNS, MISMATCHED, costs

__all__ = ["leaderboard", "write_html"]


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
    ``peak_megabytes`` (per seed), ``verdict``.

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
            cluster = pd.Series([row.split("\0")[0] for row in table.index], index=table.index)
            options: dict[str, Any] = {"clusters": cluster, "n_boot": n_boot, "random_state": random_state}
            table = _set_rows(table, METRICS)
            scores = summarise(table, base, top, metrics=use, **options)
            paired = compare(table, base, metrics=use, **options)
            for m in use:
                s, p = scores.loc[m], paired.loc[m]
                rows.append(
                    record
                    | {
                        "metric": m,
                        "value": float(table[m].mean()),
                        "n": int(cluster[table[m].notna()].nunique()),
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


def _set_rows(table: pd.DataFrame, known: Any) -> pd.DataFrame:
    return table[[c for c in table.columns if c in known]]


def _loss(value: pd.Series, info: Any) -> pd.Series:
    return (value - info.best).abs() if info.target else -value if info.best == 1 else value


def _no_claims(board: pd.DataFrame, known: Any) -> pd.DataFrame:
    """Where a replicate has no gain over the training mean, claim none for a model.

    Correlations and retrieval are judged one by one. Errors are not (a replicate of half the cells has noise of its own,
    which a shrunken prediction has not): they have nothing to predict only where no other metric has.
    """
    for _, part in board.groupby("task"):
        nothing = part["verdict"].astype(str).str.startswith(NOTHING)
        relative = part["metric"].map(lambda m: known[m].chance is not None)
        hopeless = set(part.loc[nothing & relative, "metric"])
        if relative.any() and hopeless >= set(part.loc[relative, "metric"]):
            hopeless |= set(part["metric"])
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


# ---------------------------------------------------------------------------------------------- page

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:80rem;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:1rem 0;font-size:13px}th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #ddd}
th{vertical-align:bottom}th:first-child,td:first-child{text-align:left}tr.ref{background:#f3f3f3;font-style:italic}
td.text{text-align:left;max-width:26rem}td.best{font-weight:700}td.up{background:#d5edd8}td.down{background:#f8dcd8}
svg{max-width:100%;height:auto}.note{color:#555;max-width:55rem}summary{cursor:pointer;font-weight:600;margin:.4rem 0}
"""

#: What the overview and the figures show first, of what was measured.
_FIRST = ("pearson_delta_centroid", "pearson_delta", "mse")

_NOTE = """<p class=note>Calibrated score: 0 is the mean of the training perturbations, 1 a replicate of the experiment (one half of
the cells against the other). Limits: 95 %, bootstrap over perturbations. <span style="background:#d5edd8">Green</span>: better than the
training mean, with limits that exclude zero; <span style="background:#f8dcd8">red</span>: worse. Bold: the best model of the task. Where a
replicate is not clearly better than the training mean there is nothing to predict, and no score. Fallback: share of the
perturbations that the model knew nothing of, so that it predicted the mean.</p>"""


def write_html(board: pd.DataFrame, path: str | os.PathLike) -> None:
    """One self-contained page: models by tasks, mean ranks, and for each task the forest plot and all tables."""
    metrics = list(board["metric"].unique())
    first = next((m for m in _FIRST if m in metrics), metrics[0])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Leaderboard</title><style>{_STYLE}</style>"
        f"<h1>Leaderboard</h1>{_NOTE}"
    ]
    for m in [first, *(m for m in metrics if m != first)]:
        part = board[board["metric"] == m]
        is_open = " open" if m == first else ""
        parts.append(f"<details{is_open}><summary>All tasks: {html.escape(m)}</summary>{_overview(part)}</details>")
    if ranks := _figure(board, first, "critical_difference"):
        parts.append(f"<h2>Mean ranks: {html.escape(first)}</h2>{ranks}")
    for task, part in board.groupby("task", sort=False):
        ceiling = part[(part["model"] == CEILING) & (part["metric"] == first)]["verdict"]
        verdict = f"<p>A replicate is {html.escape(str(ceiling.iloc[0]))}.</p>" if len(ceiling) else ""
        if len(ceiling) and not str(ceiling.iloc[0]).startswith("better"):
            verdict = f"<p>{html.escape(str(ceiling.iloc[0]).capitalize())}.</p>"
        parts.append(f"<h2>{html.escape(str(task))}</h2>{verdict}{_figure(part, first, 'forest')}")
        for m, rows in part.groupby("metric", sort=False):
            is_open = " open" if m == first else ""
            parts.append(f"<details{is_open}><summary>{html.escape(str(m))}</summary>{_rows(rows)}</details>")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    temporary.write_text("\n".join(parts), encoding="utf-8")
    os.replace(temporary, target)


def _number(x: Any, digits: int = 3) -> str:
    return "" if pd.isna(x) else f"{x:.{digits}f}"


def _judged(row: Any) -> str:
    """Class of a cell: limits of the difference from the training mean above or below zero."""
    if row.model in (BASELINE, CEILING):
        return ""
    return "up" if row.difference_lower > 0 else "down" if row.difference_upper < 0 else ""


def _overview(part: pd.DataFrame) -> str:
    """Models by tasks: the values of one metric, best mean rank first."""
    tasks = list(dict.fromkeys(part["task"]))
    ranks = part.groupby("model")["rank"].mean()
    order = sorted(ranks.index, key=lambda m: (m != CEILING, ranks[m], m))
    cells = {(row.model, row.task): row for row in part.itertuples()}
    lines = [
        "<table><tr><th>model</th><th>mean rank</th>" + "".join(f"<th>{html.escape(t)}</th>" for t in tasks) + "</tr>"
    ]
    for model in order:
        reference = model in (BASELINE, CEILING)
        line = f"<td>{html.escape(str(model))}</td><td>{'' if model == CEILING else _number(ranks[model], 1)}</td>"
        for task in tasks:
            row: Any = cells.get((model, task))
            if row is None or (pd.isna(row.value) and not str(row.verdict).startswith("failed")):
                line += "<td></td>"
            elif pd.isna(row.value):
                line += f"<td title='{html.escape(str(row.verdict), quote=True)}'>failed</td>"
            else:
                best = " best" if row.rank == 1 and not reference else ""
                line += f"<td class='{_judged(row)}{best}'>{_number(row.value)}</td>"
        lines.append(f"<tr{' class=ref' if reference else ''}>{line}</tr>")
    return "".join(lines) + "</table>"


def _rows(part: pd.DataFrame) -> str:
    head = ("model", "rank", "value", "score", "95 % limits", "against the mean", "n", "fallback", "seconds", "MB", "")
    lines = ["<table><tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr>"]
    row: Any
    for row in part.itertuples():
        reference = row.model in (BASELINE, CEILING)
        limits = f"{_number(row.lower, 2)} to {_number(row.upper, 2)}" if not pd.isna(row.lower) else ""
        cells = [
            html.escape(str(row.model)),
            "" if row.model == CEILING else str(row.rank),
            _number(row.value, 4),
            _number(row.score, 2),
            limits,
            _number(row.difference, 4),
            "" if pd.isna(row.n) else str(int(row.n)),
            "" if pd.isna(row.fallback) else f"{100 * row.fallback:.0f} %",
            _number(row.seconds, 1),
            _number(row.peak_megabytes, 0),
        ]
        kinds = ["", "", _judged(row) + (" best" if row.rank == 1 and not reference else ""), *[""] * 7]
        verdict = "" if reference else html.escape(str(row.verdict))
        lines.append(
            f"<tr{' class=ref' if reference else ''}>"
            + "".join(f"<td class='{k}'>{c}</td>" if k else f"<td>{c}</td>" for c, k in zip(cells, kinds, strict=True))
            + f"<td class=text>{verdict}</td></tr>"
        )
    return "".join(lines) + "</table>"


def _figure(board: pd.DataFrame, metric: str, kind: str) -> str:
    """Inline SVG with its text as text."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from ..pl._benchmark import leaderboard as draw

    part = board[board["metric"] == metric]
    if kind == "forest" and not part.loc[~part["model"].isin([BASELINE, CEILING]), "score"].notna().any():
        return ""
    if kind == "critical_difference" and (part["task"].nunique() < 2 or part["model"].nunique() < 4):
        return ""
    figure = Figure(figsize=(8, 1 + 0.26 * part["model"].nunique()))
    FigureCanvasSVG(figure)
    draw(board, metric=metric, kind=kind, ax=figure.add_subplot(), show=False)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scpert"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    drawing = buffer.getvalue()
    return drawing[drawing.index("<svg") :]
