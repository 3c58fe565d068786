"""Random numbers that depend on a seed and a name, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def named_generator(seed: int, name: str) -> torch.Generator:
    """Return a CPU generator seeded by ``hash(seed, name)``: the same on every machine and in any order."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
