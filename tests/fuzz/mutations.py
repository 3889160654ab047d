"""Random changes of inputs; every one is a function of its generator alone, so that a number names a case."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

TEXTS = (
    "", " ", "x", "true", "none", "null", "nan", "inf", "-inf", "-1", "0", "1", "1e-4", "1e400", "-1e400", "1.5", "2,3",
    "64,64", "64x64", "1e-4,", ",", "=",
    "a=b", "a=b=c", "a==", "[", "[]", "{}", "{\"a\": 1}", "[1, 2", "'", '"', "\\", "%s", "%(a)s", "{0}", "$HOME", "~",
    ".", "..", "/", "/dev/null", "\0", "\n", "\t",
    "é", "😀", "\ud800", "\u202e", "a b", "--x", "-", "--", "*", "?", "(", "(a+)+$", "99999999999999999999",
    "18446744073709551616", "1_000", "0x10", "١٢", "½",
    "x" * 300, "9" * 5000, "[" * 300, "1/0", "50%", "constant", "adamw", "adamw8bit", "bf16", "fp16", "float8",
    "cuda:9", "none.safetensors",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    *TEXTS, None, True, False, 0, 1, -1, 2, 3, 64, 10**6, -(10**6), 2**31, 2**63, 2**64, 10**30, 0.5, -0.5, 1e-30,
    1e308, float("nan"), float("inf"), [], [1], [64, 64],
    ["x"], [[]], [1, "x"], [None], {}, {"a": 1}, {"a": {"b": []}}, [1] * 50,
)  # fmt: skip
BYTES = (
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"{",
    b"}",
    b"[",
    b'"',
    b"-",
    b"9",
    b"\n",
    b"\xc3",
    b"\xed\xa0\x80",
)


def changed_bytes(content: bytes, draw: random.Random, most: int = 4) -> bytes:
    """A few bytes put in, left out, exchanged, cut or repeated; those at the start more often."""
    result = bytearray(content)
    for _ in range(draw.randint(1, most)):
        place = draw.randrange(len(result) + 1) if draw.random() < 0.5 else draw.randrange(min(len(result), 200) + 1)
        kind = draw.randrange(6)
        if kind == 0:
            result[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            result[place : place + draw.randint(1, 4)] = draw.choice(BYTES)
        elif kind == 2:
            del result[place : place + draw.choice((1, 2, 8, 100))]
        elif kind == 3:
            result[place:place] = draw.choice(BYTES) * draw.choice((1, 3, 50))
        elif kind == 4 and draw.random() < 0.4:
            del result[place:]
        else:
            other = draw.randrange(len(result) + 1)
            result[place:place] = result[other : other + draw.choice((1, 8, 60))]
    return bytes(result)


def changed_value(value: Any, draw: random.Random) -> Any:
    """A value like `value`, in which one place, at any depth, holds something else."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return draw.choice(VALUES)
    container, key = draw.choice(places)
    kind = draw.randrange(5)
    if kind == 0:
        container.pop(key)
    elif kind == 1 and isinstance(container, dict):
        container[draw.choice([*container, "x", "", "é"])] = container.pop(key)
    elif kind == 2:
        nested: Any = container[key]
        for _ in range(draw.choice((1, 2, 90, 300))):
            nested = [nested] if draw.random() < 0.5 else {"a": nested}
        container[key] = nested
    else:
        container[key] = copy.deepcopy(draw.choice(VALUES))
    return value


def _places(value: Any, depth: int = 0) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        if depth < 8:
            yield from _places(value[key], depth + 1)


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def as_toml(value: dict[str, Any]) -> str:
    """The tables of a configuration; what TOML cannot hold becomes a text of it."""

    def shown(part: Any) -> str:
        if isinstance(part, bool):
            return str(part).lower()
        if isinstance(part, float):
            return repr(part)
        if isinstance(part, int):
            return str(part) if abs(part) < 2**63 else json.dumps(str(part))
        if isinstance(part, list):
            return f"[{', '.join(map(shown, part))}]"
        if isinstance(part, dict):
            return f"{{{', '.join(f'{json.dumps(str(k))} = {shown(v)}' for k, v in part.items())}}}"
        return '""' if part is None else json.dumps(str(part))

    return "\n".join(f"{json.dumps(str(name))} = {shown(part)}" for name, part in value.items())


def changed_safetensors(content: bytes, draw: random.Random) -> bytes:
    """A file with another header (names, types, shapes, places, metadata) or other bytes."""
    if draw.random() < 0.2:
        return changed_bytes(content, draw)
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(draw.randint(1, 3)):
        header = _changed_header(header, draw) if draw.random() < 0.7 else changed_value(header, draw)
        if not isinstance(header, dict):
            break
    text = json.dumps(header).encode()
    if draw.random() < 0.3:
        data = data[: draw.randrange(len(data) + 1)]
    return struct.pack("<Q", len(text)) + text + data


def _changed_header(header: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Another but sound header: shapes, types and names that the file can have."""
    names = [
        name
        for name, entry in header.items()
        if name != "__metadata__" and isinstance(entry, dict) and isinstance(entry.get("shape"), list)
    ]
    if not names:
        return header
    header, name = copy.deepcopy(header), draw.choice(names)
    entry, kind = header[name], draw.randrange(6)
    shape = entry["shape"]
    if kind == 0:
        entry["shape"] = list(reversed(shape))
    elif kind == 1:
        entry["shape"] = [*shape, 1] if draw.random() < 0.5 else [1, *shape]
    elif kind == 2 and all(isinstance(side, int) for side in shape):
        count = 1
        for side in shape:
            count *= side
        entry["shape"] = [count]
    elif kind == 3:
        same_size = {
            "F32": ("I32", "U32"),
            "F16": ("BF16", "I16", "U16"),
            "BF16": ("F16", "I16"),
            "I64": ("F64", "U64", "C64"),
        }
        kinds = same_size.get(str(entry.get("dtype")), ())
        entry["dtype"] = draw.choice(kinds) if kinds else entry.get("dtype")
    elif kind == 4:
        parts = name.split(".")
        parts[draw.randrange(len(parts))] = draw.choice(
            (
                "",
                "x",
                "alpha",
                "lora_up",
                "lora_down",
                "weight",
                "lora_A",
                "dora_scale",
                "hada_w1_a",
                "lokr_w1",
                "oft_blocks",
            )
        )
        header = {(".".join(parts) if key == name else key): value for key, value in header.items()}
    else:
        metadata = header.setdefault("__metadata__", {})
        if isinstance(metadata, dict):
            key = draw.choice(("ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_network_module", "ss_base_model_version", "lora_adapter_metadata",
                               "modelspec.architecture", "modelspec.prediction_type", "atelier_conversion",
                               "model_config", "format"))  # fmt: skip
            metadata[key] = draw.choice([text for text in TEXTS if "\ud800" not in text])
    return header
