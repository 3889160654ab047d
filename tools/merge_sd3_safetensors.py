"""Put the parts of Stable Diffusion 3 into one file.

    python tools/merge_sd3_safetensors.py --dit mmdit.safetensors --clip_l clip_l.safetensors --vae vae.safetensors --output sd3.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.model_tools import pack_sd3

    return pack_sd3.build_parser()


def main(argv=None) -> int:
    from tools.model_tools import pack_sd3

    return pack_sd3.main(argv)


if __name__ == "__main__":
    sys.exit(main())
