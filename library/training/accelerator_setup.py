"""Runtime: accelerate, the process group, devices and dtypes behind one small interface."""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from library.core.errors import ConfigError, TrainingError
from library.core.options import Config
from library.device_utils import sum_in_fp16
from library.training.computing_options import DdpOptions, MemoryOptions, PrecisionOptions
from library.training.gradient_sums import sum_in_buckets
from library.training.option_groups import ModelOptions

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import KwargsHandler

logger = logging.getLogger(__name__)
Value = TypeVar("Value")

CLIPPING_MARGIN = 1e-5
"""a norm that is smaller than the limit by this, of both, is so whatever is rounded on the way"""
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Runtime:
    """Where and in which precision a run computes.

    `weight_dtype`: dtype of autocast and of frozen weights; `denoiser_dtype`: dtype in which the denoiser's weights are
    held (float8_e4m3fn with --fp8_base, None = those of the file); `denoiser_form` and `text_form`: the form of large matrices, one of
    weight_forms.FORMS, None = these types; `vae_dtype`: float32 with --no_half_vae.
    """

    accelerator: Accelerator
    device: torch.device
    weight_dtype: torch.dtype
    denoiser_dtype: torch.dtype | None
    text_encoder_dtype: torch.dtype
    vae_dtype: torch.dtype
    trained_dtype: torch.dtype
    rank: int
    num_processes: int
    seed: int
    """of every random draw of the run: --seed, or a number that the main process drew"""
    seed_was_drawn: bool = False
    denoiser_form: str | None = None
    text_form: str | None = None

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision around forwards; nothing in full float32."""
        if self.weight_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.weight_dtype)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of this rank's part of the loss; scaled in fp16."""
        if self.accelerator.scaler is None:
            loss.backward()  # what accelerate does beside dividing by its own count of accumulated steps, which is 1
        else:
            self.accelerator.backward(loss)

    def reduce_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum gradients over ranks. The loss was divided by the global sample count, so the sum is the batch's
        gradient; a rank without samples adds zeros. Parameters that an adapter holds still in this step have none on
        any rank."""
        if self.num_processes == 1:
            return
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_in_buckets((parameter.grad for parameter in learning), torch.distributed.all_reduce)

    def clip_gradients(self, parameters: list[torch.nn.Parameter], max_norm: float) -> torch.Tensor | None:
        """Clip to a global norm; returns the norm before clipping, a tensor on the device."""
        self.unscale_gradients()  # accelerate does the same after importing torch.distributed.tensor, half a second
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # on other devices, asking would wait
        is_small = norm.device.type == "cpu" and float(norm) + CLIPPING_MARGIN < (1 - CLIPPING_MARGIN) * max_norm
        if not is_small:  # the factor would be 1
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def unscale_gradients(self) -> None:
        """Take the factor of fp16 off the gradients, which clipping does on its way; hooks read their true size."""
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients()

    def sum_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.num_processes == 1:
            return tensor
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM)
        return total

    def from_main(self, value: Value) -> Value:
        """The main process's value, on every rank."""
        if self.num_processes == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        self.accelerator.wait_for_everyone()

    def leave_group(self) -> None:
        """After the last step: a process that ends while its group is open may be aborted by the threads of the
        group."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self.barrier()
            torch.distributed.destroy_process_group()

    def seed_foreign_code(self, seed: int) -> None:
        """Seed the global generators for code that is not ours (dropout of a third-party network module): a pure
        function of the step, so that a resumed run draws the same. Our own code never reads them.

        torch.manual_seed would note the call, with a trace of the stack, for every kind of device that is not in use,
        which takes longer than some layers.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            of_device = getattr(torch, self.device.type)
            getattr(of_device, "manual_seed_all", of_device.manual_seed)(seed)


def is_main_process() -> bool:
    """Before the process group is there: by what the launchers set."""
    return int(os.environ.get("RANK", "0") or 0) == 0


def prepare_runtime(config: Config) -> Runtime:
    """Start accelerate and form the process group; TrainingError when processes that were started do not see each
    other."""
    set_cuda_switches(config)
    return _runtime_of(start_accelerator(config[PrecisionOptions], config[DdpOptions]), config)


def set_cuda_switches(config: Config) -> None:
    """--fp16_accumulation, --cuda_allow_tf32 and --cuda_cudnn_benchmark, which are settings of the process."""
    sum_in_fp16(config[PrecisionOptions].fp16_accumulation)
    if MemoryOptions not in config:
        return  # a tool that loads no denoiser
    memory = config[MemoryOptions]
    if memory.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if memory.cuda_cudnn_benchmark:
        torch.backends.cudnn.benchmark = True


