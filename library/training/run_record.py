"""What the metadata of a file tells about its run: collected from the Run at each save."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from library.training.data_phase import DataGroups
from library.training.optimizers import OptimizerBuild
from library.training.run import Run


@dataclass
class RunRecord:
    """`metadata(run)` makes the metadata of a file written now."""

    started_at: float
    optimizer: OptimizerBuild
    data: DataGroups

    def metadata(self, run: Run) -> dict[str, str]:
        return {}
