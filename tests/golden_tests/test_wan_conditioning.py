"""What Wan is conditioned on, against the recorded cases, with an autoencoder that is rebuilt from its description."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from safetensors import safe_open

from library.families.wan_tasks import TASKS, boundary_of, is_high_noise
from library.generation.wan_options import parse_one_frame
from library.wan_conditioning_utils import (
    ends_condition,
    generation_condition,
    one_frame,
    one_frame_conditions,
    picture_condition,
    size_beside,
    tokens_of,
    training_condition,
    vision_tokens,
)
from tests.golden_dir import BEHAVIOUR_DIR, behaviour_cases

NAME = "wan_conditioning.json"
CHANNELS = 16


def recorded(key: str) -> torch.Tensor:
    with safe_open(BEHAVIOUR_DIR / "wan_conditioning.safetensors", "pt") as file:
        return file.get_tensor(key)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def pixels(text: str) -> torch.Tensor:
    """pixels(F, H, W, s) -> [1, 3, F, H, W] in -1..1."""
    frames, height, width, start = numbers(text)
    f, y, x, c = torch.meshgrid(*map(torch.arange, (frames, height, width, 3)), indexing="ij")
    values = (37 * f + 11 * y + 5 * x + 83 * c + start) % 256
    return (values.float() / 127.5 - 1).permute(3, 0, 1, 2)[None]


def fill(text: str) -> torch.Tensor:
    """fill([shape], c)."""
    *shape, start = numbers(text)
    count = torch.Size(shape).numel()
    return (((7 * torch.arange(count) + start) % 97 - 48) / 8).reshape(shape)


def stub_vae(clip: torch.Tensor) -> torch.Tensor:
    """[B, 3, F, H, W] -> [B, 16, F', h, w]."""
    pieces = clip.split([1, *[4] * ((clip.shape[2] - 1) // 4)], dim=2)
    means = torch.cat([piece.mean(dim=2, keepdim=True) for piece in pieces], dim=2)
    pooled = torch.nn.functional.avg_pool3d(means, (1, 8, 8))
    return torch.stack([pooled[:, c % 3] * (c + 1) / 16 for c in range(CHANNELS)], dim=1)


def agrees(result: torch.Tensor, key: str) -> None:
    torch.testing.assert_close(result, recorded(key).reshape(result.shape), rtol=0, atol=2e-5)


def picture(text: str | None) -> torch.Tensor | None:
    return None if text is None else pixels(text)[:, :, 0]


@pytest.mark.parametrize("case", behaviour_cases(NAME, "generation"))
def test_generation(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    task = TASKS[given["task"]]
    made = generation_condition(
        stub_vae, given["video_length"], first=picture(given["image"]), last=picture(given["end_image"]),
        control=None if given["control"] is None else pixels(given["control"]), takes_last=task.takes_last,
    )  # fmt: skip
    agrees(made.y, expected["y"])
    frames, noise = expected["latent_frames"], expected["noise_shape"]
    assert (made.latent_frames, made.y.shape[2], [made.y.shape[1]]) == (frames, frames, expected["channels"])
    assert [CHANNELS, *made.y.shape[2:]] == noise and tokens_of(noise) == expected["seq_len"]
    assert task.in_dim == CHANNELS + made.y.shape[1]
    if "mask_frames" in expected:
        assert made.y[0, :4, :, 0, 0].tolist() == expected["mask_frames"]
    assert made.extra == (given["end_image"] is not None and not task.takes_last)


@pytest.mark.parametrize("case", behaviour_cases(NAME, "sizes"))
def test_sizes(case: dict[str, Any]) -> None:
    width, height = size_beside(tuple(case["input"]["image"]), tuple(case["input"]["video_size_hw"][::-1]))
    assert [height, width] == case["expected"]["pixels_hw"]
    assert [height // 8, width // 8] == case["expected"]["latent_hw"]


@pytest.mark.parametrize("case", behaviour_cases(NAME, "caching"))
def test_caching(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    clip = pixels(given["video"])
    agrees(stub_vae(clip), expected["latents"])
    if given["i2v"]:
        agrees(picture_condition(stub_vae, clip[:, :, 0], given["frames"]), expected["latents_image"])
    if given["control"]:
        agrees(stub_vae(pixels(given["control"])), expected["latents_control"])
    assert given["i2v"] == ("latents_image" in expected)


@pytest.mark.parametrize("case", behaviour_cases(NAME, "one_frame_caching"))
def test_one_frame_caching(case: dict[str, Any]) -> None:
    given, expected = case["input"], case["expected"]
    layout = one_frame(given["clean_indices"], given["target_index"])
    references = [picture(text) for text in given["controls"]]
    latents, y = one_frame_conditions(stub_vae, layout, picture(given["target"]), references)
    agrees(latents, expected["latents"])
    agrees(y, expected["latents_image"])
    assert list(layout.f_indices) == expected["f_indices"] == expected["rope_positions_in_training"]
    assert (layout.target, layout.references) == (expected["target_slot"], expected["clip_rows"])


@pytest.mark.parametrize("case", behaviour_cases("framepack_sections.json", "wan_one_frame"))
def test_places_of_a_single_frame_that_is_made(case):
    given, expected = case["input"]["one_frame_inference"], case["expected"]
    controls, target = parse_one_frame(given, "--one_frame_inference")
    layout = one_frame(controls, target)
    assert (target, list(controls)) == (expected["target_index"], expected["control_indices"])
    assert (list(layout.f_indices), layout.target) == (expected["f_indices"], expected["decoded_slot"])


@pytest.mark.parametrize("case", behaviour_cases(NAME, "training"))
def test_training(case: dict[str, Any]) -> None:
    given, expected = dict(case["input"]), case["expected"]
    task, latents = TASKS[given.pop("task")], fill(given.pop("latents"))
    conditions = {name: fill(text) for name, text in given.items()}
    y = training_condition(conditions, fun_control=task.fun_control)
    assert (None if y is None else list(y.shape)) == expected["y_shape"]
    assert tokens_of(latents.shape) == expected["seq_len"]
    if y is not None:
        agrees(y, expected["y"])
        assert task.in_dim == CHANNELS + y.shape[1]
    states = vision_tokens(conditions)
    wanted = expected["clip_shape"]
    if wanted is None:
        assert states is None
    else:  # rows of several pictures are tokens behind each other here, rows of the batch there
        rows = wanted[0] // len(latents)
        assert list(states.shape) == [len(latents), rows * wanted[1], wanted[2]]
        assert torch.equal(states.reshape(wanted), conditions["clip"].reshape(wanted))


@pytest.mark.parametrize("case", behaviour_cases(NAME, "tasks"))
def test_tasks(case: dict[str, Any]) -> None:
    task = TASKS[case["task"]]
    found = {
        "task": task.name, "v2_2": task.is_22, "guidance": list(task.guidance),
        **{name: getattr(task, name) for name in case if name not in ("task", "v2_2", "guidance")},
    }  # fmt: skip
    assert found == case


@pytest.mark.parametrize("case", behaviour_cases(NAME, "sides"))
def test_sides(case: dict[str, Any]) -> None:
    given = case["input"]
    assert is_high_noise(given["sigma"], given["boundary"]) == case["expected"]["high_noise"]


@pytest.mark.parametrize("case", behaviour_cases(NAME, "boundary_option"))
def test_boundary_option(case: dict[str, Any]) -> None:
    assert boundary_of(case["input"]["timestep_boundary"]) == case["expected"]["boundary"]


def test_first_and_last_frame_by_hand() -> None:
    """Of nine frames the first is one latent frame, of whose mask all is 1; the last is the last of four."""
    first, last = (torch.full((1, 3, 8, 8), value) for value in (0.5, -1.0))
    y = ends_condition(stub_vae, first, last, 9)
    assert y[0, :4, :, 0, 0].tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert y[0, 4, :, 0, 0].tolist() == [0.5 / 16, 0.0, -1.0 / 4 / 16]
    assert torch.equal(ends_condition(stub_vae, first, last, 1)[:, :4], torch.ones(1, 4, 1, 1, 1))
