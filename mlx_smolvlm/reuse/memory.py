"""Memory of finished work: keys and values of earlier prompts, and embeddings of media."""

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
    """The memory of a model loaded from the folder `checkpoint`.

    Args:
        options: Sizes, and the folder on disk if there is one.
        checkpoint: Folder of the checkpoint.
        config: Its configuration.
        adapter: Folder of its LoRA adapter, or None.

    Raises:
        CheckpointError: The folder for the cache cannot be used.
    """
    if options.folder is None:
        return Memory(options)
    from mlx_smolvlm.reuse.disk import DiskStore

    store = DiskStore(Path(options.folder), options.folder_bytes, checkpoint, config, adapter)
    return Memory(options, store)


class Memory:
    """Cached states and embeddings of one loaded model, limited in size; safe for threads."""

    def __init__(self, options: CacheOptions, store: DiskStore | None = None) -> None:
        self._options, self._store = options, store
        self._states: list[CachedState] = []  # least recently used first
        self._features: OrderedDict[str, mx.array] = OrderedDict()
        # Reentrant: garbage collection may close a stream, which keeps its state, at any time.
        self._lock = threading.RLock()

    def clear(self) -> None:
        """Remove everything from memory; files on disk stay."""
        with self._lock:
            self._states.clear()
            self._features.clear()

    @property
    def nbytes(self) -> int:
        """Size of all states and embeddings in memory."""
        with self._lock:
            states = sum(one.cache.nbytes for one in self._states)
            return states + sum(one.nbytes for one in self._features.values())

    def shrink(self, most: int) -> None:
        """Drop states, the least recently used first, then embeddings, down to `most` bytes."""
        with self._lock:
            while self._states and self.nbytes > most:
                del self._states[0]
            while self._features and self.nbytes > most:
                self._features.popitem(last=False)

    def find_state(
        self, content: Content, pins: np.ndarray, own: CachedState | None
    ) -> tuple[CachedState | None, int]:
        """Find the cached state with the longest common prefix.

        Args:
            content: The content of the prompt. Its last token is never taken from a state, so
                that there is one to run.
            pins: Positions that a bounded cache must pin.
            own: The state of the conversation, or None.

        Returns:
            The state and the length of the prefix in tokens; (None, 0) if there is none. `own`
            itself is returned, any other state as a fork.
        """
        with self._lock:
            most = len(content.ids) - 1
            best, length = own, 0 if own is None else own.count_reusable(content, pins, most)
            for state in reversed(self._states):
                reusable = state.count_reusable(content, pins, most)
                if reusable > length:
                    best, length = state, reusable
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
        """Keep `state` after an answer to `prompt`.

        A state that `is_own` is only written to disk, since its conversation keeps it in memory.
        """
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
        """Set the embeddings of those `media` of which equal ones were encoded before."""
        with self._lock:
            for medium in media:
                if medium.image_embeds is None and medium.digest in self._features:
                    self._features.move_to_end(medium.digest)
                    medium.image_embeds = self._features[medium.digest]

    def keep_features(self, media: Sequence[Medium]) -> None:
        """Keep the embeddings of `media`, and drop the least recently used ones over the limit."""
        with self._lock:
            for medium in media:
                if medium.image_embeds is not None:
                    self._features[medium.digest] = medium.image_embeds
                    self._features.move_to_end(medium.digest)
            while sum(one.nbytes for one in self._features.values()) > FEATURE_BYTES:
                self._features.popitem(last=False)
