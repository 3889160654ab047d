"""A further family for one test: known to every table, and forgotten afterwards."""

from __future__ import annotations

import pytest

from library.families import registry
from library.families.record import FamilyRecord


def plant(monkeypatch: pytest.MonkeyPatch, record: FamilyRecord) -> None:
    monkeypatch.setattr(registry, "_records", registry.records())
    registry.register_family(record)
