"""One self-contained HTML page about a quickstart run: tables and figures are embedded."""

from __future__ import annotations

import base64
import html
import io
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import _keys as K
from ._files import written_whole

if TYPE_CHECKING:
    from anndata import AnnData
    from matplotlib.figure import Figure

    from ._quickstart import QuickstartResult

__all__ = ["write_report"]

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
p.lead { color: #555; margin-top: .2rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #eee; vertical-align: top; }
th { background: #f6f6f6; font-weight: 600; } td:first-child, th:first-child, td.text { text-align: left; }
tr.me td { font-weight: 600; background: #fff8e8; } tr.top td { color: #555; font-style: italic; }
.warn { color: #9a5b00; } .fail { color: #b00020; } .ok { color: #2d7a3e; }
.row { display: flex; flex-wrap: wrap; gap: 1rem; } .row figure { flex: 1 1 30%; min-width: 240px; }
figure { margin: .5rem 0; } figure img { max-width: 100%; }
figcaption { font-size: .82rem; color: #555; } code { background: #f4f4f4; padding: 0 .2rem; }
"""


def _number(value: Any) -> str:
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.3g}"
    return str(value)


def _table(frame: pd.DataFrame, row_class: dict[str, str] | None = None, index: bool = True) -> str:
    """An HTML table; numbers with three digits, all text escaped."""
    head = ([""] if index else []) + [str(c) for c in frame.columns]
    lines = ["<table><thead><tr>", *[f"<th>{html.escape(h)}</th>" for h in head], "</tr></thead><tbody>"]
    for name, row in frame.iterrows():
        kind = (row_class or {}).get(str(name), "")
        cells = ([str(name)] if index else []) + [_number(v) for v in row]
        marks = ([""] if index else []) + [
            "" if isinstance(v, int | float | np.number) else ' class="text"' for v in row
        ]
        lines.append(f'<tr class="{kind}">')
        for cell, mark in zip(cells, marks, strict=True):
            colour = f' class="text {cell}"' if cell in ("ok", "warn", "fail") else mark
            lines.append(f"<td{colour}>{html.escape(cell)}</td>")
        lines.append("</tr>")
    return "".join([*lines, "</tbody></table>"])


def _figure(figure: Figure, path: Path, caption: str) -> str:
    """Write the figure beside the report and embed it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    path.write_bytes(buffer.getvalue())
    code = base64.b64encode(buffer.getvalue()).decode()
    alt = html.escape(caption)
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{code}"><figcaption>{alt}</figcaption></figure>'


def _new_axes(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.subplots()


def write_report(
    result: QuickstartResult,
    *,
    audit: pd.DataFrame,
    origin: str,
    digest: str,
    observed: AnnData,
    library_size_key: str | None,
    split: str,
) -> Path:
    """Write ``report.html`` and ``figures/`` into ``result.out``."""
    from . import pl
    from ._quickstart import METRICS, NAMES, score_table

    folder = result.out / "figures"
    folder.mkdir(exist_ok=True)
    adata, model = result.adata, result.model
    name = type(model).__name__
    body: list[str] = []

    table = score_table(result.scores)
    classes = {name: "me", table.index[-1]: "top"}
    body += ["<h2>How good is the prediction?</h2>", _table(table, classes)]
    mine = result.scores[result.scores["model"] == name].set_index("metric")
    top: Any = mine.loc["pearson_delta"]
    if np.isfinite(top["score"]):
        verdict = (
            f"On cells that no model saw, {name} reaches a calibrated score of {top['score']:.2f} "
            f"(limits {top['lower']:.2f} to {top['upper']:.2f}) on the scale where 0 is the mean effect of all perturbations "
            "and 1 a replicate of the test cells."
        )
    else:
        verdict = f"Verdict on the shift: {top['verdict']}."
    body.append(
        f"<p>{html.escape(verdict)} Metrics are means over {int(top['n'])} perturbations; limits come from resampling them.</p>"
    )
    body.append(
        "<p>The ceiling is one half of the test cells predicting the other half. A model that learned from more cells than "
        "such a half has less noise than it, and may exceed it: a score above 1.</p>"
    )
    body.append(
        _figure(
            _score_figure(result.scores),
            folder / "scores.png",
            "Correlation of predicted and observed shift, by model.",
        )
    )

    body.append("<h2>Predicted against observed</h2><div class='row'>")
    order = result.per_perturbation["pearson_delta"].dropna().sort_values(ascending=False)
    picks = {"best": 0, "median": len(order) // 2, "worst": len(order) - 1} if len(order) else {}
    done: set[str] = set()
    for title, i in picks.items():
        label = str(order.index[i])
        if label in done:
            continue
        done.add(label)
        ax = _new_axes(4, 4)
        pl.predicted_vs_observed(result.prediction, observed, label, library_size_key=library_size_key, ax=ax)
        body.append(_figure(ax.get_figure(), folder / f"predicted_vs_observed_{title}.png", f"{title}: {label}"))
    body.append("</div>")
    if len(order):
        ax = _new_axes(9, 3.4)
        pl.top_genes(result.prediction, observed, str(order.index[0]), library_size_key=library_size_key, ax=ax)
        body.append(
            _figure(
                ax.get_figure(),
                folder / "top_genes.png",
                f"Genes that {order.index[0]} shifts most, in the test cells, and what {name} predicted.",
            )
        )

    body.append("<h2>Gene regulatory network</h2>")
    net = result.grn
    body.append(
        f"<p>{len(net)} edges pass a false discovery rate of 5 % in the training cells: total effects of a perturbation on "
        "a gene, direct and indirect. Regulators that are not among the measured genes are kept.</p>"
    )
    ax = _new_axes(9, 6)
    pl.grn(net, n_edges=40, ax=ax)
    body.append(_figure(ax.get_figure(), folder / "grn.png", f"The {min(40, len(net))} strongest edges."))
    if len(net):
        body.append(_table(net.head(15), index=False))

    body.append("<h2>Data</h2>")
    counts = pd.crosstab(adata.obs[K.PERTURBATION].astype(str).to_numpy(), adata.obs[K.SPLIT].astype(str).to_numpy())
    body.append(
        f"<p>{html.escape(origin)}: {adata.n_obs} cells, {adata.n_vars} genes, {len(counts) - 1} perturbations.</p>"
    )
    body.append(
        "<p>Readiness of the file as it came: <span class='ok'>ok</span>, <span class='warn'>warn</span> (read the advice, the "
        "run goes on), <span class='fail'>fail</span> (this use is not possible).</p>"
    )
    body.append(_table(audit, index=False))
    body.append(f"<h2>Split</h2><p>Kind: <code>{split}</code>. Cells by part:</p>{_table(counts)}")

    if model.history:
        ax = _new_axes(5, 3.2)
        pl.training(model, ax=ax)
        body += ["<h2>Training</h2>", _figure(ax.get_figure(), folder / "training.png", f"Training of {name}.")]

    body.append("<h2>Every perturbation</h2>")
    body.append(_table(result.per_perturbation[list(METRICS)].rename(columns=NAMES)))

    versions = {}
    for package in ("scpert", "anndata", "scanpy", "scvi-tools", "torch", "numpy", "scipy", "pandas"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    seed = adata.uns[K.UNS]["quickstart"]["random_state"]
    provenance = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "data (SHA-256)": digest,
        "seed": str(seed),
        "model": repr(model),
        "Python": platform.python_version(),
        **versions,
        **{f"time: {k}": f"{v:.1f} s" for k, v in result.seconds.items()},
    }
    body.append("<h2>Provenance</h2>" + _table(pd.DataFrame({"value": pd.Series(provenance)})))

    title = f"scpert quickstart: {html.escape(origin)}"
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p class='lead'>{name} beside its baselines and the noise ceiling, on held-out cells.</p>{''.join(body)}</body></html>"
    )
    path = result.out / "report.html"
    with written_whole(path) as draft:
        draft.write_text(page, encoding="utf-8")
    return path


def _score_figure(scores: pd.DataFrame) -> Figure:
    """Bars of the delta correlation of every model between no skill and ceiling, with limits of the calibrated score."""
    part = scores[scores["metric"] == "pearson_delta"].iloc[::-1]
    ax = _new_axes(6.5, 0.5 + 0.42 * (len(part) + 1))
    value = part["value"]
    ax.barh(
        np.arange(len(part)), value, color=["#E69F00" if i == len(part) - 1 else "#B8C7D3" for i in range(len(part))]
    )
    ax.set_yticks(np.arange(len(part)), part["model"])
    ax.axvline(float(part["ceiling"].iloc[0]), color="#222", ls="--", lw=1)
    ax.annotate(
        "ceiling", (float(part["ceiling"].iloc[0]), len(part) - 0.45), fontsize=8, ha="center", annotation_clip=False
    )
    ax.set_xlabel("correlation of predicted and observed shift (test cells)")
    ax.spines[["top", "right"]].set_visible(False)
    return ax.get_figure()
