"""Names of layers that Tencent's Hunyuan models alone have, by which their adapters are recognised."""

from __future__ import annotations

_OF_SIDES = ("mlp_fc", "mlp.fc", "mod_linear", "mod.linear", "attn_q_norm", "attn_k_norm")

STREAM_PARTS = (
    "modulation_linear", "modulation.linear", ".img_attn_", ".txt_attn_",
    *(f"{side}_{part}" for side in ("img", "txt") for part in _OF_SIDES),
)  # fmt: skip
