"""Make images with SDXL, with and without LoRAs."""

from library.generation import sdxl_inference


def setup_parser():
    return sdxl_inference.build_parser()


if __name__ == "__main__":
    sdxl_inference.main()
