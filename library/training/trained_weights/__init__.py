"""Training of all weights of a module, be it a whole model or a net beside one: the options that all of it has."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import Problems
from library.core.options import equivalent_option, option

OF_EVERY_SCRIPT = ("layer_lrs", "bf16_update", "use_safetensors")
OLD = ("double_blocks_to_swap", "single_blocks_to_swap")
"""options that scripts take and none reads any more"""
BF16_NOTICES = {
    "stochastic": "weights in bfloat16 are rounded stochastically after each step, so that small updates count"
    " (--bf16_update stochastic)",
    "kahan": "weights in bfloat16 are summed with what rounding cuts off, 2 bytes per weight in the optimizer's state,"
    " so that small updates count (--bf16_update kahan)",
}
"""values of --bf16_update, and what the page at start says of them"""


@dataclass(frozen=True, kw_only=True)
class TrainedWeightsOptions:
    """Training of weights"""

    layer_lrs: str | None = option(
        None,
        help="learning rates of layers of the denoiser, or of the ControlNet that learns, by their path, as"
        " regex=rate,regex=rate; 0 = not trained",
    )
    bf16_update: str = option(
        "stochastic", choices=tuple(BF16_NOTICES),
        help="how weights of --full_bf16 take updates smaller than their last digit: stochastic = rounded to one of two"
        " neighbours by chance, right on average; kahan = what is cut off is kept for the next update, 2 more bytes per"
        " weight",
    )
    fused_optimizer_groups: int | None = option(
        None,
        help="1 or more: the same as --fused_backward_pass, which updates each tensor as soon as its gradient is there",
    )
    blockwise_fused_optimizers: bool = option(False, help="the same as --fused_backward_pass")
    use_safetensors: bool = equivalent_option(
        False, help="write safetensors files",
        reason="--use_safetensors: files are safetensors unless --save_model_as says otherwise",
    )
    mem_eff_save: bool = equivalent_option(
        False, help="write files with little memory",
        reason="--mem_eff_save: files are always written without a second copy in memory",
    )
    skip_latents_validity_check: bool = equivalent_option(
        False, help="old name of --skip_cache_check",
        reason="--skip_latents_validity_check: an old name; --skip_cache_check takes cached latents as they are",
    )
    double_blocks_to_swap: int | None = option(None, help="number of double blocks that wait in main memory")
    single_blocks_to_swap: int | None = option(None, help="number of single blocks that wait in main memory")

    def __post_init__(self) -> None:
        problems = Problems()
        if self.fused_optimizer_groups is not None and self.fused_optimizer_groups < 0:
            problems.add(f"--fused_optimizer_groups is {self.fused_optimizer_groups}; needed: 1 or more, or 0 for none")
        problems.raise_if_any()
