"""The name by which older commands know `tools/convert_lora.py` for FLUX: --src and --dst are ai-toolkit or
sd-scripts."""

import sys
from pathlib import Path


def main(argv=None) -> int:
    from tools.lora_tools.old_names import convert_flux_lora

    return convert_flux_lora(argv)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose modules have names of their own
    sys.exit(main())
