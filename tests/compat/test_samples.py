"""Samples in a loop of one's own are those that a run makes of the same models."""

import importlib

import numpy as np
import pytest
from PIL import Image

import hunyuan_image_train_network
from library import (
    flux_train_utils,
    flux_utils,
    hunyuan_image_models,
    hunyuan_image_utils,
    hunyuan_image_vae,
    lumina_train_util,
    lumina_util,
    model_util,
    sd3_train_utils,
    sd3_utils,
    sdxl_model_util,
    sdxl_train_util,
    train_util,
)
from library.components.control_nets import control_nets_of
from library.core.errors import ConfigError
from library.training.hooks.sample import encode_sample_prompts
from tests.runs.families import Tinies

CALLS = {
    "sd": ("train_network", train_util),
    "sdxl": ("sdxl_train_network", sdxl_train_util),
    "flux": ("flux_train_network", flux_train_utils),
    "sd3": ("sd3_train_network", sd3_train_utils),
    "lumina": ("lumina_train_network", lumina_train_util),
    "hunyuan_image": ("hunyuan_image_train_network", hunyuan_image_train_network),
}


def pictures(folder):
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("lora_*_0[01]_*.png"))]


@pytest.mark.parametrize("family", CALLS)
def test_the_pictures_of_a_run(family, tmp_path, tmp_path_factory):
    work = Tinies(tmp_path_factory).work(family, tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat --w 64 --h 64 --s 2 --d 1\na dog --w 64 --h 64 --s 2 --d 2\n")
    sampling = [f"--sample_prompts={prompts}", "--sample_at_first", "--max_train_steps=1"]
    work.train("run", *sampling)
    script, known = CALLS[family]
    args = importlib.import_module(script).setup_parser().parse_args(work.argv("mine", *sampling))
    accelerator = train_util.prepare_accelerator(args)
    model = args.pretrained_model_name_or_path
    if family == "sd3":
        encoders = [load(getattr(args, name), None, "cpu") for name, load in sd3_utils.ENCODER_LOADERS.items()]
        models = [sd3_utils.load_sd3(model, None, "cpu"), sd3_utils.load_vae(model, None, "cpu"), encoders, None]

        def call(epoch, step):
            known.sample_images(accelerator, args, epoch, step, *models)
    elif family == "lumina":
        encoder = lumina_util.load_gemma2(args.gemma2, None, "cpu")
        models = [lumina_util.load_lumina_model(model, None, "cpu"), lumina_util.load_ae(args.ae, None, "cpu"), encoder]

        def call(epoch, step):
            known.sample_images(accelerator, args, epoch, step, *models, None)
    elif family == "hunyuan_image":
        encoders = hunyuan_image_utils.load_encoders(args.text_encoder, args.byt5, None, "cpu")
        dit = hunyuan_image_models.load_hunyuan_image_model("cpu", model, "torch", False, "cpu", None)
        models = [dit, hunyuan_image_vae.load_vae(args.vae, "cpu"), encoders, None]

        def call(epoch, step):
            known.sample_images(accelerator, args, epoch, step, *models)
    elif family == "flux":
        encoders = [flux_utils.load_clip_l(args.clip_l, None, "cpu"), flux_utils.load_t5xxl(args.t5xxl, None, "cpu")]
        models = [
            flux_utils.load_flow_model(model, None, "cpu")[1],
            flux_utils.load_ae(args.ae, None, "cpu"),
            encoders,
            None,
        ]

        def call(epoch, step):
            known.sample_images(accelerator, args, epoch, step, *models)
    else:
        if family == "sd":
            text_encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, model)
        else:
            first, second, vae, unet, *_ = sdxl_model_util.load_models_from_sdxl_checkpoint("sdxl", model, "cpu")
            text_encoder = [first, second]

        def call(epoch, step):
            known.sample_images(accelerator, args, epoch, step, accelerator.device, vae, None, text_encoder, unet)

    call(None, 3)
    call(1, 3)
    assert not (tmp_path / "mine").exists()
    call(0, 0)
    made, own = pictures(tmp_path / "mine" / "sample"), pictures(tmp_path / "run" / "sample")
    assert len(made) == len(own) == 2 and not np.array_equal(*made)
    assert all(np.array_equal(picture, other) for picture, other in zip(made, own))


def test_outputs_of_text_encoders_may_be_given(tmp_path, tmp_path_factory):
    from library.compat.namespace import config_of
    from library.core.registry import import_target
    from library.families.registry import record_of
    from library.training.sampling_prompts import load_prompts

    work = Tinies(tmp_path_factory).work("flux", tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red CAT --w 64 --h 64 --s 2 --d 1\n")
    argv = work.argv("mine", f"--sample_prompts={prompts}", "--sample_every_n_steps=2")
    args = importlib.import_module("flux_train_network").setup_parser().parse_args(argv)
    family = import_target(record_of("flux").family)(config_of(args, "flux", "network"))
    encoders = [flux_utils.load_clip_l(args.clip_l, None, "cpu"), flux_utils.load_t5xxl(args.t5xxl, None, "cpu")]
    strategies = family.strategies()
    parsed = load_prompts(str(prompts))
    texts = encode_sample_prompts(family, strategies, encoders, parsed)
    outputs = {text.replace("CAT", "cat"): strategies.layout.listed(made) for text, made in texts.items()}
    accelerator = train_util.prepare_accelerator(args)
    denoiser, ae = (
        flux_utils.load_flow_model(args.pretrained_model_name_or_path, None, "cpu")[1],
        flux_utils.load_ae(args.ae, None, "cpu"),
    )
    flux_train_utils.sample_images(
        accelerator, args, None, 2, denoiser, ae, [None, None], outputs, prompt_replacement=("CAT", "cat")
    )
    assert len(pictures(tmp_path / "mine" / "sample")) == 1


def test_prompts_are_dictionaries():
    assert train_util.line_to_prompt_dict("a ball --w 64 --d 3") == {"prompt": "a ball", "width": 64, "seed": 3}


def test_a_control_net_follows_the_picture_of_its_prompt(tmp_path, tmp_path_factory):
    """As in the run that trained it, from whose files it is read."""
    from tests.runs.test_control_nets import work_of

    work = work_of(Tinies(tmp_path_factory), "sd1", tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 2 --d 1 --cn {work.control / '01.png'}\na cat --w 64 --h 64 --s 2 --d 1\n")
    sampling = [f"--sample_prompts={prompts}", "--sample_every_n_steps=2", "--max_train_steps=2", "--save_precision=float"]
    file = work.train("run", *sampling)
    args = importlib.import_module("train_control_net").setup_parser().parse_args(work.argv("mine", *sampling))
    args.network_module = None
    accelerator = train_util.prepare_accelerator(args)
    encoder, vae, unet = model_util.load_models_from_stable_diffusion_checkpoint(False, args.pretrained_model_name_or_path)
    net = control_nets_of("sd").load(file, unet.params, None, "cpu")
    train_util.sample_images(accelerator, args, None, 2, "cpu", vae, None, encoder, unet, controlnet=net)
    made, own = pictures(tmp_path / "mine" / "sample"), pictures(tmp_path / "run" / "sample")
    assert len(made) == len(own) == 2 and not np.array_equal(*made)
    assert all(np.array_equal(picture, other) for picture, other in zip(made, own))


def test_a_family_without_control_nets_refuses_one():
    with pytest.raises(ConfigError, match="leave controlnet out"):
        lumina_train_util.sample_images(*[None] * 9, controlnet=object())
