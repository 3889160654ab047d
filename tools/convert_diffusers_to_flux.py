"""The name by which older commands know `tools/convert_model.py SRC DST --to single` for FLUX.1."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv=None) -> int:
    from tools.model_tools.old_names import convert_diffusers_to_flux

    return convert_diffusers_to_flux(argv)


if __name__ == "__main__":
    sys.exit(main())
