"""Weights of the loss by signal-to-noise ratio: the options, the table and `build`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from library.core.errors import ConfigError, Problems, did_you_mean, foreign_errors
from library.core.options import Config, Ignored, option, without_effect
from library.core.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Container

    import torch

    from library.training.objective import Objective

LossFactor = Callable[["torch.Tensor", "Objective"], "torch.Tensor"]
"""(timesteps [B] on the 0..1000 scale, objective) -> factor [B]"""

LOSS_WEIGHTS: Registry[Callable] = Registry(
    "loss weight", option="loss_weight", group="loss_weights", takes=("snr", "value", "is_v"),
    wanted="a function of (snr, value, is_v) that gives a factor of the loss for each sample",
)
"""The target is a function (snr [B], value, is_v) -> factor [B]. Those of the project are chosen by options of their
names, in this order; those from outside by --loss_weight."""
LOSS_WEIGHTS.add("min_snr_gamma", "library.training.loss_weights.snr:min_snr_factor")
LOSS_WEIGHTS.add("scale_v_pred_loss_like_noise_pred", "library.training.loss_weights.snr:scale_v_factor")
LOSS_WEIGHTS.add("v_pred_like_loss", "library.training.loss_weights.snr:v_pred_like_factor")
LOSS_WEIGHTS.add("debiased_estimation_loss", "library.training.loss_weights.snr:debiased_factor")
OWN_OPTIONS = tuple(LOSS_WEIGHTS.names())
"""those of the project, each of which is an option"""

LOSS_WEIGHTS.add("min_snr", "library.training.loss_weights.snr:min_snr_factor")
LOSS_WEIGHTS.add("detail_inv_t", "library.training.loss_weights.schemes:detail_inv_t")
LOSS_WEIGHTS.add("cosmap", "library.training.loss_weights.schemes:cosmap")
LOSS_WEIGHTS.add("sigma_sqrt", "library.training.loss_weights.schemes:sigma_sqrt")
SCHEMES = tuple(name for name in LOSS_WEIGHTS.names() if name not in OWN_OPTIONS)
"""those of the project that --loss_weighting chooses from, for every family"""


@dataclass(frozen=True, kw_only=True)
class LossWeightOptions:
    """Weight of the loss by noise level."""

    min_snr_gamma: float | None = option(None, help="gamma of min-SNR weighting, arXiv 2303.09556; 5 is usual, 0 = off")
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, help="scale a v-prediction loss like a noise-prediction loss"
    )
    v_pred_like_loss: float | None = option(
        None, help="add this much of the loss that v-prediction would have; not with --zero_terminal_snr"
    )
    debiased_estimation_loss: bool = option(
        False, help="weight of arXiv 2310.08442; with --zero_terminal_snr only for v-prediction"
    )

    loss_weighting: str = option(
        "none", choices=("none", *SCHEMES),
        help="weight of the loss by noise level, for models with and without a table of levels: min_snr,"
        " min(gamma / snr, 1); detail_inv_t, 1 / t; cosmap, 2 / (pi (1 - 2t + 2t^2)); sigma_sqrt, 1 / t^2; t is 0 for"
        " data and 1 for noise",
    )
    loss_weighting_gamma: float = option(5.0, help="gamma of --loss_weighting min_snr")
    detail_inv_t_min: float = option(1.0, help="smallest weight of --loss_weighting detail_inv_t")
    detail_inv_t_max: float = option(5.0, help="largest weight of --loss_weighting detail_inv_t")
    weight_cap_ratio: float | None = option(
        None, help="no noise level weighs more than this many times what it weighs without weights: 1 or more"
    )
    loss_weight: list[str] | None = option(
        None,
        nargs="*",
        metavar="NAME[=VALUE]",
        help="weights of the loss that plug-ins register, or paths package.module:function, each with its number behind = where it has one",
    )

    def __post_init__(self) -> None:
        problems = Problems()
        for item in self.loss_weight or ():
            problems.attempt(lambda item=item: parse_loss_weight(item))
        gamma, weight = self.min_snr_gamma, self.v_pred_like_loss
        if gamma is not None and not (math.isfinite(gamma) and gamma >= 0):
            problems.add(f"--min_snr_gamma is {gamma}; 0 (off) or a positive number is needed, e.g. 5")
        if weight is not None and not (math.isfinite(weight) and weight >= 0):
            problems.add(f"--v_pred_like_loss is {weight}; 0 (off) or a positive number is needed, e.g. 0.1")
        self._check_schemes(problems)
        problems.raise_if_any()

    def _check_schemes(self, problems: Problems) -> None:
        known = ("none", *SCHEMES)
        if self.loss_weighting not in known:
            problems.add(
                f"--loss_weighting is '{self.loss_weighting}'{did_you_mean(self.loss_weighting, known) or '.'} Known:"
                f" {', '.join(known)}"
            )
        if not (math.isfinite(self.loss_weighting_gamma) and self.loss_weighting_gamma > 0):
            problems.add(f"--loss_weighting_gamma is {self.loss_weighting_gamma}; a number above 0 is needed, e.g. 5")
        least, most = self.detail_inv_t_min, self.detail_inv_t_max
        if not (math.isfinite(most) and 0 < least <= most):
            problems.add(
                f"--detail_inv_t_min is {least} and --detail_inv_t_max is {most}; 0 < min <= max is needed, e.g. 1 and 5"
            )
        cap = self.weight_cap_ratio
        if cap is not None and not (math.isfinite(cap) and cap >= 1):
            problems.add(f"--weight_cap_ratio is {cap}; 1 or more is needed, e.g. 5")
        if self.loss_weighting == "min_snr" and self.min_snr_gamma:
            problems.add(
                f"--loss_weighting is min_snr and --min_snr_gamma is {self.min_snr_gamma}: both weigh by the same formula;"
                " leave out one of them (the gamma of --loss_weighting is --loss_weighting_gamma)"
            )

    @property
    def scheme_value(self) -> float | tuple[float, float] | None:
        """What the function of --loss_weighting takes as `value`."""
        values = {
            "min_snr": self.loss_weighting_gamma, "detail_inv_t": (self.detail_inv_t_min, self.detail_inv_t_max),
        }  # fmt: skip
        return values.get(self.loss_weighting)


def parse_loss_weight(item: str) -> tuple[str, float | None]:
    """`name=5` -> ("name", 5.0); without = there is no value. ConfigError for an unknown name and for what is no
    number."""
    name, sign, text = item.partition("=")
    if name in OWN_OPTIONS:
        raise ConfigError(
            f"--loss_weight has {name}, which is an option of its own: use --{name}{f' {text}' if text else ''}"
        )
    if name in SCHEMES:
        raise ConfigError(f"--loss_weight has {name}, which is chosen by another option: use --loss_weighting {name}")
    problem = LOSS_WEIGHTS.problem(name)
    if problem is not None:
        raise ConfigError(problem)
    try:
        value = float(text) if sign else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ConfigError(f"--loss_weight has {item}; needed: a finite number behind the =, e.g. {name}=5")
    return name, value


WITHOUT_SIGNAL = ("v_pred_like_loss", "debiased_estimation_loss")
"""divide by the signal-to-noise ratio when noise is predicted"""


def check(options: LossWeightOptions, v_parameterization: bool, zero_terminal_snr: bool = False) -> None:
    """Raise ConfigError for weights that the prediction type or the noise schedule excludes."""
    problems = Problems()
    for item in options.loss_weight or ():
        problems.attempt(lambda item=item: _try_weight(*parse_loss_weight(item), v_parameterization))
    if options.scale_v_pred_loss_like_noise_pred and not v_parameterization:
        problems.add("--scale_v_pred_loss_like_noise_pred is set; it needs --v_parameterization")
    if options.v_pred_like_loss and v_parameterization:
        problems.add(
            "--v_pred_like_loss is set together with --v_parameterization, whose loss is that one already; drop it"
        )
    for name in WITHOUT_SIGNAL if zero_terminal_snr and not v_parameterization else ():
        if getattr(options, name):
            problems.add(
                f"--{name} is set together with --zero_terminal_snr and without --v_parameterization: it divides by the"
                " signal-to-noise ratio, which falls to 0 there, so that the last few of 1000 timesteps would have "
                "most of all weight;"
                f" leave out --{name} or --zero_terminal_snr, or train a v-prediction model with --v_parameterization"
            )
    problems.raise_if_any()


def _try_weight(name: str, value: float | None, is_v: bool) -> None:
    """Call a weight from outside once, for two samples: a factor of another shape would mix them."""
    import torch

    where, weight = f"--loss_weight has {name}", LOSS_WEIGHTS.resolve(name, "--loss_weight")
    told = "" if value is not None else f"; a value can be given as {name}=5"
    with foreign_errors(ConfigError, f"{where}, which fails for two samples{told}"):
        factor = weight(torch.tensor([0.5, 2.0]), value, is_v)
    if isinstance(factor, (int, float)):
        return
    if not isinstance(factor, torch.Tensor) or factor.shape not in ((), (2,)):
        given = tuple(factor.shape) if isinstance(factor, torch.Tensor) else type(factor).__name__
        raise ConfigError(f"{where}, which gives {given} for two samples; needed: a tensor [2], one factor for each")


def build(options: LossWeightOptions) -> LossFactor | None:
    """The product of all chosen factors, or None when none is chosen and nothing is capped."""
    chosen = [(LOSS_WEIGHTS.resolve(name), getattr(options, name)) for name in OWN_OPTIONS if getattr(options, name)]
    if options.loss_weighting != "none":
        chosen.append((LOSS_WEIGHTS.resolve(options.loss_weighting), options.scheme_value))
    named = map(parse_loss_weight, options.loss_weight or ())
    chosen += [(LOSS_WEIGHTS.resolve(name), value) for name, value in named]
    if not chosen and options.weight_cap_ratio is None:
        return None

    def factor(timesteps: torch.Tensor, objective: Objective) -> torch.Tensor:
        snr, is_v = objective.snr(timesteps), objective.prediction_type == "v"
        result = snr.new_ones(snr.shape)
        for function, value in chosen:
            result = result * function(snr, value, is_v)
        if options.weight_cap_ratio is None:
            return result
        total = result * objective.weights_at(timesteps)
        return result * (options.weight_cap_ratio / total).clamp(max=1)

    return factor


def weights_of_levels(options: LossWeightOptions, objective: Objective, timesteps: torch.Tensor) -> torch.Tensor | None:
    """What the loss of a run is multiplied by at timesteps [N] on the 0..1000 scale; None where all weigh the same."""
    factor = build(options)
    if factor is None and not objective.weighs:
        return None
    weights = objective.weights_at(timesteps)
    return weights if factor is None else weights * factor(timesteps, objective)


def idle(options: LossWeightOptions, explicit: Container[str]) -> list[Ignored]:
    """Numbers of schemes that are not chosen."""
    owners = {"loss_weighting_gamma": "min_snr", "detail_inv_t_min": "detail_inv_t", "detail_inv_t_max": "detail_inv_t"}
    given = [name for name, owner in owners.items() if name in explicit and options.loss_weighting != owner]
    return without_effect(given, f"--loss_weighting {options.loss_weighting} does not read it")


def idle_cap(config: Config, objective: Objective) -> list[Ignored]:
    """--weight_cap_ratio, where no noise level of the run weighs more."""
    options = config[LossWeightOptions]
    if options.weight_cap_ratio is None:
        return []
    weights = weights_of_levels(
        replace(options, weight_cap_ratio=None), objective, objective.whole_levels()
    )
    largest = 1.0 if weights is None else float(weights.max())
    is_idle = largest <= options.weight_cap_ratio
    return without_effect(["weight_cap_ratio"] if is_idle else [], f"the largest weight of this run is {largest:.4g}")
