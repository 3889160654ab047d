"""Dataset configurations: what the reference cases do not reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from voluptuous import Invalid

from library.config_util import ConfigSanitizer, DatasetConfigError, load_blueprint
from library.core.errors import ConfigError
from library.dataset import CachingOptions, DatasetOptions
from library.dataset.architectures import ARCHITECTURES
from library.dataset.config_reading import ConfigReader, ProblemList
from library.dataset.config_schema import ALL_KINDS, KEYS, NOT_FLAT, schema_of

FLUX = ARCHITECTURES["flux"]
SUBSET = '[[datasets.subsets]]\nimage_dir = "a"\n'


def load(
    tmp_path: Path,
    text: str,
    *,
    name: str = "d.toml",
    caching=None,
    script: str = "flux_train_network",
    explicit=(),
    **options,
):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    given = DatasetOptions(dataset_config=path, **options)
    return load_blueprint(
        given, caching, explicit=frozenset({*options, *explicit}), architecture=FLUX, script=script,
    )


def errors(tmp_path: Path, text: str, **more) -> dict[str, str]:
    with pytest.raises(DatasetConfigError) as caught:
        load(tmp_path, text, **more)
    return {error.path: error.kind for error in caught.value.errors}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.yaml", "", r"\.toml or \.json"),
        ("d.toml", "[[datasets]\n", "not valid TOML"),
        ("d.toml", 'a = "C:\\data\\x"', "single quotes"),
        ("d.json", '{"datasets": []', "not valid JSON"),
        ("d.json", '{"general": {}, "general": {}}', "twice"),
        ("d.json", "[]", "a table with"),
    ],
)
def test_unreadable_files(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text, name=name)


def test_missing_and_badly_encoded_file(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_blueprint(DatasetOptions(dataset_config=tmp_path / "none.toml"), architecture=FLUX)
    (tmp_path / "d.toml").write_bytes(b"# caf\xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_blueprint(DatasetOptions(dataset_config=tmp_path / "d.toml"), architecture=FLUX)


def test_suffix_in_capitals_and_byte_order_mark(tmp_path):
    text = f"\ufeff[[datasets]]\nresolution = 64\n{SUBSET}"
    assert load(tmp_path, text, name="d.TOML").datasets[0].resolution == (64, 64)


def test_no_datasets_and_no_subsets_say_so(tmp_path):
    with pytest.raises(ConfigError, match=r"no \[\[datasets\]\]"):
        load(tmp_path, "")
    with pytest.raises(ConfigError, match="has no subsets"):
        load(tmp_path, "[[datasets]]\nresolution = 64\n")
    with pytest.raises(ConfigError, match=r"\[\[datasets\]\].*\[datasets\.NAME\]"):
        load(tmp_path, "[datasets]\nresolution = 64\n")


def test_named_tables_in_json(tmp_path):
    text = '{"datasets": {"one": {"resolution": 64, "subsets": [{"image_dir": "a"}]}}}'
    blueprint = load(tmp_path, text, name="d.json")
    assert blueprint.datasets[0].label == "datasets.one"
    assert blueprint.datasets[0].subsets[0].label == "datasets.one.subsets[0]"


def test_messages_hold_value_key_and_way_out(tmp_path):
    with pytest.raises(DatasetConfigError) as caught:
        load(tmp_path, f'[general]\nflip_au = true\n[[datasets]]\nbatch_size = "x"\nresolution = 40\n{SUBSET}')
    text = str(caught.value)
    assert "general.flip_au: unknown key 'flip_au'; did you mean 'flip_aug'?" in text
    assert 'datasets[0].batch_size: is "x"; a whole number is needed, 1 or more' in text
    assert "datasets[0].resolution: is 40x40; the sides must be multiples of 16 for flux" in text
    assert len(caught.value.problems) == len(caught.value.errors) == 3


def test_renamed_options_suggest_the_key(tmp_path):
    with pytest.raises(DatasetConfigError) as caught:
        load(tmp_path, f"[[datasets]]\nresolution = 64\ntrain_batch_size = 2\n{SUBSET}")
    (error,) = caught.value.errors
    assert (error.kind, error.nearest) == ("unknown_key", "batch_size")


def errors_of(tmp_path, text: str, **settings) -> list[tuple[str, str, str | None]]:
    with pytest.raises(DatasetConfigError) as caught:
        load(tmp_path, text, **settings)
    return [(error.path, error.kind, error.nearest) for error in caught.value.errors]


def test_options_of_the_command_line_are_unknown_keys(tmp_path):
    text = f"[[datasets]]\nresolution = 64\ncache_latents = true\n{SUBSET}train_data_dir = 'b'\n"
    assert errors_of(tmp_path, text) == [
        ("datasets[0].cache_latents", "unknown_key", None),
        ("datasets[0].subsets[0].train_data_dir", "unknown_key", None),
    ]


def test_a_refused_value_is_reported_once(tmp_path):
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}conditioning_data_dir = 5\n"
    assert errors_of(tmp_path, text) == [("datasets[0].subsets[0].conditioning_data_dir", "wrong_type", None)]


def test_misspelled_subsets(tmp_path):
    text = "[[datasets]]\nresolution = 64\n[[datasets.subset]]\nimage_dir = 'a'\n"
    assert ("datasets[0].subset", "unknown_key", "subsets") in errors_of(tmp_path, text)


def test_all_faults_of_all_datasets_and_subsets_at_once(tmp_path):
    """A fault hides none behind it: not in the same table, nor in the next subset, dataset or section."""
    subset = '[[datasets.subsets]]\nimage_dir = 5\nnum_repeats = -1\nflip_au = true\n'
    dataset = f'[[datasets]]\nresolution = "x"\nbatch_size = 0\nimage_dir = "a"\n{subset}{subset}'
    text = f'[general]\nkeep_tokens = 1.5\nbatch_size = 0\n{dataset}{dataset}[generl]\n'
    found = errors(tmp_path, text)
    faults = {"image_dir": "wrong_type", "num_repeats": "out_of_range", "flip_au": "unknown_key"}
    expected = {"general.keep_tokens": "wrong_type", "general.batch_size": "out_of_range", "generl": "unknown_key"}
    for i in range(2):
        own = {"resolution": "wrong_type", "batch_size": "out_of_range", "image_dir": "conflict"}
        expected |= {f"datasets[{i}].{name}": kind for name, kind in own.items()}
        expected |= {f"datasets[{i}].subsets[{j}].{name}": kind for j in range(2) for name, kind in faults.items()}
    assert found == expected
    named = json.dumps({"datasets": {n: {"subsets": [{"image_dir": 5}, 7], "resolution": 0} for n in ("one", "two")}})
    assert errors(tmp_path, named, name="d.json") == {
        f"datasets.{n}.{key}": kind for n in ("one", "two")
        for key, kind in {
            "subsets[0].image_dir": "wrong_type", "subsets[1]": "wrong_type", "resolution": "out_of_range",
        }.items()
    }  # fmt: skip


def test_the_sanitizer_of_other_trainers_has_the_same_schema():
    content = {
        "general": {"flip_aug": "yes", "enable_buckt": True},
        "datasets": [
            {"resolution": [64], "subsets": [{"image_dir": "", "resize_interpolation": "lanczo"}, {"is_reg": 1}]}
        ],
    }
    with pytest.raises(DatasetConfigError) as own:
        load_blueprint(DatasetOptions(), architecture=FLUX, content=content)
    with pytest.raises(DatasetConfigError) as theirs:
        ConfigSanitizer(True, True, False, True).sanitize_user_config(content)
    told = {str(error) for error in theirs.value.errors}
    assert told == {str(error) for error in own.value.errors if error.kind != "missing"} and len(told) == 6
    assert any("is \"lanczo\"; one of" in line and "did you mean 'lanczos'?" in line for line in told)


@pytest.mark.parametrize(("raw", "path"), [(None, ""), ({"general": 1}, "general"), ({"datasets": "x"}, "datasets")])
def test_sections_that_are_no_tables(raw, path):
    problems = ProblemList()
    tables = ConfigReader(problems).read(raw)
    assert path in {item.path for item in problems.items if item.kind == "wrong_type"}
    assert not tables.general.values and not tables.datasets


def test_a_number_that_is_none_is_out_of_range(tmp_path):
    text = f"[[datasets]]\nresolution = 64\nnetwork_multiplier = nan\n{SUBSET}"
    with pytest.raises(DatasetConfigError, match="is NaN; a finite number is needed"):
        load(tmp_path, text)


def test_the_schema_takes_every_key_at_its_levels_alone():
    """schema_of is made of KEYS: each key passes where it may stand, and nowhere else."""
    values = {"resolution": 64, "skip_image_resolution": 64, "resize_interpolation": "area", "network_multiplier": 1}
    values |= {"face_crop_aug_range": [1, 2], "custom_attributes": {}, "control_resolution": 64}
    values |= {"target_frames": [1], "frame_extraction": "full", "source_fps": "auto", "fp_1f_clean_indices": [0]}
    schema = schema_of(ALL_KINDS, True)
    for name, key in KEYS.items():
        fitting = [v for v in (values.get(name), True, 1, "a") if v is not None and not is_refused(key.check, v)]
        for level in "GDS":
            placed = {name: fitting[0]}
            subset = placed if level == "S" else {}
            raw = {"datasets": [{**(placed if level == "D" else {}), "subsets": [subset]}]}
            raw |= {"general": placed} if level == "G" else {}
            assert is_refused(schema, raw) == (level not in key.levels), (name, level)
        flat = {"datasets": [{"image_directory": "a", **placed}]}
        assert is_refused(schema, flat) == (name in NOT_FLAT or key.levels == "G"), name


def is_refused(schema, value) -> bool:
    try:
        schema(value)
    except Invalid:
        return True
    return False


def test_named_dataset_that_is_no_table(tmp_path):
    text = '{"datasets": {"one": {"resolution": 64, "subsets": [{"image_dir": "a", "num_repeats": -1}]}, "two": 5}}'
    assert set(errors_of(tmp_path, text, name="d.json")) == {
        ("datasets.two", "wrong_type", None), ("datasets.one.subsets[0].num_repeats", "out_of_range", None),
    }
    assert errors_of(tmp_path, "[]", name="d.json") == [("", "wrong_type", None)]


@pytest.mark.parametrize("value", ["[64]", '"64x64"', '["64", "64"]', '"[64,64]"'])
def test_forms_of_the_resolution(tmp_path, value):
    assert errors_of(tmp_path, f"[[datasets]]\nresolution = {value}\n{SUBSET}") == [
        ("datasets[0].resolution", "wrong_type", None)
    ]


def test_a_step_longer_than_the_resolution(tmp_path):
    text = f"[[datasets]]\nresolution = 48\nenable_bucket = true\nmin_bucket_reso = 16\n{SUBSET}"
    assert errors_of(tmp_path, text) == [("datasets[0].min_bucket_reso", "conflict", None)]
    with pytest.raises(ConfigError, match="lower bucket_reso_steps"):
        load(tmp_path, text)


def test_size_rule_is_the_familys_alone(tmp_path):
    assert load(tmp_path, f"[[datasets]]\nresolution = 80\nbucket_reso_steps = 16\n{SUBSET}").datasets
    assert errors(tmp_path, f"[[datasets]]\nresolution = 72\n{SUBSET}") == {"datasets[0].resolution": "out_of_range"}
    text = f"[[datasets]]\nresolution = 64\nbucket_reso_steps = 24\n{SUBSET}"
    assert errors(tmp_path, text) == {"datasets[0].bucket_reso_steps": "out_of_range"}
    masks = '[[datasets]]\nresolution = 72\n[[datasets.subsets]]\nimage_dir = "a"\nconditioning_data_dir = "m"\n'
    assert errors(tmp_path, masks, masked_loss=True) == {"datasets[0].resolution": "out_of_range"}


def test_default_maximum_follows_the_resolution(tmp_path):
    text = f"[[datasets]]\nresolution = [1296, 512]\nenable_bucket = true\n{SUBSET}"
    assert load(tmp_path, text).datasets[0].max_bucket_reso == 1344  # rounded up to 64
    with pytest.raises(DatasetConfigError, match="1024.*1296"):
        load(tmp_path, text, max_bucket_reso=1024)
    assert errors(tmp_path, text.replace("[[datasets]]", "[[datasets]]\nmax_bucket_reso = 1024", 1)) == {
        "datasets[0].max_bucket_reso": "conflict"
    }


def test_minimum_above_the_resolution(tmp_path):
    text = f"[[datasets]]\nresolution = 64\nenable_bucket = true\n{SUBSET}"
    assert errors(tmp_path, text) == {"datasets[0].min_bucket_reso": "conflict"}
    assert load(tmp_path, text, min_bucket_reso=64).datasets[0].min_bucket_reso == 64


def test_errors_stand_where_the_value_is_written(tmp_path):
    text = f"[general]\ncolor_aug = true\n[[datasets]]\nresolution = 64\n{SUBSET}"
    assert errors(tmp_path, text, caching=CachingOptions(cache_latents=True)) == {"general.color_aug": "conflict"}
    plain = f"[[datasets]]\nresolution = 64\n{SUBSET}"
    from_option = errors(tmp_path, plain, caching=CachingOptions(cache_latents=True), color_aug=True)
    assert from_option == {"datasets[0].subsets[0].color_aug": "conflict"}


def test_text_cache_takes_what_is_fixed(tmp_path):
    text = f'[[datasets]]\nresolution = 64\ncaption_prefix = "p"\nkeep_tokens_separator = "|"\ncaption_dropout_rate = 0.1\n{SUBSET}'
    cached = CachingOptions(cache_text_encoder_outputs_to_disk=True)
    assert load(tmp_path, text, caching=cached).datasets
    assert errors(tmp_path, text + "caption_tag_dropout_rate = 0.1\n", caching=cached) == {
        "datasets[0].subsets[0].caption_tag_dropout_rate": "conflict"
    }


def test_masks_are_detected_per_dataset(tmp_path):
    """train_db with --masked_loss takes plain folders beside those with masks."""
    text = (
        f'[[datasets]]\nresolution = 64\n{SUBSET}conditioning_data_dir = "m"\n[[datasets]]\nresolution = 64\n{SUBSET}'
    )
    assert [d.kind for d in load(tmp_path, text, masked_loss=True, script="train_db").datasets] == ["CN", "DB"]
    with pytest.raises(DatasetConfigError, match="masked_loss"):
        load(tmp_path, text)


def test_scripts_that_take_one_kind(tmp_path):
    folders = f"[[datasets]]\nresolution = 64\n{SUBSET}"
    listed = folders + 'metadata_file = "m.json"\n'
    assert errors(tmp_path, folders, script="fine_tune") == {"datasets[0].subsets[0].metadata_file": "missing"}
    assert errors(tmp_path, listed, script="train_db") == {"datasets[0].subsets[0].metadata_file": "conflict"}
    masked = folders + 'conditioning_data_dir = "m"\n'
    assert load(tmp_path, masked, script="flux_train_control_net").datasets[0].kind == "CN"


def test_settings_without_meaning_for_masks_are_off(tmp_path):
    text = f'[general]\nclass_tokens = "x"\n[[datasets]]\nresolution = 64\n{SUBSET}conditioning_data_dir = "m"\n'
    (subset,) = load(tmp_path, text, masked_loss=True, alpha_mask=True).datasets[0].subsets
    assert (subset.class_tokens, subset.alpha_mask) == (None, False)


def test_same_folder_twice(tmp_path):
    once = f"[[datasets]]\nresolution = 64\n{SUBSET}"
    twice = once + '[[datasets.subsets]]\nimage_dir = "./a/"\n'
    blueprint = load(tmp_path, twice)
    assert len(blueprint.datasets[0].subsets) == 1
    assert any("subsets[1]" in line for line in blueprint.warnings)
    assert len(load(tmp_path, once + once).datasets) == 2  # in two datasets it is multi-resolution training


def test_folder_options_beside_a_file_are_named(tmp_path):
    blueprint = load(tmp_path, f"[[datasets]]\nresolution = 64\n{SUBSET}", train_data_dir="x")
    (warning,) = blueprint.warnings
    assert "--train_data_dir is ignored" in warning and "reg_data_dir" not in warning


def test_old_extension_spelling_wins_with_a_warning(tmp_path):
    blueprint = load(
        tmp_path, f"[[datasets]]\nresolution = 64\n{SUBSET}", caption_extension=".a", caption_extention="b"
    )
    assert blueprint.datasets[0].subsets[0].caption_extension == ".b"
    assert any("caption_extention" in line for line in blueprint.warnings)


def test_separator_defaults_are_texts(tmp_path):
    (subset,) = load(tmp_path, f"[[datasets]]\nresolution = 64\n{SUBSET}").datasets[0].subsets
    assert (subset.caption_separator, subset.keep_tokens_separator) == (",", "")


@pytest.mark.parametrize("value", ["true", "1.0", '"1"'])
def test_integers_are_integers(tmp_path, value):
    text = f"[[datasets]]\nresolution = 64\nbatch_size = {value}\n{SUBSET}"
    assert errors(tmp_path, text) == {"datasets[0].batch_size": "wrong_type"}


# ---------------------------------------------------------------- without a file


def folders(**options):
    return load_blueprint(
        DatasetOptions(resolution=(64, 64), **options), architecture=FLUX, explicit=frozenset(options)
    )


def test_no_images_given():
    with pytest.raises(ConfigError, match="--dataset_config FILE, or --train_data_dir"):
        folders()
    with pytest.raises(ConfigError, match="not a folder"):
        folders(train_data_dir="/none/such")


def test_images_directly_in_the_folder(tmp_path):
    (tmp_path / "a.PNG").touch()
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigError, match="N_name.*holds 1 images itself"):
        folders(train_data_dir=str(tmp_path))


def test_folders_are_sorted_and_others_named(tmp_path):
    for name in ("2_b", "10_a", "x_y", "0_off"):
        (tmp_path / name).mkdir()
    blueprint = folders(train_data_dir=str(tmp_path))
    found = [(Path(s.image_dir).name, s.num_repeats, s.class_tokens) for s in blueprint.datasets[0].subsets]
    assert found == [("10_a", 10, "a"), ("2_b", 2, "b")]
    (warning,) = [line for line in blueprint.warnings if "0_off" not in line]
    assert "x_y" in warning


def test_masks_without_a_file(tmp_path):
    blueprint = folders(train_data_dir="a", conditioning_data_dir="m", masked_loss=True)
    assert blueprint.datasets[0].kind == "CN"
    with pytest.raises(ConfigError, match="--masked_loss"):
        folders(train_data_dir=str(tmp_path), conditioning_data_dir="m")
    with pytest.raises(ConfigError, match="--reg_data_dir has no use with --in_json"):
        folders(in_json="m.json", reg_data_dir="r")


def test_changed_effects_are_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    load(tmp_path, f'[[datasets]]\nresolution = 64\n{SUBSET}')
    assert not caplog.messages
    load(tmp_path, f'[[datasets]]\nresolution = 64\ncaption_separator = ";"\n{SUBSET}color_aug = true\n')
    assert len(caplog.messages) == 2


def test_folders_that_ask_for_no_repeats_are_named(tmp_path):
    for name in ("-2_name", "0_other", "3_good", "cat"):
        (tmp_path / name).mkdir()
    warnings = load_blueprint(
        DatasetOptions(train_data_dir=str(tmp_path), resolution=(64, 64)), architecture=ARCHITECTURES["flux"]
    ).warnings
    for name, reason in (
        ("-2_name", "asks for -2 repeats"),
        ("0_other", "asks for 0 repeats"),
        ("cat", "does not begin with a number"),
    ):
        assert any(name in line and reason in line for line in warnings), name
