"""Names of library.train_util about options, optimizers and files: each can be imported, costs nothing before, works on
a namespace."""

import argparse
import hashlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from library import custom_train_functions, deepspeed_utils, train_util
from library.core.errors import ConfigError
from library.safetensors_utils import save_file_atomic
from library.training.metadata import MINIMUM, commit_hash


@pytest.mark.parametrize("name", sorted(train_util.__all__))
def test_a_name_leads_to_its_home(name):
    assert callable(getattr(train_util, name))


def test_importing_it_is_cheap_and_an_unknown_name_is_an_error():
    code = "import sys, library.train_util as t; assert 'torch' not in sys.modules; assert 'get_optimizer' in dir(t)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        exec("from library.train_util import no_such_name")


def test_names_of_files():
    options = SimpleNamespace(
        output_name="mine", save_every_n_epochs=1, save_last_n_epochs=2, save_every_n_steps=10, save_last_n_steps=30
    )
    assert train_util.get_epoch_ckpt_name(options, ".safetensors", 3) == "mine-000003.safetensors"
    assert train_util.get_step_ckpt_name(options, ".pt", 50) == "mine-step00000050.pt"
    assert train_util.get_last_ckpt_name(SimpleNamespace(output_name=None), ".ckpt") == "last.ckpt"
    assert train_util.get_remove_epoch_no(options, 3) == 1
    assert train_util.get_remove_step_no(options, 50) == 10
    assert train_util.get_remove_step_no(SimpleNamespace(save_last_n_steps=None), 50) is None


def test_optimizer_and_schedule_of_a_namespace():
    options = SimpleNamespace(
        optimizer_type="AdamW",
        learning_rate=0.1,
        optimizer_args=["weight_decay=0.5"],
        max_train_steps=10,
        lr_scheduler="linear",
        lr_warmup_steps=0,
        lr_scheduler_type=None,
    )
    parameter = torch.nn.Parameter(torch.ones(2))
    name, arguments, optimizer = train_util.get_optimizer(options, [parameter])
    assert name.endswith("AdamW") and arguments == "weight_decay=0.5"
    assert not train_util.is_schedulefree_optimizer(optimizer, options)
    train, evaluate = train_util.get_optimizer_train_eval_fn(optimizer, options)
    assert train() is None and evaluate() is None
    schedule = train_util.get_scheduler_fix(options, optimizer, num_processes=2)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[10] == pytest.approx(0.05)
        and schedule.get_last_lr()[0] == pytest.approx(0.0)
    )


def test_prompts_are_dictionaries(tmp_path):
    assert train_util.line_to_prompt_dict("a ball --w 64 --d 3") == {"prompt": "a ball", "width": 64, "seed": 3}
    path = tmp_path / "p.txt"
    path.write_text("a ball --s 4\n# not this\na cube\n")
    assert [p["prompt"] for p in train_util.load_prompts(str(path))] == ["a ball", "a cube"]


def test_types_and_recorded_options():
    options = SimpleNamespace(
        mixed_precision="bf16",
        save_precision=None,
        log_config=True,
        wandb_api_key="k",
        output_dir="/x",
        network_args=["a=1"],
    )
    assert train_util.prepare_dtype(options) == (torch.bfloat16, None)
    recorded = train_util.get_sanitized_config_or_none(options)
    assert recorded["network_args"] == "['a=1']" and not {"wandb_api_key", "output_dir"} & set(recorded)
    assert train_util.get_sanitized_config_or_none(SimpleNamespace(log_config=False)) is None


def parser_with_config():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config_file")
    for add in (
        train_util.add_sd_models_arguments,
        train_util.add_optimizer_arguments,
        train_util.add_training_arguments,
    ):
        add(parser)
    train_util.add_dataset_arguments(parser, True, True, True)
    return parser


def test_arguments_are_added_with_their_defaults():
    options = parser_with_config().parse_args(["--cache_latents"])
    assert (options.max_train_steps, options.caption_extension, options.cache_latents, options.lr_scheduler) == (
        1600,
        ".caption",
        True,
        "constant",
    )


