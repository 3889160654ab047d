"""Merge adapters into a model, or several adapters into one file.

    python tools/merge_lora.py --model model.safetensors --models a.safetensors b.safetensors --ratios 0.8 0.5 --save_to merged.safetensors
    python tools/merge_lora.py --models a.safetensors b.safetensors --ratios 0.8 0.5 --save_to both.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import merge

    return merge.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import merge

    return merge.main(argv)


if __name__ == "__main__":
    sys.exit(main())
