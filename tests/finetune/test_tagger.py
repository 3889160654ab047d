"""Tags by models of both layouts. The network is a small function of the pixels; one test runs a real file in
onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune import tag_images_by_wd14_tagger as script
from library.core.errors import CheckpointError, ConfigError
from tests.library.dataset.images import make_image
from tools.caption_tools.tag_models import Tag, pixels_for, read_tags
from tools.caption_tools.tag_rules import TagRules, expanded, read_replacements
from tools.caption_tools.tagger import run

LISTED = [
    ("general", 9),
    ("sensitive", 9),
    ("questionable", 9),
    ("explicit", 9),
    ("1girl", 0),
    ("red_hair", 0),
    ("^_^", 0),
    ("miku_(song)", 4),
    ("rare", 0),
]
LISTED_VALUES = [0.2, 0.6, 0.1, 0.1, 0.9, 0.5, 0.4, 0.7, 0.1]
MAPPED = [
    ("safe", "Rating"),
    ("good", "Quality"),
    ("best", "Quality"),
    ("cat", "General"),
    ("dog", "General"),
    ("ann", "Artist"),
    ("web", "Meta"),
]
MAPPED_LOGITS = [2.0, 1.0, 3.0, 0.5, 1.5, 0.1, -4.0]


class FixedNetwork:
    """Gives every image the same numbers, and keeps the sizes of the batches that it saw."""

    def __init__(self, values: list[float], batch_size: int | None = None) -> None:
        self.values, self.batch_size, self.batches = values, batch_size, []

    def __call__(self, images: np.ndarray) -> np.ndarray:
        self.batches.append(images.shape)
        return np.tile(np.array(self.values, np.float32), (len(images), 1))


@pytest.fixture
def listed(tmp_path) -> Path:
    folder = tmp_path / "tagger"
    folder.mkdir()
    rows = [f"{number},{name},{category},1" for number, (name, category) in enumerate(LISTED)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *rows]))
    (folder / "model.onnx").write_bytes(b"")
    return folder


@pytest.fixture
def mapped(tmp_path) -> Path:
    folder = tmp_path / "models" / "space_name_part"
    folder.mkdir(parents=True)
    (folder / "tag_mapping.json").write_text(
        json.dumps({str(i): {"tag": tag, "category": kind} for i, (tag, kind) in enumerate(MAPPED)})
    )
    (folder / "model_optimized.onnx").write_bytes(b"")
    return folder


@pytest.fixture
def pictures(tmp_path) -> Path:
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for number in range(3):
        make_image(folder / f"{number}.png", (30, 20 + number), seed=number)
    make_image(folder / "deeper" / "x.webp", (20, 20))
    (folder / "broken.jpg").write_bytes(b"no")
    return folder


def tagged(pictures: Path, model: Path, *more: str, network: FixedNetwork | None = None) -> str:
    run(
        [str(pictures), f"--model_dir={model}", "--overwrite", *more],
        lambda path: network or FixedNetwork(LISTED_VALUES),
    )
    return (pictures / "0.txt").read_text(encoding="utf-8").rstrip("\n") if (pictures / "0.txt").exists() else ""


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "1girl, red_hair, ^_^, miku_(song)"),
        (["--thresh=0.6"], "1girl, miku_(song)"),
        (["--general_threshold=0.6", "--character_threshold=0.95"], "1girl"),
        (["--general_threshold=0"], "1girl, red_hair, ^_^, miku_(song), rare"),
        (["--remove_underscore"], "1girl, red hair, ^_^, miku (song)"),
        (["--character_tags_first"], "miku_(song), 1girl, red_hair, ^_^"),
        (["--character_tag_expand", "--remove_underscore"], "1girl, red hair, ^_^, miku, song"),
        (["--use_rating_tags"], "sensitive, 1girl, red_hair, ^_^, miku_(song)"),
        (["--use_rating_tags_as_last_tag"], "1girl, red_hair, ^_^, miku_(song), sensitive"),
        (["--undesired_tags=1girl, ^_^,sensitive", "--use_rating_tags"], "red_hair, miku_(song)"),
        (["--always_first_tags=red_hair,none,1girl"], "red_hair, 1girl, ^_^, miku_(song)"),
        (["--tag_replacement=1girl,woman;^_^,smile"], "woman, red_hair, smile, miku_(song)"),
        ([r"--tag_replacement=1girl,a\,b\;c"], "a,b;c, red_hair, ^_^, miku_(song)"),
        (["--caption_separator=; "], "1girl; red_hair; ^_^; miku_(song)"),
    ],
    ids=str,
)  # fmt: skip
def test_options_with_a_list_of_tags(pictures, listed, options, expected):
    assert tagged(pictures, listed, *options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "dog, cat, ann"),
        (["--artist_threshold=0.9", "--meta_threshold=0"], "dog, cat, web"),
        (["--use_rating_tags", "--use_quality_tags"], "safe, best, dog, cat, ann"),
        (["--use_quality_tags_as_last_tag"], "dog, cat, ann, best"),
        (["--tag_replacement=cat,tiger"], "dog, tiger, ann"),
    ],
    ids=str,
)
def test_options_with_a_mapping_of_tags(pictures, mapped, options, expected):
    network = FixedNetwork(MAPPED_LOGITS)
    assert tagged(pictures, mapped.parent, "--repo_id=space/name/part", *options, network=network) == expected
    assert network.batches[0] == (1, 3, 448, 448)


def test_batches_unreadable_images_and_a_model_with_a_batch_size_of_its_own(pictures, listed, caplog):
    caplog.set_level("INFO")
    free, fixed = FixedNetwork(LISTED_VALUES), FixedNetwork(LISTED_VALUES, batch_size=2)
    tagged(pictures, listed, "--batch_size=3", "--recursive", "--onnx", network=free)
    assert [shape[0] for shape in free.batches] == [3, 1] and free.batches[0][1:] == (448, 448, 3)
    assert (
        "broken.jpg" in caplog.text
        and "4 done, 0 skipped, 1 failed" in caplog.text
        and (pictures / "deeper" / "x.txt").exists()
    )
    tagged(pictures, listed, "--batch_size=3", network=fixed)
    assert [shape[0] for shape in fixed.batches] == [2, 2]


def test_existing_files_stay_or_are_added_to(pictures, listed, caplog):
    caplog.set_level("INFO")
    (pictures / "0.txt").write_text("mine, red_hair\n")
    command = [str(pictures), f"--model_dir={listed}"]
    run(command, lambda path: FixedNetwork(LISTED_VALUES))
    assert (pictures / "0.txt").read_text() == "mine, red_hair\n" and "1 whose .txt file exists" in caplog.text
    run([*command, "--append_tags"], lambda path: FixedNetwork(LISTED_VALUES))
    assert (pictures / "0.txt").read_text() == "mine, red_hair, 1girl, ^_^, miku_(song)\n"


def test_one_file_for_all_images(pictures, listed, tmp_path):
    out, lines = tmp_path / "tags.json", tmp_path / "tags.jsonl"
    tagged(pictures, listed, f"--output_path={out}")
    key = str(pictures / "1.png")
    assert json.loads(out.read_text())[key] == {"tags": "1girl, red_hair, ^_^, miku_(song)", "image_size": [30, 21]}
    tagged(pictures, listed, f"--output_path={lines}")
    tagged(pictures, listed, f"--output_path={lines}", "--append_tags", "--general_threshold=0")
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {
        "image_path": key,
        "caption": "1girl, red_hair, ^_^, miku_(song), rare",
        "image_size": [30, 21],
    } in entries and len(entries) == 3
    with pytest.raises(ConfigError, match="exists; give another name"):
        run([str(pictures), f"--model_dir={listed}", f"--output_path={out}"], lambda path: FixedNetwork(LISTED_VALUES))


def test_frequencies(pictures, listed, capsys):
    tagged(pictures, listed, "--frequency_tags")
    assert "1girl: 3" in capsys.readouterr().out


def test_pixels_of_both_layouts(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    image[..., 0] = 200
    first, second = pixels_for(image, "list"), pixels_for(image, "mapping")
    assert first.shape == (448, 448, 3) and second.shape == (3, 448, 448)
    assert first[224, 224] == pytest.approx([0, 0, 200], abs=1) and first[2, 224] == pytest.approx([255] * 3, abs=1)
    assert second[:, 224, 224] == pytest.approx([200 / 127.5 - 1, -1, -1], abs=0.01) and second[
        0, 2, 2
    ] == pytest.approx(1, abs=0.01)


def test_a_likeliest_tag_and_names_with_brackets():
    rules = TagRules(thresholds={"general": 0.5}, rating="last")
    assert rules.tags_of([Tag("a", "rating"), Tag("b", "rating"), Tag("c", "general")], [0.1, 0.2, 0.5]) == ["c", "b"]
    assert expanded("a_(b)_(c)") == ["a_(b)", "c"] and expanded("plain") == ["plain"]
    assert read_replacements(r"a,b;c\,d,e") == {"a": "b", "c,d": "e"} and read_replacements(None) == {}


def test_files_of_a_model_that_do_not_fit(pictures, listed, mapped):
    with pytest.raises(CheckpointError, match="2 numbers for 9 tags"):
        tagged(pictures, listed, network=FixedNetwork([0.1, 0.2]))
    (mapped / "tag_mapping.json").write_text('{"1": {"tag": "a", "category": "General"}}')
    with pytest.raises(CheckpointError, match="is no list of tags"):
        read_tags(str(mapped))


def test_every_problem_is_told_at_once(pictures, listed, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    more = ["--thresh=2", "--batch_size=0", "--tag_replacement=a", "--output_path=x.txt", "--use_quality_tags", "--use_rating_tags",
            "--use_rating_tags_as_last_tag", "--caption_separator=", "--max_data_loader_n_workers=-1",
            "--caption_extension=PNG"]  # fmt: skip
    assert script.main([str(pictures / "none"), f"--model_dir={listed}", *more]) == 2
    told = capsys.readouterr().err
    for text in ("does not exist", "--thresh is 2", "--batch_size is 0", "--tag_replacement has", "x.txt", "tag_mapping.json", "both given", "pip install onnxruntime",
                 "--caption_separator is empty", "--max_data_loader_n_workers is -1",
                 "text would replace images"):  # fmt: skip
        assert text in told


def test_a_real_file_in_onnxruntime(pictures, listed):
    """The network gives the mean of each colour of the picture, so that white paper and the order of colours show."""
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install onnxruntime")
    onnx = pytest.importorskip("onnx", reason="needs onnx to write a small network: pip install onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("GlobalAveragePool", ["turned"], ["pooled"]),
        helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2]),
        helper.make_node("Flatten", ["pooled"], ["flat"]), helper.make_node("Mul", ["flat", "factor"], ["tags"]),
    ]  # fmt: skip
    factor = helper.make_tensor("factor", kind, [1], [1 / 255])
    graph = helper.make_graph(
        [nodes[1], nodes[0], *nodes[2:]], "colours", [helper.make_tensor_value_info("image", kind, ["n", 448, 448, 3])],
        [helper.make_tensor_value_info("tags", kind, ["n", 3])], [factor],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, str(listed / "model.onnx"))
    (listed / "selected_tags.csv").write_text("tag_id,name,category,count\n0,blue,0,1\n1,green,0,1\n2,red,0,1\n")
    Image.new("RGBA", (8, 8), (255, 0, 0, 255)).save(pictures / "0.png")
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(pictures / "1.png")
    run([str(pictures), f"--model_dir={listed}", "--batch_size=2"])
    assert (pictures / "0.txt").read_text() == "red\n" and (pictures / "1.txt").read_text() == "blue, green, red\n"
