"""The start-up checks of all formulas together."""

from __future__ import annotations

from library.core.options import Config
from library.training.adapters import NetworkOptions
from library.training.computing_options import PrecisionOptions
from library.training.formula_checks import formula_notices, formula_problems, formula_warnings
from library.training.loss_weights import LossWeightOptions
from library.training.losses import LossOptions
from library.training.objective import DdpmObjective, FlowMatchingObjective
from library.training.optimizers import OptimizerOptions
from library.training.option_groups import LoopOptions, ModelOptions, NoiseOptions
from library.training.schedulers import SchedulerOptions
from library.training.timestep_samplers import TimestepOptions

GROUPS = (
    LoopOptions,
    ModelOptions,
    NoiseOptions,
    OptimizerOptions,
    SchedulerOptions,
    LossOptions,
    LossWeightOptions,
    TimestepOptions,
    NetworkOptions,
)


def config_of(**values) -> Config:
    return Config.read(values, GROUPS)


def test_problems_of_all_formulas_come_together():
    problems = formula_problems(config_of(
        optimizer_type="AdamWW", lr_scheduler="adafactor", v_pred_like_loss=0.1, v_parameterization=True,
    ))
    assert len(problems) == 3
    assert formula_problems(config_of()) == []


def test_warnings_see_the_rates_of_the_parts():
    assert formula_warnings(config_of()) == []
    mixed = config_of(optimizer_type="prodigy", learning_rate=1.0, text_encoder_lr=[0.5])
    assert len(formula_warnings(mixed)) == 1


def test_notices():
    config = config_of(
        timestep_sampling="sigma", weighting_scheme="logit_normal", loss_type="huber", multires_noise_iterations=6,
        lr_warmup_steps=10,
    )
    flow = formula_notices(config, FlowMatchingObjective(config[TimestepOptions], config[NoiseOptions]))
    assert len(flow) == 3
    ddpm = formula_notices(config, DdpmObjective(config[TimestepOptions], config[NoiseOptions]))
    assert any("multires" in line for line in ddpm) and not any("timestep_sampling" in line for line in ddpm)


def test_settings_that_the_chosen_formula_does_not_read_are_named():
    from library.training import losses, timestep_samplers

    assert [str(item) for item in losses.idle(losses.LossOptions(loss_type="l1", huber_c=0.5))] == [
        "--huber_c: has no effect: --loss_type is l1"
    ]
    assert losses.idle(losses.LossOptions()) == []
    options = TimestepOptions(timestep_sampling="uniform", sigmoid_scale=2.0, logit_mean=1.0)
    assert [item.written for item in timestep_samplers.idle(options)] == ["--sigmoid_scale", "--logit_mean"]
    assert all("--timestep_sampling uniform" in item.reason for item in timestep_samplers.idle(options))
    assert (
        timestep_samplers.idle(TimestepOptions(timestep_sampling="shift", sigmoid_scale=2.0, discrete_flow_shift=1.0))
        == []
    )
    scheme = TimestepOptions(timestep_sampling="shift", weighting_scheme="logit_normal")
    assert [item.written for item in timestep_samplers.idle(scheme)] == ["--weighting_scheme"]
    falling = TimestepOptions(sigma_table="falling", timestep_sampling="sigma", discrete_flow_shift=3.0)
    for options, written in (
        (falling, "discrete_flow_shift"), (TimestepOptions(timestep_sampling="shift"), "sigma_table"),
        (TimestepOptions(show_timesteps_resolution=(64, 64)), "show_timesteps_resolution"),
    ):  # fmt: skip
        assert [item.written for item in timestep_samplers.idle(options, {written})] == [f"--{written}"]


def test_the_whole_range_of_timesteps_is_no_range():
    from library.training import timestep_samplers

    assert timestep_samplers.notices(TimestepOptions(min_timestep=0, max_timestep=1000)) == []
    assert len(timestep_samplers.notices(TimestepOptions(min_timestep=0, max_timestep=900))) == 1


def test_an_optimizer_that_makes_float16_weights_no_numbers_is_refused():
    """Adam's usual eps is 0 in float16, and the first matrices of adapters have no gradient in the first step."""
    groups = (*GROUPS, PrecisionOptions)
    half = {"full_fp16": True, "mixed_precision": "fp16"}
    problems = formula_problems(Config.read(half, groups))
    assert len(problems) == 1 and "--full_fp16" in problems[0] and "eps=1e-4" in problems[0]
    assert formula_problems(Config.read({**half, "optimizer_args": ["eps=1e-4"]}, groups)) == []
    assert formula_problems(Config.read({**half, "optimizer_type": "SGDNesterov"}, groups)) == []
    assert formula_problems(Config.read({"mixed_precision": "fp16"}, groups)) == []


def test_weights_that_divide_by_a_ratio_of_0_are_refused():
    """At a zero-terminal schedule the last steps of noise prediction would have nearly all weight."""
    for option, value in (("debiased_estimation_loss", True), ("v_pred_like_loss", 0.1)):
        (problem,) = formula_problems(config_of(zero_terminal_snr=True, **{option: value}))
        assert f"--{option}" in problem and "--zero_terminal_snr" in problem and "--v_parameterization" in problem
        assert formula_problems(config_of(**{option: value})) == []
    assert (
        formula_problems(config_of(zero_terminal_snr=True, debiased_estimation_loss=True, v_parameterization=True))
        == []
    )
    assert (
        len(formula_problems(config_of(zero_terminal_snr=True, debiased_estimation_loss=True, v_pred_like_loss=0.1)))
        == 2
    )


def test_no_step_of_a_zero_terminal_schedule_has_a_weight_out_of_all_measure():
    """Every combination that starts: the largest factor is at most some times the one that the plain schedule gives."""
    import torch

    from library.training import loss_weights

    times = torch.arange(1000)
    chosen = (
        {"min_snr_gamma": 5.0},
        {"debiased_estimation_loss": True},
        {"v_pred_like_loss": 0.5},
        {"scale_v_pred_loss_like_noise_pred": True},
    )
    started = 0
    for values in chosen:
        for is_v in (False, True):
            config = config_of(zero_terminal_snr=True, v_parameterization=is_v, **values)
            if formula_problems(config):
                continue
            objective = DdpmObjective(
                config[TimestepOptions], config[NoiseOptions], prediction_type="v" if is_v else "epsilon"
            )
            factor = loss_weights.build(config[LossWeightOptions])(times, objective)
            assert torch.isfinite(factor).all() and float(factor.max()) <= 20, (values, is_v)
            started += 1
    assert started == 4
