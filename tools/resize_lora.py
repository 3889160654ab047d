"""Change the rank of an adapter file, or split a DyLoRA file into its ranks.

    python tools/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 8
    python tools/resize_lora.py --model lora.safetensors --save_to small.safetensors --new_rank 32 --dynamic_method sv_fro --dynamic_param 0.9
    python tools/resize_lora.py --model dylora.safetensors --save_to part.safetensors --split_unit 4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.lora_tools import resize

    return resize.build_parser()


def main(argv=None) -> int:
    from tools.lora_tools import resize

    return resize.main(argv)


if __name__ == "__main__":
    sys.exit(main())
