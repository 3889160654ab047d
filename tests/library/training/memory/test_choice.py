"""What --vram_budget and --blocks_to_swap auto choose, and why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from library.core.errors import ConfigError
from library.core.options import Config
from library.training.computing_options import MemoryOptions, PrecisionOptions
from library.training.memory.choice import Chooser, changed
from library.training.memory.measure import Sizes
from library.training.memory.plan import MemoryPlan, Phase

MB = 10**6
BLOCKS = 8


def config_of(*explicit: str, mixed_precision: str = "bf16", **memory: object) -> Config:
    groups = {MemoryOptions: MemoryOptions(**memory), PrecisionOptions: PrecisionOptions(mixed_precision=mixed_precision)}
    return Config(groups, [*explicit, *memory])


def measured(config: Config) -> Sizes:
    """A run of 800 MB of weights in 8 blocks, which 8 bits halve, and 600 MB of activations, of which checkpoints
    leave 100, and 80 when their inputs wait elsewhere."""
    memory = config[MemoryOptions]
    block = (50 if config[PrecisionOptions].fp8_scaled else 100) * MB
    sizes = Sizes(None, "cuda", weights={"denoiser": BLOCKS * block})
    sizes.forward = (80 if memory.cpu_offload_checkpointing else 100 if memory.gradient_checkpointing else 600) * MB
    sizes.swaps = [(0, 0), *(((count + 2) * block, 2 * block) for count in range(1, BLOCKS - 1))]
    return sizes


def assembled(config: Config, sizes: Sizes) -> MemoryPlan:
    home, places = sizes.swaps[config[MemoryOptions].blocks_to_swap or 0]
    phase = Phase("forward", {"denoiser": sizes.weights["denoiser"] - home + places, "activations": sizes.forward})
    return MemoryPlan(device="cuda", phases=[phase], host={}, settings="batch of 1")


def choose(config: Config, budget: int, *, given: bool = True, invalid: tuple[str, ...] = ()) -> tuple[Config, str]:
    class Smaller:
        """Batches of which each sample takes the same, of a batch of 4."""

        most = 3

        def plan(self, one: Config, count: int) -> MemoryPlan:
            sizes = measured(one)
            sizes.forward = sizes.forward * count // 4
            return assembled(one, sizes)

    def is_valid(one: Config) -> bool:
        return not any(getattr(one[group], name, None) for name in invalid for group in one.classes())

    found = Chooser(measured, assembled, is_valid, Smaller()).choose(config, budget * MB, given=given)
    assert found.plan.device_peak <= budget * MB
    return found.config, " ".join(found.lines)


def test_the_budget_is_reached_by_what_costs_least() -> None:
    config, why = choose(config_of(), 1500)
    assert not config[MemoryOptions].gradient_checkpointing and "nothing is changed" in why
    config, why = choose(config_of(), 900)
    assert config[MemoryOptions].gradient_checkpointing and not config[MemoryOptions].blocks_to_swap
    assert why == (
        "--vram_budget 0.9: chosen --gradient_checkpointing, to stay within 0.9 GB; as asked the run holds 1.4 GB in its"
        " largest moment (forward), with --gradient_checkpointing 0.9 GB"
    )
    config, why = choose(config_of(), 620)
    assert config[MemoryOptions].blocks_to_swap == 3 and "--gradient_checkpointing --blocks_to_swap 3" in why
    config, _ = choose(config_of(), 280)
    assert config[MemoryOptions].cpu_offload_checkpointing and config[MemoryOptions].blocks_to_swap == 6
    config, _ = choose(config_of(), 200)
    assert config[PrecisionOptions].fp8_scaled and config[MemoryOptions].blocks_to_swap == 6


def test_what_was_given_stays() -> None:
    config, _ = choose(config_of(blocks_to_swap=1), 820)
    assert config[MemoryOptions].blocks_to_swap == 1 and config[MemoryOptions].gradient_checkpointing
    with pytest.raises(ConfigError, match="blocks_to_swap|the nearest"):
        choose(config_of(blocks_to_swap=1), 280)
    config, _ = choose(config_of(), 500, invalid=("blocks_to_swap",))
    assert config[PrecisionOptions].fp8_scaled and not config[MemoryOptions].blocks_to_swap
    with pytest.raises(ConfigError, match="nearest"):
        choose(config_of(mixed_precision="no"), 200)  # 8 bits compute in a narrower type


def test_what_front_ends_write_of_options_that_are_off_is_open() -> None:
    written = {"blocks_to_swap": 0, "gradient_checkpointing": False, "cpu_offload_checkpointing": False}
    assert choose(config_of("fp8_scaled", **written), 200)[0].values() == choose(config_of(), 200)[0].values()


def test_auto_swaps_and_changes_nothing_else() -> None:
    config, why = choose(config_of(blocks_to_swap="auto"), 1250, given=False)
    assert config[MemoryOptions] == replace(MemoryOptions(), blocks_to_swap=2)
    assert why.startswith("--blocks_to_swap auto: chosen --blocks_to_swap 2, to stay within 1.25 GB")
    config, _ = choose(config_of(blocks_to_swap="auto"), 1400, given=False)
    assert config[MemoryOptions].blocks_to_swap == 0


def test_a_refusal_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as refused:
        choose(config_of(), 100)
    told = str(refused.value)
    assert told.startswith("--vram_budget is 0.1 GB; the nearest that this run can come to is 0.18 GB with")
    assert "--gradient_checkpointing --cpu_offload_checkpointing --fp8_scaled --blocks_to_swap 6" in told
    assert "as asked 1.4 GB" in told
    assert "Not even a batch of 1 fits, which holds 0.12 GB" in told
    with pytest.raises(ConfigError, match="A batch of 3 fits, with 0.16 GB; a smaller resolution"):
        choose(config_of(), 170)
    with pytest.raises(ConfigError, match="A batch of 1 fits, with 0.12 GB"):
        choose(config_of(), 139)


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_budget_is_a_size(value: float) -> None:
    with pytest.raises(ConfigError, match="vram_budget"):
        MemoryOptions(vram_budget=value)


def test_other_groups_stay() -> None:
    config = config_of("seed")
    other = changed(config, MemoryOptions, gradient_checkpointing=True)
    assert other[PrecisionOptions] is config[PrecisionOptions] and other.explicit == config.explicit
