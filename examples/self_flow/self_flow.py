"""Self-Flow as a hook that is named by its path, to be changed.

    --hook examples.self_flow.self_flow:SelfFlow

Self-Flow itself is `--self_flow` of every script of a flow model (library/training/alignment/self_flow.py). This class
is the same hook under the path by which it was named before, and the place to change it.
"""

from __future__ import annotations

from library.training.alignment.options import SelfFlowOptions
from library.training.alignment.self_flow import SelfFlow as OwnSelfFlow

__all__ = ["SelfFlow", "SelfFlowOptions"]


class SelfFlow(OwnSelfFlow):
    """The hook of the project; what it does in a step is in its `process_batch`."""
