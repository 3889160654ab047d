"""Input files of a run: pipes and devices are not waited for, deep nesting is a message, TOML that is written can be
read, secrets are masked, and names that become folders stay inside theirs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from library.components.tokenizers import read_clip_folder, read_qwen_folder, read_t5_folder
from library.core.errors import AtelierError, ConfigError
from library.core.text_files import open_file, parse_toml, read_text, require_file, toml_text
from library.training.parser_common import parse
from tests.waiting import PATIENCE

DEEP = 100_000
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@pytest.mark.parametrize(
    "values",
    [
        {
            "a": {
                "text": "D:\\models\\xl",
                "unc": "\\\\server\\x",
                "quote": 'say "hi"',
                "line": "one\ntwo\t\x00\x7f",
                "other": "é 猫",
            }
        },
        {
            "b": {
                "yes": True,
                "no": False,
                "number": 3,
                "rate": 1e-05,
                "large": 1e300,
                "list": ["D:\\x", "y"],
                "numbers": [1, 2.5],
                "none": "",
            }
        },
    ],
)
def test_toml_that_is_written_is_read_as_it_was(values) -> None:
    assert parse_toml(toml_text(values), "it") == values


def test_a_configuration_with_paths_of_windows_is_written_and_read(tmp_path) -> None:
    from library.training import cli

    path = tmp_path / "made.toml"
    argv = [
        "--pretrained_model_name_or_path",
        "D:\\models\\xl",
        "--base_weights",
        "D:\\loras\\x.safetensors",
        "E:\\new\\u.safetensors",
        "--network_args",
        "preset=D:\\x\\full.toml",
        "--learning_rate",
        "1e-5",
    ]
    cli.main("sd", "network", [*argv, "--config_file", str(path), "--output_config"])
    again, direct = parse(["--config_file", str(path)], "sd", "network"), parse(argv, "sd", "network")
    assert {name for name in direct.values() if direct.value(name) != again.value(name)} == {"config_file"}


READERS = {
    "--config_file": ("train.toml", "a = " + "[" * DEEP), "--dataset_config": ("data.toml", "a = " + "[" * DEEP),
    "--dataset_config json": ("data.json", "[" * DEEP), "--sample_prompts": ("prompts.json", "[" * DEEP),
    "--sample_prompts toml": ("prompts.toml", "a = " + "[" * DEEP),
    "--log_tracker_config": ("tracker.toml", "a = " + "[" * DEEP),
    "--in_json": ("meta.json", "[" * DEEP),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_every_reader_of_a_run_names_a_file_that_is_nested_too_deeply(tmp_path, capsys, name: str) -> None:
    from library.training import cli

    file, content = READERS[name]
    (tmp_path / file).write_text(content, encoding="utf-8")
    option = name.split()[0]
    with pytest.raises(SystemExit) as ended:
        cli.main(
            "sd",
            "network",
            [
                option,
                str(tmp_path / file),
                "--sample_at_first",
                "--output_dir",
                str(tmp_path / "out"),
                "--log_with=wandb",
            ],
        )
    told = capsys.readouterr().err
    assert ended.value.code == 2 and file in told and "Traceback" not in told


@needs_pipes
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "merges.txt", "spiece.model"])
def test_a_pipe_in_a_tokenizer_folder_is_not_waited_for(tmp_path, name: str) -> None:
    for other in ("vocab.json", "merges.txt"):
        (tmp_path / other).write_text("{}" if other.endswith("json") else "a b", encoding="utf-8")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    code = "import sys\nfrom pathlib import Path\nimport tests.library.test_input_files as here\nhere.read_all(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=PATIENCE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def read_all(folder) -> None:
    """Every reader of tokenizer folders ends, with a tokenizer, with nothing, or with a message."""
    for read in (read_clip_folder, read_t5_folder, read_qwen_folder):
        try:
            read(folder)
        except AtelierError:
            pass


@needs_pipes
def test_pipes_and_folders_in_the_place_of_files_are_named(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="a pipe or a device"):
            open_file(path)
        with pytest.raises(ConfigError, match="a pipe or a device"):
            read_text(path)
    with pytest.raises(OSError, match="it is a folder"):
        require_file(tmp_path)


@needs_pipes
def test_no_reader_of_a_run_waits_for_a_pipe(tmp_path) -> None:
    """Models, data sets, captions, prompts, thumbnails: all end with a message or pass the pipe over."""
    from library.checkpoints.kinds import describe_checkpoint
    from library.dataset.captions import read_caption
    from library.dataset.config_reading import read_config_file
    from library.dataset.items import SubsetParams
    from library.dataset.metadata_files import read_metadata_file
    from library.dataset.npz_file import UNREADABLE, read_headers
    from library.sai_model_spec import thumbnail_url
    from library.training.sampling_prompts import load_prompts

    for name in ("a.safetensors", "a.toml", "a.json", "a.txt", "a.npz", "a.png"):
        os.mkfifo(tmp_path / name)
    assert describe_checkpoint(tmp_path / "a.safetensors").kind == "damaged"
    for call in (
        lambda: read_config_file(tmp_path / "a.toml"), lambda: read_metadata_file(str(tmp_path / "a.json")),
        lambda: load_prompts(tmp_path / "a.txt"),
        lambda: read_caption(str(tmp_path / "a.png"), SubsetParams(caption_extension=".txt")),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match="a pipe or a device"):
            call()
    with pytest.raises(UNREADABLE):
        read_headers(tmp_path / "a.npz")
    with pytest.raises((OSError, ConfigError)):
        thumbnail_url(str(tmp_path / "a.png"))


def test_secrets_are_in_no_message_and_no_text_of_the_options(tmp_path) -> None:
    (tmp_path / "train.toml").write_text(
        'wandb_api_key = ["KEY123"]\nhuggingface_token = 5\nseed = "x"\n', encoding="utf-8"
    )
    with pytest.raises(ConfigError) as caught:
        parse(["--config_file", str(tmp_path / "train.toml")], "sd", "network")
    assert "wandb_api_key is ***" in str(caught.value) and "KEY123" not in str(caught.value)
    config = parse(["--wandb_api_key=KEY123", "--huggingface-token=KEY456"], "sd", "network")
    shown = " ".join(repr(config[group]) for group in config.classes())
    assert "KEY" not in shown and config.value("wandb_api_key") == "KEY123"


@pytest.mark.parametrize(
    "words",
    [
        ["--log_prefix=../../x"],
        ["--log_prefix=a/b"],
        ["--log_prefix=a\\b"],
        ["--log_tracker_name=../x"],
        ["--log_tracker_name=.."],
        ["--output_name=.."],
    ],
)
def test_names_that_become_folders_stay_inside_theirs(words) -> None:
    with pytest.raises(ConfigError, match=f"{words[0].partition('=')[0]} is .*needed: a file name without folders"):
        parse(words, "sd", "network")


def test_a_project_of_wandb_alone_may_have_a_slash() -> None:
    assert (
        parse(["--log_with=wandb", "--log_tracker_name=team/cats"], "sd", "network").value("log_tracker_name")
        == "team/cats"
    )
