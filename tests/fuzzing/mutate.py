"""Damage: to bytes, and to trees of JSON."""

import json
import math
import struct

# Texts that have been trouble for somebody.
TEXTS = [
    *(
        "",
        " ",
        "\n",
        "\0",
        "a",
        "a\nb\x1b[2J",
        "\ufeff",
        "ﬁ",
        "e\u0301",
        "\U0001d573",
        "日本語",
        "\u2028",
    ),
    *("\ud800", "\udfff\ud800", "\u202e", "<|im_end|>", "</s>", "Ġ", "▁", "<0x41>", "{{ x }}"),
    *("../../etc/passwd", "/etc/passwd", "a" * 3000, "é" * 500, " " * 500, "Ⅷ" * 40, "🏳️‍🌈" * 20),
]
NUMBERS = [
    *(0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1),
    *(2**64, -(2**31), -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-300, 1e300),
    *(math.nan, math.inf, -math.inf),
]
_FIELDS = ("<B", "<H", "<I", "<Q")


def odd(rng):
    """A value that is not what was expected."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([None, True, False])
    if kind in (1, 2):
        return rng.choice(NUMBERS)
    if kind in (3, 4):
        return rng.choice(TEXTS)
    nested = rng.choice([[], {}, "x"])
    for _ in range(rng.choice([1, 2, 300])):
        nested = rng.choice([[nested], {rng.choice(["a", "type", "content"]): nested}])
    return nested


def damaged(rng, data, head=None):
    """Bytes with one to four kinds of damage, most of it within the first `head`."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        end = len(data) if head is None or rng.random() < 0.1 else min(head, len(data))
        at = rng.randrange(end + 1) if end else 0
        match rng.randrange(9):
            case 0 | 1 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 2 if at < len(data):
                data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
            case 3 | 4:
                code = rng.choice(_FIELDS)
                bits = 8 * struct.calcsize(code)
                value = rng.choice(
                    [0, 1, 2**bits - 1, 2 ** (bits - 1), 2 ** (bits // 2), len(data)]
                )
                field = struct.pack(code, value % 2**bits)
                data[at : at + len(field)] = field
            case 5:
                del data[at:]
            case 6:
                del data[at : at + rng.choice([1, 4, 8, 100])]
            case 7:
                source = rng.randrange(len(data) + 1)
                data[at:at] = data[source : source + rng.choice([1, 8, 64, 1000])]
            case 8:
                data[at : at + rng.choice([1, 4, 16])] = bytes(
                    [rng.choice([0, 0xFF, rng.randrange(256)])] * rng.choice([1, 4, 16])
                )
    return bytes(data)


def mutated(rng, tree):
    """A copy of a tree of JSON with one to three places changed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.randint(1, 3)):
        tree = _mutated_once(rng, tree, tree)
    return tree


def _mutated_once(rng, node, root):
    if not isinstance(node, dict | list) or not node or rng.random() < 0.12:
        return odd(rng)
    keys = list(node) if isinstance(node, dict) else range(len(node))
    key = rng.choice(keys)
    match rng.randrange(12):
        case 0:
            del node[key]
        case 1:
            node[key] = odd(rng)
        case 2 if isinstance(node, dict):
            node[rng.choice([*TEXTS, *map(str, root)])] = node.pop(key)
        case 2 | 3:
            node[key] = json.loads(json.dumps(node[rng.choice(keys)]))
        case _:
            node[key] = _mutated_once(rng, node[key], root)
    return node


def json_bytes(rng, tree):
    """A tree as text, sometimes with what no tree can have."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.8)
    match rng.randrange(40):
        case 0:
            depth = rng.choice([900, 100_000])
            text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
        case 1:
            text = '{"a": ' * 100_000
        case 2:  # every key twice
            text = text[:-1] + ", " + text[1:]
        case 3:
            text = text[: rng.randrange(len(text) + 1)]
        case 4:
            text = text.replace(rng.choice(["1", "true", '"']), "9" * 5000, 1)
        case 5:
            return damaged(rng, text.encode("utf-8", "surrogatepass"))
        case 6:
            return text.encode("utf-16", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")