def start_accelerator(precision: PrecisionOptions, ddp: DdpOptions, **further: object) -> Accelerator:
    """accelerate's Accelerator; `further` are arguments of its own that our loop has no use for."""
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    check_torchvision()
    has_accelerator = torch.cuda.is_available() or _has("mps") or _has("xpu")
    handlers: list[KwargsHandler] = []
    if ddp.ddp_timeout:
        handlers.append(InitProcessGroupKwargs(timeout=timedelta(minutes=ddp.ddp_timeout)))
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    accelerator = Accelerator(
        # Without cpu=True accelerate on a machine without accelerator forms no group: every process believes to be
        # alone.
        cpu=not has_accelerator,
        mixed_precision=precision.mixed_precision,
        kwargs_handlers=handlers or None,
        **further,
    )
    _check_process_group(accelerator.num_processes)
    if precision.full_fp16 and accelerator.scaler is not None:  # there is none on the CPU
        allow_fp16_gradients(accelerator.scaler)
    return accelerator


def allow_fp16_gradients(scaler: torch.amp.GradScaler) -> None:
    """Let the gradient scaler unscale float16 gradients, which torch refuses by default: --full_fp16 trains in
    float16."""
    unscale = scaler._unscale_grads_
    scaler._unscale_grads_ = lambda optimizer, inv_scale, found_inf, _: unscale(optimizer, inv_scale, found_inf, True)


def shared_seed(given: int | None, num_processes: int) -> int:
    """--seed or that of the state to go on with, else a number drawn by the main process and known to all."""
    if given is not None:
        return given
    box = [secrets.randbits(32)]
    if num_processes > 1:
        torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _runtime_of(accelerator: Accelerator, config: Config) -> Runtime:
    from library.training.state import seed_of

    given_seed = seed_of(config)
    return Runtime(
        accelerator=accelerator,
        # with several processes accelerate numbers the CPU (cpu:1), which file readers refuse
        device=torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device,
        **_forms(config),
        rank=accelerator.process_index,
        num_processes=accelerator.num_processes,
        seed=shared_seed(given_seed, accelerator.num_processes),
        seed_was_drawn=given_seed is None,
    )


def with_forms(runtime: Runtime, config: Config) -> Runtime:
    """The same runtime for a configuration that stores its weights in another form."""
    return dataclasses.replace(runtime, **_forms(config))


def _forms(config: Config) -> dict[str, Any]:
    """Number formats of a Runtime."""
    precision = config[PrecisionOptions]
    weight_dtype = DTYPES[precision.mixed_precision]
    fp8 = torch.float8_e4m3fn
    return dict(
        weight_dtype=weight_dtype,
        denoiser_dtype=_denoiser_dtype(precision, weight_dtype),
        text_encoder_dtype=fp8 if precision.text_form == "fp8" else weight_dtype,
        denoiser_form=precision.denoiser_form,
        text_form=precision.text_form,
        vae_dtype=torch.float32 if config[ModelOptions].no_half_vae else weight_dtype,
        trained_dtype=weight_dtype if precision.full_fp16 or precision.full_bf16 else torch.float32,
    )


def _denoiser_dtype(precision: PrecisionOptions, weight_dtype: torch.dtype) -> torch.dtype | None:
    if precision.mixed_precision_transformer:
        return None
    return torch.float8_e4m3fn if precision.denoiser_form == "fp8" else weight_dtype


def _has(backend: str) -> bool:
    module = getattr(torch, backend, None) or getattr(torch.backends, backend, None)
    return bool(module is not None and module.is_available())


def _check_process_group(num_processes: int) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and num_processes != world_size:
        raise TrainingError(
            f"{world_size} processes were started (WORLD_SIZE) but only {num_processes} joined the group; start with"
            " 'accelerate launch --multi_gpu --num_processes N' or 'torchrun --nproc_per_node N'"
        )


def check_torchvision() -> None:
    """Name a torchvision that does not fit torch: its failing import makes every model class of transformers fail."""
    import importlib.util

    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except Exception as error:
        raise ConfigError(
            f"the installed torchvision does not fit torch {torch.__version__} ({error}); transformers cannot load a "
            "model"
            " beside it. Remove it with: pip uninstall torchvision  (or install the release that belongs to this torch)"
        ) from error
