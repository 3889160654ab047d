"""Average Stable Diffusion or SDXL models, or any models with the same tensors.

    python tools/merge_models.py --models a.safetensors b.safetensors --ratios 0.7 0.3 --output merged.safetensors
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.model_tools import average

    return average.build_parser()


def main(argv=None) -> int:
    from tools.model_tools import average

    return average.main(argv)


if __name__ == "__main__":
    sys.exit(main())
