"""Make videos with FramePack and FramePack-F1, with and without LoRAs."""

from library.generation import framepack_inference


def setup_parser():
    return framepack_inference.build_parser()


if __name__ == "__main__":
    framepack_inference.main()
