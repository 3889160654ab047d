"""What the encoder of FramePack makes of known latents against caches of the known tool."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from library import strategy_framepack
from library.dataset.items import SampleFacts
from library.dataset.tensor_cache_keys import parse_key
from library.families.latents import Bucket, SampleKind
from library.strategy_framepack import FramePackLatentEncoder
from tests.golden_dir import BEHAVIOUR_DIR, behaviour_cases

FILE = "video_caches.json"


def fill(shape: tuple[int, ...], start: int) -> torch.Tensor:
    numbers = torch.arange(math.prod(shape))
    return (((7 * numbers + start) % 97 - 48) / 8).reshape(shape)


class KnownVae:
    """Gives latents by the first pixel of what it encodes, without a look at the rest."""

    params = SimpleNamespace(scaling_factor=1.0)

    def encode_raw(self, images: torch.Tensor, seeds: Any) -> torch.Tensor:
        start = round(float(images.flatten()[0]) * 127.5 + 127.5)
        frames = 1 + (images.shape[2] - 1) // 4 if images.ndim == 5 else 1
        latents = fill((16, frames, 2, 2), start)
        return latents[None] if images.ndim == 5 else latents[None, :, 0]


def picture(start: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, start / 127.5 - 1)


def recorded(file: str) -> dict[str, torch.Tensor]:
    return {parse_key(key).name: tensor for key, tensor in load_file(BEHAVIOUR_DIR / file).items()}


@pytest.fixture(autouse=True)
def states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy_framepack, "encode_pictures", lambda model, pictures: fill((4, 6), 81)[None])


def check(encoder: FramePackLatentEncoder, bucket: Bucket, made: tuple, stored: dict[str, torch.Tensor]) -> None:
    latents, conditions = made
    found = {name: tensor[0] for name, tensor in conditions.items()}
    assert found.keys() == stored.keys() - {"latents"} == encoder.condition_shapes(bucket).keys()
    for name, tensor in {**found, "latents": latents[0]}.items():
        wanted = stored[name].reshape(tensor.shape)
        torch.testing.assert_close(tensor.to(wanted.dtype), wanted, rtol=0, atol=1e-3 if "clean" in name else 0)


@pytest.mark.parametrize("case", behaviour_cases(FILE, "framepack_sections"))
def test_sections(case: dict[str, Any]) -> None:
    encoder = FramePackLatentEncoder(is_f1=case["f1"], image_width=6)
    kind = SampleKind(section_frames=case["window"])
    clip = picture(80, 1, 3, case["video_frames"], 16, 16)
    for number, file in enumerate(case["files"]):
        facts = [SampleFacts(kind, number)]
        made = encoder.encode_with_facts(KnownVae(), {"image_encoder": None}, clip, [1], {}, facts)
        check(encoder, Bucket(16, 16, case["video_frames"], kind), made, recorded(file))


def is_single_frame(case: dict[str, Any]) -> bool:
    return "one_frame" in case and case["architecture"] == "fp"


@pytest.mark.parametrize("case", behaviour_cases(FILE, "files", where=is_single_frame))
def test_single_frames(case: dict[str, Any]) -> None:
    told = case["one_frame"]
    encoder = FramePackLatentEncoder(middle=not told["no_2x"], far=not told["no_4x"], image_width=6)
    kind = SampleKind(((16, 16),) * 2, tuple(told["clean_indices"]), told["target_index"], told["no_post"])
    bucket = Bucket(16, 16, 1, kind)
    pictures = {
        "conditioning_images": picture(91, 1, 3, 16, 16), "conditioning_alpha": torch.ones(1, 1, 16, 16),
        "conditioning_images_1": picture(92, 1, 3, 16, 16),
        "conditioning_alpha_1": torch.full((1, 1, 16, 16), told["alpha_of_second"]),
    }  # fmt: skip
    assert set(encoder.pictures_for(bucket)) == set(pictures)
    target = picture(93, 1, 3, 16, 16)
    made = encoder.encode_with_facts(KnownVae(), {"image_encoder": None}, target, [1], pictures, [SampleFacts(kind)])
    check(encoder, bucket, made, recorded(case["file"]))
    assert made[1]["clean_latent_indices"].tolist() == [told["stored_clean_latent_indices"]]
