"""Enlarge pictures and videos by a network: ESRGAN files, and with the package spandrel SwinIR and others.

    python tools/upscaler.py --model RealESRGAN_x4plus.pth --input pictures --output large --scale 2
    python tools/upscaler.py --model RealESRGAN_x4plus.pth --input clip.mp4 --codec h265
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.frame_tools import upscale

    return upscale.TOOL.folder_tool.parser()


def main(argv=None) -> int:
    from tools.frame_tools import upscale

    return upscale.main(argv)


if __name__ == "__main__":
    sys.exit(main())
