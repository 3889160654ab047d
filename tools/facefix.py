"""Face restoration, which is refused: docs/frame_tools.md tells why, and what to use instead."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def setup_parser():
    from tools.frame_tools import face_restoration

    return face_restoration.build_parser()


def main(argv=None) -> int:
    from tools.frame_tools import face_restoration

    return face_restoration.main(argv)


if __name__ == "__main__":
    sys.exit(main())
