"""--config_file and --output_config of flux_train_network.py: precedence, types, foreign keys, every problem at
once."""

import pytest
import toml

from library.core.errors import ConfigError
from library.training.option_groups import LoopOptions
from library.training.parser_common import parse, parse_command


@pytest.fixture
def config_file(tmp_path):
    """A function that writes a TOML text and returns its path."""

    def write(text):
        path = tmp_path / "train.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def read(path, *argv):
    return parse(["--config_file", path, *argv], "flux", "network")


def problems_of(path, *argv):
    with pytest.raises(ConfigError) as caught:
        read(path, *argv)
    return caught.value.problems


def test_the_command_line_beats_the_file_and_the_file_beats_the_default(config_file):
    path = config_file("max_train_steps = 20\nnetwork_dim = 8\n")
    config = read(path, "--network_dim", "16")
    assert (config[LoopOptions].max_train_steps, config.value("network_dim")) == (20, 16)
    assert config.value("gradient_accumulation_steps") == 1
    assert (
        config.explicit >= {"max_train_steps", "network_dim"} and "gradient_accumulation_steps" not in config.explicit
    )


def test_the_ending_of_the_file_may_be_left_out(config_file):
    assert read(config_file("seed = 3").removesuffix(".toml")).value("seed") == 3


def test_tables_are_flattened_and_later_keys_win(config_file):
    config = read(config_file("seed = 1\n[any]\nseed = 2\nnetwork_dim = 4\n[other]\nnetwork_dim = 5\n"))
    assert (config.value("seed"), config.value("network_dim")) == (2, 5)


@pytest.mark.parametrize(
    "line, name, value",
    [
        ('unet_lr = "1e-4"', "unet_lr", 1e-4),
        ("unet_lr = 1e-4", "unet_lr", 1e-4),
        ("unet_lr = 1", "unet_lr", 1.0),
        ('network_dim = "8"', "network_dim", 8),
        ("network_dim = 8.0", "network_dim", 8),
        ('resolution = "512,768"', "resolution", (512, 768)),
        ("resolution = [512, 768]", "resolution", (512, 768)),
        ("resolution = 512", "resolution", (512, 512)),
        ('cache_latents = "true"', "cache_latents", True),
        ("cache_latents = 0", "cache_latents", False),
        ('network_args = ["conv_dim=4", "conv_alpha=1"]', "network_args", ["conv_dim=4", "conv_alpha=1"]),
        ('network_args = "conv_dim=4 conv_alpha=1"', "network_args", ["conv_dim=4", "conv_alpha=1"]),
        ("network_args = []", "network_args", None),
        ("text_encoder_lr = 1e-5", "text_encoder_lr", [1e-5]),
        ('text_encoder_lr = ["1e-5", "0"]', "text_encoder_lr", [1e-5, 0.0]),
        ('output_name = ""', "output_name", None),
        ("output_name = 5", "output_name", "5"),
        ("save_n_epoch_ratio = 0", "save_n_epoch_ratio", None),
        ("save_every_n_epochs = 0", "save_every_n_epochs", None),
        ("max_train_epochs = 0", "max_train_epochs", None),
        ('ddp_timeout = "0"', "ddp_timeout", None),
        ("max-token-length = 75", "max_token_length", None),
        ("sample_every_n_steps = 0", "sample_every_n_steps", None),
        ("sample_every_n_epochs = -1", "sample_every_n_epochs", None),
        ("clip_skip = 1", "clip_skip", None),
        ("max_token_length = 75", "max_token_length", None),
        ("noise_offset = 0", "noise_offset", None),
        ("multires_noise_discount = 0.2", "multires_noise_discount", 0.3),
        ('dynamo_backend = "no"', "dynamo_backend", "no"),
    ],
)
def test_a_value_takes_the_type_of_its_option(config_file, line, name, value):
    found = read(config_file(line)).value(name)
    assert found == value and type(found) is type(value)


def test_step_counts_may_be_a_part_of_the_run(config_file):
    assert read(config_file('lr_warmup_steps = "10%"')).value("lr_warmup_steps") == parse(
        ["--lr_warmup_steps", "10%"], "flux", "network"
    ).value("lr_warmup_steps")


