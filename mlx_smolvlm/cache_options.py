"""How much memory the tokens of an answer may take, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_smolvlm.bounded import RECENT, SINKS, BoundedKVCache
from mlx_smolvlm.cache import KVCache
from mlx_smolvlm.config import TextConfig
from mlx_smolvlm.errors import CheckpointError
from mlx_smolvlm.storage import FLOAT, PackedStorage, Storage

LEAST_TOKENS = 2 * (SINKS + RECENT)


@dataclass(frozen=True)
class CacheOptions:
    """Keys and values of the tokens: their precision, and how many are kept.

    Args:
        kv_bits: 8 or 4; None keeps them as they are computed.
        kv_group_size: Numbers that share a scale, 32 or 64, if `kv_bits` is given.
        max_kv_tokens: The most tokens to keep. The first message and what there is up to the
            last picture or video stay, then the latest tokens; the others are forgotten.
            None keeps all.

    Raises:
        ValueError: A value is out of range.
    """

    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.kv_bits not in (None, 4, 8):
            raise ValueError(f"kv_bits is {self.kv_bits}, and must be 4, 8 or None")
        if self.kv_group_size not in (32, 64):
            raise ValueError(f"kv_group_size is {self.kv_group_size}, and must be 32 or 64")
        if self.max_kv_tokens is not None and self.max_kv_tokens < LEAST_TOKENS:
            raise ValueError(
                f"max_kv_tokens is {self.max_kv_tokens}, and must be {LEAST_TOKENS} or more"
            )

    def check(self, config: TextConfig) -> None:
        """Refuse a model that these options do not suit.

        Raises:
            CheckpointError: Its heads do not divide into groups.
        """
        if self.kv_bits is not None and config.head_dim % self.kv_group_size:
            raise CheckpointError(
                f"this model's heads are {config.head_dim} numbers wide, which do not divide into "
                f"groups of {self.kv_group_size}; "
                + ("use kv_group_size 32" if config.head_dim % 32 == 0 else "leave kv_bits out")
            )

    def make(self, num_layers: int) -> KVCache:
        """An empty cache for a decoder of `num_layers`."""
        storage: Storage = FLOAT
        if self.kv_bits is not None:
            storage = PackedStorage(self.kv_bits, self.kv_group_size)
        if self.max_kv_tokens is None:
            return KVCache(num_layers, storage)
        return BoundedKVCache(num_layers, self.max_kv_tokens, storage)


FULL = CacheOptions()
