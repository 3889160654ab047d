"""Names of the ways in which sigmas of flow models are drawn."""

from __future__ import annotations

FLOW_MODES = (
    "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "nextdit_shift",
    "ideogram4_shift", "logsnr", "whole",
)  # fmt: skip
SIGMOID_MODES = frozenset({"sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift"})
"""modes that start from sigmoid(sigmoid_scale * z)"""
DENSITY_MODES = frozenset({"sigma", "whole"})
"""modes that follow the density of --weighting_scheme"""
