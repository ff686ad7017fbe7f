"""Networks of the article's tables that know no graph: conditional VAE and compositional autoencoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from anndata import AnnData

from .._checks import check_positive
from ..data._loader import ScreenTensors
from ..errors import ScpertError
from ..module._conditional import ConditionalModule
from ._base import PerturbationModel, Prediction, Reference

__all__ = ["CPA", "ConditionalVAE"]


class _ConditionalModel(PerturbationModel):
    """Control cells go through the encoder as controls and through the decoder as perturbed cells."""

    scope = "combinations"
    _uses = ("library_size_key", "covariate_keys")
    _stratified = True
    _max_epochs = 100
    _additive = False

    def _build(self, seed: int) -> None:
        o = self._options
        rank = np.argsort(np.argsort(np.asarray(self.genes_, dtype=str), kind="stable"), kind="stable")
        with self._seeded(seed):
            self.module = ConditionalModule(
                self.n_genes,
                len(self.targets_),
                [len(c) for c in self.covariates_.values()],
                n_hidden=o["n_hidden"],
                n_layers=o["n_layers"],
                n_latent=o["n_latent"],
                additive=self._additive,
                adversary_weight=o.get("adversary_weight", 0.0),
                kl_weight=o["kl_weight"],
                scale=self.scale_,
            )
            self.module.reset_by_name(torch.as_tensor(rank))

    def _before_training(self, random_state: int) -> None:
        self.__dict__.pop("_trained_targets", None)
        if not self.is_trained_:
            self._build(random_state)
            mean = torch.as_tensor(self.reference_.mean, device=self.device)
            with torch.no_grad():
                self.module.read.bias.copy_(mean)

    def _decoded(self, targets: tuple[str, ...], reference: Reference, batch_size: int) -> np.ndarray:
        """Decoded cells ``(cell, gene)``, from the means of their latents."""
        module, out = self.module, []
        values = reference.log1p
        codes = self._codes([targets])
        with torch.inference_mode():
            for start in range(0, len(reference), batch_size):
                rows = slice(start, min(start + batch_size, len(reference)))
                x = torch.as_tensor(values[rows].toarray(), dtype=torch.float32, device=self.device)
                covariates = torch.as_tensor(reference.covariates[rows], device=self.device)
                nothing = torch.full((len(x), 1), -1, dtype=torch.int64, device=self.device)
                z = module.inference(x, module.condition(nothing, covariates))["mean"]
                wanted = module.condition(codes.to(self.device).expand(len(x), -1), covariates)
                out.append(module.generative(z, wanted)["mean"].cpu().numpy())
        return np.concatenate(out)

    def _predict_delta(
        self, targets: list[tuple[str, ...]], reference: Reference, rng: np.random.Generator, batch_size: int
    ) -> Prediction:
        base = self._decoded((), reference, batch_size).mean(axis=0)
        return Prediction(np.stack([self._decoded(t, reference, batch_size).mean(axis=0) - base for t in targets]))

    def get_latent_representation(self, adata: AnnData | None = None, *, batch_size: int | None = None) -> np.ndarray:
        """Latent of each cell (basal, for :class:`CPA`), float32 ``(cell, latent)``."""
        self._check_trained()
        screen = self._screen_of(adata, labels=not self._additive)  # the conditional VAE encodes by the perturbation
        tensors = ScreenTensors(screen, self._field_state, self.setup_args_)
        size, out = batch_size or 1024, []
        with torch.inference_mode():
            for start in range(0, tensors.n_cells, size):
                batch = tensors.batch(np.arange(start, min(start + size, tensors.n_cells)))
                batch = {k: v.to(self.device) for k, v in batch.items()}
                out.append(self.module.inference(**self.module._get_inference_input(batch))["mean"].cpu().numpy())
        return np.concatenate(out)

    def get_perturbation_embedding(self) -> Any:
        """Embedding of the targets, ``(target, dim)``."""
        import pandas as pd

        self._check_trained()
        table = self.module.target_table.detach().cpu().numpy()
        return pd.DataFrame(table, index=pd.Index(self.targets_, name="target"))


def _check_widths(**sizes: int) -> None:
    for name, value in sizes.items():
        if int(check_positive(name, value)) != value:
            raise ScpertError(f"{name}={value!r}: give a whole number above 0.")


class ConditionalVAE(_ConditionalModel):
    r"""Variational autoencoder whose encoder and decoder are told the perturbation.

    .. math:: z \sim q(z \mid x, e_p),\quad \hat x = f(z, e_p),\quad e_p = \sum_{a \in p} e_a

    A control cell is encoded as control and decoded as perturbed; the shift is the difference of its two decodings, so
    that what the decoder gets wrong in both cancels. Targets without training cells cannot be predicted.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`.
    n_hidden, n_layers, n_latent
        Sizes of encoder and decoder.
    kl_weight
        Weight of the KL.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.ConditionalVAE.setup_anndata(adata)
    >>> model = scpert.model.ConditionalVAE(adata, n_hidden=16)
    >>> model.train(max_epochs=1, accelerator="cpu")
    >>> model.get_latent_representation().shape
    (300, 32)
    """

    def __init__(
        self,
        adata: AnnData | None = None,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_latent: int = 32,
        kl_weight: float = 1.0,
        *,
        registry: dict | None = None,
    ):
        super().__init__(adata, registry)
        _check_widths(n_hidden=n_hidden, n_layers=n_layers, n_latent=n_latent)
        check_positive("kl_weight", kl_weight)
        self._remember(locals())
        self._build(0)


class CPA(_ConditionalModel):
    r"""Compositional perturbation autoencoder (Lotfollahi et al. 2023).

    .. math:: z = z_{basal}(x) + \sum_{a \in p} e_a + \sum_c e_c,\quad \hat x = f(z)

    With ``adversary_weight > 0`` a classifier reads the targets from the basal latent and its gradient is reversed, as
    published; without (the default) the model is the better one on the screens that were compared.

    Parameters
    ----------
    adata
        Data set up by :meth:`setup_anndata`; ``covariate_keys`` are added to the latent.
    n_hidden, n_layers, n_latent
        Sizes of encoder and decoder.
    adversary_weight
        Strength of the adversary; 0: none.
    kl_weight
        Weight of a KL on the basal latent, without which (and without adversary) the latent tells the perturbation and
        the embeddings learn nothing; 0: a plain autoencoder, as published together with the adversary.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5)
    >>> scpert.model.CPA.setup_anndata(adata)
    >>> model = scpert.model.CPA(adata, n_hidden=16)
    >>> model.train(max_epochs=1, accelerator="cpu")
    >>> model.get_perturbation_embedding().shape
    (5, 32)
    """

    _additive = True

    def __init__(
        self,
        adata: AnnData | None = None,
        n_hidden: int = 128,
        n_layers: int = 1,
        n_latent: int = 32,
        adversary_weight: float = 0.0,
        kl_weight: float = 1.0,
        *,
        registry: dict | None = None,
    ):
        super().__init__(adata, registry)
        _check_widths(n_hidden=n_hidden, n_layers=n_layers, n_latent=n_latent)
        check_positive("adversary_weight", adversary_weight, zero=True)
        check_positive("kl_weight", kl_weight, zero=True)
        self._remember(locals())
        self._build(0)
