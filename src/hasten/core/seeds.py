"""Seeds derived from names, so that no generator's state has to be carried along.

    (run seed, "dropout", step, micro-batch) -> 63-bit seed

A seed that is a pure function of where training stands makes resuming exact: nothing about
random numbers is saved, and nothing is replayed.
"""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Returns a seed in [0, 2**63) that depends on all ``parts`` and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
