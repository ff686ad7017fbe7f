"""How :class:`scpert.model.CellState` is fitted: a closed-form start, then gradient steps."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._progress import progress
from ..errors import ScpertError
from ..module._cell_state import CellStateModule

__all__ = ["closed_form_start", "fit", "group_folds", "make_optimizer", "pca_imputed", "principal_axes"]

logger = logging.getLogger("scpert")

#: Ridge strengths of the closed-form output layer that cross-fitting chooses from (relative to the mean kernel diagonal).
RIDGE = (0.03, 0.1, 0.3, 1.0, 3.0, np.inf)

#: Shares of the source model's covariance in the axes of a model that is carried over.
SHARES = (0.0, 0.05, 0.2, 0.5, 0.8, 1.0)


def group_folds(groups: np.ndarray, n_folds: int, rng: np.random.Generator) -> np.ndarray:
    """Fold of each row, so that no group is in two folds and the folds are about equally large."""
    names, codes = np.unique(groups, return_inverse=True)
    n_folds = min(n_folds, len(names))
    size = np.bincount(codes.reshape(-1))
    fold = np.zeros(len(names), dtype=int)
    load = np.zeros(n_folds)
    order = rng.permutation(len(names))
    for g in order[np.argsort(-size[order], kind="stable")]:
        f = int(np.argmin(load))
        fold[g] = f
        load[f] += size[g]
    return fold[codes.reshape(-1)]


def principal_axes(Y: Tensor, k: int) -> Tensor:
    """First ``k`` principal axes of the rows of ``Y`` (not centred again), ``(gene, k)``, orthonormal."""
    n, g = Y.shape
    if n <= g:
        value, vector = torch.linalg.eigh((Y @ Y.T).double())
        value, vector = value.flip(0)[:k], vector.flip(1)[:, :k]
        axes = Y.T @ (vector / value.clamp_min(value[0] * 1e-10).sqrt()).float()
        return axes
    _, vector = torch.linalg.eigh((Y.T @ Y).double())
    return vector.flip(1)[:, :k].float()


def pca_imputed(V: Tensor, centre: Tensor, Y: Tensor, observed: Tensor) -> Tensor:
    """Rows of ``Y`` from the axes ``V``, the scores by least squares on each row's observed genes."""
    out = torch.empty_like(Y)
    ridge = 1e-6 * torch.eye(V.shape[1])
    for i, o in enumerate(observed):
        W = V[o]
        out[i] = V @ torch.linalg.lstsq(W.T @ W + ridge, W.T @ (Y[i] - centre)[o]).solution + centre
    return out


