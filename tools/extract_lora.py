"""Make an adapter of the difference between two models.

    python tools/extract_lora.py --model_org base.safetensors --model_tuned tuned.safetensors --save_to lora.safetensors --dim 32 --conv_dim 16
    python tools/extract_lora.py --model_org base --model_tuned tuned --save_to diff.safetensors --kind full
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import extract

    return extract.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import extract

    return extract.main(argv)


if __name__ == "__main__":
    sys.exit(main())
