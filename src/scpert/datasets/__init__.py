"""Simulated screens with a known truth, and public screens in the standard form."""

from ._simulated import simulated

__all__ = ["simulated"]
