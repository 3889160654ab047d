"""Make images with HunyuanImage 2.1, with and without LoRAs."""

from library.generation import hunyuan_image_inference


def setup_parser():
    return hunyuan_image_inference.build_parser()


if __name__ == "__main__":
    hunyuan_image_inference.main()
