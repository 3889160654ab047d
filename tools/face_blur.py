"""Blur the faces of pictures and videos.

    python tools/face_blur.py --model face_detection_yunet_2023mar.onnx --input pictures --output blurred
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.frame_tools import face_blur

    return face_blur.TOOL.folder_tool.parser()


def main(argv=None) -> int:
    from tools.frame_tools import face_blur

    return face_blur.main(argv)


if __name__ == "__main__":
    sys.exit(main())
