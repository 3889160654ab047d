"""Loading and making the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pastel.models import PastelDenoiser, PastelVae, PastelWords

from library.checkpoints.loading import assign_state, build_on_meta, check_state, open_checkpoint
from library.safetensors_utils import save_file_atomic


def load(module_class, path, dtype, device, transform=None):
    """A module from its file; `transform` sees the tensors on their way, as loaders of the trainer do."""
    files = open_checkpoint(path)
    model = build_on_meta(module_class)
    state = files.tensors(device, False, files.shapes, transform, files.casting(dtype))
    check_state(model, state, str(path))
    assign_state(model, state)
    return model.to(device)


def own_state(state):
    """Names of files are those of the modules."""
    return dict(state)


@dataclass(frozen=True)
class TinyPastel:
    folder: Path

    def arguments(self) -> list[str]:
        names = {"pretrained_model_name_or_path": "denoiser", "vae": "vae", "pastel_words": "words"}
        return [f"--{option}={self.folder / name}.safetensors" for option, name in names.items()]


def build_tiny_pastel(folder, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> TinyPastel:
    Path(folder).mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    for name, module in (("denoiser", PastelDenoiser), ("vae", PastelVae), ("words", PastelWords)):
        shapes = {key: value.shape for key, value in module().state_dict().items()}
        state = {key: (0.2 * torch.randn(shape, generator=generator)).to(dtype) for key, shape in shapes.items()}
        save_file_atomic(state, Path(folder) / f"{name}.safetensors")
    return TinyPastel(Path(folder))
