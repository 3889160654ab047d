"""Names of the ways in which sigmas of flow models are drawn."""

from __future__ import annotations

from collections.abc import Mapping

FLOW_MODES = (
    "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "nextdit_shift",
    "ideogram4_shift", "logsnr", "logit_normal", "logit_normal_low", "mode", "mixed_uniform_low", "mixed_uniform_logit",
    "qinglong_flux", "qinglong_qwen", "whole",
)  # fmt: skip
SIGMOID_MODES = frozenset({"sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift"})
"""modes that start from sigmoid(sigmoid_scale * z)"""
FREE_NORMAL_MODES = frozenset({"logsnr", "logit_normal", "logit_normal_low"})
"""modes that start from logit_mean + logit_std * z"""
SHIFT_MODES = frozenset({"shift", "logit_normal", "logit_normal_low"})
"""modes with the shift of --discrete_flow_shift"""
DENSITY_MODES = frozenset({"sigma", "whole"})
"""modes that follow the density of --weighting_scheme"""

_ALMOST_DATA: Mapping[str, float] = {"logit_mean": 5.36, "logit_std": 1.0}
MIXTURES: dict[str, tuple[tuple[float, str, Mapping[str, float]], ...]] = {
    "qinglong_flux": ((0.79, "flux_shift", {}), (0.11, "logsnr", {}), (0.10, "logsnr", _ALMOST_DATA)),
    "qinglong_qwen": ((0.95, "qwen_shift", {}), (0.05, "logsnr", _ALMOST_DATA)),
}
"""modes in which each sample follows one of several others: (share, mode, options that are fixed for it)"""
MIXED_WITH_UNIFORM: dict[str, str] = {"mixed_uniform_low": "logit_normal_low", "mixed_uniform_logit": "logit_normal"}
"""modes in which --timestep_mix_low_prob of the samples follow another, and the rest are uniform"""
MIXED_MODES = frozenset({*MIXTURES, *MIXED_WITH_UNIFORM})


def parts_of(mode: str, mix_prob: float) -> tuple[tuple[float, str, Mapping[str, float]], ...]:
    """(share, mode, options that are fixed for it) of each part; one of share 1 where a mode is no mixture."""
    if mode in MIXED_WITH_UNIFORM:
        return ((mix_prob, MIXED_WITH_UNIFORM[mode], {}), (1 - mix_prob, "uniform", {}))
    return MIXTURES.get(mode, ((1.0, mode, {}),))


SIGMA_TABLES = ("rising", "falling")
"""ways in which mode sigma reads its table"""
