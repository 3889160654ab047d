"""The moments of a run from what its phases take."""

from __future__ import annotations

import pytest

from library.core.options import Config
from library.dataset import CachingOptions
from library.training.computing_options import MemoryOptions
from library.training.memory.measure import Sizes
from library.training.memory.plan import _phases
from library.training.optimizers import OptimizerOptions
from library.training.optimizers.host_states import ROOM
from library.training.option_groups import EmaOptions


@pytest.mark.parametrize(("optimizer", "visiting"), [("AdamW", 2 * ROOM), ("Prodigy", 5 * ROOM)])
def test_states_in_main_memory_come_for_the_update(optimizer: str, visiting: int) -> None:
    """A part and the next one of what steps weight by weight, all of what steps as a whole."""
    groups = (
        CachingOptions(), EmaOptions(), MemoryOptions(), OptimizerOptions(optimizer_type=optimizer, offload_optimizer=True)
    )  # fmt: skip
    sizes = Sizes(None, "cuda", weights={"denoiser": 7}, in_step={"denoiser"}, optimizer=5 * ROOM)
    phases = {phase.name: phase.parts for phase in _phases(Config({type(group): group for group in groups}), sizes)}
    assert "optimizer" not in phases["forward"] and phases["update"]["optimizer"] == visiting
