"""Trainers of video models as classes to derive from, and what is imported from their scripts."""

from __future__ import annotations

import importlib
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import hv_train_network as hv
from library.core.errors import ConfigError
from tests.runs.conftest import read_parts
from tests.runs.families import FamilyWork, Tinies


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> FamilyWork:
    return Tinies(tmp_path_factory).work("hunyuan_video", tmp_path_factory.mktemp("hv"))


def tensors(path: Path) -> bytes:
    return read_parts(path)[1]


def train(work: FamilyWork, trainer, out: str, *more: str) -> Path:
    parser = hv.hv_setup_parser(hv.setup_parser_common())
    trainer.train(parser.parse_args([*work.argv(out, "--max_train_steps=2"), *more]))
    return work.folder / out / "lora.safetensors"


def test_a_trainer_gives_the_bytes_of_the_script(work):
    """A plain one, and one whose methods all do what they did, read with the parser that is put together from parts."""
    called = []

    def passing(name):
        def method(self, *args, **kwargs):
            called.append(name)
            return getattr(hv.HunyuanVideoNetworkTrainer, name)(self, *args, **kwargs)

        return method

    names = (
        "handle_model_specific_args", "load_vae", "load_transformer", "scale_shift_latents", "process_batch", "call_dit",
        "get_noisy_model_input_and_timesteps", "compute_loss", "on_train_start", "on_post_optimizer_step", "on_post_save",
    )
    plain = tensors(work.train("script", "--max_train_steps=2"))
    assert tensors(train(work, hv.NetworkTrainer(), "plain")) == plain
    mine = type("Mine", (hv.HunyuanVideoNetworkTrainer,), {name: passing(name) for name in names})
    assert tensors(train(work, mine(), "mine")) == plain and set(called) == set(names)


@pytest.mark.parametrize(
    ("family", "script", "name"),
    [("wan", "wan", "WanNetworkTrainer"), ("framepack", "fpack", "FramePackNetworkTrainer")],
)
def test_the_others_give_the_bytes_of_theirs(family, script, name, tmp_path_factory, tmp_path):
    made, module = Tinies(tmp_path_factory).work(family, tmp_path), importlib.import_module(f"{script}_train_network")
    parser = getattr(module, f"{script}_setup_parser")(hv.setup_parser_common())
    getattr(module, name)().train(parser.parse_args([*made.argv("mine"), "--max_train_steps=1"]))
    plain = made.train("script", "--max_train_steps=1")
    assert tensors(tmp_path / "mine" / "lora.safetensors") == tensors(plain)


def test_what_a_trainer_changes_counts(work):
    class Mine(hv.HunyuanVideoNetworkTrainer):
        def handle_model_specific_args(self, args):
            args.learning_rate = 0.5
            self._i2v_training = True

        def load_transformer(self, accelerator, args, dit_path, attn_mode, split_attn, loading_device, dit_weight_dtype):
            seen.update(path=dit_path, mode=attn_mode, split=split_attn, device=str(loading_device), dtype=dit_weight_dtype)
            return super().load_transformer(
                accelerator, args, dit_path, attn_mode, split_attn, loading_device, dit_weight_dtype
            )

    seen: dict = {}
    trainer = Mine()
    path = train(work, trainer, "changed")
    assert read_parts(path)[0]["ss_learning_rate"] == "0.5" and trainer.i2v_training and not trainer.control_training
    assert (trainer.architecture, trainer.architecture_full_name) == ("hv", "hunyuan_video")
    assert seen["mode"] == "torch" and not seen["split"] and seen["dtype"] == torch.float32 and Path(seen["path"]).exists()


def test_methods_without_a_place_are_told(work):
    methods = {"do_inference": lambda self: None, "convert_weight_keys": lambda self: None}
    with pytest.raises(ConfigError) as error:
        train(work, type("Mine", (hv.HunyuanVideoNetworkTrainer,), methods)(), "never")
    assert len(error.value.problems) == 2 and "Mine.do_inference is never called here" in str(error.value)


def test_functions_of_noise_levels():
    """Sigmas of the nearest whole timestep, with five dimensions; weights by hand: sigma^-2, 2 / (pi (1 - 2s + 2s^2))."""
    times = torch.tensor([1.0, 250.4, 1001.0])
    sigmas = hv.get_sigmas(None, times, torch.device("cpu"), n_dim=5)
    assert sigmas.shape == (3, 1, 1, 1, 1) and sigmas.flatten().tolist() == pytest.approx([0.001, 0.25, 1.0])
    weigh = hv.compute_loss_weighting_for_sd3
    assert weigh("none", None, times, torch.device("cpu"), torch.float32) is None
    found = weigh("sigma_sqrt", None, times, torch.device("cpu"), torch.float32).flatten().tolist()
    assert found == pytest.approx([1e6, 16.0, 1.0], rel=1e-5)
    cosmap = weigh("cosmap", None, times, torch.device("cpu"), torch.float32).flatten().tolist()
    assert cosmap[1:] == pytest.approx([1.0185916, 0.6366198], rel=1e-5)
    torch.manual_seed(3)
    drawn = hv.compute_density_for_timestep_sampling("logit_normal", 50_000, 0.5, 1.0, 1.29)
    assert drawn.median().item() == pytest.approx(0.6225, abs=0.01)


def test_functions_of_samples_and_batches(tmp_path):
    due = [
        hv.should_sample_images(Namespace(**options), steps, epoch)
        for options, steps, epoch in (
            ({"sample_at_first": True}, 0, None), ({"sample_every_n_steps": 3}, 6, None),
            ({"sample_every_n_steps": 3}, 7, None), ({"sample_every_n_epochs": 2}, 9, 4),
            ({"sample_every_n_epochs": 2}, 9, None),
        )
    ]  # fmt: skip
    assert due == [True, True, False, True, False]
    prompt = hv.line_to_prompt_dict("a cat --w 512 --f 25 --fs 7.0 --l 6 --n a dog")
    assert (prompt["frame_count"], prompt["discrete_flow_shift"], prompt["cfg_scale"]) == (25, 7.0, 6.0)
    (tmp_path / "prompts.txt").write_text("a cat --f 9\na dog\n", encoding="utf-8")
    assert [entry["enum"] for entry in hv.load_prompts(str(tmp_path / "prompts.txt"))] == [0, 1]
    told = []
    dataset = Namespace(set_current_epoch=told.append)
    assert hv.collator_class(Namespace(value=4), dataset)(["batch"]) == "batch" and told == [4]


def test_a_parser_of_two_parts_has_the_options_of_the_script():
    parts, whole = hv.hv_setup_parser(hv.setup_parser_common()), hv.setup_parser()
    assert vars(parts.parse_args([])) == vars(whole.parse_args([]))
