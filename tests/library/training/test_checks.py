"""Start-up checks: what is wrong is said before anything is loaded, and what is right passes."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch._inductor.exc import InvalidCxxCompiler

from library.core.options import Config
from library.training import checks, idle_options
from library.training.parser_common import script

CLASSES = script("flux", "network").classes


def config_of(**values):
    return Config.read(values, CLASSES)


def test_the_output_folder_is_needed_and_made_after_the_checks(tmp_path):
    assert checks.output_problems(config_of()) == [
        "--output_dir is not given; needed: the folder for the trained files"
    ]
    folder = tmp_path / "new" / "folder"
    assert checks.output_problems(config_of(output_dir=str(folder))) == []
    assert not folder.exists() and not folder.parent.exists()
    checks.make_output_folder(config_of(output_dir=str(folder)))
    assert folder.is_dir() and not list(folder.iterdir())
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert "cannot be written" in checks.output_problems(config_of(output_dir=str(place)))[0]


def test_the_prompt_file_is_read_at_start(tmp_path):
    missing = tmp_path / "none.txt"
    assert "there is no such file" in checks.sampling_problems(config_of(sample_prompts=str(missing)))[0]
    empty = tmp_path / "empty.txt"
    empty.write_text("# only a comment\n")
    assert checks.sampling_problems(config_of(sample_prompts=str(empty))) == []
    told = checks.warnings(config_of(sample_prompts=str(empty), sample_every_n_epochs=1))
    assert len(told) == 1 and "holds no prompt: no sample images" in told[0]
    good = tmp_path / "good.txt"
    good.write_text("a red ball --w 64 --h 64\n")
    assert checks.sampling_problems(config_of(sample_prompts=str(good))) == []


def state_folder(tmp_path, step):
    folder = tmp_path / "mine-state"
    folder.mkdir()
    (folder / "train_state.json").write_text(json.dumps({"current_epoch": 1, "current_step": step}))
    save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
    torch.save({}, folder / "optimizer.bin")
    return folder


def test_the_state_to_resume_from_is_whole_and_has_steps_left(tmp_path):
    assert "there is no such folder" in checks.resume_problems(config_of(resume=str(tmp_path / "none")))[0]
    assert "no train_state.json and no folder with one" in checks.resume_problems(config_of(resume=str(tmp_path)))[0]
    folder = state_folder(tmp_path, step=10)
    where = {"resume": str(folder), "output_dir": str(tmp_path / "out"), "output_name": "mine"}
    assert checks.resume_problems(config_of(**where, max_train_steps=11)) == []
    assert "no step is left" in checks.resume_problems(config_of(**where, max_train_steps=9))[0]
    assert checks.resume_problems(config_of(**where, max_train_steps=10)) == [], (
        "its file is missing and will be written"
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.safetensors").write_text("x")
    assert "no step is left" in checks.resume_problems(config_of(**where, max_train_steps=10))[0]
    (folder / "train_state.json").unlink()
    assert "train_state.json" in checks.resume_problems(config_of(**where))[0]
    (folder / "optimizer.bin").unlink()
    assert "train_state.json and optimizer.bin are missing" in checks.resume_problems(config_of(**where))[0]


def test_start_points_lie_before_the_end():
    assert "no step is left" in checks.resume_problems(config_of(initial_step=100, max_train_steps=100))[0]
    assert checks.resume_problems(config_of(initial_step=99, max_train_steps=100)) == []
    assert "no epoch is left" in checks.resume_problems(config_of(initial_epoch=4, max_train_epochs=3))[0]


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(checks.importlib.util, "find_spec", lambda name: None)
    problems = checks.logging_problems(config_of(log_with="all", logging_dir=str(tmp_path)))
    assert len(problems) == 2 and "tensorboard" in problems[0] and "pip install 'atelier[wandb]'" in problems[1]
    assert checks.logging_problems(config_of()) == []


def test_a_tracker_configuration_is_read_at_start(tmp_path):
    bad = tmp_path / "bad.toml"
    bad.write_text("x = ")
    assert "is not valid TOML" in checks.logging_problems(config_of(log_tracker_config=str(bad)))[0]


def test_a_repository_name_has_an_owner():
    assert "owner/name" in checks.hub_problems(config_of(huggingface_repo_id="name"))[0]
    assert checks.hub_problems(config_of(huggingface_repo_id="me/name")) == []


def test_a_backend_that_torch_lacks_is_refused():
    assert (
        "nvprims_nvfuser" in checks.compile_problems(config_of(torch_compile=True, dynamo_backend="nvprims_nvfuser"))[0]
    )
    assert checks.compile_problems(config_of(torch_compile=True, dynamo_backend="eager")) == []


def test_inductor_needs_a_compiler(monkeypatch):
    """Without one the run would end in its first step, with models loaded."""
    from torch._inductor import cpp_builder
    from torch.utils import _triton

    def told() -> list[str]:
        return checks.compile_problems(config_of(torch_compile=True))

    def without_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told() == []
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", without_compiler)
    assert "--dynamo_backend is inductor, which needs a C++ compiler" in told()[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_triton, "has_triton_package", lambda: False)
    assert "needs the package triton" in told()[0]


def test_blocks_with_draws_are_not_compiled_whole():
    """They would end the first step with a page about the compiler's own code."""

    def problems(network_args=(), **values):
        words = {"torch_compile": True, "dynamo_backend": "eager", "dynamo_fullgraph": True,
                 "network_module": "networks.lora", "network_args": list(network_args), **values}  # fmt: skip
        return checks.compile_problems(Config.read(words, CLASSES))

    assert problems() == problems(["rank_dropout=0"]) == problems(network_dropout=0.0) == []
    assert problems(network_dropout=0.1, dynamo_fullgraph=False) == []
    assert problems(network_dropout=0.1, network_module="lycoris.kohya") == []  # draws as torch does
    (told,) = problems(["module_dropout=0.2", "ggpo_sigma=0.03", "ggpo_beta=0.01"], network_dropout=0.1)
    named = "--network_dropout 0.1, --network_args module_dropout=0.2, --network_args ggpo_sigma=0.03"
    assert named in told and "leave --dynamo_fullgraph out" in told


