"""Options for storing keys and values and for reusing them in later prompts."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlx_smolvlm.config import TextConfig
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.kv.bounded import RECENT, SINKS, BoundedKVCache
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, KVCache, PackedStorage, Storage

PREFIX_BYTES = 256 * 1024**2
FOLDER_BYTES = 4 * 1024**3
MIN_TOKENS = 2 * (SINKS + RECENT)


@dataclass(frozen=True)
class CacheOptions:
    """How keys and values are stored, and how many are kept for later prompts.

    Attributes:
        memory_bytes: Most bytes of memory for keys and values of earlier prompts; 0 keeps
            none. A conversation keeps its own in addition.
        folder: Folder to store them in for later runs; None stores none on disk.
        folder_bytes: Most bytes in that folder; the least recently used files are removed.
        kv_bits: Bits per stored number, 8 or 4; None stores numbers as they are computed.
        kv_group_size: Numbers that share a scale, 32 or 64, if `kv_bits` is given.
        max_kv_tokens: Most tokens that attention keeps. The first message, pictures and
            videos stay, then the latest tokens; others are dropped. None keeps all.

    Raises:
        ValueError: A value is out of range, or `folder` is combined with `kv_bits` or
            `max_kv_tokens`.
    """

    memory_bytes: int = PREFIX_BYTES
    folder: str | os.PathLike[str] | None = None
    folder_bytes: int = FOLDER_BYTES
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "folder_bytes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be 0 or above")
        if self.kv_bits not in (None, 4, 8):
            raise ValueError(f"kv_bits is {self.kv_bits!r}; it must be 4 or 8")
        if self.kv_group_size not in (32, 64):
            raise ValueError(f"kv_group_size is {self.kv_group_size!r}; it must be 32 or 64")
        if self.max_kv_tokens is not None and self.max_kv_tokens < MIN_TOKENS:
            raise ValueError(
                f"max_kv_tokens is {self.max_kv_tokens!r}; it must be {MIN_TOKENS} or above"
            )
        if self.folder is not None and not self.is_plain:
            raise ValueError(
                "folder holds keys and values of all tokens as they are computed; it goes with "
                "neither kv_bits nor max_kv_tokens"
            )

    @property
    def is_plain(self) -> bool:
        """Whether all keys and values are kept, as they are computed."""
        return self.kv_bits is None and self.max_kv_tokens is None

    def check(self, config: TextConfig) -> None:
        """Check that the options suit a model.

        Raises:
            CheckpointError: `head_dim` is no multiple of the group size.
        """
        width = config.head_dim
        if self.kv_bits is not None and width % self.kv_group_size:
            advice = "leave kv_bits out" if width % 32 else "use a kv_group_size of 32"
            raise CheckpointError(
                f"the heads of this model are {width} wide, which is no multiple of the "
                f"kv_group_size {self.kv_group_size}; {advice}"
            )

    def make_cache(self, num_layers: int) -> KVCache:
        """An empty cache for a decoder of `num_layers`."""
        if self.max_kv_tokens is None:
            return KVCache(num_layers, self.make_storage())
        return BoundedKVCache(num_layers, self.max_kv_tokens, self.make_storage())

    def make_storage(self) -> Storage:
        """How the numbers of a cache are stored."""
        if self.kv_bits is None:
            return FLOAT_STORAGE
        return PackedStorage(self.kv_bits, self.kv_group_size)


DEFAULT_OPTIONS = CacheOptions()
