"""Figures: one function per result, each returning axes."""

from ._interactions import genetic_interactions

__all__ = ["genetic_interactions"]
