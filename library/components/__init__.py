"""Parts that several families share: U-Net, autoencoders, text encoders, tokenizers."""
