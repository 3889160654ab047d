"""Enlarge images to twice their size by a network that sharpens their latents.

    python tools/latent_upscaler.py --vae_path sd15.safetensors --weights upscaler.safetensors --image_pattern "images/*.png" --output_dir big

gen_img.py enlarges between the two stages of --highres_fix_scale with it: --highres_fix_upscaler tools.latent_upscaler
--highres_fix_upscaler_args "weights=upscaler.safetensors"
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.image_tools import upscale

    return upscale.TOOL.parser()


def create_upscaler(*, weights: str):
    """The object that gen_img.py asks for: `upscale(vae, images, latents, dtype, width, height, batch_size,
    vae_batch_size)`."""
    from library.components.latent_upscaler_utils import load_upscaler

    return load_upscaler(weights)


def main(argv=None) -> int:
    from tools.image_tools import upscale

    return upscale.main(argv)


if __name__ == "__main__":
    sys.exit(main())
