"""Pictures and videos enlarged by a network: ESRGAN, Real-ESRGAN and BSRGAN files by our own reader, SwinIR and others
by the package spandrel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from library.core.errors import AtelierError, CheckpointError, ConfigError
from library.core.options import Config, equivalent_option, option
from library.scripts.tool_script import DTYPES, dtype_problem, tool_exit_code
from tools.frame_tools.processing import FrameProcessor, FrameTool, missing_file

if TYPE_CHECKING:
    import numpy as np
    import torch

NEEDED = "spandrel"


@dataclass(frozen=True, kw_only=True)
class UpscaleFilesOptions:
    """Enlarging"""

    model: str | None = option(None, help="file of the network, .safetensors or .pth")
    mode: str | None = equivalent_option(
        None, choices=("swinir", "esrgan"), help="kind of the network",
        reason="--mode: the file tells which network it is",
    )  # fmt: skip
    scale: float | None = option(
        None, help="sides of the result / sides of the picture; what the network does when not given, else resized to"
        " it",
    )  # fmt: skip
    tile_size: int = option(
        0, help="sides of the parts that are computed one by one, to save memory; 0 = pictures whole", least=0
    )
    dtype: str = option("float32", help="number format of the network: float32, bf16 or fp16")
    device: str | None = option(None, help="device, e.g. cuda:1; the first GPU when not given, else the CPU")


def problems_of(config: Config) -> Iterator[str]:
    options = config[UpscaleFilesOptions]
    problem = missing_file("model", options.model, "a file of an ESRGAN or SwinIR network")
    if problem:
        yield problem
    if options.scale is not None and not 0 < options.scale <= 16:
        yield f"--scale is {options.scale}; needed: above 0, at most 16"
    wrong = dtype_problem("dtype", options.dtype)
    if wrong or DTYPES[options.dtype.lower()].startswith("float8"):
        yield wrong or f"--dtype is {options.dtype}; needed: float32, bf16 or fp16"
    from library.device_utils import device_problem

    problem = device_problem("device", options.device)
    if problem:
        yield problem


class Upscaler(FrameProcessor):
    """`network`: [3, H, W] in 0..1 -> [3, H', W'] in 0..1, float32. `scale`: what the sides become times; None = as the
    network makes them."""

    def __init__(self, network: Callable[[torch.Tensor], torch.Tensor], scale: float | None = None) -> None:
        self.network, self.scale = network, scale

    def picture(self, frame: np.ndarray) -> np.ndarray:
        import torch
        from PIL import Image

        pixels = torch.from_numpy(frame.copy()).permute(2, 0, 1).float() / 255  # [3, H, W]
        made = self.network(pixels).float().cpu()
        if not bool(torch.isfinite(made).all()):
            raise AtelierError("the network gives values that are not finite; leave --dtype out, or use bf16")
        result = (made.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        if self.scale is None:
            return result
        height, width = (max(round(side * self.scale), 1) for side in frame.shape[:2])
        if result.shape[:2] == (height, width):
            return result
        import numpy as np

        return np.asarray(Image.fromarray(result).resize((width, height), Image.Resampling.LANCZOS))


def load(config: Config) -> Upscaler:
    """CheckpointError for a file that no reader knows; ConfigError, with what is missing, where spandrel would."""
    import torch

    from library.components.esrgan_utils import enlarged, load_rrdb
    from library.device_utils import get_preferred_device

    options = config[UpscaleFilesOptions]
    device = torch.device(options.device) if options.device else get_preferred_device()
    dtype = getattr(torch, DTYPES[options.dtype.lower()])
    own = load_rrdb(options.model or "")
    if own is not None:
        own = own.to(device, dtype)
        return Upscaler(lambda pixels: enlarged(own, pixels.to(device, dtype), options.tile_size), options.scale)
    if options.tile_size:
        raise ConfigError("--tile_size is for ESRGAN files; other networks take pictures whole: leave it out")
    return Upscaler(_of_spandrel(options.model or "", dtype, device), options.scale)


def spandrel_problem() -> str | None:
    """Why spandrel cannot be used, or None: it imports torchvision, which has to fit the installed torch."""
    if find_spec("torchvision") is None:
        return (
            "the package spandrel, which reads it, needs torchvision; install the one that fits your torch, and spandrel"
        )
    if find_spec(NEEDED) is None:
        return "the package spandrel, which reads it, is not installed: pip install spandrel"
    try:
        import spandrel  # noqa: F401
    except Exception as error:  # torchvision raises RuntimeError where it does not fit
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"the package spandrel, which reads it, cannot be imported ({reason}); does torchvision fit your torch?"
    return None


def _of_spandrel(path: str, dtype: Any, device: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    problem = spandrel_problem()
    if problem:
        raise ConfigError(f"--model is {path}, no ESRGAN file: {problem}")
    import torch
    from spandrel import ImageModelDescriptor, ModelLoader

    from library.core.errors import foreign_errors

    with foreign_errors(CheckpointError, f"{path} is no network that spandrel reads"):
        found = ModelLoader().load_from_file(path)
    if not isinstance(found, ImageModelDescriptor) or found.input_channels != 3:
        raise CheckpointError(f"{path} is no network that takes a picture and gives one")
    if dtype == torch.float16 and not found.supports_half:
        raise ConfigError(f"--dtype is fp16, in which {found.architecture.name} does not compute; use bf16 or float32")
    found = found.to(device, dtype).eval()

    @torch.no_grad()
    def network(pixels: torch.Tensor) -> torch.Tensor:
        return found(pixels[None].to(device, dtype))[0]

    return network


TOOL = FrameTool("Enlarge pictures and videos by a network", UpscaleFilesOptions, "upscaled", problems_of, load)


def main(argv: Sequence[str] | None = None) -> int:
    return tool_exit_code(TOOL.run, argv)
