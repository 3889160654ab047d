"""Names of the ways in which sigmas of flow models are drawn."""

from __future__ import annotations

from collections.abc import Mapping

FLOW_MODES = (
    "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "nextdit_shift",
    "ideogram4_shift", "logsnr", "qinglong_flux", "qinglong_qwen", "whole",
)  # fmt: skip
SIGMOID_MODES = frozenset({"sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift"})
"""modes that start from sigmoid(sigmoid_scale * z)"""
DENSITY_MODES = frozenset({"sigma", "whole"})
"""modes that follow the density of --weighting_scheme"""

_ALMOST_DATA: Mapping[str, float] = {"logit_mean": 5.36, "logit_std": 1.0}
MIXTURES: dict[str, tuple[tuple[float, str, Mapping[str, float]], ...]] = {
    "qinglong_flux": ((0.79, "flux_shift", {}), (0.11, "logsnr", {}), (0.10, "logsnr", _ALMOST_DATA)),
    "qinglong_qwen": ((0.95, "qwen_shift", {}), (0.05, "logsnr", _ALMOST_DATA)),
}
"""modes in which each sample follows one of several others: (share, mode, options that are fixed for it)"""
SIGMA_TABLES = ("rising", "falling")
"""ways in which mode sigma reads its table"""