def test_a_configuration_file_lies_below_the_command_line(tmp_path, monkeypatch):
    path = tmp_path / "c.toml"
    path.write_text(
        '[a]\nmax_train_steps = "20"\nlearning_rate = "1e-4"\ncache_latents = true\noptimizer_args = ["a=1"]\n'
    )
    monkeypatch.setattr(sys, "argv", ["x", "--config_file", str(path), "--learning_rate", "3e-4"])
    parser = parser_with_config()
    options = train_util.read_config_from_file(parser.parse_args(), parser)
    assert (options.max_train_steps, options.learning_rate, options.cache_latents, options.optimizer_args) == (
        20,
        3e-4,
        True,
        ["a=1"],
    )
    path.write_text("max_train_step = 20\n")
    with pytest.raises(ConfigError, match="did you mean 'max_train_steps'"):
        train_util.read_config_from_file(parser.parse_args(), parser)


def test_a_script_may_add_one_of_our_options_again_and_mean_its_own():
    parser = parser_with_config()
    parser.add_argument("--save_model_as", default="ckpt")
    assert parser.parse_args([]).save_model_as == "ckpt"


@pytest.mark.parametrize(
    ("add", "has", "lacks"),
    [
        (train_util.add_masked_loss_arguments, {"conditioning_data_dir", "masked_loss"}, {"resolution"}),
        (
            train_util.add_dit_training_arguments,
            {"blocks_to_swap", "weighting_scheme", "cache_text_encoder_outputs"},
            {"sdpa"},
        ),
        (train_util.add_sd_saving_arguments, {"save_model_as"}, {"output_dir"}),
        (
            custom_train_functions.add_custom_train_arguments,
            {"min_snr_gamma", "debiased_estimation_loss", "weighted_captions"},
            {"v2"},
        ),
        (deepspeed_utils.add_deepspeed_arguments, {"deepspeed", "zero_stage"}, set()),
        (
            lambda parser: train_util.add_dataset_arguments(parser, False, False, False),
            {"resolution"},
            {"reg_data_dir", "in_json", "caption_dropout_rate"},
        ),
    ],
)
def test_each_group_of_options_has_its_names(add, has, lacks):
    parser = argparse.ArgumentParser()
    add(parser)
    names = set(vars(parser.parse_args([])))
    assert has <= names and not lacks & names


def test_options_are_checked_together():
    options = SimpleNamespace(
        huber_c=-1.0, adaptive_noise_scale=0.1, noise_offset=None, cache_latents_to_disk=True, cache_latents=False
    )
    with pytest.raises(ConfigError) as raised:
        train_util.verify_training_args(options)
    assert "--huber_c is -1.0" in str(raised.value) and "--adaptive_noise_scale is set; it needs --noise_offset" in str(
        raised.value
    )
    options.huber_c, options.adaptive_noise_scale = 0.1, None
    train_util.verify_training_args(options)
    assert options.cache_latents is True


def test_paths_on_a_recorded_command_line_are_named(monkeypatch, caplog):
    monkeypatch.setattr(sys, "argv", ["x", "--output_dir=/private", "--train_data_dir", "images"])
    train_util.verify_command_line_training_args(
        SimpleNamespace(log_with="wandb", output_dir="/private", train_data_dir="images", vae="/v")
    )
    assert "with these paths: output_dir;" in caplog.text
    caplog.clear()
    train_util.verify_command_line_training_args(SimpleNamespace(log_with="tensorboard", output_dir="/private"))
    assert not caplog.text


def test_texts_become_sizes():
    options = SimpleNamespace(
        resolution="512,768", face_crop_aug_range="1.0,3.0", caption_extention=".cap", caption_extension=".txt"
    )
    train_util.prepare_dataset_args(options, True)
    assert (options.resolution, options.face_crop_aug_range, options.caption_extension) == (
        (512, 768),
        (1.0, 3.0),
        ".cap",
    )
    with pytest.raises(ConfigError, match="--resolution"):
        train_util.prepare_dataset_args(SimpleNamespace(resolution="big"), False)


