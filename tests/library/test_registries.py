"""Every table of names that users choose from, as the code has it: nothing that had a name loses it, every name builds
and does its work once, and a page tells of it. A table that is new here wants a line in BUILDERS, a name none."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from library.core.keyed_random import StepDraws
from library.core.registry import Registry, import_target
from library.families.registry import FAMILIES, records
from library.training import losses, optimizers, schedulers, timestep_samplers
from library.training.inference_samplers import INFERENCE_SAMPLERS, discrete
from library.training.loss_weights import LOSS_WEIGHTS, LossWeightOptions
from library.training.losses import LossOptions
from library.training.objective import ddpm_alphas_cumprod
from library.training.optimizers import OptimizerOptions
from library.training.schedulers import SchedulerOptions
from library.training.timestep_samplers import TimestepOptions

ROOT = Path(__file__).parents[2]
DEFINED = re.compile(r"^(\w+)\b[^=\n]*= Registry\b", re.MULTILINE)
GENERATED = re.compile(r"^\| `--(?:[^|\n\\]|\\.)*(?:\|(?:[^|\n\\]|\\.)*){3}\|$", re.MULTILINE)
"""lines of tables of options, which list all names because the help does"""


def tables() -> dict[str, Registry]:
    """Group -> table, of all modules of the project that define one."""
    found = {}
    for folder in ("library", "networks", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in DEFINED.findall(path.read_text(encoding="utf-8")):
                module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                registry = getattr(importlib.import_module(module), name)
                found[registry.group] = registry
    return found


TABLES = tables()
NAMES = [(group, entry.name) for group, table in TABLES.items() for entry in table if not entry.is_outside]
PAGES = "\n".join(
    GENERATED.sub("", path.read_text(encoding="utf-8"))
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
)
FENCED = re.compile(r"```.*?```", re.DOTALL)
SPANS = [*FENCED.findall(PAGES), *re.findall(r"`([^`\n]+)`", FENCED.sub("", PAGES))]
QUOTED = {word.lower() for span in SPANS for word in re.findall(r"[\w+]+", span)}
"""words of what pages show as code"""


# ---- building --------------------------------------------------------------------------------------------------------


def is_installed(group: str, name: str) -> bool:
    """Whether the package that a name needs is there; without one of its own it has to be."""
    package = TABLES[group].entry(name).package
    try:
        return package is None or bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def an_optimizer(name: str) -> None:
    if is_installed("optimizers", name):
        optimizers.check(OptimizerOptions(optimizer_type=name, learning_rate=1.0))


def a_schedule(name: str) -> None:
    if name == "adafactor":
        optimizer = OptimizerOptions(optimizer_type="AdaFactor", learning_rate=0.1)
        schedulers.check(SchedulerOptions(lr_scheduler=name), optimizer)
        build = optimizers.build(optimizer, [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1}])
        assert schedulers.build(SchedulerOptions(), build, learning_rate=0.1, max_train_steps=9).get_last_lr() == [0.1]
        return
    needed = {"lr_scheduler_min_lr_ratio": 0.1}
    if name == "piecewise_constant":
        needed = {"lr_scheduler_args": ["step_rules=1:3,0.1"]}
    options = SchedulerOptions(lr_scheduler=name, **needed)
    schedulers.check(options, OptimizerOptions(learning_rate=0.1), 10)
    curve = schedulers.curve_of(options, schedulers.CurveSettings.of(options, rate=0.1, max_train_steps=10))
    assert all(0 <= curve(step) <= 1 for step in range(11))


def a_loss(name: str) -> None:
    prediction, target = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    options = LossOptions(loss_type=name, huber_schedule="constant")
    losses.check(options)
    loss = losses.build(options)(prediction, target, torch.tensor([100.0, 900.0]), None)
    assert loss.shape == prediction.shape and bool((loss > 0).all())


def a_loss_weight(name: str) -> None:
    values = {"detail_inv_t": LossWeightOptions(loss_weighting="detail_inv_t").scheme_value}
    snr = torch.tensor([0.1, 1.0, 10.0])
    factor = LOSS_WEIGHTS.resolve(name)(snr, values.get(name, 5.0), False)
    assert factor.shape == snr.shape and bool((factor > 0).all() and factor.isfinite().all())


def a_timestep_sampler(name: str) -> None:
    options = TimestepOptions(timestep_sampling=name, timestep_mix_low_prob=0.5)
    levels = timestep_samplers.build(options).sample((64, 16, 8, 8), StepDraws(0, 0, tuple(range(64))))
    assert levels.shape[0] == 64 and 0 <= float(levels.min()) < float(levels.max()) <= 1


def an_inference_sampler(name: str) -> None:
    """Latents that a perfect model draws to 1, without more noise."""
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    alphas = ddpm_alphas_cumprod(zero_terminal_snr=False)

    def network(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        alpha = alphas[int(float(timestep))]
        return (latents - alpha.sqrt()) / (1 - alpha).sqrt()

    found = discrete.sample_latents(
        name, network, start, 20, prediction_type="epsilon", noise=lambda: torch.zeros(1, 4, 4, 4)
    )
    assert (found - 1).abs().mean() < 0.3 < (start - 1).abs().mean(), INFERENCE_SAMPLERS.entry(name)


def a_sigma_table(name: str) -> None:
    sigmas = TABLES["sigma_tables"].resolve(name)(8, 3.0)
    levels = torch.as_tensor(sigmas).tolist()
    assert len(levels) <= 9 and levels[-1] == 0 and levels == sorted(levels, reverse=True) and levels[0] <= 1


def an_adapter(name: str) -> None:
    if is_installed("adapters", name):
        module = TABLES["adapters"].resolve(name)
        assert callable(module.create_network) and callable(module.create_network_from_weights)


def a_trainable(name: str) -> None:
    entry = TABLES["trainables"].entry(name)
    cls, options = TABLES["trainables"].resolve(name), import_target(entry.info["options"])
    assert is_dataclass(options) and not inspect.isabstract(cls)
    options()
    assert cls.check is not None and callable(cls.save)


BUILDERS: dict[str, Callable[[str], None]] = {
    "optimizers": an_optimizer, "schedulers": a_schedule, "losses": a_loss, "loss_weights": a_loss_weight,
    "timestep_samplers": a_timestep_sampler, "inference_samplers": an_inference_sampler, "sigma_tables": a_sigma_table,
    "adapters": an_adapter, "trainables": a_trainable, "hooks": lambda name: TABLES["hooks"].resolve(name),
}  # fmt: skip


def test_every_table_is_known_here() -> None:
    assert TABLES.keys() <= BUILDERS.keys(), "say in BUILDERS how its names are built"
    assert len(TABLES) >= 10


@pytest.mark.parametrize("group", sorted(BUILDERS))
def test_every_name_builds(group: str) -> None:
    wrong = []
    for name in [name for table, name in NAMES if table == group]:
        try:
            BUILDERS[group](name)
        except Exception as error:  # all of them are told
            wrong.append((name, repr(error)))
    assert not wrong, "\n".join(map(str, wrong))


def test_every_family_is_there() -> None:
    """Records name their classes; each of them can be imported."""
    names = "sd sdxl sd3 flux chroma anima lumina hunyuan_image hunyuan_video framepack wan"
    assert set(FAMILIES) >= set(names.split())
    for name, record in FAMILIES.items():
        assert inspect.isclass(import_target(record.family)), name
        assert (ROOT / record.page).is_file(), name
    assert len(records()) >= len(FAMILIES)


# ---- pages and old names ---------------------------------------------------------------------------------------------


def test_every_name_is_on_a_page() -> None:
    """Where people read, not only in tables that are made from the help."""
    missing = [f"{group}: {name}" for group, name in NAMES if name.lower() not in QUOTED]
    assert not missing, "\n".join(missing)


FROZEN: dict[str, str] = {
    "optimizers": "AdamW SGDNesterov AdamW8bit Lion8bit PagedLion8bit PagedAdamW8bit PagedAdamW PagedAdamW32bit"
    " SGDNesterov8bit Lion DAdaptation DAdaptAdamPreprint DAdaptAdanIP DAdaptAdaGrad DAdaptAdam DAdaptAdan DAdaptLion"
    " DAdaptSGD Prodigy AdaFactor AdamWScheduleFree RAdamScheduleFree SGDScheduleFree ProdigyPlusScheduleFree CAME"
    " AdEMAMix8bit SOAP automagic automagic_v2 soap_sf prodigy_plus_schedulefree",
    "schedulers": "constant constant_with_warmup none linear cosine cosine_with_restarts cosine_with_warm_restarts"
    " cosine_with_warmup cosine_with_min_lr polynomial inverse_sqrt warmup_stable_decay piecewise_constant rex"
    " adafactor",
    "losses": "l1 l2 huber smooth_l1",
    "loss_weights": "min_snr_gamma scale_v_pred_loss_like_noise_pred v_pred_like_loss debiased_estimation_loss",
    "timestep_samplers": "sigma uniform sigmoid shift flux_shift",
    "inference_samplers": "ddim ddpm pndm lms euler euler_a heun dpm_2 dpm_2_a dpmsolver dpmsolver++ dpmsingle k_lms"
    " k_euler k_euler_a k_dpm_2 k_dpm_2_a er_sde dpmpp_3m_sde",
    "sigma_tables": "simple sgm_uniform karras beta",
    "adapters": "lora loha lokr glora oft diag_oft boft dylora lora_fa tlora ia3 full norm lora_flux lora_sd3"
    " lora_lumina lora_anima lycoris",
    "trainables": "network",
}
"""names that commands and presets have; further ones need no line"""


def test_no_name_is_lost() -> None:
    named = [(group, name) for group, names in FROZEN.items() for name in names.split()]
    assert not [(group, name) for group, name in named if name not in TABLES[group]]


@pytest.mark.parametrize("group", sorted(set(BUILDERS) - {"hooks"}))
def test_an_unknown_name_is_told_with_the_nearest(group: str) -> None:
    table: Any = TABLES[group]
    known = table.names()[0]
    message = table.problem(known[:-1] + ("x" if len(known) < 4 else "") + "~")
    assert message is not None and "Known: " in message and known in message
