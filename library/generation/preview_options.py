"""What scripts of flow models are asked about pictures of the steps in between. Without torch."""

from __future__ import annotations

from dataclasses import dataclass

from library.core.errors import ConfigError
from library.core.options import option


@dataclass(frozen=True, kw_only=True)
class PreviewOptions:
    """Previews"""

    preview_latent_every: int | None = option(
        None, metavar="N", help="after every N steps (models that make clips in sections: sections) write what is made"
        " so far as latent_preview.png, or .mp4 of a clip, into the output folder, over the one before; 0 = never",
    )  # fmt: skip
    preview_vae: str | None = option(
        None, metavar="FILE", help="tiny autoencoder for the previews: TAESD for pictures, TAEHV for"
        " families of clips; without it a coarse picture is computed from the latents",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.preview_latent_every is not None and self.preview_latent_every < 0:
            raise ConfigError(f"--preview_latent_every is {self.preview_latent_every}; needed: 0 (never) or more")

    def notices(self) -> list[str]:
        """Lines for the log."""
        if self.preview_latent_every:
            return [
                "previews show the model's estimate of the clean latents, x - sigma v (known tools subtract the noise"
                " of the start, so that colours drift)"
            ]
        if self.preview_vae is not None:
            return ["--preview_vae has no effect without --preview_latent_every"]
        return []
