"""Simulated screens with a known truth, and public screens in the standard form."""

from ._screens import adamson_2016, norman_2019, replogle_2022_k562_essential, replogle_2022_rpe1
from ._simulated import simulated

__all__ = ["adamson_2016", "norman_2019", "replogle_2022_k562_essential", "replogle_2022_rpe1", "simulated"]
