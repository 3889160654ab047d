"""Make the embedded tiny base (assets/tiny-flux) from nothing: draw captioned scenes, train its parts, write its files.

    python tools/pretrain_tiny_base.py --output_dir assets/tiny-flux --work_dir /tmp/tiny_base

Four stages, each kept in the work folder and not repeated: pictures, autoencoder, latents, denoiser with text encoders.
About an hour and a half on two cores, less with --compile. Sample grids are written to the work folder while it trains.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.core.options import add_options, option, read_options  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from library.flux_models import AutoEncoder
    from tools.tiny_base.denoiser_training import TextTokens, TinyBase

logger = logging.getLogger("pretrain_tiny_base")

PROMPTS = (
    "a large red circle on a blue background",
    "a small yellow star in the top left corner on a black background",
    "a green tree on a meadow",
    "a blue fish to the left of an orange mushroom on a white background",
    "a pink heart above a teal square on a gray background",
    "purple house, sunset background",
    "a big white moon at night",
    "a large orange face on a green and yellow striped background",
    "a red boat at the beach",
    "a black car at the bottom on a red to yellow gradient background",
    "a brown cup in the snow",
    "a large teal diamond on a pink and white checkered background",
    "a white flower below a yellow cloud on a purple background",
    "a tiny red cross on the right against an orange background",
    "a zorbit on a yellow background",
    "",
)


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """Making of the tiny base."""

    output_dir: str = option("assets/tiny-flux", help="folder of the finished model files")
    work_dir: str = option(
        "tiny_base_work", help="folder for sample grids and the results of the stages, which are not repeated"
    )
    num_pictures: int = option(12000, least=1, help="pictures that the autoencoder learns from")
    num_scenes: int = option(30000, least=1, help="captioned scenes that the denoiser learns from")
    denoiser_steps: int = option(3400, least=1, help="training steps of the denoiser")
    batch_size: int = option(128, least=1, help="scenes per step of the denoiser")
    compile: bool = option(False, help="compile the denoiser (needs a C++ compiler; a third quicker)")
    threads: int = option(2, least=1, help="CPU threads")
    seed: int = option(1, help="seed of all drawing and training")


def setup_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, PretrainOptions)
    return parser


def stage_pictures(opts: PretrainOptions, work: Path) -> Tensor:
    import torch

    from tools.tiny_base.autoencoder_training import draw_pictures

    path = work / "pictures.pt"
    if not path.exists():
        logger.info("drawing %d pictures", opts.num_pictures)
        torch.save(draw_pictures(opts.seed, opts.num_pictures), path)
    return torch.load(path, weights_only=True)


def stage_autoencoder(opts: PretrainOptions, work: Path) -> AutoEncoder:
    import torch

    from library.flux_models import AutoEncoder, AutoEncoderParams
    from tools.tiny_base.autoencoder_training import AutoencoderPlan, train_autoencoder

    model = AutoEncoder(AutoEncoderParams(ch=24, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=8))
    path = work / "autoencoder.pt"
    if not path.exists():
        train_autoencoder(model, stage_pictures(opts, work), AutoencoderPlan(), opts.seed)
        torch.save(model.state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def stage_latents(opts: PretrainOptions, work: Path) -> Tensor:
    """Packed, scaled latents of the scenes, [N, 16, 64]."""
    import random

    import numpy as np
    import torch

    from tools.tiny_base.autoencoder_training import encode_mean
    from tools.tiny_base.denoiser_training import pack, scale_latents
    from tools.tiny_base.scenes import draw_scene, render

    path = work / "latents.pt"
    if not path.exists():
        model = stage_autoencoder(opts, work)
        logger.info("drawing and encoding %d scenes", opts.num_scenes)
        rows = []
        for start in range(0, opts.num_scenes, 1000):
            indices = range(start, min(start + 1000, opts.num_scenes))
            images = np.stack([np.asarray(render(draw_scene(opts.seed, i), random.Random(i))) for i in indices])
            rows.append(pack(scale_latents(encode_mean(model, torch.from_numpy(images).permute(0, 3, 1, 2)))))
        torch.save(torch.cat(rows), path)
    return torch.load(path, weights_only=True)


def tokenize(captions: list[str], folder: Path) -> TextTokens:
    """Ids of captions through the project's own tokenizer loaders, padded to the lengths of training."""
    import torch

    from library.components.tokenizers import load_clip_tokenizer, load_t5_tokenizer
    from tools.tiny_base.denoiser_training import T5_LENGTH, TextTokens
    from tools.tiny_base.vocabulary import CLIP_LENGTH

    cache = str(folder / "tokenizers")
    ids = [
        tokenizer(captions, padding="max_length", truncation=True, max_length=length).input_ids
        for tokenizer,
        length in ((load_clip_tokenizer(cache_dir=cache), CLIP_LENGTH), (load_t5_tokenizer(cache_dir=cache), T5_LENGTH))
    ]
    return TextTokens(*(torch.tensor(rows) for rows in ids))


