"""Make images with SDXL, with and without networks: gen_img.py with --sdxl."""

from library.generation import unet_inference


def setup_parser():
    return unet_inference.build_parser(sdxl=True)


if __name__ == "__main__":
    unet_inference.main(sdxl=True)
