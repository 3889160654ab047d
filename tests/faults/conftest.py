"""The same tiny runs as in tests/runs."""

from tests.runs.conftest import quick_collections, tiny, work  # noqa: F401
