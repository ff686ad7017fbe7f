"""Conditional VAE and compositional autoencoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import scpert
from scpert.errors import ScpertError, UnknownTargetError
from scpert.model import CPA, ConditionalVAE
from scpert.module._conditional import ConditionalModule


@pytest.fixture(scope="module")
def screen():
    return scpert.datasets.simulated(n_cells=400, n_genes=30, n_targets=5, n_combinations=2, random_state=0)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (ConditionalVAE, {}),
        (CPA, {}),
        (CPA, {"adversary_weight": 1.0}),
        (CPA, {"adversary_weight": 1.0, "kl_weight": 0.0}),
    ],
)
def test_moves_repeats_and_loads(cls, options, screen, tmp_path):
    cls.setup_anndata(screen)
    model = cls(screen, n_hidden=16, n_latent=4, **options)
    start = {k: v.detach().clone() for k, v in model.module.named_parameters()}
    model.train(max_epochs=3, accelerator="cpu", batch_size=64)
    assert not [k for k, v in model.module.named_parameters() if torch.equal(v, start[k])]
    out = model.predict_perturbation()
    assert np.array_equal(out.X, model.predict_perturbation().X)
    model.save(tmp_path / "m")
    np.testing.assert_array_equal(cls.load(tmp_path / "m").predict_perturbation(list(out.obs_names)).X, out.X)
    assert model.get_latent_representation().shape == (400, 4)
    one, two = model.targets_[:2]
    pair = model.predict_perturbation([f"{two}+{one}"])
    assert pair.obs["status"].iloc[0] in ("combination", "trained")


def test_learns_the_effects(screen):
    ConditionalVAE.setup_anndata(screen)
    model = ConditionalVAE(screen, n_hidden=32)
    model.train(max_epochs=60, accelerator="cpu", batch_size=64)
    out = model.predict_perturbation(list(model.effects_.labels))
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(out.layers["delta"], model.effects_.delta, strict=True)]
    assert np.mean(r) > 0.6


def test_targets_of_combinations_only_are_not_predictable_alone(screen):
    label = next(x for x in sorted(set(screen.obs["perturbation"])) if "+" in x)
    one, two = label.split("+")
    adata = screen[screen.obs["perturbation"] != one].copy()
    CPA.setup_anndata(adata)
    model = CPA(adata, n_hidden=8, n_latent=4)
    model.train(max_epochs=1, accelerator="cpu")
    table = model.coverage([one, two])
    assert list(table["trained"]) == [True, True] and list(table["predictable"]) == [False, True]
    with pytest.raises(UnknownTargetError, match="trained in combinations only"):
        model.predict_perturbation(one)
    assert model.predict_perturbation(label).obs["status"].iloc[0] == "trained"


def test_a_gene_that_does_not_move_is_near_to_no_perturbation(screen):
    adata = screen.copy()
    adata.X = adata.X.toarray()
    adata.X[:, 0] = 0
    adata.var_names = ["silent", *adata.var_names[1:]]
    CPA.setup_anndata(adata)
    model = CPA(adata, n_hidden=8, n_latent=4)
    model.train(max_epochs=1, accelerator="cpu")
    nearest, mean = (model.predict_perturbation("silent", on_unknown=how).X for how in ("nearest", "mean"))
    np.testing.assert_array_equal(nearest, mean)


def test_embeddings_add_and_the_adversary_is_reversed():
    torch.manual_seed(0)
    module = ConditionalModule(6, 3, n_hidden=8, n_latent=4, additive=True, adversary_weight=2.0, scale="log1p")
    codes = torch.tensor([[0, 2], [1, -1], [-1, -1]])
    got = module.condition(codes, torch.zeros(3, 0, dtype=torch.long))
    expected = torch.stack([module.target_table[0] + module.target_table[2], module.target_table[1], torch.zeros(4)])
    torch.testing.assert_close(got, expected)
    x = torch.rand(3, 6)
    batch = {"x": x, "library": torch.ones(3, 1), "codes": codes, "covariates": torch.zeros(3, 0, dtype=torch.long)}
    module.eval()
    _, _, out = module(batch)
    adversary = 6 * out.extra_metrics["adversary"]
    rest = ConditionalModule(6, 3, n_hidden=8, n_latent=4, additive=True, scale="log1p").eval()
    rest.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("adversary")})
    _, _, plain = rest(batch)
    torch.testing.assert_close(out.loss.detach(), plain.loss.detach() + adversary)
    with_, without = (m.encoder[0].weight for m in (module, rest))
    reversed_part = torch.autograd.grad(out.loss, with_)[0] - torch.autograd.grad(plain.loss, without)[0]
    seen = module.inference(x, got)["mean"]
    wanted = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    loss = 6 * torch.nn.functional.binary_cross_entropy_with_logits(module.adversary(seen), wanted)
    torch.testing.assert_close(reversed_part, -2.0 * torch.autograd.grad(loss, with_)[0], atol=1e-5, rtol=1e-4)


def test_bad_options(screen):
    CPA.setup_anndata(screen)
    with pytest.raises(ScpertError, match="n_latent"):
        CPA(screen, n_latent=0)
    with pytest.raises(ScpertError, match="adversary_weight"):
        CPA(screen, adversary_weight=-1.0)
    ConditionalVAE.setup_anndata(screen)
    with pytest.raises(ScpertError, match="whole number"):
        ConditionalVAE(screen, n_hidden=2.5)
