"""Named random streams: one root seed, one independent generator per path of names.

Seeds are derived by hashing, never by `seed + i`: with sums, seeds 0 and 1 share all but one of their streams.
"""

import hashlib

import torch


def derived_seed(seed: int, *path: str | int) -> int:
    """63-bit seed of the stream named `path` under the root `seed`."""
    name = "/".join([str(int(seed)), *(str(part) for part in path)])
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *path: str | int) -> torch.Generator:
    """CPU generator of the stream named `path`; numbers are drawn on the CPU so that they agree on every device."""
    return torch.Generator().manual_seed(derived_seed(seed, *path))


def rademacher(size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` independent signs, -1 or +1 with equal probability, as int8."""
    return torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
