"""Fill the latent cache of a data set: the VAE's latents of every image, in files beside the images.

    python tools/cache_latents.py --family flux --ae ae.safetensors --dataset_config data.toml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.training import cache_tools  # noqa: E402


def setup_parser():
    return cache_tools.build_parser("latents")


if __name__ == "__main__":
    cache_tools.main("latents")