def _ridge_parts(H: Tensor, R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value, vector = torch.linalg.eigh((H @ H.T).double())
    return value.clamp_min(0).float(), vector.float(), vector.float().T @ R


def closed_form_start(
    module: CellStateModule,
    Y: Tensor,
    groups: np.ndarray,
    rng: np.random.Generator,
    mask: tuple[float, float],
    prior: Tensor | None = None,
) -> dict[str, float]:
    r"""Start the linear path at the principal axes and the output layer at a ridge regression.

    With :math:`V` the first axes of the training rows, :math:`A = V, B = V^\top`. The hidden features :math:`H` of the
    (still random) decoder then predict what the axes leave over, :math:`R = Y - YVV^\top`:
    :math:`W = H^\top (HH^\top + \lambda I)^{-1} R`. :math:`\lambda` is the one with the least error at masked genes of
    groups left out (3 folds within the training rows); infinite is among the choices.

    ``prior`` ``(row, gene)`` are pseudo-samples of another model, :math:`P^\top P` its covariance of the genes. The axes
    are then those of :math:`(1 - \alpha) Y^\top Y / n + \alpha P^\top P`, and :math:`\alpha` is chosen along with
    :math:`\lambda`; 0 (no transfer) and 1 (the other model's axes) are among the choices.
    """
    n, k = Y.shape[0], module.n_latent
    shares = (0.0,) if prior is None else SHARES
    module.eval()

    def axes(rows: Tensor, share: float) -> Tensor:
        stack = rows
        if prior is not None:
            parts = [rows * ((1 - share) / len(rows)) ** 0.5] * (share < 1) + [prior * share**0.5] * (share > 0)
            stack = torch.cat(parts)
        V = principal_axes(stack, min(k, len(stack)))
        return torch.nn.functional.pad(V, (0, k - V.shape[1]))

    def spread(z: Tensor) -> float:
        return float(z.norm(dim=1).square().mean().sqrt().clamp_min(1e-6))

    few = n < (12 if prior is None else 4)
    folds = np.zeros(n, dtype=int) if few else group_folds(groups, 3, rng)
    errors = np.zeros((len(shares), len(RIDGE)))
    with torch.no_grad():
        hide = torch.from_numpy(rng.random(Y.shape, dtype=np.float32) < float(np.mean(mask)))
        for f in np.unique(folds) if folds.any() else ():
            tr, te = torch.from_numpy(folds != f), torch.from_numpy(folds == f)
            observed = (~hide[te]).float()
            for a, share in enumerate(shares):
                V = axes(Y[tr], share)
                z = Y[tr] @ V
                module.z_scale.fill_(spread(z))
                z_test = module.masked(Y[te], observed) @ V
                H, H_test = module.features(z), module.features(z_test)
                centre = H.mean(0)
                H, H_test = H - centre, H_test - centre
                value, vector, target = _ridge_parts(H, Y[tr] - z @ V.T)
                kernel = H_test @ H.T @ vector
                base = (Y[te] - z_test @ V.T) * hide[te]
                for i, strength in enumerate(RIDGE):
                    if np.isinf(strength):
                        errors[a, i] += float(base.square().sum())
                    else:
                        weight = kernel / (value + strength * float(value.mean()) * 10)
                        errors[a, i] += float((base - (weight @ target) * hide[te]).square().sum())
        chosen, best = len(shares) // 2, len(RIDGE) - 1
        if errors.any():
            chosen, best = (int(x) for x in np.unravel_index(np.argmin(errors), errors.shape))
        V = axes(Y, shares[chosen])
        z = Y @ V
        module.z_scale.fill_(spread(z))
        module.A.copy_(V)
        module.B.copy_(V.T)
        module.output.weight.zero_()
        module.output.bias.zero_()
        if np.isfinite(RIDGE[best]):
            H = module.features(z)
            centre = H.mean(0)
            H = H - centre
            value, vector, target = _ridge_parts(H, Y - z @ V.T)
            dual = vector @ (target / (value + RIDGE[best] * float(value.mean()) * 10)[:, None])
            W = H.T @ dual
            module.output.weight.copy_(W.T)
            module.output.bias.copy_(-(centre @ W))
    return {"ridge": float(RIDGE[best]), "share": float(shares[chosen])}


def make_optimizer(name: str, module: CellStateModule, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """``"adamw"`` (two moments a weight), or ``"adafactor"``: factored second moment, no first (rows + columns a matrix)."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    return torch.optim.Adafactor(parameters, lr=lr, weight_decay=weight_decay, foreach=False)


def fit(
    module: CellStateModule,
    batches: Callable[[np.random.Generator], Iterator[tuple[Tensor, Tensor | None]]],
    validation: Callable[[], Iterator[tuple[Tensor, Tensor | None]]] | None,
    *,
    device: torch.device,
    max_epochs: int,
    lr: float,
    weight_decay: float,
    optimizer: str,
    mask: tuple[float, float],
    masked_weight: float,
    early_stopping: bool,
    patience: int,
    precision: str,
    seed: int,
    evaluate_start: bool,
) -> tuple[dict[str, pd.DataFrame], int]:
    """Gradient steps on the denoising loss; returns the history and the best epoch (-1: the state before the first).

    The weights with the lowest validation error at masked genes are put back at the end, also after an interruption.
    """
    module.to(device)
    trainable = [p for p in module.parameters() if p.requires_grad]
    optim = make_optimizer(optimizer, module, lr, weight_decay)
    rng = np.random.default_rng(seed)
    generator = torch.Generator(device=device).manual_seed(seed)
    autocast: Any = (
        torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    )
    records: list[dict[str, float]] = []
    keep_best = validation is not None
    best, best_epoch, state = np.inf, -1, None

    def observe(y: Tensor, generator: torch.Generator) -> Tensor:
        share = torch.rand((len(y), 1), device=device, generator=generator) * (mask[1] - mask[0]) + mask[0]
        return (torch.rand(y.shape, device=device, generator=generator) >= share).float()

    def validate() -> tuple[float, float]:
        batches: Any = validation
        module.eval()
        fixed = torch.Generator(device=device).manual_seed(seed + 1)
        total = np.zeros(3)
        with torch.no_grad(), autocast:
            for y, counts in batches():
                y = y.to(device)
                loss, error = module.loss(
                    y,
                    observe(y, fixed),
                    counts=None if counts is None else counts.to(device),
                    masked_weight=masked_weight,
                )
                total += np.array([float(loss), float(error), 1.0]) * len(y)
        return total[0] / total[2], total[1] / total[2]

    def snapshot() -> dict[str, Tensor]:
        return {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}

    if keep_best and evaluate_start:
        _, best = validate()
        state = snapshot()
    start_error = best
    waited = 0
    try:
        for epoch in progress(range(max_epochs), total=max_epochs, description="train CellState", unit="epoch"):
            module.train()
            total = np.zeros(2)
            for y, counts in batches(rng):
                y = y.to(device)
                with autocast:
                    loss, _ = module.loss(
                        y,
                        observe(y, generator),
                        counts=None if counts is None else counts.to(device),
                        masked_weight=masked_weight,
                    )
                if not torch.isfinite(loss):
                    raise ScpertError(
                        f"The training loss is {float(loss)} in epoch {epoch}: the learning rate lr={lr} is too large for "
                        "these data. Train again with a tenth of it."
                    )
                optim.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, 10.0)
                optim.step()
                total += np.array([float(loss.detach()), 1.0]) * len(y)
            record = {"train_loss": total[0] / max(total[1], 1)}
            if validation is not None:
                record["validation_loss"], record["validation_error_masked"] = validate()
                if record["validation_error_masked"] < best - 1e-5:
                    best, best_epoch, waited = record["validation_error_masked"], epoch, 0
                    state = snapshot()
                else:
                    waited += 1
            records.append(record)
            if early_stopping and validation is not None and waited >= patience:
                break
    except KeyboardInterrupt:
        logger.warning("training was interrupted: the best state so far is kept")
    if state is not None:
        module.load_state_dict(state)
    module.eval()
    logger.info("best epoch %d; error at masked genes %.4f (start %.4f)", best_epoch, best, start_error)
    table = pd.DataFrame(records, index=pd.RangeIndex(len(records), name="epoch"))
    return {c: table[[c]] for c in table.columns}, best_epoch
