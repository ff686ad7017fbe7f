"""Simulated screens with a known truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from .. import _keys as K
from .._checks import check_choice, check_fraction, check_positive, check_seed
from .._progress import progress
from ..data import _simulate as sim
from ..data._perturbation import join
from ..errors import ScpertError

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["simulated"]

#: Level at which a target is held, relative to control.
_TARGET_LEVEL = {"knockdown": 0.22, "knockout": 0.02, "activation": 7.5}

#: Coefficients of the two single effects in the effect of a combination.
_CLASSES = {"additive": (1.0, 1.0), "synergistic": (1.6, 1.6), "suppressive": (0.4, 0.4), "epistatic": (1.0, 0.0)}

_MITO = "ND1 ND2 CO1 CO2 ATP8 ATP6 CO3 ND3 ND4L ND4 ND5 ND6 CYB".split()


class _Platform(NamedTuple):
    centre: float  # of the log mean counts of genes
    spread: float
    ceiling: float
    library_sd: float  # of the log size of cells
    dispersion: float


_PLATFORMS = {
    "selected": _Platform(0.0, 1.65, 4.6, 0.45, 0.45),
    "transcriptome": _Platform(-8.8, 4.4, 3.8, 0.41, 0.6),
    "targeted": _Platform(0.4, 2.0, 6.0, 0.40, 0.06),
}


def simulated(
    n_cells: int = 3000,
    n_genes: int = 500,
    n_targets: int | None = None,
    n_combinations: int | None = None,
    random_state: int = 0,
    *,
    mode: str = "knockdown",
    platform: str = "selected",
    effect_size: float = 1.0,
    target_level: float | None = None,
    penetrance: float = 0.9,
    control_fraction: float = 0.15,
    cells_per_perturbation: int | None = None,
    n_regulators: int | None = None,
    mean_out_degree: float | None = None,
    degree_exponent: float = 2.5,
    strength: float = 0.6,
    activators: float = 0.7,
    depth: int = 3,
    cycles: bool = False,
    max_radius: float = 0.8,
    saturation: float | None = 3.0,
    n_modules: int | None = None,
    module_share: float = 0.8,
    noise: float = 0.3,
    library_size: float | None = None,
    dispersion: float | None = None,
    quality_fail: float = 0.02,
    n_batches: int = 2,
    n_donors: int = 2,
    batch_sd: float = 0.1,
) -> AnnData:
    r"""Simulate a screen whose network, effects and interactions are known.

    A sparse signed network :math:`A` (row regulates column) is drawn with power-law out-degrees. A perturbation holds
    its targets :math:`T` at a level :math:`d` (log fold change); what regulates them is cut, and all other genes move
    to the steady state

    .. math::

        \delta_T = d, \qquad
        \delta_g = s \tanh\Bigl(\frac1s \sum_h A_{hg}\,\delta_h\Bigr) \quad (g \notin T),

    which without saturation (:math:`s \to \infty`) is :math:`\delta = d_T (I - A^{(T)})^{-1}`, :math:`A^{(T)}` being
    :math:`A` with the columns of :math:`T` set to zero. Counts of gene :math:`g` in cell :math:`c` are

    .. math::

        x_{cg} \sim \operatorname{NB}\bigl(m_{cg},\ m_{cg} + \phi_g m_{cg}^2\bigr), \qquad
        \log m_{cg} = \log l_c + \mu_g + z_c\,\delta_{p(c) g} + b_{g,\text{batch}} + b_{g,\text{donor}}
        + \bigl(\varepsilon_c (I - A)^{-1}\bigr)_g

    with log-normal cell sizes :math:`l_c`, :math:`z_c \sim \operatorname{Bernoulli}(\text{penetrance})`, and
    disturbances :math:`\varepsilon_c` of the regulators, which pass through the same network (but not through genes
    that the perturbation holds) and saturate likewise, so that genes are correlated in control cells too.

    The effect of a combination ``A+B`` is :math:`c_1 \delta_A + c_2 \delta_B` but for its targets, which stay at their
    own levels. Classes in turn: ``additive`` (1, 1), ``synergistic`` (1.6, 1.6), ``suppressive`` (0.4, 0.4),
    ``epistatic`` (1, 0: the first masks the second).

    Parameters
    ----------
    n_cells
        Cells in all, controls included.
    n_genes
        Genes; from 100 genes on, a few are mitochondrial (``MT-...``) and outside the network.
    n_targets
        Perturbed genes, all measured; each is a perturbation of its own. Regulators first, then other genes. By
        default 20, at most half of the genes.
    n_combinations
        Pairs of targets that are perturbed together; by default 8, as far as there are pairs.
    random_state
        Seed: the same arguments give the same screen.
    mode
        ``"knockdown"``, ``"knockout"`` or ``"activation"``.
    platform
        What means, variances and zeros resemble: ``"selected"`` (expressed genes chosen for analysis; lies between
        the two others), ``"transcriptome"`` (any genes of a droplet screen: 96 % zeros) or ``"targeted"`` (a
        panel sequenced deeply: 40 % zeros).
    effect_size
        Factor on all log effects, also on the targets' own; 0 gives a screen without any effect.
    target_level
        Mean expression of a hit target relative to control; 1 minus the efficiency. By default 0.22 (knock-down), 0.02
        (knock-out) or 7.5 (activation); it varies between targets.
    penetrance
        Share of the cells with a guide that are perturbed in truth.
    control_fraction
        Share of control cells (at least one).
    cells_per_perturbation
        If given, sets the number of cells of each perturbation, and ``n_cells`` is not used.
    n_regulators
        Genes with outgoing edges; by default as many as there are targets, at least a tenth and at most half of the
        genes.
    mean_out_degree, degree_exponent
        Mean and exponent (above 2) of the power law of out-degrees; the mean is by default 5 % of the genes or
        what gives each gene five regulators, whichever is less, but at least 3.
    strength
        Mean absolute weight of an edge; 0 leaves only the effects on the targets themselves.
    activators
        Share of positive edges.
    depth
        Length of the longest path. Edges go from higher to lower levels only, unless ``cycles``.
    cycles
        Whether edges may go in any direction. The weights are then scaled so that the spectral radius of ``abs(A)``
        is at most ``max_radius``.
    max_radius
        See ``cycles``; below 1, so that every perturbation has a steady state.
    saturation
        Largest indirect log effect :math:`s`; ``None`` for a linear response.
    n_modules
        Groups of regulators that share targets (``module_share`` of them, with like weights), and so have similar
        effects; by default one for five regulators, none below ten. ``uns["truth"]["annotations"]`` tells them.
    module_share
        See ``n_modules``.
    noise
        Standard deviation of the disturbances of the (at most 200 most connected) regulators in a cell, natural log.
    library_size
        Mean counts of a good cell; by default the platform's.
    dispersion
        Median over-dispersion :math:`\phi`; by default the platform's.
    quality_fail
        Share of failed cells: 10 to 30 % of the counts and six times the mitochondrial share.
    n_batches, n_donors
        Levels of the two covariates.
    batch_sd
        Standard deviation of the covariates' effects on genes, natural log.

    Returns
    -------
    AnnData
        ``X``: integer counts, CSR float32 ``(cell, gene)``.

        ``obs``: ``perturbation``; ``perturbed`` (bool, the truth); ``batch``, ``donor``; ``quality_fail_truth`` (bool).

        ``var``: ``regulator``, ``target`` (bool); ``mean`` (expected counts), ``dispersion``.

        ``uns["truth"]``: ``net`` (direct effects: ``source``, ``target``, ``weight``); ``effects`` (total effects of a
        perturbed cell, natural log fold change: ``source`` is the perturbation, ``target`` the gene, all others are
        zero); ``interactions`` (``perturbation``, ``first``, ``second``, ``class``, ``c1``, ``c2``);
        ``annotations`` (``gene``, ``term``); ``parameters``.

    Raises
    ------
    ScpertError
        If arguments are out of range or do not fit each other.

    Examples
    --------
    >>> import scpert
    >>> adata = scpert.datasets.simulated(n_cells=300, n_genes=40, n_targets=5, n_combinations=2)
    >>> adata.shape
    (300, 40)
    >>> list(adata.uns["truth"]["interactions"]["class"])
    ['additive', 'synergistic']
    """
    random_state = check_seed(random_state)
    import anndata as ad

    rng = np.random.default_rng(random_state)
    mode = check_choice("mode", mode, tuple(_TARGET_LEVEL))
    kind = _PLATFORMS[check_choice("platform", platform, tuple(_PLATFORMS))]
    for name, share in (
        ("penetrance", penetrance),
        ("control_fraction", control_fraction),
        ("activators", activators),
        ("module_share", module_share),
        ("quality_fail", quality_fail),
    ):
        check_fraction(name, share)
    for name, number in (
        ("effect_size", effect_size),
        ("strength", strength),
        ("noise", noise),
        ("batch_sd", batch_sd),
    ):
        check_positive(name, number, zero=True)
    n_genes = _integer("n_genes", n_genes, 2)
    n_targets = min(20, max(1, n_genes // 2)) if n_targets is None else _integer("n_targets", n_targets, 1)
    if n_targets > n_genes:
        raise ScpertError(f"n_targets={n_targets} is more than n_genes={n_genes}: each target is a gene.")
    n_pairs = n_targets * (n_targets - 1) // 2
    n_combinations = min(8, n_pairs) if n_combinations is None else _integer("n_combinations", n_combinations, 0)
    if n_combinations > n_pairs:
        raise ScpertError(f"n_combinations={n_combinations}: {n_targets} targets make only {n_pairs} pairs.")
    n_perturbations = n_targets + n_combinations
    if cells_per_perturbation is not None:
        perturbed_cells = _integer("cells_per_perturbation", cells_per_perturbation, 1) * n_perturbations
        if control_fraction >= 1:
            raise ScpertError("control_fraction=1 leaves no perturbed cells: give less than 1.")
        n_cells = perturbed_cells + max(1, round(perturbed_cells * control_fraction / (1 - control_fraction)))
    n_cells = _integer("n_cells", n_cells, 1)
    if n_cells < n_perturbations + 1:
        raise ScpertError(
            f"n_cells={n_cells} is too few for {n_targets} targets, {n_combinations} combinations and the control: "
            f"give at least {n_perturbations + 1}."
        )
    level = _TARGET_LEVEL[mode] if target_level is None else check_positive("target_level", target_level)
    if (level > 1) != (mode == "activation") or level == 1:
        raise ScpertError(
            f"target_level={level!r} does not fit mode={mode!r}: it is the expression of a target relative to control, "
            "below 1 for knockdown and knockout and above 1 for activation."
        )
    depth = _integer("depth", depth, 1)
    n_batches, n_donors = _integer("n_batches", n_batches, 1), _integer("n_donors", n_donors, 1)
    if not degree_exponent > 2:
        raise ScpertError(f"degree_exponent={degree_exponent!r}: give a number above 2 (else there is no mean degree).")
    if not 0 < max_radius < 1:
        raise ScpertError(f"max_radius={max_radius!r}: give a number between 0 and 1 (else there is no steady state).")
    if saturation is not None:
        check_positive("saturation", saturation)

    # genes: mitochondrial ones last, outside the network
    n_mito = min(len(_MITO), max(n_genes // 150, int(n_genes >= 100)), n_genes - n_targets)
    n_free = n_genes - n_mito
    if n_regulators is None:
        n_regulators = max(1, min(n_free // 2, max(n_targets, n_free // 10)))
    elif not 1 <= _integer("n_regulators", n_regulators, 1) <= n_free:
        raise ScpertError(
            f"n_regulators={n_regulators}: give at most {n_free} here (mitochondrial genes do not regulate)."
        )
    if n_modules is None:
        n_modules = n_regulators // 5 if n_regulators >= 10 else 0
    n_modules = min(_integer("n_modules", n_modules, 0), n_regulators)
    if mean_out_degree is None:
        mean_out_degree = max(3.0, min(0.05, 5.0 / n_regulators) * n_genes)
    check_positive("mean_out_degree", mean_out_degree)
    width = len(str(n_genes))
    genes = np.array(
        [f"G{i + 1:0{width}d}" for i in range(n_free)] + [f"MT-{name}" for name in _MITO[:n_mito]], dtype=object
    )

    log_mean = np.empty(n_genes)
    log_mean[:n_free] = sim.gene_log_means(n_free, kind.centre, kind.spread, kind.ceiling, rng)
    if n_mito:  # 5 % of the counts of a good cell
        log_mean[n_free:] = np.log(0.05 / 0.95 * np.exp(log_mean[:n_free]).sum() / n_mito) + rng.normal(0, 0.5, n_mito)
    if library_size is not None:
        log_mean += np.log(check_positive("library_size", library_size) / np.exp(log_mean).sum())
    # regulators are expressed: from the upper half, but not the very highest, where there is a choice
    order = np.argsort(-log_mean[:n_free], kind="stable")
    first = min(n_free // 20, n_free - n_regulators)
    pool = order[first : max(first + n_regulators, n_free // 2)]
    regulators = rng.permutation(rng.choice(pool, n_regulators, replace=False))
    others = np.setdiff1d(np.arange(n_free), regulators)
    network = sim.random_network(
        regulators,
        others,
        mean_out_degree=mean_out_degree,
        exponent=degree_exponent,
        strength=strength,
        activators=activators,
        depth=min(depth, n_regulators),
        cycles=cycles,
        max_radius=max_radius,
        n_modules=n_modules,
        module_share=module_share,
        rng=rng,
    )
    matrix = network.matrix
    matrix.resize((n_genes, n_genes))

    # perturbations
    from_regulators = rng.permutation(regulators)[:n_targets]
    extra = rng.permutation(others)[: n_targets - len(from_regulators)]
    targets = np.sort(np.concatenate([from_regulators, extra]))
    own = np.log(level) * rng.lognormal(0.0, 0.15, n_targets)
    singles = sim.total_effects(matrix, targets[:, None], own[:, None], saturation=saturation)
    pairs, classes, coefficients = _combinations(np.isin(targets, regulators), n_combinations, rng)
    combined = coefficients[:, :1] * singles[pairs[:, 0]] + coefficients[:, 1:] * singles[pairs[:, 1]]
    here = np.arange(n_combinations)
    for side in (0, 1):
        combined[here, targets[pairs[:, side]]] = own[pairs[:, side]]
    effects = effect_size * np.concatenate([np.zeros((1, n_genes)), singles, combined])
    codes = np.full((n_perturbations + 1, 2 if n_combinations else 1), -1)
    codes[1 : n_targets + 1, 0] = targets
    if n_combinations:
        codes[n_targets + 1 :] = targets[pairs]
    labels = np.array([join(genes[c[c >= 0]]) for c in codes], dtype=object)

    # cells
    n_control = min(max(1, round(control_fraction * n_cells)), n_cells - n_perturbations)
    state = np.concatenate([np.zeros(n_control, dtype=int), np.arange(n_cells - n_control) % n_perturbations + 1])
    state = rng.permutation(state)
    perturbed = (state > 0) & (rng.random(n_cells) < penetrance)
    failed = rng.random(n_cells) < quality_fail
    batch, donor = rng.integers(n_batches, size=n_cells), rng.integers(n_donors, size=n_cells)
    size = rng.lognormal(-0.5 * kind.library_sd**2, kind.library_sd, n_cells)
    size[failed] *= rng.uniform(0.1, 0.3, int(failed.sum()))
    mito = np.zeros((2, n_genes))
    mito[1, n_free:] = np.log(6.0)
    batch_effects = [
        (rng.normal(0.0, batch_sd, (n_batches, n_genes)), batch),
        (rng.normal(0.0, batch_sd, (n_donors, n_genes)), donor),
        (mito, failed.astype(int)),
    ]
    response, noisy = sim.noise_response(network, noise)
    spread = kind.dispersion if dispersion is None else check_positive("dispersion", dispersion)
    model = sim.CountModel(log_mean, spread * rng.lognormal(0.0, 0.25, n_genes), response, noisy, noise, saturation)
    blocks = sim.sample_counts(model, effects, codes, np.where(perturbed, state, 0), size, batch_effects, rng)
    chunk = sim.chunk_rows(n_genes)
    blocks = progress(blocks, total=-(-n_cells // chunk), description="simulate", unit="chunk")
    X = sim.stack(blocks, (n_cells, n_genes))

    obs = pd.DataFrame(
        {
            K.PERTURBATION: pd.Categorical.from_codes(state, pd.Index(labels)),
            "perturbed": perturbed,
            "batch": pd.Categorical.from_codes(batch, pd.Index([f"batch{i + 1}" for i in range(n_batches)])),
            "donor": pd.Categorical.from_codes(donor, pd.Index([f"donor{i + 1}" for i in range(n_donors)])),
            "quality_fail_truth": failed,
        },
        index=[f"cell{i + 1}" for i in range(n_cells)],
    )
    var = pd.DataFrame(
        {
            "regulator": np.isin(np.arange(n_genes), regulators),
            "target": np.isin(np.arange(n_genes), targets),
            "mean": np.exp(log_mean),
            "dispersion": model.dispersion,
        },
        index=genes,
    )
    coo = matrix.tocoo()
    row, column = np.nonzero(effects)
    module = np.concatenate([network.module, np.full(n_mito, -1)])
    member = np.flatnonzero(module >= 0)
    truth = {
        "net": pd.DataFrame({K.SOURCE: genes[coo.row], K.TARGET: genes[coo.col], K.WEIGHT: coo.data}),
        "effects": pd.DataFrame({K.SOURCE: labels[row], K.TARGET: genes[column], K.WEIGHT: effects[row, column]}),
        "interactions": pd.DataFrame(
            {
                "perturbation": labels[n_targets + 1 :],
                "first": genes[targets[pairs[:, 0]]],
                "second": genes[targets[pairs[:, 1]]],
                "class": classes,
                "c1": coefficients[:, 0],
                "c2": coefficients[:, 1],
            }
        ),
        "annotations": pd.DataFrame({"gene": genes[member], "term": [f"module{m + 1}" for m in module[member]]}),
        "parameters": {
            "mode": mode,
            "platform": platform,
            "effect_size": float(effect_size),
            "penetrance": float(penetrance),
            "strength": float(strength),
            "depth": int(depth),
            "random_state": int(random_state),
        },
    }
    return ad.AnnData(X, obs=obs, var=var, uns={K.TRUTH: truth})


def _integer(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not np.isscalar(value) or value != int(value) or value < least:
        raise ScpertError(f"{name}={value!r}: give an integer of at least {least}.")
    return int(value)


def _combinations(regulates: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of targets ``(n, 2)``, their classes and coefficients; pairs of regulators first."""
    first, second = np.triu_indices(len(regulates), 1)
    both = regulates[first] & regulates[second]
    order = np.argsort(~both + rng.random(len(first)) * 0.5, kind="stable")[:n] if n else np.zeros(0, dtype=int)
    pairs = np.stack([first[order], second[order]], axis=1)
    names = np.array([list(_CLASSES)[i % len(_CLASSES)] for i in range(n)], dtype=object)
    coefficients = np.array([_CLASSES[name] for name in names], dtype=float).reshape(n, 2)
    return pairs, names, coefficients
