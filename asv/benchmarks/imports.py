"""Time of a fresh interpreter to import: scpert has to stay under a tenth of scvi-tools."""

from __future__ import annotations

import subprocess
import sys


def _seconds(module: str) -> float:
    code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    return float(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()[-1]
    )


class Imports:
    """Seconds of an import, each in an interpreter of its own."""

    params = ["scpert", "scpert.pp", "scpert.metrics", "scvi"]
    param_names = ["module"]
    timeout = 300

    def track_seconds(self, module: str) -> float:
        return _seconds(module)

    track_seconds.unit = "s"


def track_share_of_scvi() -> float:
    """Import of scpert as a share of that of scvi-tools, in the same run."""
    return _seconds("scpert") / _seconds("scvi")


track_share_of_scvi.unit = "ratio"
track_share_of_scvi.timeout = 300
