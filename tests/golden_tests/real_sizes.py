"""Models of real sizes, from files whose data is a hole: their weights take no memory as long as nothing reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from library.core.registry import import_target
from tests.runs.families import key_table, write_header_only

LOADERS = {
    "flux_dev": "library.flux_utils:load_flux", "lumina2": "library.lumina_utils:load_lumina",
    "chroma": "library.chroma_utils:load_chroma", "anima": "library.anima_utils:load_anima",
    "sd3_medium": "library.sd3_utils:load_sd3", "sd35_medium": "library.sd3_utils:load_sd3",
    "sd35_large": "library.sd3_utils:load_sd3", "sdxl_checkpoint": "library.sdxl_utils:load_unet_sdxl",
}  # fmt: skip
"""key table -> the function that loads its denoiser"""


ON_META = {
    "hunyuan_video": (
        "library.hunyuan_video_utils:inspect_hunyuan_video", "library.hunyuan_video_models:HYVideoDiffusionTransformer",
    ),
    "wan_t2v_1_3b": ("library.wan_utils:inspect_wan", "library.wan_models:WanModel"),
    "framepack": (
        "library.framepack_utils:inspect_framepack",
        "library.framepack_models:HunyuanVideoTransformer3DModelPacked",
    ),
}  # fmt: skip
"""key table -> the function that reads the sizes of its denoiser, and the class: of those that are never read, made
without data"""


class RealModels:
    """Denoisers by their key tables, made when first asked for and kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, torch.nn.Module] = {}

    def file(self, name: str) -> Path:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            write_header_only(path, key_table(name))
        return path

    def __getitem__(self, name: str) -> torch.nn.Module:
        if name in ON_META and name not in self._made:
            inspect, made_of = map(import_target, ON_META[name])
            with torch.device("meta"):
                self._made[name] = made_of(inspect(self.file(name)).params)
        elif name not in self._made:
            load: Any = import_target(LOADERS[name])
            self._made[name] = load(self.file(name), None, "cpu")
        return self._made[name]


def digest(keys: Iterable[str]) -> tuple[int, str]:
    """(count, sha256) of names, sorted, one a line."""
    names = sorted(keys)
    return len(names), hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()
