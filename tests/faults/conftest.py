"""The same tiny runs as in tests/runs."""

from tests.runs.conftest import tiny, work  # noqa: F401
