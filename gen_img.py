"""Make images with Stable Diffusion 1, 2 and SDXL, with and without networks."""

from library.generation import unet_inference


def setup_parser():
    return unet_inference.build_parser()


if __name__ == "__main__":
    unet_inference.main()
