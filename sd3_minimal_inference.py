"""Make images with Stable Diffusion 3 and 3.5, with and without LoRAs."""

from library.generation import sd3_inference


def setup_parser():
    return sd3_inference.build_parser()


if __name__ == "__main__":
    sd3_inference.main()
