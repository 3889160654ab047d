"""Measurements: every figure beside its baseline from the same run. `python -m benchmarks`; docs/benchmarks.md."""
