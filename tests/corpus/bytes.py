"""Mutations of any file's bytes."""

from __future__ import annotations

import random
from collections.abc import Callable

Mutation = Callable[[bytes, random.Random], bytes]


def truncated(content: bytes, rng: random.Random) -> bytes:
    """The beginning."""
    return content[: rng.randrange(1, len(content))]


def barely(content: bytes, rng: random.Random) -> bytes:
    """All but the last bytes."""
    return content[: -rng.randrange(1, min(16, len(content)))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Some bits the other way."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 4, 32))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zeroed(content: bytes, rng: random.Random) -> bytes:
    """A hole of zeros."""
    start = rng.randrange(len(content))
    length = min(rng.randrange(1, 1 + len(content) // 4), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def repeated(content: bytes, rng: random.Random) -> bytes:
    """A piece twice."""
    start = rng.randrange(len(content))
    return content[:start] + content[start : start + 100] + content[start:]


def cut(content: bytes, rng: random.Random) -> bytes:
    """A piece left out."""
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randrange(1, 60) :]


def headless(content: bytes, rng: random.Random) -> bytes:
    """Without its first bytes."""
    return content[rng.randrange(1, 12) :]


def head_damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes of 255 in the header, where sizes and counts are."""
    start, length = rng.randrange(2, 40), rng.choice((1, 2, 4))
    return content[:start] + b"\xff" * length + content[start + length :]


def tail(content: bytes, rng: random.Random) -> bytes:
    """Noise after the end."""
    return content + rng.randbytes(500)


ALL: dict[str, Mutation] = {
    "truncated": truncated,
    "barely-truncated": barely,
    "flipped": flipped,
    "zeroed": zeroed,
    "repeated": repeated,
    "cut": cut,
    "headless": headless,
    "head-damaged": head_damaged,
    "tail": tail,
}


def composed(names: tuple[str, ...], content: bytes, rng: random.Random) -> bytes:
    """These mutations, one after the other."""
    for name in names:
        content = ALL[name](content, rng)
    return content
