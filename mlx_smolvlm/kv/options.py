"""How keys and values of tokens are kept, and which of them from one prompt to the next."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlx_smolvlm.config import TextConfig
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.kv.bounded import RECENT, SINKS, BoundedKVCache
from mlx_smolvlm.kv.cache import FLOAT_STORAGE, KVCache, PackedStorage, Storage

PREFIX_BYTES = 256 * 1024**2
FOLDER_BYTES = 4 * 1024**3
LEAST_TOKENS = 2 * (SINKS + RECENT)


@dataclass(frozen=True)
class CacheOptions:
    """How keys and values of tokens are kept, and which of them from one prompt to the next.

    Attributes:
        memory_bytes: Of keys and values of prompts that were asked; 0 keeps none. A
            conversation keeps its own besides.
        folder: Where to keep them on disk, for later runs; None does not.
        folder_bytes: At most so much there; what was not used for longest goes first.
        kv_bits: Their precision, 8 or 4; None keeps them as they are computed.
        kv_group_size: Numbers that share a scale, 32 or 64, if `kv_bits` is given.
        max_kv_tokens: The most tokens that an answer or a conversation holds. The first
            message, pictures and videos stay, and of the rest the latest tokens; the others
            are forgotten. None keeps all.

    Raises:
        ValueError: A value outside its range, or `folder` together with one of the last three.
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
        if self.max_kv_tokens is not None and self.max_kv_tokens < LEAST_TOKENS:
            raise ValueError(
                f"max_kv_tokens is {self.max_kv_tokens!r}; it must be {LEAST_TOKENS} or above"
            )
        if self.folder is not None and not self.is_plain:
            raise ValueError(
                "folder holds keys and values of all tokens as they are computed; it goes with "
                "neither kv_bits nor max_kv_tokens"
            )

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are kept as they are computed, and all of them."""
        return self.kv_bits is None and self.max_kv_tokens is None

    def check(self, config: TextConfig) -> None:
        """Refuse a model that these options do not suit.

        Raises:
            CheckpointError: Its heads do not divide into groups.
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
        storage: Storage = FLOAT_STORAGE
        if self.kv_bits is not None:
            storage = PackedStorage(self.kv_bits, self.kv_group_size)
        if self.max_kv_tokens is None:
            return KVCache(num_layers, storage)
        return BoundedKVCache(num_layers, self.max_kv_tokens, storage)


DEFAULT_OPTIONS = CacheOptions()
