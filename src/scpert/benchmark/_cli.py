"""``scpert benchmark``: the benchmark from the command line."""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ScpertError

__all__ = ["add_arguments", "main"]

logger = logging.getLogger("scpert")

MODELS = ("NoChange", "PerturbedMean", "Additive", "LinearPCA")


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments of ``scpert benchmark``."""
    parser.add_argument("--data", nargs="*", default=[], help="h5ad files; without any, the simulated tasks (--tasks)")
    parser.add_argument("--tasks", nargs="*", default=None, help="names of simulated tasks (scpert.benchmark.TASKS)")
    parser.add_argument(
        "--models", nargs="*", default=list(MODELS), help=f"names of models (default: {' '.join(MODELS)})"
    )
    parser.add_argument(
        "--split",
        nargs="*",
        default=["perturbations"],
        help="perturbations, combinations, cells, contexts, folds, given (default: perturbations)",
    )
    parser.add_argument("--seeds", default="3", help="number of seeds, or a list such as 0,1,2 (default: 3)")
    parser.add_argument("--out", required=True, help="folder; a run that was stopped goes on where it was")
    parser.add_argument("--perturbation-key", default="perturbation")
    parser.add_argument("--control", default="control")
    parser.add_argument("--layer", default=None)
    parser.add_argument("--scale", default="auto", help="counts, log1p, effects or auto")
    parser.add_argument("--library-size-key", default=None)
    parser.add_argument(
        "--covariate-keys", nargs="*", default=None, help="columns (batch, donor) within which effects are measured"
    )
    parser.add_argument(
        "--context-key", default=None, help="column of the contexts (cell line, donor), for --split contexts"
    )
    parser.add_argument("--split-key", default=None, help="column with train, val and test, for --split given")
    parser.add_argument("--fractions", default=None, help="shares of train, val, test, such as 0.7,0.1,0.2")
    parser.add_argument("--n-folds", type=int, default=None)
    parser.add_argument("--metrics", nargs="*", default=None)
    parser.add_argument("--max-epochs", type=int, default=None, help="for models that are trained in epochs")
    parser.add_argument(
        "--knowledge",
        nargs="*",
        default=[],
        metavar="NAME=FILE",
        help="tables for models that take knowledge (KNN, Ridge, KnowledgeGP, GPOVAE, GEARS, BioDSNN): csv, tsv or parquet with "
        "the columns gene and term, or source and target, or (not GEARS and BioDSNN) an embedding with the genes in the first column",
    )
    parser.add_argument("--dask", default=None, help="address of a Dask scheduler, or a number of local workers")
    return parser


def main(args: argparse.Namespace | Sequence[str] | None = None) -> int:
    """Run ``scpert benchmark``; returns the exit status.

    Parameters
    ----------
    args
        Parsed arguments, or a list of strings.

    Examples
    --------
    >>> from scpert.benchmark import add_arguments
    >>> import argparse
    >>> add_arguments(argparse.ArgumentParser()).parse_args(["--out", "somewhere"]).split
    ['perturbations']
    """
    if not isinstance(args, argparse.Namespace):
        args = add_arguments(argparse.ArgumentParser(prog="scpert benchmark")).parse_args(args)
    from . import TASKS, ModelSpec, Task, leaderboard, run
    from ._task import METRICS

    setup: dict[str, Any] = {
        "perturbation_key": args.perturbation_key,
        "control": args.control,
        "layer": args.layer,
        "scale": args.scale,
        "library_size_key": args.library_size_key,
        "covariate_keys": args.covariate_keys,
    }
    setup = {k: v for k, v in setup.items() if v is not None}
    options: dict[str, Any] = {}
    if args.fractions:
        options["fractions"] = _numbers("--fractions", args.fractions, float, "0.7,0.1,0.2")
    tasks: list[Any] = []
    for file in args.data:
        for split in args.split:
            extra: dict[str, Any] = {"n_folds": args.n_folds} if split == "folds" and args.n_folds else {}
            if split == "contexts" and args.context_key:
                extra["context_key"] = args.context_key
            name = f"{Path(file).stem}_{split}"
            tasks.append(
                Task(
                    name,
                    str(file),
                    split,
                    split_options=options | extra,
                    setup=setup,
                    **({"split_key": args.split_key} if split == "given" and args.split_key else {}),
                    metrics=tuple(args.metrics or METRICS),
                )
            )
    if args.tasks is not None:
        tasks += args.tasks or list(TASKS)
    elif not tasks:
        tasks = list(TASKS)
    train = {"max_epochs": args.max_epochs} if args.max_epochs else {}
    knowledge = _knowledge(args.knowledge)
    models = []
    for name in args.models:
        spec = ModelSpec(name, train=train)
        takes = inspect.signature(spec.resolve()).parameters
        nets = {key: table for key, table in knowledge.items() if _has_edges(table)}
        if "knowledge" in takes and knowledge:
            spec = replace(spec, options={"knowledge": knowledge})
        elif "knowledge" in takes:
            logger.warning("%s has no --knowledge: of unseen perturbations it can predict the mean effect only", name)
        elif "perturbation_net" in takes and nets:  # graph models know targets by nets and annotations
            spec = replace(spec, options={"perturbation_net": nets})
        models.append(spec)
    given = _numbers("--seeds", str(args.seeds), int, "3 or 0,1,2")
    seeds: Any = given[0] if "," not in str(args.seeds) else list(given)
    engine = _client(args.dask) if args.dask else None
    try:
        results = run(tasks, models, seeds=seeds, out=args.out, engine=engine)
    finally:
        if engine is not None:
            engine.close()
    if (results["status"] == "failed").all():
        first = results.drop_duplicates("message").head(3)
        print(
            "Nothing could be computed:",
            *(f"  {r.task} / {r.model}: {r.message}" for r in first.itertuples()),
            sep="\n",
        )
        return 1
    page = Path(args.out) / "leaderboard.html"
    board = leaderboard(results, path=page)
    board.to_csv(Path(args.out) / "leaderboard.csv", index=False)
    shown = [m for m in ("pearson_delta_centroid", "mse") if m in set(board["metric"])] or list(
        board["metric"].unique()
    )[:1]
    for metric in shown:
        part = board[board["metric"] == metric][
            ["task", "model", "rank", "value", "score", "lower", "upper", "fallback", "seconds", "verdict"]
        ]
        print(f"\n{metric}\n{part.to_string(index=False, float_format=lambda x: f'{x:.4g}')}")
    print(f"\nAll metrics: {page}")
    return 0


def _numbers(option: str, text: str, kind: type, example: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(x) for x in text.split(","))
    except ValueError:
        raise ScpertError(f"{option} {text!r}: give numbers, such as {example}.") from None


def _has_edges(table: Any) -> bool:
    """Whether a table holds annotations or a net; else it is an embedding."""
    return {"gene", "term"} <= set(table.columns) or {"source", "target"} <= set(table.columns)


def _knowledge(items: Sequence[str]) -> dict[str, Any]:
    """Tables by name from ``NAME=FILE``."""
    import pandas as pd

    out: dict[str, Any] = {}
    for item in items:
        name, found, file = item.partition("=")
        if not (name and found and file):
            raise ScpertError(f"--knowledge {item!r} is not NAME=FILE. Write, for example, --knowledge go=go.tsv.")
        kinds = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
        ending = Path(file.removesuffix(".gz")).suffix
        if not Path(file).is_file() or ending not in (*kinds, ".parquet"):
            raise ScpertError(
                f"--knowledge {item!r}: {'not a table that can be read' if Path(file).is_file() else 'there is no such file'}. Give "
                "a csv, tsv or parquet file."
            )
        table = pd.read_parquet(file) if ending == ".parquet" else pd.read_csv(file, sep=kinds[ending])
        if not _has_edges(table) and isinstance(table.index, pd.RangeIndex):
            table = table.set_index(table.columns[0])
        out[name] = table
    return out


def _client(where: str) -> Any:
    from distributed import Client

    if where.isdigit():  # the client's own workers: they end with it
        return Client(n_workers=int(where), threads_per_worker=1, dashboard_address=None)
    return Client(where)
