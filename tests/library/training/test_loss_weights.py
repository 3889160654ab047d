"""--loss_weighting and --weight_cap_ratio: formulas by hand, for flow models and tables of noise levels, and what is told."""

from __future__ import annotations

import math

import pytest
import torch

from library.core.errors import ConfigError
from library.core.options import Config
from library.core.registry import import_target
from library.families.registry import record_of
from library.training import loss_weights
from library.training.idle_options import ignored
from library.training.loss_weights import LossWeightOptions
from library.training.objective import DdpmObjective, FlowMatchingObjective
from library.training.parser_common import parse_command
from library.training.timestep_samplers import TimestepOptions

TIMES = [0.0, 0.00005, 0.1, 0.35, 0.5, 0.75, 1.0]
"""the first two are below the margin of 1e-4"""


def by_hand(scheme: str, time: float) -> float:
    """Weight of a scheme at a time from 0 to 1, with its usual numbers."""
    time = min(max(time, 1e-4), 1 - 1e-4)
    ratio = ((1 - time) / time) ** 2
    return {
        "none": 1.0, "min_snr": min(5 / ratio, 1.0), "detail_inv_t": min(max(1 / time, 1.0), 5.0),
        "cosmap": 2 / (math.pi * (1 - 2 * time + 2 * time**2)), "sigma_sqrt": time**-2,
    }[scheme]  # fmt: skip


def flow(scheme: str = "none", weigh: bool = False) -> FlowMatchingObjective:
    return FlowMatchingObjective(TimestepOptions(weighting_scheme=scheme), weigh=weigh)


def factors(objective, timesteps, **options) -> list[float]:
    return loss_weights.build(LossWeightOptions(**options))(torch.tensor(timesteps), objective).tolist()


@pytest.mark.parametrize("scheme", loss_weights.SCHEMES)
def test_schemes_follow_their_formulas(scheme):
    """Of flow models at their times; of tables of noise levels at the time of a flow model with the same ratio."""
    expected = [by_hand(scheme, time) for time in TIMES]
    found = factors(flow(), [1000 * time for time in TIMES], loss_weighting=scheme)
    assert found == pytest.approx(expected, rel=2e-4, abs=1e-6)
    table, steps = DdpmObjective(TimestepOptions()), [0, 250, 600, 999]
    signal = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)[steps]
    times = 1 / (1 + (signal / (1 - signal)).sqrt())
    expected = [by_hand(scheme, time) for time in times.tolist()]
    assert factors(table, steps, loss_weighting=scheme) == pytest.approx(expected, rel=1e-5)


def test_numbers_of_schemes():
    assert factors(flow(), [500.0], loss_weighting="min_snr", loss_weighting_gamma=0.5) == [0.5]
    limits = {"detail_inv_t_min": 2.0, "detail_inv_t_max": 3.0}
    assert factors(flow(), [100.0, 400.0, 900.0], loss_weighting="detail_inv_t", **limits) == [3.0, 2.5, 2.0]
    v = DdpmObjective(TimestepOptions(), prediction_type="v")
    ratio = v.snr(torch.tensor([10]))
    expected = 5 / (ratio + 1)  # the formula of velocity prediction
    assert factors(v, [10], loss_weighting="min_snr") == pytest.approx(expected.tolist())


def test_the_cap_is_a_number_and_not_one_of_the_batch():
    """A sample has the same weight alone and beside others; what --weighting_scheme weighs counts with it."""
    capped = {"loss_weighting": "sigma_sqrt", "weight_cap_ratio": 4.0}
    alone = [factors(flow(), [step], **capped)[0] for step in (100.0, 800.0)]
    assert alone == factors(flow(), [100.0, 800.0], **capped) == pytest.approx([4.0, 0.8**-2])
    objective = flow("sigma_sqrt", weigh=True)
    found = factors(objective, [100.0, 800.0], weight_cap_ratio=4.0)
    assert [number * time**-2 for number, time in zip(found, (0.1, 0.8))] == pytest.approx([4.0, 0.8**-2])


def read(objective: FlowMatchingObjective, **values) -> list[str]:
    config = Config.read(values, (LossWeightOptions, TimestepOptions))
    items = loss_weights.idle(config[LossWeightOptions], values) + loss_weights.idle_cap(config, objective)
    return [str(item) for item in items]


def test_what_has_no_effect_is_listed():
    assert read(flow(), loss_weighting="detail_inv_t", detail_inv_t_max=4.0, weight_cap_ratio=2.0) == []
    assert read(flow(), loss_weighting="cosmap", loss_weighting_gamma=5.0) == [
        "--loss_weighting_gamma: has no effect: --loss_weighting cosmap does not read it"
    ]
    for objective, scheme, largest in ((flow(), "none", "1"), (flow(), "cosmap", "1.273"), (flow(), "min_snr", "1")):
        told = read(objective, loss_weighting=scheme, weight_cap_ratio=1.5)
        assert told == [f"--weight_cap_ratio: has no effect: the largest weight of this run is {largest}"]
    assert read(flow("sigma_sqrt", weigh=True), weight_cap_ratio=1.5) == []
    upper = FlowMatchingObjective(TimestepOptions(weighting_scheme="sigma_sqrt", min_timestep=900), weigh=True)
    assert "1.235" in read(upper, weight_cap_ratio=1.5)[0]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"loss_weighting": "cosmop"}, "cosmap"), ({"loss_weighting_gamma": 0.0}, "above 0"),
        ({"detail_inv_t_min": 6.0}, "min <= max"), ({"detail_inv_t_max": math.inf}, "min <= max"),
        ({"weight_cap_ratio": 0.5}, "1 or more"), ({"weight_cap_ratio": math.nan}, "1 or more"),
        ({"loss_weighting": "min_snr", "min_snr_gamma": 5.0}, "leave out one"),
        ({"loss_weight": ["cosmap"]}, "--loss_weighting cosmap"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(values, told):
    with pytest.raises(ConfigError, match=told):
        LossWeightOptions(**values)


def test_a_run_lists_them():
    config = parse_command(["--loss_weighting=cosmap", "--detail_inv_t_min=2", "--weight_cap_ratio=2"], "sdxl", "network").config
    told = [item.written for item in ignored(config, import_target(record_of("sdxl").family)(config))]
    assert "--detail_inv_t_min" in told and "--weight_cap_ratio" in told
