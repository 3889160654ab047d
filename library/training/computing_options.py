"""The options of how a run computes: number formats, memory, torch.compile, processes. See option_groups.py for the
rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from library.core.options import AUTO, count_or_none, equivalent_option, number_or_auto, option, refused_option
from library.training.option_bounds import raise_problems, too_small

MINUTES_OF_A_YEAR = 525_600
_DEEPSPEED = (
    "DeepSpeed is not supported; several GPUs work through accelerate launch, memory is saved by --blocks_to_swap and "
    "--offload_optimizer"
)


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Number formats"""

    mixed_precision: str = option(
        "no", help="format of the forward pass; trained weights stay float32", choices=("no", "fp16", "bf16")
    )
    full_fp16: bool = option(False, help="trained weights and gradients in float16 too; needs --mixed_precision fp16")
    full_bf16: bool = option(False, help="trained weights and gradients in bfloat16 too; needs --mixed_precision bf16")
    fp8_base: bool = option(False, help="frozen weights of denoiser and text encoders in float8; needs mixed precision")
    fp8_base_unet: bool = option(False, help="frozen weights of the denoiser alone in float8; needs mixed precision")
    fp8_scaled: bool = option(
        False, help="large matrices of the frozen denoiser in float8 with scales by which they use the whole range"
    )
    fp8_fast: bool = option(
        False, help="multiply in 8 bits, for --fp8_scaled: quicker and less exact; needs a GPU that can (RTX 40 on)"
    )
    mixed_precision_transformer: bool = option(
        False,
        help="keep every tensor of the frozen denoiser in the type that its file has; layers in float32 compute in it,"
        " what is between them in that of --mixed_precision, which is needed",
    )
    upcast_quantization: bool = equivalent_option(
        False, help="compute 8-bit weights and their scales in float32",
        reason="--upcast_quantization: weights become 8 bits in float32 in any case, and scales stay float32",
    )  # fmt: skip
    fp16_accumulation: bool = option(
        False,
        help="let GPUs add up products of float16 in float16: quicker and less exact, gradients too; for --mixed_precision"
        " fp16",
    )
    quantize_base: str | None = option(
        None, choices=(None, "int8", "nf4"),
        help="large matrices of the frozen denoiser in 8 or 4 bits with scales (nf4: that of QLoRA, by bitsandbytes)",
    )
    quantize_text_encoder: str | None = option(
        None, choices=(None, "fp8", "fp8_scaled", "int8", "nf4"),
        help="large matrices of frozen text encoders in float8, in float8 with scales, in 8 or 4 bits",
    )

    def __post_init__(self) -> None:
        problems = []
        for name, needed in (("full_fp16", "fp16"), ("full_bf16", "bf16")):
            if getattr(self, name) and self.mixed_precision != needed:
                problems.append(
                    f"--{name} is set with --mixed_precision {self.mixed_precision}; add --mixed_precision {needed}"
                )
        for name in ("fp8_base", "fp8_base_unet"):
            if getattr(self, name) and self.mixed_precision == "no":
                problems.append(
                    f"--{name} is set with --mixed_precision no; float8 weights compute in bf16 or fp16: add "
                    "--mixed_precision bf16"
                )
        others = [name for name in ("fp8_base", "fp8_base_unet", "fp8_scaled") if getattr(self, name)]
        if self.quantize_base and others:
            problems.append(
                f"--quantize_base {self.quantize_base} and --{others[0]} are set; the weights of the denoiser have one"
                f" form: leave one of them out (--quantize_text_encoder fp8 is for text encoders alone)"
            )
        raise_problems([*problems, *self._stored_problems()])

    def _stored_problems(self) -> list[str]:
        if not self.mixed_precision_transformer:
            return []
        problems = []
        if self.mixed_precision == "no":
            problems.append(
                "--mixed_precision_transformer is set with --mixed_precision no; layers of several types meet in one:"
                " add --mixed_precision bf16 or fp16, that of most tensors of the file"
            )
        names = ("fp8_base", "fp8_base_unet", "fp8_scaled", "quantize_base")
        given = [name for name in names if getattr(self, name)]
        if given:
            problems.append(
                f"--{given[0]} is set with --mixed_precision_transformer, which keeps weights as the file has them; leave"
                " one of them out"
            )
        return problems

    @property
    def denoiser_form(self) -> str | None:
        """How the frozen denoiser is stored, one of library.checkpoints.weight_forms.FORMS; None: as it is computed
        with."""
        if self.quantize_base or self.fp8_scaled:
            return self.quantize_base or "fp8_scaled"
        return "fp8" if self.fp8_base or self.fp8_base_unet else None

    @property
    def multiplies_fp8(self) -> bool:
        """Whether the denoiser's products are those of 8-bit numbers."""
        return self.fp8_fast and self.fp8_scaled

    @property
    def text_form(self) -> str | None:
        """The same of frozen text encoders."""
        return self.quantize_text_encoder or ("fp8" if self.fp8_base and not self.fp8_base_unet else None)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Memory and speed"""

    gradient_checkpointing: bool = option(False, help="recompute activations in the backward pass: less memory, slower")
    cpu_offload_checkpointing: bool = option(
        False, help="keep the inputs of checkpointed blocks in main memory; needs --gradient_checkpointing"
    )
    blocks_to_swap: int | str | None = option(
        None,
        help="number of blocks of the denoiser that wait in main memory, 0 = none; auto = as many as the memory of the"
        " device makes necessary",
        convert=number_or_auto, metavar="N|auto",
    )
    block_swap_ring_size: int = option(
        2,
        help="places on the device, of those that --blocks_to_swap leaves, through which swapped blocks pass: one"
        " computes while the next arrive",
    )
    vram_budget: float | None = option(
        None, metavar="GB",
        help="gigabytes (10^9 bytes) of the device that the run may hold: gradient checkpointing, swapped blocks, inputs of"
        " checkpoints in main memory and 8-bit weights are chosen so that it fits, as far as these options are off",
    )
    torch_compile: bool = option(False, help="compile the blocks of the denoiser with torch.compile")
    dynamo_backend: str = option(
        "inductor",
        help="backend of --torch_compile, in any case; no is what front ends write when they do not compile",
        convert=str.lower,
        choices=(
            "no",
            "eager",
            "aot_eager",
            "inductor",
            "aot_ts_nvfuser",
            "nvprims_nvfuser",
            "cudagraphs",
            "ofi",
            "fx2trt",
            "onnxrt",
            "tensort",
            "tensorrt",
            "aot_torchxla_trace_once",
            "torchxla_trace_once",
            "ipex",
            "tvm",
            "hpu_backend",
        ),
    )
    dynamo_mode: str | None = option(
        None, help="what --torch_compile optimizes for; default when not given",
        choices=(None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    dynamo_fullgraph: bool = option(False, help="make an error of code that --torch_compile cannot compile whole")
    dynamo_dynamic: bool | None = option(
        None, help="whether --torch_compile compiles for sizes that change; found out while training when not given"
    )
    dynamo_cache_size_limit: int | None = option(
        None, help="most versions of a block that --torch_compile keeps; room for the sizes of all blocks when not"
        " given",
        convert=count_or_none,
    )
    cuda_allow_tf32: bool = option(
        False, help="let NVIDIA GPUs multiply float32 matrices in TF32: faster, fewer digits"
    )
    cuda_cudnn_benchmark: bool = option(
        False, help="let cuDNN try out its convolutions: faster where sizes stay, results may differ in the last digits"
    )
    lowram: bool = equivalent_option(
        False,
        help="hint for machines with little main memory",
        reason="--lowram: every part is loaded where it is used and released after its last use; nothing else to do",
    )
    highvram: bool = equivalent_option(
        False,
        help="hint for GPUs with much memory",
        reason="--highvram: the GPU cache is emptied only when a part is released; nothing else to do",
    )

    def __post_init__(self) -> None:
        problems = too_small(self, 1, "block_swap_ring_size")
        if self.vram_budget is not None and not 0 < self.vram_budget < math.inf:
            problems.append(f"--vram_budget is {self.vram_budget:g}; needed: gigabytes above 0, e.g. 12")
        if self.blocks_to_swap != AUTO:
            problems += too_small(self, 0, "blocks_to_swap", hint=" (0 = no swapping)")
        raise_problems(problems + too_small(self, 1, "dynamo_cache_size_limit"))

    @property
    def compiles(self) -> bool:
        return self.torch_compile and self.dynamo_backend != "no"


@dataclass(frozen=True, kw_only=True)
class DdpOptions:
    """Several processes"""

    ddp_timeout: int | None = option(
        None,
        help="minutes that a process waits for the others; 30 when not given",
        convert=count_or_none,
        most=MINUTES_OF_A_YEAR,
    )
    ddp_gradient_as_bucket_view: bool = equivalent_option(
        False,
        help="share memory between gradients and buckets",
        reason="--ddp_gradient_as_bucket_view: the trainer sums gradients itself, in buckets that last as long as the sum;"
        " there is nothing to share",
    )
    ddp_static_graph: bool = equivalent_option(
        False,
        help="assume that the graph never changes",
        reason="--ddp_static_graph: gradients are summed by the trainer after each step; the graph does not matter",
    )

    def __post_init__(self) -> None:
        raise_problems(too_small(self, 1, "ddp_timeout"))


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """DeepSpeed"""

    deepspeed: bool = refused_option(False, help="train through DeepSpeed", reason=_DEEPSPEED)
    zero_stage: int = refused_option(2, help="ZeRO stage", choices=(0, 1, 2, 3), reason=_DEEPSPEED)
    offload_optimizer_device: str | None = refused_option(
        None, help="where the optimizer lives", choices=(None, "cpu", "nvme"), reason=_DEEPSPEED
    )
    offload_optimizer_nvme_path: str | None = refused_option(
        None, help="folder for the optimizer on NVMe", reason=_DEEPSPEED
    )
    offload_param_device: str | None = refused_option(
        None, help="where the parameters live", choices=(None, "cpu", "nvme"), reason=_DEEPSPEED
    )
    offload_param_nvme_path: str | None = refused_option(
        None, help="folder for the parameters on NVMe", reason=_DEEPSPEED
    )
    zero3_init_flag: bool = refused_option(False, help="build the model under ZeRO-3", reason=_DEEPSPEED)
    zero3_save_16bit_model: bool = refused_option(False, help="save 16-bit weights under ZeRO-3", reason=_DEEPSPEED)
    fp16_master_weights_and_gradients: bool = refused_option(False, help="master weights in float16", reason=_DEEPSPEED)