def write_tokenizers(folder: Path) -> None:
    from tools.tiny_base.vocabulary import write_clip_tokenizer, write_t5_tokenizer

    write_clip_tokenizer(folder / "tokenizers" / "openai_clip-vit-large-patch14")
    write_t5_tokenizer(folder / "tokenizers" / "google_t5-v1_1-xxl")


def new_base() -> TinyBase:
    from tools.tiny_base.denoiser_training import TinyBase
    from tools.tiny_base.vocabulary import clip_vocabulary, t5_pieces

    return TinyBase(len(clip_vocabulary()[0]), len(t5_pieces()))


def write_grid(base: TinyBase, autoencoder: AutoEncoder, tokens: TextTokens, path: Path) -> None:
    """Samples of PROMPTS as one picture; the last row of tokens is the empty prompt."""
    import torch

    from library.generation.image_grid import GridCell, image_grid
    from tools.tiny_base.denoiser_training import generate

    latents = generate(base, tokens, tokens.rows(torch.tensor([len(PROMPTS) - 1])), range(len(PROMPTS)))
    with torch.no_grad():
        pictures = autoencoder.decoder(latents).clamp(-1, 1)
    cells = [GridCell(to_image(picture), prompt) for picture, prompt in zip(pictures, PROMPTS)]
    image_grid(cells, columns=4).save(path)


def to_image(picture: Tensor) -> Any:
    """[3, H, W] in -1..1 as a PIL image."""
    from PIL import Image

    return Image.fromarray(((picture.permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())


def stage_denoiser(opts: PretrainOptions, work: Path) -> TinyBase:
    import torch

    from tools.tiny_base.denoiser_training import DenoiserPlan, captions_of, train_denoiser

    base, path = new_base(), work / "base.pt"
    if not path.exists():
        latents, autoencoder = stage_latents(opts, work), stage_autoencoder(opts, work)
        prompts = tokenize(list(PROMPTS), work)
        logger.info("tokenizing captions")
        tokens = tokenize(captions_of(opts.seed, len(latents)), work)

        def report(step: int, average: TinyBase) -> None:
            write_grid(average, autoencoder, prompts, work / f"samples-{step:06d}.png")
            torch.save(average.state_dict(), work / "base-partial.pt")

        if opts.compile:
            base.denoiser.compile(dynamic=False)
        plan = DenoiserPlan(steps=opts.denoiser_steps, batch_size=opts.batch_size)
        torch.save(train_denoiser(base, latents, tokens, plan, opts.seed, report).state_dict(), path)
    base.load_state_dict(torch.load(path, weights_only=True))
    return base.eval()


def export(base: TinyBase, autoencoder: AutoEncoder, folder: Path) -> None:
    """The four model files in half precision, each with its `model_config`, and the tokenizers."""
    import json
    from dataclasses import asdict

    import torch

    from library.safetensors_utils import save_file_atomic
    from tools.tiny_base.vocabulary import sentencepiece_model, t5_pieces

    def write(name: str, state: dict[str, Tensor], config: dict[str, Any]) -> None:
        halves = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
        save_file_atomic(
            halves, folder / name, {"model_config": json.dumps(config, sort_keys=True), "title": f"tiny-flux {name}"}
        )

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizers(folder)
    write("flux1-tiny.safetensors", base.denoiser.state_dict(), asdict(base.denoiser.params))
    write("ae.safetensors", autoencoder.state_dict(), asdict(autoencoder.params))
    clip = {
        key: value
        for key, value in base.clip.state_dict().items()
        if key.startswith("text_model.") and "position_ids" not in key
    }
    write("clip_l.safetensors", clip, base.clip_config)
    t5 = {key: value for key, value in base.t5.state_dict().items() if key != "encoder.embed_tokens.weight"}
    t5["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model(t5_pieces())), dtype=torch.uint8)
    write("t5xxl.safetensors", t5, base.t5_config)


def main(argv: list[str] | None = None) -> None:
    opts = read_options(vars(setup_parser().parse_args(argv)), PretrainOptions)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    import torch

    torch.set_num_threads(opts.threads)
    torch.manual_seed(opts.seed)
    work = Path(opts.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    write_tokenizers(work)
    autoencoder = stage_autoencoder(opts, work)
    export(stage_denoiser(opts, work), autoencoder, Path(opts.output_dir))
    logger.info("written to %s", opts.output_dir)


if __name__ == "__main__":
    main()
