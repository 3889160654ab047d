"""Cut images around the faces of drawn people.

    python tools/detect_face_rotate.py --src_dir images --dst_dir faces --rotate --crop_size 512,512

Needs the package that finds the faces: pip install anime-face-detector
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.image_tools import faces

    return faces.TOOL.parser()


def main(argv=None) -> int:
    from tools.image_tools import faces

    return faces.main(argv)


if __name__ == "__main__":
    sys.exit(main())
