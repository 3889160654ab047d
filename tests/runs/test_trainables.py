"""Every family with everything that can be learned of it is a cell of a test through the command line: the same command
or a resumed run writes the same bytes, the file begins where the run ended."""

from __future__ import annotations

from library.families.registry import FAMILIES
from tests.families import CASES
from tests.runs import test_control_nets, test_lllite, test_textual_inversion, test_whole_models


def test_no_cell_is_left_out() -> None:
    """Adapters are in test_families.py."""
    wanted = {(case.name, trainable) for case in CASES.values() for trainable in FAMILIES[case.family].scripts}
    tried = {tuple(cell.values) for cell in test_whole_models.CELLS}
    tried |= {(name, "control_net") for name in test_control_nets.SETS}
    tried |= {(name, "lllite") for name in test_lllite.FAMILIES_WITH_IT}
    tried |= {(name, trainable.name) for name, trainable in test_textual_inversion.SETS.values()}
    assert tried == wanted
