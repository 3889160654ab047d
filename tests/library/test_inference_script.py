"""What the image scripts share: prompt lines and files, sizes and seeds, picture files."""

import pytest
from PIL import Image

from library.core.errors import AtelierError, CheckpointError, ConfigError
from library.generation.requests import COMMON_LINE_OPTIONS, PictureRequest, SessionOptions
from library.generation.script import (
    LineReader,
    make_each,
    output_name,
    picture_texts,
    planned_requests,
    unused_path,
    with_seed_and_size,
    write_picture,
)

DEFAULT = PictureRequest(prompt="a cat", width=64, height=32, seed=3)
READER = LineReader(COMMON_LINE_OPTIONS, 16, lambda request: ["too long"] if len(request.prompt) > 20 else [])


def test_a_file_of_prompts_is_read_whole_before_anything_is_made(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# two cats\na red cat --d 5 --m 0.5,-1\n\n--n - --w 48\n", encoding="utf-8")
    first, second = planned_requests(SessionOptions(from_file=str(path)), DEFAULT, READER)
    assert (first.prompt, first.seed, first.multipliers, first.width) == ("a red cat", 5, (0.5, -1.0), 64)
    assert (second.prompt, second.negative_prompt, second.width) == ("a cat", "", 48)


def test_every_bad_line_is_told_with_its_number_and_left_out(tmp_path, caplog):
    path = tmp_path / "prompts.txt"
    lines = "a cat --q 3\n{}\na cat --w 8 --s 0\na cat on the roof of a house\n"
    path.write_text(lines.format("a dog -- barking --d -1"), encoding="utf-8")
    [request] = planned_requests(SessionOptions(from_file=str(path)), DEFAULT, READER)
    assert (request.prompt, request.seed) == ("a dog -- barking", None) and with_seed_and_size(
        request, 16
    ).seed is not None
    assert caplog.text.count("left out") == 4 and "prompts.txt line 4: too long" in caplog.text
    path.write_text(lines.format(""), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        planned_requests(SessionOptions(from_file=str(path)), DEFAULT, READER)
    numbers = [problem.split(":")[0].rpartition(" ")[2] for problem in caught.value.problems]
    assert numbers == ["1", "3", "3", "4"]


@pytest.mark.parametrize("content", [None, "# nothing\n"])
def test_a_file_without_prompts(tmp_path, content):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="--from_file is .*prompts.txt"):
        planned_requests(SessionOptions(from_file=str(path)), DEFAULT, READER)


def test_prompts_come_from_one_place():
    with pytest.raises(ConfigError, match="--interactive and --from_file"):
        SessionOptions(interactive=True, from_file="prompts.txt")
    with pytest.raises(ConfigError, match="too long"):
        planned_requests(SessionOptions(), PictureRequest(prompt="x" * 30, width=64, height=64), READER)


def test_sides_are_rounded_down_and_a_seed_is_drawn():
    request = with_seed_and_size(PictureRequest(prompt="", width=75, height=47), 16)
    assert (request.width, request.height) == (64, 32) and request.seed is not None
    assert with_seed_and_size(DEFAULT, 16) == DEFAULT


def test_pictures_of_one_second_stay_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("time.strftime", lambda form: "20300101_000000")
    names = []
    for _ in range(3):
        path = unused_path(tmp_path, 7, 2)
        names.append(path.name)
        path.with_name(f"{path.stem}_latent.safetensors" if names == ["20300101_000000_7_02.png"] else path.name).touch()
    assert names == ["20300101_000000_7_02.png", "20300101_000000_7_02_2.png", "20300101_000000_7_02_3.png"]
    assert unused_path(tmp_path / "new", 7, 2).name == names[0]


def test_a_picture_carries_its_texts_and_appears_whole(tmp_path):
    path = write_picture(
        Image.new("RGB", (4, 2)), tmp_path / "deep" / output_name(7, 2), picture_texts(DEFAULT, guidance=3.5)
    )
    assert path.name.endswith("_7_02.png") and [path] == list(path.parent.iterdir())
    with Image.open(path) as image:
        assert image.text == {"prompt": "a cat", "seed": "3", "scale": "1.0", "guidance": "3.5"}
    bare = write_picture(Image.new("RGB", (4, 2)), tmp_path / "bare.png")
    assert not Image.open(bare).text


def test_a_picture_that_cannot_be_made_does_not_end_the_others(tmp_path, caplog):
    from pathlib import Path

    def make(request, index):
        if index == 1:
            raise CheckpointError("broken")
        return Path(str(index))

    with pytest.raises(AtelierError, match="1 of 3 pictures could not be made"):
        make_each([DEFAULT] * 3, make)
    assert "picture 1: broken" in caplog.text
    with pytest.raises(CheckpointError, match="broken"):
        make_each([DEFAULT], lambda request, index: make(request, 1))
