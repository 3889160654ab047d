"""Clips of FramePack on a tiny model: what each section sees, and what settings change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from library.components.hunyuan_vae_utils import load_hunyuan_vae
from library.components.siglip_utils import load_siglip
from library.core.errors import ConfigError
from library.framepack_utils import load_framepack
from library.generation import framepack_pipeline
from library.generation.framepack_pipeline import FramePackPipeline
from library.generation.framepack_requests import FramePackRequest, MagCacheSettings
from library.tiny_models.framepack_tiny import build_tiny_framepack

REQUEST = FramePackRequest(prompt="a", width=32, height=32, steps=3, seed=4, sections=2)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> FramePackPipeline:
    tiny = build_tiny_framepack(tmp_path_factory.mktemp("tiny"))
    parts = (load(path, torch.float32, "cpu") for load, path in (
        (load_framepack, tiny.denoiser), (load_hunyuan_vae, tiny.vae), (load_siglip, tiny.image_encoder),
    ))  # fmt: skip
    denoiser, vae, encoder = parts
    return FramePackPipeline(denoiser, vae, image_encoder=encoder, window=3)


@pytest.fixture(scope="module")
def text() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(2)
    return {
        "llama_vec": torch.randn(1, 5, 24, generator=draws), "llama_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "clip_l_pooler": torch.randn(1, 16, generator=draws),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for number in range(3):
        pixels = np.random.RandomState(number).randint(0, 255, (32, 32, 4), dtype=np.uint8)
        pixels[..., 3] = 0 if number == 2 else 255
        paths.append(str(folder / f"{number}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def made(pipeline: FramePackPipeline, text: dict, negative: dict | None = None, **settings: object) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.latents(dataclasses.replace(REQUEST, **settings), text, negative)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What each forward was given beside the text."""
    seen: list[dict] = []
    predict = framepack_pipeline.predict_velocity

    def noting(*args, **named):
        seen.append({**args[4], "rope_scale": named["rope_scale"], "text": args[3]})
        return predict(*args, **named)

    monkeypatch.setattr(framepack_pipeline, "predict_velocity", noting)
    return seen


def test_the_second_section_that_is_made_sees_the_first_one(pipeline, text, pictures, calls) -> None:
    """The plain model from the end, F1 from the beginning; each first frame is the picture's."""
    clip = made(pipeline, text, image_path=pictures[0], end_image_path=pictures[1])
    assert clip.shape == (1, 16, 7, 4, 4) and len(calls) == 6
    first, second = calls[0], calls[-1]
    start = clip[:, :, :1]
    torch.testing.assert_close(first["latents_clean"][:, :, :1], start)
    assert first["latents_clean"][:, :, 1].any() and not first["latents_clean_2x"].any()  # the end, and nothing more
    seen = torch.cat((second["latents_clean"][:, :, 1:], second["latents_clean_2x"]), dim=2)
    torch.testing.assert_close(seen, clip[:, :, 4:])
    assert [call["latent_indices"].tolist() for call in (first, second)] == [[[4, 5, 6]], [[1, 2, 3]]]
    calls.clear()
    forwards = dataclasses.replace(pipeline, is_f1=True)
    clip = made(forwards, text, image_path=pictures[0])
    torch.testing.assert_close(calls[0]["latents_clean"], clip[:, :, [0, 0]])
    torch.testing.assert_close(calls[-1]["latents_clean"][:, :, 1:], clip[:, :, 3:4])
    torch.testing.assert_close(calls[-1]["latents_clean_2x"], clip[:, :, 1:3])


def test_sections_have_texts_and_pictures_of_their_own(pipeline, text, pictures, calls) -> None:
    rows = {name: torch.cat((tensor, tensor * 2 if tensor.is_floating_point() else tensor)) for name, tensor in text.items()}
    clip = made(pipeline, rows, prompt="a;;;-1:b", image_path=f"{pictures[0]};;;1:{pictures[1]}")
    last, first = calls[0], calls[-1]
    assert torch.equal(last["text"]["llama_vec"], text["llama_vec"] * 2)
    assert torch.equal(first["text"]["llama_vec"], text["llama_vec"])
    torch.testing.assert_close(first["latents_clean"][:, :, :1], clip[:, :, :1])
    assert not torch.equal(last["image_embeddings"], first["image_embeddings"])
    assert REQUEST.rows == (("a",),)
    assert dataclasses.replace(REQUEST, prompt="a;;;-1:b").rows == (("a",), ("b",))