def test_accelerator_and_its_states(tmp_path):
    options = SimpleNamespace(
        mixed_precision="no", gradient_accumulation_steps=2, logging_dir=None, output_dir=str(tmp_path),
        output_name="mine",
        save_every_n_epochs=1, save_last_n_epochs=1, save_every_n_steps=5, save_last_n_steps=5, resume=None,
    )
    accelerator = train_util.prepare_accelerator(options)
    assert accelerator.gradient_accumulation_steps == 2 and accelerator.mixed_precision == "no"
    train_util.patch_accelerator_for_fp16_training(accelerator)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    for epoch in (1, 2):
        train_util.save_and_remove_state_on_epoch_end(options, accelerator, epoch)
    for step in (5, 10, 15):
        train_util.save_and_remove_state_stepwise(options, accelerator, step)
    train_util.save_state_on_train_end(options, accelerator)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mine-000002-state", "mine-state", "mine-step00000010-state", "mine-step00000015-state",
    ]
    weights = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    train_util.resume_from_local_or_hf_if_specified(accelerator, options)
    assert not model.weight.any()
    options.resume = str(tmp_path / "mine-state")
    train_util.resume_from_local_or_hf_if_specified(accelerator, options)
    assert torch.equal(model.weight, weights)
    with pytest.raises(ConfigError, match="a state folder is needed"):
        train_util.resume_from_local_or_hf_if_specified(accelerator, SimpleNamespace(resume=str(tmp_path / "no")))


def test_deepspeed_is_refused_while_on_and_nothing_while_off():
    deepspeed_utils.prepare_deepspeed_args(SimpleNamespace(deepspeed=False))
    assert deepspeed_utils.prepare_deepspeed_plugin(SimpleNamespace(deepspeed=False)) is None
    for call in (
        deepspeed_utils.prepare_deepspeed_args,
        deepspeed_utils.prepare_deepspeed_plugin,
        train_util.prepare_accelerator,
    ):
        with pytest.raises(ConfigError, match="--deepspeed is on; it is not available here"):
            call(SimpleNamespace(deepspeed=True))
    with pytest.raises(ConfigError, match="accelerator.prepare"):
        deepspeed_utils.prepare_deepspeed_model(SimpleNamespace(deepspeed=True), unet=None)


def test_learning_rates_and_losses_are_logged_by_name():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [p], "lr": rate} for p, rate in zip(parameters, (0.5, 0.25))])
    schedule, logs = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0), {}
    train_util.append_lr_to_logs(logs, schedule, "SGD")
    assert logs == {"lr/unet": 0.5, "lr/text_encoder1": 0.25}
    optimizer.param_groups[1]["d"] = 2.0
    train_util.append_lr_to_logs_with_names(logs, schedule, "Prodigy", ["a", "b"])
    assert logs["lr/d*lr/b"] == 0.5
    recorder = train_util.LossRecorder()
    for step, loss in enumerate((1.0, 2.0, 3.0)):
        recorder.add(epoch=0, step=step, loss=loss)
    assert recorder.moving_average == 2.0
    recorder.add(epoch=1, step=0, loss=4.0)
    assert recorder.moving_average == 3.0 and recorder.loss_list == [4.0, 2.0, 3.0]


def test_minimum_metadata_and_the_commit(tmp_path):
    metadata = train_util.build_minimum_network_metadata(True, "sd_v2", "networks.lora", "4", "1", {"conv_dim": "2"})
    assert metadata["ss_network_args"] == '{"conv_dim": "2"}' and metadata["ss_base_model_version"] == "sd_v2"
    assert set(metadata) == set(MINIMUM)
    assert train_util.build_minimum_network_metadata(None, None, "m", "4", "1", None) == {
        "ss_network_module": "m", "ss_network_dim": "4", "ss_network_alpha": "1",
    }
    assert train_util.get_git_revision_hash() == (commit_hash() or "(unknown)")
    path = tmp_path / "a.safetensors"
    save_file_atomic({"x": torch.ones(2)}, path, {"k": "v"})
    assert train_util.load_metadata_from_safetensors(str(path)) == {"k": "v"}
    assert train_util.calculate_sha256(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
