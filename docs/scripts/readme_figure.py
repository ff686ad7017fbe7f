"""The figure of the README: predicted against observed shift, and the inferred network, of a simulated screen.

    python docs/scripts/readme_figure.py

It writes docs/_static/readme.png. The cells that the prediction is compared with were not trained on.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import scpert

OUT = Path(__file__).parents[1] / "_static" / "readme.png"


def main() -> None:
    """Draw the figure."""
    adata = scpert.datasets.simulated(n_cells=4000, n_genes=200, n_targets=12, n_combinations=3, random_state=0)
    scpert.pp.split(adata, kind="cells", fractions=(0.6, 0.1, 0.3), random_state=0)
    test = adata[adata.obs["split"] == "test"].copy()

    scpert.model.GPOVAE.setup_anndata(adata, split_key="split")
    model = scpert.model.GPOVAE(adata)
    model.train(max_epochs=40, random_state=0)
    prediction = model.predict_perturbation()
    size = (np.asarray(prediction.layers["delta"]) ** 2).sum(axis=1)
    shown = str(prediction.obs["perturbation"].iloc[int(size.argmax())])  # the largest predicted shift
    scpert.tl.infer_grn(adata, split_key="split")

    with plt.rc_context({"font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=(1, 1.15), layout="constrained")
        scpert.pl.predicted_vs_observed(prediction, test, shown, ax=left, show=False)
        scpert.pl.grn(adata, n_edges=20, ax=right, show=False)
        figure.savefig(OUT, dpi=130)
        plt.close(figure)
    print(OUT.name, shown)


if __name__ == "__main__":
    main()
