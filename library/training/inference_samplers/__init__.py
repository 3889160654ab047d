"""Samplers that make images: the option and the table.

A sampler is a function `(denoise, latents, sigmas, noise) -> latents`. `denoise(latents, sigma)` gives the derivative
of the latents with respect to sigma: in flow matching the velocity noise - data, in the space of SD models (data +
sigma * noise) the noise. `sigmas` [n + 1] run down to 0; `noise()` gives the next standard normal tensor to samplers
that add noise.

`flow.flow_sampler` gives a name's function for flow models; `discrete.sample_latents` runs a name on an SD model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from library.core.errors import ConfigError, did_you_mean, problems_of
from library.core.options import option
from library.core.registry import Registry

DEFAULT_SAMPLER = "ddim"

INFERENCE_SAMPLERS: Registry[Callable] = Registry(
    "sampler", option="sample_sampler", group="inference_samplers", takes=("denoise", "latents", "sigmas", "noise"),
    wanted="a function of (denoise, latents, sigmas, noise) that gives the latents at the last sigma",
    info={"spacing": "linspace", "final": "zero", "flow": None, "midpoints": False},
)


def _add(
    name: str, target: str, spacing: str, *, final: str = "zero", flow: str | None = None, midpoints: bool = False,
    k: bool = False
) -> None:
    """One sampler: how SD models space their times (`discrete.SPACINGS`) and end (`final`), what it means for flow
    models.

    `flow`: None = not for them, "same" = the same function, "alpha" = it is told how flow latents hold the data.
    `k`: the name with `k_` before it is the same sampler.
    """
    for alias in (name, f"k_{name}")[: 2 if k else 1]:
        INFERENCE_SAMPLERS.add(
            alias, f"library.training.inference_samplers.{target}", spacing=spacing, final=final, flow=flow,
            midpoints=midpoints
        )


_add("ddim", "flow:euler", "leading", flow="same")
_add("ddpm", "ancestral:euler_ancestral", "leading")
_add("pndm", "linear_multistep:pndm", "leading", final="sigma_min", midpoints=True)
_add("lms", "linear_multistep:lms", "linspace", flow="same", k=True)
_add("euler", "flow:euler", "linspace", flow="same", k=True)
_add("euler_a", "ancestral:euler_ancestral", "linspace", k=True)
_add("heun", "two_stage:heun", "linspace", flow="same")
_add("dpm_2", "two_stage:dpm_2", "linspace", k=True)
_add("dpm_2_a", "two_stage:dpm_2_ancestral", "linspace", k=True)
_add("dpmsolver", "dpmsolver:dpmsolver", "linspace_inner", final="sigma_min")
_add("dpmsolver++", "dpmsolver:dpmsolver_pp", "linspace_inner", flow="alpha")
_add("dpmsolver++_sde", "dpmsolver:dpmsolver_pp_sde", "linspace_inner", flow="alpha")
_add("dpmsingle", "dpmsolver:dpmsingle", "linspace_inner")
_add("unipc", "unipc:unipc", "linspace_inner", flow="alpha")
_add("dpmpp_3m_sde", "dpmsolver:dpmsolver_pp_3m_sde", "linspace_inner", flow="alpha")
_add("lcm", "ancestral:lcm", "linspace_inner", flow="alpha")
_add("er_sde", "er_sde:er_sde", "linspace_inner", flow="alpha")

SAMPLER_NAMES = tuple(INFERENCE_SAMPLERS.names())
"""names that --sample_sampler and prompt files may use; a family says which of them it has"""
FLOW_SAMPLER_NAMES = tuple(entry.name for entry in INFERENCE_SAMPLERS if entry.info.get("flow"))
"""those of them that flow models have"""
SAMPLER_HELP = ", or a path package.module:function"

SIGMA_TABLES: Registry[Callable] = Registry(
    "sigma table", option="sigma_table", group="sigma_tables", takes=("num_steps", "shift"),
    wanted="a function of (num_steps, shift) that gives the noise levels of the steps, from 1 down, and 0 behind them",
)
for _name in ("simple", "sgm_uniform", "karras", "beta"):
    SIGMA_TABLES.add(_name, f"library.training.inference_samplers.sigma_tables:{_name}")
SD_SIGMA_TABLES = ("simple", "sgm_uniform", "karras", "beta")
"""those of them that SD models have, over the noise levels of their training"""
CLIPPED_ELSEWHERE = ("ddim", "ddpm", "heun")


def check_flow_sampler(name: str, what: str) -> None:
    """ConfigError with the names that flow models have when `name` is none of them; `what` says where it stands."""
    if name in FLOW_SAMPLER_NAMES:
        return
    if INFERENCE_SAMPLERS.problem(name) is not None:
        raise ConfigError(
            f"{what} is '{name}'{did_you_mean(name, FLOW_SAMPLER_NAMES) or ';'} flow models have "
            f"{', '.join(FLOW_SAMPLER_NAMES)}"
        )
    entry = INFERENCE_SAMPLERS.entry(name, what)
    if not entry.info["flow"]:
        hint = (
            '; one from outside says that it is for them by @INFERENCE_SAMPLERS.register(name, flow="same")'
            if entry.is_outside
            else ""
        )
        raise ConfigError(
            f"{what} is '{name}', a sampler of SD models; flow models have {', '.join(FLOW_SAMPLER_NAMES)}{hint}"
        )
    check_sampler(name, what)


def sd_sampler_reason(name: str) -> str | None:
    """Why a family of flow models keeps its own sampler where this name is asked for, which front ends send to every
    family: it is one that SD models alone have. None for all others, those from outside among them."""
    if name.lower() not in SAMPLER_NAMES or name.lower() in FLOW_SAMPLER_NAMES:
        return None
    return f"a sampler of SD models; flow models have {', '.join(FLOW_SAMPLER_NAMES)}, and make their samples by their own"


def check_sigma_table(name: str | None, what: str) -> None:
    """ConfigError when there is no table of noise levels of this name, or one from outside does not keep the contract;
    None passes."""
    problem = None if name is None else SIGMA_TABLES.problem(name, what)
    if problem is not None:
        raise ConfigError(problem)
    if name is not None and SIGMA_TABLES.entry(name, what).is_outside:
        SIGMA_TABLES.resolve(name, what)


def check_sd_table(name: str | None, what: str, sampler: str | None = None) -> None:
    """ConfigError when SD models have no table of noise levels of this name, or the sampler goes with none; None
    passes."""
    if name is None:
        return
    if name not in SD_SIGMA_TABLES:
        check_sigma_table(name, what)
        raise ConfigError(
            f"{what} is {name}, a table for flow models; SD models have {', '.join(SD_SIGMA_TABLES)}, in these letters"
        )
    if sampler is not None and INFERENCE_SAMPLERS.entry(sampler).info["final"] == "sigma_min":
        raise ConfigError(
            f"{what} is {name} with the sampler {sampler}, whose times are its own and end at the first noise level of"
            " training; needed: another sampler, e.g. euler or dpmsolver++, or no table"
        )


def check_sampler(name: str, what: str) -> None:
    """ConfigError when there is no sampler of this name, or one from outside does not keep the contract."""
    problem = INFERENCE_SAMPLERS.problem(name, what)
    if problem is not None:
        raise ConfigError(problem)
    if name not in SAMPLER_NAMES:
        INFERENCE_SAMPLERS.resolve(name, what)


def sampler_notices(name: str, *, is_v: bool = False, zero_terminal_snr: bool = False) -> list[str]:
    """Lines for the log at start of a script that samples an SD model: where pictures differ from those of known
    trainers.

    `is_v`: the model predicts velocity.
    """
    INFERENCE_SAMPLERS.entry(name)
    lines = []
    if name in CLIPPED_ELSEWHERE:
        lines.append(
            f"{name}: predicted latents are not clipped to -1..1, so samples have more contrast than those of tools "
            "that clip them"
        )
    if name == "pndm" and is_v:
        lines.append(
            "pndm: predictions of velocity become noise before those of several steps are combined, which known tools "
            "do after it"
        )
    if zero_terminal_snr:
        lines.append(
            "samples follow the zero-terminal schedule of the training (known trainers sample on the plain one)"
        )
    return lines


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Sampler of the sample images."""

    sample_sampler: str = option(
        DEFAULT_SAMPLER,
        help="sampler of the sample images, as far as the model has it: " + ", ".join(SAMPLER_NAMES) + SAMPLER_HELP
        + f"; to flow models {DEFAULT_SAMPLER} is their own sampler",
    )

    sample_sigma_table: str | None = option(
        None, help="noise levels of the steps of sample images: " + ", ".join(SIGMA_TABLES.names()) + ", of flow models"
        + SAMPLER_HELP + " too; those of the model or the sampler when not given",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if problems := [
            *problems_of(lambda: check_sampler(self.sample_sampler, "--sample_sampler")),
            *problems_of(lambda: check_sigma_table(self.sample_sigma_table, "--sample_sigma_table")),
        ]:
            raise ConfigError(problems)