@pytest.mark.parametrize(
    "line, words",
    [
        ('unet_lr = "fast"', ["unet_lr is 'fast'", "a number"]),
        ("network_dim = 4.5", ["network_dim is 4.5", "a whole number"]),
        ("network_dim = true", ["network_dim is True", "a whole number"]),
        ('cache_latents = "perhaps"', ["cache_latents is 'perhaps'", "true or false"]),
        ("cache_latents = 2", ["cache_latents is 2", "true or false"]),
        ('mixed_precision = "bf61"', ["mixed_precision is 'bf61'", "did you mean 'bf16'"]),
        ('output_name = ["a", "b"]', ["output_name", "not a list"]),
        ("output_name = true", ["output_name is True", "a text"]),
        ('resolution = "large"', ["resolution", "1024,768"]),
        ("netwrk_dim = 4", ["unknown key netwrk_dim", "did you mean 'network_dim'"]),
        ("[a.b]\nseed = 1", ["b is a table inside a table"]),
        ('seed = "', ["is not valid TOML"]),
        ("save_every_n_epochs = -1", ["--save_every_n_epochs is -1", "1 or more"]),
        ('config_file = "x"', ["config_file"]),
    ],
)
def test_a_bad_line_is_named_with_file_key_and_need(config_file, line, words):
    path = config_file(line)
    problems = problems_of(path)
    assert len(problems) == 1
    assert all(word in problems[0] for word in words)
    assert path in problems[0] or problems[0].startswith("--")


def test_all_problems_are_told_at_once(config_file):
    path = config_file('netwrk_dim = 4\nunet_lr = "fast"\nsave_every_n_steps = -1\nweighted_captions = true\n')
    problems = problems_of(path, "--train_batch_size", "two", "--max_train_steps", "-1", "--seeed", "1")
    for name in (
        "netwrk_dim",
        "unet_lr",
        "save_every_n_steps",
        "weighted_captions",
        "train_batch_size",
        "max_train_steps",
        "seeed",
    ):
        assert sum(name in problem for problem in problems) == 1, name
    assert len(problems) == 7


def ignored_in(path, *argv):
    return [str(item) for item in read(path, *argv).ignored]


def test_keys_of_other_scripts_that_ask_for_nothing_are_ignored_in_one_line(config_file):
    path = config_file(
        'clip_g = ""\nnoise_offset_type = "Original"\nmem_eff_save = false\nepoch = 1\nstop_text_encoder_training = 0\nseed = 1\n'
    )
    assert ignored_in(path) == [
        "clip_g, epoch, mem_eff_save, noise_offset_type, stop_text_encoder_training: keys of other scripts that ask "
        "for nothing"
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        ('gemma2 = "gemma.safetensors"', "a key of other scripts"),
        ("epoch = 20\nmax_train_steps = 100", "the length is max_train_steps = 100"),
        ("epoch = 10\nmax_train_epochs = 10", "the length is max_train_epochs = 10"),
        ('noise_offset_type = "Multires"', "multires_noise_iterations"),
        ("stop_text_encoder_training = 50", "--network_train_unet_only"),
        ("train_inpainting = true", "no known script reads it"),
        ("single_blocks_to_swap = 4", "--blocks_to_swap"),
        ("fused_optimizer_groups = 4", "a key of other scripts"),
        ("lr_restart_cycles = 3", "--lr_scheduler_num_cycles"),
        ("use_safetensors = true", "--save_model_as"),
        ("min_snr_gamma = 5", "no table of signal-to-noise ratios"),
        ("v_parameterization = true", "velocity"),
        ("zero_terminal_snr = true", "no table"),
        ("noise_offset = 0.1", "plain noise"),
        ("fused_backward_pass = true", "full fine-tuning only"),
        ('vae = "vae.safetensors"', "--ae"),
    ],
)
def test_a_known_key_without_meaning_is_ignored_with_the_reason(config_file, line, words):
    (told,) = ignored_in(config_file(line))
    assert told.startswith(line.partition(" = ")[0]) and words in told


def test_a_key_that_is_an_option_of_the_reader_alone_is_unknown(config_file):
    assert "unknown key output_config" in problems_of(config_file("output_config = true"))[0]


def test_the_command_line_replaces_an_ignored_key_too(config_file):
    path = config_file("min_snr_gamma = 5")
    assert ignored_in(path, "--min_snr_gamma", "0") == []
    assert [told.partition(":")[0] for told in ignored_in(path, "--min_snr_gamma", "3")] == ["--min_snr_gamma 3"]