def test_what_settings_change(pipeline, text, calls) -> None:
    """Equal seeds give equal clips; each setting another one."""
    negative = {name: -tensor if tensor.is_floating_point() else tensor for name, tensor in text.items()}
    plain = made(pipeline, text)
    assert torch.equal(made(pipeline, text), plain)
    assert not any(call["image_embeddings"].any() for call in calls)  # without a picture
    guided = made(pipeline, text, negative, cfg_scale=3.0)
    others = [
        guided, made(pipeline, text, negative, cfg_scale=3.0, guidance_rescale=0.7),
        made(pipeline, text, embedded_guidance_scale=1.0), made(pipeline, text, latent_paddings=(4,)),
        made(pipeline, text, flow_shift=1.0), made(pipeline, text, seed=5),
        made(dataclasses.replace(pipeline, rope_threshold=700.0), text),
    ]  # fmt: skip
    assert all(not torch.equal(one, other) for n, one in enumerate(others) for other in [plain, *others[:n]])
    assert {call["rope_scale"] for call in calls} == {1.0, 0.5}
    count = len(calls)
    assert torch.equal(made(pipeline, text, negative, cfg_scale=1.0), plain) and len(calls) == count + 6


def test_blocks_are_left_out(pipeline, text, monkeypatch, caplog) -> None:
    ran: list[int] = []
    block = pipeline.denoiser.transformer_blocks[0]
    handle = block.register_forward_hook(lambda *_: ran.append(1))
    steps = 8
    whole = made(pipeline, text, steps=steps, sections=1)
    assert len(ran) == steps
    ran.clear()
    fast = made(pipeline, text, steps=steps, sections=1, magcache=MagCacheSettings(threshold=9.0, most=3))
    assert len(ran) == 1 + 1 + 1 and not torch.equal(fast, whole)  # the first, one after three left out, the last
    with caplog.at_level("INFO"):
        measured = made(pipeline, text, steps=steps, sections=1, magcache=MagCacheSettings(calibrate=True))
    handle.remove()
    assert torch.equal(measured, whole)
    (line,) = [record.getMessage() for record in caplog.records if "mag_ratios" in record.getMessage()]
    assert len(line.split(" ")[-1].split(",")) == steps


def test_single_frames_see_their_control_pictures(pipeline, text, pictures, calls) -> None:
    frame = made(
        pipeline, text, sections=None, one_frame="target_index=2,control_index=0;5,no_2x",
        control_image_paths=tuple(pictures[:2]),
    )  # fmt: skip
    assert frame.shape == (1, 16, 1, 4, 4)
    call = calls[-1]
    assert call["latent_indices"].tolist() == [[2]] and call["clean_latent_indices"].tolist() == [[0, 5, 4]]
    assert "clean_latent_2x_indices" not in call and call["latents_clean"].shape[2] == 3
    assert call["latents_clean"][:, :, 1].any() and not call["latents_clean"][:, :, 2].any()
    made(pipeline, text, sections=None, control_image_paths=(pictures[2], pictures[0]), control_mask_paths=(pictures[0],))
    assert calls[-1]["latents_clean"][:, :, 0].any()  # a mask counts before the alpha channel
    made(pipeline, text, sections=None, control_image_paths=(pictures[2],))
    assert not calls[-1]["latents_clean"].any()


def test_what_cannot_be_made_is_told(pipeline, text, pictures) -> None:
    with pytest.raises(ConfigError, match="a clip has 9 frames; a section of 3 latent frames needs at least 13"):
        made(pipeline, text, sections=None, frames=9)
    with pytest.raises(ConfigError, match="--image_encoder, which reads it, is not given"):
        made(dataclasses.replace(pipeline, image_encoder=None), text, image_path=pictures[0])
    assert made(pipeline, text, sections=None, frames=25).shape[2] == 7
