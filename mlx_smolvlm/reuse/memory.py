"""Work that need not be done again: keys and values of a prompt's beginning, encoded media."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from mlx_smolvlm.config import Config
from mlx_smolvlm.kv.options import CacheOptions
from mlx_smolvlm.media.encode import Medium
from mlx_smolvlm.reuse.content import CachedState, Content

if TYPE_CHECKING:
    from mlx_smolvlm.reuse.disk import DiskStore

FEATURE_BYTES = 64 * 1024**2


def make_memory(
    options: CacheOptions, checkpoint: Path, config: Config, adapter: Path | None = None
) -> Memory:
    """The memory of the model that was loaded from the folder `checkpoint`, with an adapter or not.

    Raises:
        CheckpointError: The folder for the cache cannot be used.
    """
    if options.folder is None:
        return Memory(options)
    from mlx_smolvlm.reuse.disk import DiskStore

    store = DiskStore(Path(options.folder), options.folder_bytes, checkpoint, config, adapter)
    return Memory(options, store)


class Memory:
    """What one loaded model remembers of its prompts, within bounds."""

    def __init__(self, options: CacheOptions, store: DiskStore | None = None) -> None:
        self._options, self._store = options, store
        self._states: list[CachedState] = []  # the one used last is at the end
        self._features: OrderedDict[str, mx.array] = OrderedDict()
        # Reentrant: a stream that nobody closed remembers its state whenever it is collected.
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Forget what is held in memory."""
        with self._lock:
            self._states.clear()
            self._features.clear()

    def find_state(
        self, content: Content, pins: np.ndarray, own: CachedState | None
    ) -> tuple[CachedState | None, int]:
        """The state that begins as `content` does for longest, and for how many tokens.

        At least one token of `content` is left to be done. `own`, a conversation's, is given
        back itself, others as forks. A bounded cache is to pin `pins`.
        """
        with self._lock:
            most = len(content.ids) - 1
            best, length = own, 0 if own is None else own.count_reusable(content, pins, most)
            for state in reversed(self._states):
                found = state.count_reusable(content, pins, most)
                if found > length:
                    best, length = state, found
            stored = self._store and self._store.find(content, most, length)
            if stored:
                best, length = (
                    stored,
                    stored.content.count_common(content, min(most, stored.num_tokens)),
                )
            elif best is not None and best is not own:
                self._states.sort(key=lambda state: state is best)
                best = best.fork()
            return (best, length) if length else (None, 0)

    def keep_state(self, state: CachedState, prompt: Content, is_own: bool) -> None:
        """Keep `state` after an answer to `prompt`; a conversation keeps its own itself."""
        with self._lock:
            if self._store is not None:
                self._store.save(state, prompt)
            limit = self._options.memory_bytes
            if is_own or state.cache.nbytes > limit:
                return
            self._states = [
                old
                for old in self._states
                if old.content.count_common(state.content, old.num_tokens) < old.num_tokens
            ]
            self._states.append(state)
            while sum(one.cache.nbytes for one in self._states) > limit:
                del self._states[0]

    def fill_features(self, media: Sequence[Medium]) -> None:
        """Give `media` the embeddings of equal ones that were encoded before."""
        with self._lock:
            for medium in media:
                if medium.image_embeds is None and medium.digest in self._features:
                    self._features.move_to_end(medium.digest)
                    medium.image_embeds = self._features[medium.digest]

    def keep_features(self, media: Sequence[Medium]) -> None:
        """Keep the embeddings of `media`."""
        with self._lock:
            for medium in media:
                if medium.image_embeds is not None:
                    self._features[medium.digest] = medium.image_embeds
                    self._features.move_to_end(medium.digest)
            while sum(one.nbytes for one in self._features.values()) > FEATURE_BYTES:
                self._features.popitem(last=False)