@pytest.mark.parametrize(
    "off", [["--no-cache_latents"], ["--no_cache_latents"], ["--cache_latents", "false"], ["--cache_latents=0"]]
)
def test_a_boolean_of_the_file_is_switched_off_on_the_command_line(config_file, off):
    path = config_file("cache_latents = true")
    assert read(path).value("cache_latents") is True
    assert read(path, *off).value("cache_latents") is False


def test_a_missing_file_is_an_error(tmp_path):
    assert problems_of(str(tmp_path / "none")) == (
        f"--config_file is {tmp_path / 'none'}; there is no file {tmp_path / 'none.toml'}",
    )


def test_an_unknown_option_on_the_command_line_is_answered_with_the_nearest_name():
    with pytest.raises(ConfigError, match="unknown option --netwrk_dim; did you mean 'network_dim'"):
        parse(["--netwrk_dim", "4"], "flux", "network")
    with pytest.raises(ConfigError, match="--gemma2 is an option of other scripts"):
        parse(["--gemma2", "x"], "flux", "network")


def test_output_config_round_trip(tmp_path):
    from library.training import cli

    path = tmp_path / "made.toml"
    argv = [
        "--network_dim",
        "8",
        "--network_args",
        "a=1",
        "b=2",
        "--cache_latents",
        "--resolution",
        "512,768",
        "--save_model_as",
        "",
        "--unet_lr",
        "1e-4",
        "--huggingface_token",
        "secret",
        "--wandb_api_key",
        "secret",
        "--lr_warmup_steps",
        "0.1",
    ]
    cli.main("flux", "network", [*argv, "--config_file", str(path), "--output_config"])
    text = path.read_text(encoding="utf-8")
    assert "secret" not in text and "output_config" not in text and "config_file" not in text
    written = {key: value for table in toml.loads(text).values() for key, value in table.items()}
    assert set(written) == {
        "network_dim",
        "network_args",
        "cache_latents",
        "resolution",
        "save_model_as",
        "unet_lr",
        "lr_warmup_steps",
    }
    again, direct = read(str(path)), parse(argv, "flux", "network")
    different = {name for name in direct.values() if direct.value(name) != again.value(name)}
    assert different == {"huggingface_token", "wandb_api_key", "config_file"}


def test_output_config_never_replaces_a_file(config_file, capsys):
    from library.training import cli

    path = config_file("seed = 1")
    with pytest.raises(SystemExit) as caught:
        cli.main("flux", "network", ["--config_file", path, "--output_config"])
    assert caught.value.code == 2
    assert "would replace" in capsys.readouterr().err
    assert toml.load(path) == {"seed": 1}


def test_a_secret_on_the_command_line_is_warned_about_without_showing_it():
    parsed = parse_command(["--wandb_api_key", "k123"], "flux", "network")
    assert any("--wandb_api_key" in note.text for note in parsed.notes)
    assert not any("k123" in note.text for note in parsed.notes)


@pytest.mark.parametrize("argv", [["--use_safetensors"], ["--use-safetensors"]])
def test_an_option_of_old_guides_is_ignored_on_the_command_line(argv):
    (item,) = parse(argv, "flux", "network").ignored
    assert item.written == "--use_safetensors"


@pytest.mark.parametrize(
    "argv, name, value",
    [
        (["--t5xxl-max-token-length", "128"], "t5xxl_max_token_length", 128),
        (["--t5xxl-max-token-length=128"], "t5xxl_max_token_length", 128),
        (["--no-half-vae"], "no_half_vae", True), (["--cache-latents"], "cache_latents", True),
        (["--no-cache-latents"], "cache_latents", False),
        (["--save-last-n-epochs-state", "-1"], None, "--save_last_n_epochs_state is -1"),
    ],
)  # fmt: skip
def test_dashes_are_taken_for_underscores(argv, name, value):
    if name is not None:
        assert parse(argv, "flux", "network").value(name) == value
        return
    with pytest.raises(ConfigError, match=value):
        parse(argv, "flux", "network")


def test_programs_that_call_the_parser_may_write_dashes_too():
    from library.training import cli

    assert cli.build_parser("sd", "network").parse_args(["--max-token-length", "150"]).max_token_length == 150
