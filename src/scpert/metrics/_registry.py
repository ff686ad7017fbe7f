"""The table of metrics: what each is, what its best value is, where it comes from and how it can be gamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .._checks import listing, suggest
from ..errors import ScpertError

__all__ = ["METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes
    ----------
    name
        Column of the table; cell-eval's name where cell-eval has the metric.
    definition
        What it measures, in a sentence.
    formula
        With m_p, m̂_p the observed and predicted mean log1p CP10k profile of perturbation p, c the control,
        δ_p = m_p - c, r the perturbed centroid of the training data, g a gene, P the number of perturbations.
    source
        Paper or package.
    best
        Best value: 0 or 1, or ``None`` for counts.
    level
        ``"pseudobulk"``: per perturbation, from mean profiles. ``"cell"``: per perturbation, needs predicted cells.
        ``"set"``: one value for all perturbations, repeated in each row.
    exploit
        How a useless prediction can score well.
    needs
        ``"train"`` (training data), ``"cells"`` (predicted and observed cells).
    target
        The best value lies between too low and too high: no calibrated score.
    chance
        What a prediction without information scores, where the metric says so; calibrated scores use it where a flat
        prediction has no value of its own.
    columns
        Columns that it fills, where more than its own name.
    default
        Whether it is computed unless named.
    """

    name: str
    definition: str
    formula: str
    source: str
    best: float | None
    level: str
    exploit: str
    needs: tuple[str, ...] = ()
    target: bool = False
    chance: float | None = None
    columns: tuple[str, ...] = ()
    default: bool = True
    function: Callable[..., Any] | None = field(default=None, repr=False, compare=False)

    @property
    def higher_is_better(self) -> bool | None:
        """``None`` for counts and where the best value is neither end."""
        return None if self.best is None or self.target else self.best == 1


#: Metrics by name.
METRICS: dict[str, Metric] = {}


class Undefined(Exception):
    """A metric has no value: for all perturbations (``reason``) or for some (``values`` with ``reasons``)."""

    def __init__(self, reason: str = "", *, values: np.ndarray | None = None, reasons: np.ndarray | None = None):
        super().__init__(reason)
        self.reason, self.values, self.reasons = reason, values, reasons


def metric(
    name: str,
    *,
    best: float | None,
    formula: str,
    source: str,
    exploit: str,
    level: str = "pseudobulk",
    needs: tuple[str, ...] = (),
    target: bool = False,
    chance: float | None = None,
    columns: tuple[str, ...] = (),
    default: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function of a pair as a metric; the first line of its docstring is the definition."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        definition = (function.__doc__ or "").strip().splitlines()[0]
        METRICS[name] = Metric(
            name,
            definition,
            formula,
            source,
            best,
            level,
            exploit,
            needs=needs,
            target=target,
            chance=chance,
            columns=columns,
            default=default,
            function=function,
        )
        return function

    return register


def resolve(names: str | Sequence[str] | None, default: Sequence[str]) -> list[Metric]:
    """Metrics by name; a family's columns stand for the family."""
    if names is None:
        return [METRICS[name] for name in default]
    if isinstance(names, str):
        names = [names]
    owner = {column: m.name for m in METRICS.values() for column in m.columns}
    unknown = [str(n) for n in names if n not in METRICS and n not in owner]
    if unknown:
        hints = [s for name in unknown for s in suggest(name, METRICS, n=2)]
        did_you_mean = f" Did you mean {listing(hints)}?" if hints else ""
        raise ScpertError(
            f"metrics: {listing(unknown)} not known.{did_you_mean} scpert.metrics.METRICS lists all: {listing(METRICS, 200)}."
        )
    chosen = dict.fromkeys(owner.get(str(n), str(n)) for n in names)
    if not chosen:
        raise ScpertError("metrics is empty: name at least one, or leave it None.")
    return [METRICS[name] for name in chosen]
