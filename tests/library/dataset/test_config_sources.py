"""Sources of datasets and subsets: both forms of a configuration, what is told, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.config_util import Blueprint, DatasetConfigError, load_blueprint
from library.core.errors import ConfigError
from library.dataset import DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.clips.settings import AUTO_FPS
from tests.golden_tests.video_architectures import ARCHITECTURES as VIDEO

FLUX, WAN, FRAMEPACK, HUNYUAN = ARCHITECTURES["flux"], VIDEO["wan"], VIDEO["fp"], VIDEO["hv"]


def load(folder: Path, text: str, architecture=WAN, *, explicit=(), **more) -> Blueprint:
    script = more.pop("script", "train_network")
    path = folder / "d.toml"
    path.write_text(text, encoding="utf-8")
    given = DatasetOptions(dataset_config=path, **more)
    return load_blueprint(given, architecture=architecture, explicit=frozenset({*more, *explicit}), script=script)


def errors(folder: Path, text: str, architecture=WAN, **more) -> list[tuple[str, str]]:
    with pytest.raises(DatasetConfigError) as caught:
        load(folder, text, architecture, **more)
    return [(error.path, error.kind) for error in caught.value.errors]


def test_both_forms_in_one_file(tmp_path):
    flat, nested, named = load(tmp_path, """
        [general]
        caption_extension = ".txt"
        [[datasets]]
        video_directory = "v"
        resolution = 512
        target_frames = [5]
        [[datasets]]
        resolution = 512
        target_frames = [9]
        [[datasets.subsets]]
        video_directory = "w"
        source_fps = "auto"
        [[datasets.subsets]]
        image_directory = "i"
        [[datasets]]
        image_directory = "j"
        resolution = 512
        """).datasets  # fmt: skip
    assert [dataset.bucket_rule for dataset in (flat, nested, named)] == ["area", "steps", "area"]
    assert (flat.bucket_reso_steps, nested.bucket_reso_steps) == (16, 64)
    assert flat.subsets[0].label == "datasets[0]" and nested.subsets[1].label == "datasets[1].subsets[1]"
    clips, pictures = nested.subsets
    assert (clips.clips.target_frames, clips.clips.source_fps, clips.whole_captions) == ((9,), AUTO_FPS, False)
    assert pictures.clips is None and pictures.image_dir == "i" and named.subsets[0].whole_captions
    assert {dataset.kind for dataset in (flat, nested, named)} == {"DB"}


def test_a_dataset_without_subsets_has_caption_settings_and_masks(tmp_path):
    text = '[[datasets]]\nimage_directory = "i"\nresolution = 512\n'
    [dataset] = load(tmp_path, text + "flip_aug = true\nis_reg = true\nvalidation_split = 0.5", FLUX).datasets
    [subset] = dataset.subsets
    assert subset.flip_aug and subset.is_reg and subset.validation_split == 0.5 and dataset.validation_split == 0.5
    masks = text + 'conditioning_data_dir = "m"'
    assert load(tmp_path, masks, FLUX, masked_loss=True).datasets[0].kind == "CN"
    assert load(tmp_path, masks, FLUX, script="train_control_net").datasets[0].holds_control


def test_what_was_written_on_the_command_line_stands_in(tmp_path):
    text = '[[datasets]]\nimage_directory = "i"\n'
    [dataset] = load(tmp_path, text).datasets
    assert dataset.resolution == (960, 544) and dataset.subsets[0].caption_extension is None
    blueprint = load(
        tmp_path, text, resolution=(512, 512), caption_extension=".cap", train_batch_size=3, min_bucket_reso=128
    )
    [dataset] = blueprint.datasets
    assert (dataset.resolution, dataset.batch_size) == ((512, 512), 3)
    assert dataset.subsets[0].caption_extension == ".cap"
    assert "min_bucket_reso" in blueprint.shadowed and not {"resolution", "train_batch_size"} & blueprint.shadowed
    assert blueprint.warnings == (
        "min_bucket_reso has no effect: datasets without subsets have buckets of all shapes of one area",
    )
    assert load(tmp_path, text + NESTED + 'image_dir = "j"', min_bucket_reso=128).warnings == ()
    old = load(tmp_path, text, caption_extention=".old").datasets[0]
    assert old.subsets[0].caption_extension == ".old"


@pytest.mark.parametrize(
    ("architecture", "keys", "told"),
    [
        (WAN, "target_frames = [1, 4, 26]", [r"frames \[4, 26\] are no multiple of 4 and 1, .* \[1, 25\] frames"]),
        (WAN, 'frame_extraction = "uniform"', ["takes the beginning, as head does"]),
        (WAN, "frame_stride = 2\nframe_sample = 2", ["frame_stride has no effect with .* head", "frame_sample has no"]),
        (WAN, 'frame_extraction = "full"\ntarget_frames = [5]', ["target_frames has no effect with .* full"]),
        (WAN, 'frame_extraction = "slide"\nframe_stride = 2', []),
        (WAN, "fp_latent_window_size = 5", ["fp_latent_window_size is nothing that wan reads"]),
        (FRAMEPACK, "fp_latent_window_size = 5", []),
        (WAN, "cache_info = true", []),
    ],
)  # fmt: skip
def test_settings_without_effect_are_told(tmp_path, architecture, keys, told):
    warnings = load(tmp_path, f'[[datasets]]\nvideo_directory = "v"\n{keys}\n', architecture).warnings
    assert len(warnings) == len(told), warnings
    for line, wanted in zip(warnings, told):
        with pytest.raises(ConfigError, match=f"datasets.0.: .*{wanted}"):
            raise ConfigError(line)


def test_settings_of_pictures_that_a_family_does_not_read_are_told(tmp_path):
    text = '[[datasets]]\nimage_directory = "i"\ncontrol_directory = "c"\n'
    text += "control_resolution = 512\nfp_1f_target_index = 1\n"
    [line] = load(tmp_path, text, FLUX).warnings
    assert "control_directory, control_resolution, fp_1f_target_index are nothing that flux reads, and ignored" in line
    assert load(tmp_path, text, FLUX).datasets[0].subsets[0].control_count == 0
    assert load(tmp_path, text, FRAMEPACK).warnings == ()


@pytest.mark.parametrize(
    ("architecture", "keys", "count"),
    [
        (WAN, "", 1), (VIDEO["f2d"], "", None), (FLUX, "", 0), (FRAMEPACK, "fp_1f_clean_indices = [0, 10, 4]", 3),
        (FRAMEPACK, "fp_1f_no_post = true", 1), (HUNYUAN, "fp_1f_clean_indices = [0, 10]", 1),
    ],
)  # fmt: skip
def test_number_of_control_pictures(tmp_path, architecture, keys, count):
    [dataset] = load(tmp_path, f'[[datasets]]\nimage_directory = "i"\n{keys}\n', architecture).datasets
    assert dataset.subsets[0].control_count == count


def test_places_of_control_pictures_that_are_not_there_are_told(tmp_path):
    text = '[[datasets]]\nimage_directory = "i"\nfp_1f_clean_indices = [0, 10]\n'
    [line] = load(tmp_path, text, FRAMEPACK).warnings
    assert "there is no control_directory" in line
    assert load(tmp_path, f'{text}control_directory = "c"\n', FRAMEPACK).warnings == ()


def test_a_list_has_no_folder_for_its_notes(tmp_path):
    text = '[[datasets]]\nimage_jsonl_file = "x.jsonl"\ncache_directory = "c"\ncache_info = true\n'
    assert load(tmp_path, text).warnings == ("datasets[0]: cache_info is for folders, and has no effect on a list",)


def test_renamed_keys_are_told(tmp_path):
    text = '[[datasets]]\nimage_directory = "i"\nqwen_image_edit_control_resolution = 512\n'
    assert load(tmp_path, text, VIDEO["qie"]).warnings == (
        "datasets[0].qwen_image_edit_control_resolution is called control_resolution now",
    )
    path = tmp_path / "named.json"
    old = {"image_directory": "i", "flux_kontext_no_resize_control": True}
    path.write_text(json.dumps({"datasets": {"one": old}}), encoding="utf-8")
    blueprint = load_blueprint(DatasetOptions(dataset_config=path), architecture=VIDEO["fk"])
    assert blueprint.datasets[0].subsets[0].no_resize_control
    assert blueprint.warnings == ("datasets.one.flux_kontext_no_resize_control is called no_resize_control now",)


FLAT = '[[datasets]]\nvideo_directory = "v"\n'


def test_buckets_of_videos_that_other_tools_make_otherwise_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    buckets = "enable_bucket = true"
    for keys, is_told in (("", True), (buckets, False), (f"{buckets}\nbucket_no_upscale = true", True)):
        caplog.clear()
        load(tmp_path, FLAT + keys)
        assert ("count for videos as for pictures" in caplog.text) == is_told


NESTED = "[[datasets]]\nresolution = 512\n[[datasets.subsets]]\n"


@pytest.mark.parametrize(
    ("architecture", "text", "wanted"),
    [
        (FLUX, NESTED + 'video_directory = "v"', [("datasets[0].subsets[0].video_directory", "conflict")]),
        (FLUX, NESTED + 'image_dir = "i"\ntarget_frames = [5]', [("datasets[0].subsets[0].target_frames", "conflict")]),
        (WAN, NESTED + 'image_dir = "i"\nvideo_directory = "v"', [("datasets[0].subsets[0]", "conflict")]),
        (WAN, NESTED + 'video_directory = "v"\nmetadata_file = "m"', [("datasets[0].subsets[0]", "conflict")]),
        (WAN, NESTED + 'video_directory = "v"\nmultiple_target = true', [
            ("datasets[0].subsets[0].multiple_target", "conflict"),
        ]),
        (WAN, '[[datasets]]\nimage_directory = "i"\nmultiple_target = true', [
            ("datasets[0].multiple_target", "conflict"),
        ]),
        (WAN, '[[datasets]]\nvideo_directory = "v"\nmin_bucket_reso = 64', [
            ("datasets[0].min_bucket_reso", "conflict"),
        ]),
        (WAN, '[[datasets]]\nvideo_directory = "v"\nimage_dir = "i"', [("datasets[0].image_dir", "conflict")]),
        (WAN, '[[datasets]]\nvideo_directory = "v"\nresolution = [100, 100]', [
            ("datasets[0].resolution", "out_of_range"),
        ]),
        (WAN, '[[datasets]]\nvideo_directory = "v"\nsource_fps = inf', [("datasets[0].source_fps", "out_of_range")]),
        (FLUX, "[[datasets]]\nresolution = 512", [("datasets[0].subsets", "missing")]),
        (WAN, '[[datasets]]\nvideo_directry = "v"\ntarget_frames = [5]\nmultiple_target = false', [
            ("datasets[0]", "missing"), ("datasets[0].video_directry", "unknown_key"),
        ]),
        (WAN, FLAT + 'image_directory = "i"\ntarget_frames = [5]\nno_resize_control = true', [
            ("datasets[0]", "conflict"),
        ]),
        (WAN, "[[datasets]]\nresolution = 512", [("datasets[0]", "missing")]),
        (WAN, "[[datasets]]\nresolution = 512\nsubsets = []", [("datasets[0].subsets", "missing")]),
        (WAN, '[[datasets]]\nresolution = 512\nvideo_directory = "v"\nsubsets = []', [
            ("datasets[0].video_directory", "conflict"), ("datasets[0].subsets", "missing"),
        ]),
        (WAN, '[datasets]\nvideo_directory = "v"', [("datasets", "conflict")]),
        (WAN, '[general]\nvideo_directory = "v"\n[[datasets]]\nimage_directory = "i"', [
            ("general.video_directory", "conflict"),
        ]),
        (WAN, 2 * (NESTED + 'video_directory = "v"\n'), [("datasets[1].subsets[0].cache_directory", "conflict")]),
    ],
)  # fmt: skip
def test_refusals(tmp_path, architecture, text, wanted):
    assert sorted(errors(tmp_path, text, architecture)) == sorted(wanted)


def test_image_families_share_folders_between_datasets_and_need_no_folder_for_lists(tmp_path):
    """Their caches hold several sizes of an image, beside the images."""
    text = "".join(f'[[datasets]]\nresolution = {size}\nimage_directory = "i"\n' for size in (512, 768))
    text += '[[datasets]]\nimage_jsonl_file = "x.jsonl"\nresolution = 512\n'
    assert len(load(tmp_path, text, FLUX).datasets) == 3


def test_a_video_for_a_family_of_pictures_is_one_message(tmp_path):
    with pytest.raises(DatasetConfigError) as caught:
        load(tmp_path, '[[datasets]]\nvideo_directory = "v"\ntarget_frames = [5]\n', FLUX)
    [problem] = caught.value.problems
    assert problem.startswith("datasets[0].video_directory: flux learns pictures, not videos")
