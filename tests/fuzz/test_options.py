"""Command lines, configuration files and dataset configurations with values of every kind, up to where models would be
loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.training import cli, parser_common
from library.training.trainer_base import Trainer
from tests.families import CASES
from tests.fuzz.mutations import TEXTS, VALUES, as_json, as_toml, changed_bytes, changed_value
from tests.fuzz.running import corpus, generator
from tests.runs.conftest import draw_pictures
from tests.tiny import build_tiny

NOT_TOUCHED = {"output_config", "config_file", "help", "logging_dir", "resume_from_huggingface"}
"""options that write, end the run in another way, or ask the network"""


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    draw_pictures(folder / "images", 2, size=(64, 64))
    return folder


@pytest.fixture(autouse=True)
def only_checks(places, monkeypatch):
    """A run ends where it would load models; the folder is one in which odd names may be made."""
    (places / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(places / "here")
    monkeypatch.setattr(Trainer, "run", lambda self: self.check())


def dataset_values(places: Path) -> dict:
    subset = {
        "image_dir": str(places / "images"),
        "num_repeats": 2,
        "keep_tokens": 1,
        "caption_prefix": "a",
        "flip_aug": True,
    }
    table = {
        "resolution": [64, 64],
        "batch_size": 2,
        "enable_bucket": True,
        "min_bucket_reso": 64,
        "bucket_reso_steps": 64,
        "subsets": [subset],
    }
    flat = {
        "image_directory": str(places / "images"), "resolution": 64, "num_repeats": 1,
        "cache_directory": str(places / "caches"),
    }  # fmt: skip
    return {"general": {"caption_extension": ".txt", "shuffle_caption": False}, "datasets": [table, flat]}


@pytest.fixture(scope="module")
def lines(places):
    """tiny model -> a command line that works."""
    (places / "data.toml").write_text(as_toml(dataset_values(places)), encoding="utf-8")
    found = {}
    for name, case in CASES.items():
        tiny = build_tiny(name, places / name)
        found[name] = [
            *tiny.arguments(), *case.options(), f"--dataset_config={places / 'data.toml'}",
            f"--output_dir={places / 'out'}", "--output_name=lora",
            "--network_dim=4", "--max_train_steps=7", "--seed=5", "--console_log_level=CRITICAL",
        ]  # fmt: skip
    return found


def test_the_lines_work(lines):
    for name, argv in lines.items():
        assert start(name, argv) == 0


def start(name: str, argv: list[str]) -> int:
    code = cli.exit_code(lambda: cli.run(CASES[name].family, "network", argv))
    assert code in (0, 1, 2), code
    return code


def options_of(name: str) -> list[str]:
    return sorted(parser_common.script(CASES[name].family, "network").all_defaults().keys() - NOT_TOUCHED)


def changed_line(argv: list[str], names: list[str], draw) -> list[str]:
    """One to three options more, or in the place of others, with odd values."""
    argv = list(argv)
    for name in draw.sample(names, draw.randint(1, 3)):
        text = draw.choice(TEXTS).replace("\0", "")
        kind = draw.randrange(5)
        words = [f"--{name}"] if kind == 0 else [f"--{name}", text] if kind == 1 else [f"--{name}={text}"]
        argv = [word for word in argv if not word.startswith(f"--{name}=")] + words
    return argv


def test_command_lines(lines, places, cases, finds):
    families = list(lines)
    names = {name: options_of(name) for name in families}
    for number in cases(200):
        draw, family = generator("lines", number), families[number % len(families)]
        argv = changed_line(lines[family], names[family], draw)
        finds.run(
            f"case {number} ({family}: {' '.join(argv[len(lines[family]) - 3 :])!a:.200})", lambda: start(family, argv)
        )
    for kept in corpus("lines"):
        family, *more = kept.read_text(encoding="utf-8").splitlines()
        finds.run(kept.name, lambda: start(family, [*lines[family], *more]))
    finds.assert_none()


def test_configuration_files(lines, places, cases, finds):
    families = list(lines)
    path = places / "config.toml"
    for number in cases(75):
        draw, family = generator("files", number), families[number % len(families)]
        values = {name: draw.choice(VALUES) for name in draw.sample(options_of(family), 2)} | {
            "network_args": ["a=1"],
            "learning_rate": 1e-4,
        }
        text = as_toml(values).encode("utf-8", "replace")
        path.write_bytes(changed_bytes(text, draw) if draw.random() < 0.4 else text)
        finds.run(
            f"case {number} ({family}, {text!r:.300})", lambda: start(family, [*lines[family], f"--config_file={path}"])
        )
    finds.assert_none()


def test_dataset_configurations(lines, places, cases, finds):
    values = dataset_values(places)
    names = ["cache_latents", "class_tokens", "metadata_file", "conditioning_data_dir", "validation_split", "caption_separator", "secondary_separator", "resize_interpolation",
             "face_crop_aug_range", "max_bucket_reso", "caption_dropout_rate", "network_multiplier",
             "custom_attributes", "token_warmup_step", "color_aug", "image_directory", "image_jsonl_file", "video_directory",
             "target_frames", "frame_extraction", "source_fps", "cache_directory", "control_directory",
             "control_resolution", "fp_1f_clean_indices", "multiple_target"]  # fmt: skip
    for number in cases(225):
        draw, is_json = generator("datasets", number), number % 2
        changed = changed_value(values, draw)
        found = changed.get("datasets")
        tables = [table for table in found if isinstance(table, dict)] if isinstance(found, list) else []
        if draw.random() < 0.5 and tables:
            draw.choice(tables)[draw.choice(names)] = draw.choice(VALUES)
        content = as_json(changed) if is_json else as_toml(changed).encode("utf-8", "replace")
        path = places / f"fuzz.{'json' if is_json else 'toml'}"
        path.write_bytes(changed_bytes(content, draw) if draw.random() < 0.3 else content)
        argv = [word for word in lines["flux"] if "dataset_config" not in word] + [f"--dataset_config={path}"]
        finds.run(f"case {number} ({content!r:.400})", lambda: start("flux", argv))
    finds.assert_none()
