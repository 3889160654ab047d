"""Choose the training size of every image of a metadata file and cache its latents.

    python finetune/prepare_buckets_latents.py images meta.json meta_sizes.json sd15.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.caption_tools import buckets

    return buckets.TOOL.parser()


def main(argv=None) -> int:
    from tools.caption_tools import buckets

    return buckets.main(argv)


if __name__ == "__main__":
    sys.exit(main())
