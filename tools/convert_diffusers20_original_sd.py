"""The name by which older commands know `tools/convert_model.py` for Stable Diffusion 1 and 2."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv=None) -> int:
    from tools.model_tools.old_names import convert_diffusers20_original_sd

    return convert_diffusers20_original_sd(argv)


if __name__ == "__main__":
    sys.exit(main())
