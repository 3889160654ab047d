"""List tensors of a model, or write them in other number formats, chosen by parts of their names.

    python tools/model_utility.py --input model.safetensors --full_target_keys attn
    python tools/model_utility.py --input model.safetensors --output_path mixed.safetensors --dtype fp16 --dtype_exclude_keys norm bias modulation
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.model_tools import utility

    return utility.build_parser()


def main(argv=None) -> int:
    from tools.model_tools import utility

    return utility.main(argv)


if __name__ == "__main__":
    sys.exit(main())
