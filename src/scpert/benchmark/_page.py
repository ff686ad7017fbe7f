"""The leaderboard as one light, self-contained page: text, small inline drawings, no pictures of tables."""

from __future__ import annotations

import html
import io
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .._files import written_whole
from ..metrics import METRICS
from ..metrics._summary import NOTHING
from ._run import BASELINE, CEILING

__all__ = ["write_html"]

#: What is shown first where it is there: a specific correlation, an error, a retrieval.
HEADLINES = (
    *("pearson_delta_centroid", "mse", "retrieval_cosine_no_targets", "centroid_accuracy"),
    *("pearson_delta", "wmse", "discrimination_score_l1"),
)
NAMES = {BASELINE: "training mean (scores 0)", CEILING: "ceiling: a replicate (scores 1)"}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:1280px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.4rem;border-bottom:1px solid #ddd}
p{max-width:62rem}.note{color:#555;font-size:.9rem}
.wide{overflow-x:auto}table{border-collapse:collapse;margin:.6rem 0;font-size:13px}
th,td{padding:.22rem .5rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th{background:#f6f6f6;font-weight:600;vertical-align:bottom;white-space:normal;max-width:9rem}th:first-child,td:first-child,td.t{text-align:left}
td.t{color:#555}tr.bad td.t{white-space:normal}tr.ref td{background:#fafafa;color:#555;font-style:italic}
.best{font-weight:700;background:#e8f3ea}.up{color:#1d6b34}.down{color:#a32020}.nil{color:#8a5a00}tr.bad td{color:#a32020}
summary{cursor:pointer;color:#345}svg text{font-family:system-ui,sans-serif}figure{margin:1rem 0}td svg{vertical-align:middle}figure svg{max-width:100%;height:auto}
"""

_INTRO = (
    "<p>Every model beside the mean of the training perturbations, which scores 0, and a replicate of the experiment (one "
    "half of the cells against the other), which scores 1. Limits are 95 %, from a bootstrap over perturbations. A model has "
    "shown something where its whole interval lies right of 0. Where a replicate is not clearly better than the training mean "
    "there is nothing to predict, and no score. <b>Fallback</b> is the share of perturbations with a target that the model knew "
    "nothing of: the mean effect stands in for it (in NoChange no effect). Values marked <span class=best>so</span> are the "
    "best of the models.</p>"
)


def write_html(board: pd.DataFrame, path: str | os.PathLike) -> None:
    """One self-contained page: all tasks at a glance, mean ranks, then for each task the models, best first."""
    body = ["<h1>Leaderboard</h1>", _INTRO, _overview(board), _ranks(board)]
    body += [
        _task(str(task), part, board.attrs.get("questions", {})) for task, part in board.groupby("task", sort=False)
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Leaderboard</title><style>{_STYLE}</style>{''.join(body)}</html>"
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as draft:
        draft.write_text(page, encoding="utf-8")


# ---------------------------------------------------------------------------------------------- text


def _number(x: Any, digits: int = 3) -> str:
    """Fixed digits; three significant ones where those would show zeros."""
    if pd.isna(x):
        return ""
    return f"{x:.3g}" if 0 < abs(x) < 10.0**-digits else f"{x:.{digits}f}"


def _table(head: Iterable[str], rows: Iterable[tuple[str, Sequence[tuple[str, str]]]]) -> str:
    """``rows``: class of the row, and class and (escaped) content of each cell ("raw": the whole cell)."""
    lines = ["<div class=wide><table><tr>", *[f"<th>{h}</th>" for h in head], "</tr>"]
    for kind, cells in rows:
        lines.append(f"<tr class={kind}>" if kind else "<tr>")
        lines += [x if c == "raw" else f"<td class={c}>{x}</td>" if c else f"<td>{x}</td>" for c, x in cells]
        lines.append("</tr>")
    return "".join([*lines, "</table></div>"])


def _kind(model: str) -> str:
    return "ref" if model in NAMES else ""


def _title(model: str) -> str:
    return html.escape(NAMES.get(model, model))


def _hopeless(part: pd.DataFrame) -> bool:
    """Nothing to predict, by one metric in one task."""
    return bool(part["verdict"].astype(str).str.startswith(NOTHING).any())


def _headline(part: pd.DataFrame) -> str:
    """The first of the headlines by which a task can be scored: a choice that no model has a part in."""
    there = list(part["metric"].unique())
    order = [m for m in HEADLINES if m in there] + [m for m in there if m not in HEADLINES]
    scored = set(part.loc[(part["model"] == CEILING) & part["score"].notna(), "metric"])
    return next((m for m in order if m in scored), order[0])


def _direction(row: Any) -> str:
    return "up" if row.lower > 0 else "down" if row.upper < 0 else ""


def _order(part: pd.DataFrame, metric: str) -> list[str]:
    """Ceiling first; then the models by rank, failed ones last."""
    rows = part[part["metric"] == metric].assign(top=lambda t: t["model"] != CEILING, bad=lambda t: t["value"].isna())
    return list(rows.sort_values(["top", "bad", "rank", "model"], kind="stable")["model"])


# ---------------------------------------------------------------------------------------------- parts


def _overview(board: pd.DataFrame) -> str:
    tasks = {str(task): (_headline(part), part) for task, part in board.groupby("task", sort=False)}
    models = [m for m in dict.fromkeys(board["model"]) if m not in NAMES]
    cells: dict[str, dict[str, Any]] = {m: {} for m in models}
    for task, (metric, part) in tasks.items():
        for scored in part[part["metric"] == metric].itertuples():
            if scored.model in cells:
                cells[str(scored.model)][str(task)] = scored
    mean = {m: np.mean([r.rank for r in cells[m].values()]) if cells[m] else np.inf for m in models}
    head = [
        "model",
        *[f"{html.escape(str(t))}<br><small>{html.escape(metric)}</small>" for t, (metric, _) in tasks.items()],
    ]
    empty = {t: _hopeless(part[part["metric"] == metric]) for t, (metric, part) in tasks.items()}
    rows = []
    row: Any
    for model in sorted(models, key=lambda m: (mean[m], m)):
        line = [("", _title(model))]
        for task in tasks:
            row = cells[model].get(task)
            if row is None or str(row.verdict).startswith("failed"):
                line.append(("down", "" if row is None else "failed"))
            elif empty[task]:
                line.append(("nil", "nothing to predict"))
            elif pd.isna(row.score):
                line.append(("nil", "no score"))
            else:
                limits = (
                    "" if pd.isna(row.lower) else f" <small>[{_number(row.lower, 2)}, {_number(row.upper, 2)}]</small>"
                )
                line.append((_direction(row), f"{_number(row.score, 2)}{limits}"))
        rows.append(("", line))
    return (
        "<h2>All tasks at a glance</h2><p class=note>Calibrated score and limits by the metric under each task: green is better "
        "than the training mean, red worse. Sorted by mean rank.</p>" + _table(head, rows)
    )


def _ranks(board: pd.DataFrame) -> str:
    if board["task"].nunique() < 2 or board["model"].nunique() < 4:
        return ""
    shown = [m for m in HEADLINES if m in set(board["metric"])][:2] or [board["metric"].iloc[0]]
    return "<h2>Mean ranks over the tasks</h2>" + "".join(f"<figure>{_svg(board, m)}</figure>" for m in shown)


def _svg(board: pd.DataFrame, metric: str) -> str:
    """Critical differences as SVG with text as text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    from ..errors import ScpertError
    from ..pl._benchmark import leaderboard as draw

    figure = Figure(figsize=(8, 1 + 0.24 * board["model"].nunique()))
    FigureCanvasSVG(figure)
    try:
        draw(board, metric=metric, kind="critical_difference", ax=figure.add_subplot(), show=False)
    except ScpertError as error:
        return f"<p class=note>{html.escape(str(error))}</p>"
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": metric}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)


def _task(task: str, part: pd.DataFrame, questions: dict[str, str]) -> str:
    metric = _headline(part)
    shown = [metric, *[m for m in HEADLINES if m in set(part["metric"]) and m != metric]][:4]
    order = _order(part, metric)
    row_of: dict[tuple[str, str], Any] = {(str(r.model), str(r.metric)): r for r in part.itertuples()}
    n = part["n"].max()
    about = [html.escape(questions.get(task, "")), "" if pd.isna(n) else f"{n:.0f} tested"]
    none = [m for m in dict.fromkeys(part["metric"]) if _hopeless(part[part["metric"] == m])]
    every = {m for m in part["metric"] if m in METRICS and METRICS[m].higher_is_better is not None} <= set(none)
    out = [f"<h2>{html.escape(task)}</h2><p>{', '.join(x for x in about if x)}.</p>"]
    if none:
        which = "by any metric" if every else "by " + ", ".join(f"<code>{html.escape(m)}</code>" for m in none)
        out.append(
            f"<p class=nil><b>Nothing to predict here</b> {which}: a replicate is not clearly better than the mean.</p>"
        )
    head = ["model", *[_column(m) for m in shown], f"score<br><small>{html.escape(metric)}</small>", "limits"]
    head += ["verdict", "fallback", "seconds", "MB"]
    best = {m: _best(part, m) for m in shown}
    rows = []
    for model in order:
        row = row_of[model, metric]
        if str(row.verdict).startswith("failed"):
            message = f"<td class=t colspan={len(head) - 1}>{html.escape(str(row.verdict))}</td>"
            rows.append(("bad", [("", _title(model)), ("raw", message)]))
            continue
        cells = [("", _title(model))]
        for m in shown:
            value = row_of[model, m].value if (model, m) in row_of else np.nan
            cells.append(("best" if model in best[m] else "", _number(value)))
        limits = "" if pd.isna(row.lower) or model in NAMES else f"{_number(row.lower, 2)} to {_number(row.upper, 2)}"
        cells += [("", _bar(row)), (_direction(row), limits), ("t", "" if model in NAMES else _verdict(row))]
        known = "" if pd.isna(row.fallback) or model in NAMES else f"{100 * row.fallback:.0f} %"
        cells += [("", known), ("", "" if pd.isna(row.seconds) else f"{row.seconds:.2f}")]
        cells.append(("", "" if pd.isna(row.peak_megabytes) else f"{row.peak_megabytes:.0f}"))
        rows.append((_kind(model), cells))
    out += [_table(head, rows), _details(part, order, row_of)]
    return "".join(out)


def _verdict(row: Any) -> str:
    failed = f"; {row.failed} seed(s) failed" if row.failed else ""
    short = str(row.verdict).split(":")[0].replace(" than the training mean", "")
    return html.escape(short.replace("not clearly different from the training mean", "no clear difference")) + failed


def _column(metric: str) -> str:
    return html.escape(metric).replace("_", "_<wbr>") + _arrow(metric)


def _arrow(metric: str) -> str:
    higher = METRICS[metric].higher_is_better if metric in METRICS else None
    return "" if higher is None else " &uarr;" if higher else " &darr;"


def _best(part: pd.DataFrame, metric: str) -> set[str]:
    """The models of the best value; none where there is nothing to predict."""
    rows = part[(part["metric"] == metric) & ~part["model"].isin(list(NAMES)) & part["value"].notna()]
    if rows.empty or _hopeless(part[part["metric"] == metric]):
        return set()
    return set(rows.loc[rows["rank"] == rows["rank"].min(), "model"])


def _bar(row: Any) -> str:
    """Score and limits on a line from -0.5 to 1.5, with the mean at 0 and the replicate at 1."""
    if pd.isna(row.score):
        return ""

    def x(value: float) -> float:
        return 70 * (min(max(value, -0.5), 1.5) + 0.5) + 5

    colour = {"up": "#1d6b34", "down": "#a32020"}.get(_direction(row), "#456")
    marks = "".join(f'<path d="M{x(v):.0f} 1V15" stroke="#bbb" stroke-dasharray="2"/>' for v in (0, 1))
    if not pd.isna(row.lower):
        marks += f'<path d="M{x(row.lower):.1f} 8H{x(row.upper):.1f}" stroke="{colour}" stroke-width="2"/>'
    marks += f'<circle cx="{x(row.score):.1f}" cy="8" r="3.5" fill="{colour}"/>'
    return f'{_number(row.score, 2)} <svg width="150" height="16">{marks}</svg>'


def _details(part: pd.DataFrame, order: list[str], row_of: dict[tuple[str, str], Any]) -> str:
    metrics = list(dict.fromkeys(part["metric"]))
    best = {m: _best(part, m) for m in metrics}

    def matrix(cell: Any) -> str:
        rows = []
        for model in order:
            line = [("", _title(model))]
            line += [cell(row_of[model, m]) if (model, m) in row_of else ("", "") for m in metrics]
            rows.append((_kind(model), line))
        return _table(["model", *map(_column, metrics)], rows)

    def value(row: Any) -> tuple[str, str]:
        return "best" if row.model in best[row.metric] else "", _number(row.value)

    def gain(row: Any) -> tuple[str, str]:
        if pd.isna(row.difference) or row.model == BASELINE:
            return "", ""
        if pd.isna(row.difference_lower):
            return "", _number(row.difference)
        kind = "up" if row.difference_lower > 0 else "down" if row.difference_upper < 0 else ""
        limits = f"[{_number(row.difference_lower)}, {_number(row.difference_upper)}]"
        return kind, f"{_number(row.difference)} <small>{limits}</small>"

    return (
        f"<details><summary>All {len(metrics)} metrics</summary>{matrix(value)}</details>"
        "<details><summary>Differences from the training mean, with limits (positive is better)</summary>"
        f"{matrix(gain)}</details>"
    )