@pytest.mark.parametrize(
    "values, words",
    [
        ({"max_train_steps": 10, "max_train_epochs": 2}, "replaces --max_train_steps"),
        ({"save_model_as": "pt"}, "no metadata"),
        ({"sample_every_n_steps": 5}, "no sample images are made: --sample_prompts"),
        ({"sample_at_first": True}, "no sample images are made: --sample_prompts"),
    ],
)
def test_options_that_do_something_else_are_warned_of(values, words):
    assert any(words in line for line in checks.warnings(config_of(**values)))


@pytest.mark.parametrize(
    "values, words",
    [
        ({"save_last_n_epochs": 2}, "--save_last_n_epochs: has no effect"),
        ({"save_last_n_steps_state": 2}, "--save_last_n_steps_state: has no effect"),
        (
            {"persistent_data_loader_workers": True, "max_data_loader_n_workers": 0},
            "--persistent_data_loader_workers: ",
        ),
        ({"validate_every_n_steps": 2}, "--validate_every_n_steps: has no effect without --validation_split"),
        (
            {"noise_offset_random_strength": True},
            "--noise_offset_random_strength: has no effect without --noise_offset",
        ),
        (
            {"ip_noise_gamma_random_strength": True},
            "--ip_noise_gamma_random_strength: has no effect without --ip_noise_gamma",
        ),
        (
            {"multires_noise_discount": 0.5},
            "--multires_noise_discount: has no effect without --multires_noise_iterations",
        ),
        ({"sample_prompts": "x.txt"}, "--sample_prompts: has no effect"),
        ({"keep_tokens": 1}, "--keep_tokens: has no effect without --shuffle_caption"),
        ({"validation_seed": 1}, "--validation_seed: has no effect without --validation_split"),
        ({"dataset_config": "x.toml", "in_json": "x.json"}, "--in_json: has no effect with --dataset_config"),
        ({"lr_scheduler_power": 2.0}, "--lr_scheduler_power: has no effect"),
        ({"sample_every_n_epochs": 999999}, "--sample_every_n_epochs: makes no sample images without --sample_prompts"),
        (
            {"cpu_offload_checkpointing": True},
            "--cpu_offload_checkpointing: has no effect without --gradient_checkpointing",
        ),
        ({"torch_compile": True, "dynamo_backend": "no"}, "--torch_compile: has no effect with --dynamo_backend no"),
        ({"dynamo_backend": "eager"}, "--dynamo_backend: has no effect without --torch_compile"),
        ({"dynamo_mode": "max-autotune"}, "--dynamo_mode: has no effect without --torch_compile"),
        ({"async_upload": True}, "--async_upload: has no effect without --huggingface_repo_id"),
        (
            {"huggingface_repo_visibility": "public"},
            "--huggingface_repo_visibility: has no effect without --huggingface_repo_id",
        ),
        ({"resume_from_huggingface": True}, "--resume_from_huggingface: has no effect without --resume"),
        ({"log_prefix": "a"}, "--log_prefix: has no effect without --logging_dir"),
    ],
)
def test_settings_of_features_that_are_off_are_ignored_and_an_error_under_strict(values, words):
    assert [words in str(item) for item in idle_options.ignored(config_of(**values))] == [True]
    assert checks.strict_problems(config_of(**values)) == []
    (problem,) = checks.strict_problems(config_of(**values, strict=True))
    assert words in problem and "--strict" in problem


def test_a_plain_run_has_no_warning():
    plain = config_of(save_every_n_epochs=1, save_last_n_epochs=2)
    assert checks.warnings(plain) == [] and idle_options.ignored(plain) == []


@pytest.mark.parametrize(
    "values, words",
    [
        ({"full_fp16": True, "mixed_precision": "bf16"}, "--full_fp16"),
        ({"full_bf16": True}, "--full_bf16"),
        ({"fp8_base": True}, "--fp8_base"),
        ({"blocks_to_swap": -1}, "--blocks_to_swap is -1"),
        ({"log_with": "tensorboard"}, "--logging_dir"),
        ({"output_name": "a/b"}, "--output_name"),
        ({"save_every_n_steps": -3}, "--save_every_n_steps is -3"),
        ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps is 0"),
    ],
)
def test_options_that_contradict_each_other_are_refused(values, words):
    from library.core.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        config_of(**values)
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0]
