"""Fill the text encoder cache of a data set: the text encoders' outputs of every caption, in files beside the images.

    python tools/cache_text_encoder_outputs.py --family flux --clip_l clip_l.safetensors --t5xxl t5xxl.safetensors \
        --t5xxl_max_token_length 512 --dataset_config data.toml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from library.training import cache_tools  # noqa: E402


def setup_parser():
    return cache_tools.build_parser("text")


if __name__ == "__main__":
    cache_tools.main("text")
