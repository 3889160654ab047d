"""Requests of clips: which steps are guided, which leave layers out, letters of prompt lines."""

from __future__ import annotations

import pytest

from library.generation.script import LineReader
from library.generation.video_requests import VIDEO_LINES, SkipLayers, VideoRequest, guided_steps

PATTERNS = {
    "early": "SSSSAAAAAA",
    "late": "AAAAAASSSS",
    "middle": "AAASSSSAAA",
    "early_late": "SSAAAAAASS",
    "alternate": "SASASAASAS",
    "none": "AAAAAAAAAA",
}
"""of ten steps with a ratio of 0.6: A = guided, S = not"""


@pytest.mark.parametrize("mode", PATTERNS)
def test_which_steps_are_guided(mode):
    assert "".join("A" if guided else "S" for guided in guided_steps(mode, 0.6, 10)) == PATTERNS[mode]
    assert all(guided_steps(mode, None, 4)), "without a ratio all are"
    if mode != "none":
        assert not any(guided_steps(mode, 0.0, 4)) and all(guided_steps(mode, 1.0, 4))


def test_which_steps_leave_layers_out():
    skip = SkipLayers(layers=(4, 5), start=0.1, end=0.35)
    assert [step for step in range(20) if skip.works_at(step, 20)] == [2, 3, 4, 5, 6]


def test_a_line_has_the_letters_of_known_scripts():
    default = VideoRequest(prompt="", width=256, height=256, frames=129)
    line = (
        "a cat --w 320 --h 192 --f 33 --d 7 --s 5 --g 6 --fs 5.5 --i a.png --ei b.png --cn c.mp4 --n dull --ci d.png"
        " --ci e.png --cim m.png --of target_index=1 --v in.mp4 --st 0.5 --e 4"
    )
    read = LineReader(VIDEO_LINES, 16).read(line, default)
    assert read == VideoRequest(
        prompt="a cat", width=320, height=192, frames=33, seed=7, steps=5, cfg_scale=6.0, flow_shift=5.5,
        image_path="a.png", end_image_path="b.png", control_path="c.mp4", negative_prompt="dull",
        control_image_paths=("d.png", "e.png"), control_mask_paths=("m.png",), one_frame="target_index=1",
        video_path="in.mp4", strength=0.5, embedded_guidance_scale=4.0,
    )  # fmt: skip
