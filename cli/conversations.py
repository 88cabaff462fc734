"""Conversations that are kept in the cache, so that `chat --continue` goes on with the last one.

Each is a file as `/save` writes it, but without keys and values, and a small one that says which
model it belongs to. It is written after every answer, also one that a closed terminal stops, so
only `kill -9` loses something: the answer that was being given. A program never writes over what
another one has written: two that go on with one conversation end up with a file each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.cli.output import describe_os_error, say
from mlx_smolvlm.config import DEMO_FOLDER
from mlx_smolvlm.errors import CheckpointError, PromptError
from mlx_smolvlm.files import (
    locate_cache,
    lock,
    make_private_folder,
    read_file,
    remove_leftovers,
    write_file,
)

if TYPE_CHECKING:
    from mlx_smolvlm import Conversation, SmolVLM
    from mlx_smolvlm.cli.args import ChatOptions
    from mlx_smolvlm.prompt.messages import Message

HISTORY_VARIABLE = "MLX_SMOLVLM_HISTORY"  # if it is empty, nothing of a conversation is kept
MAX_FILES, MAX_BYTES = 10, 512 * 1024**2  # of conversations; the newest one always stays
LOCK_S = 3.0  # writing a conversation takes less
NOTICE_S = 1.0
SUFFIX, _MAX_OWNER = ".chat", 1 << 16


@dataclass(frozen=True)
class Owner:
    """Which model a conversation belongs to: a checkpoint's folder or "demo", and an adapter's."""

    model: str
    adapter: str | None = None


@dataclass(frozen=True)
class KeptConversation:
    """The file of a conversation, its model, and which version of the file it is."""

    path: Path
    owner: Owner
    version: tuple[int, int] | None = None  # see `_read_version`

    def choose_model(self, options: ChatOptions) -> ChatOptions:
        """Return options that load its model, unless they name one themselves.

        Raises:
            CheckpointError: The folder of the model or of its adapter was removed.
        """
        from mlx_smolvlm.convert.hub import DEMO

        if options.model is not None:
            return options
        adapter = None if self.owner.adapter is None else Path(self.owner.adapter)
        for kind, folder in (("model", Path(self.owner.model)), ("adapter", adapter)):
            if folder not in (None, Path(DEMO)) and not folder.is_dir():
                raise CheckpointError(
                    f"the {kind} of the last conversation is gone: {folder}; mlx-smolvlm chat "
                    "begins another conversation"
                )
        return replace(options, model=self.owner.model, adapter=options.adapter or adapter)


def find_folder() -> Path:
    """Return the folder of the conversations, which may not exist."""
    return locate_cache() / "conversations"


def is_keeping() -> bool:
    """Return whether conversations are kept."""
    return os.environ.get(HISTORY_VARIABLE) != ""


def find_last_conversation() -> KeptConversation:
    """Return the conversation with the latest answer.

    Raises:
        PromptError: None is kept.
    """
    if not is_keeping():
        raise PromptError(f"${HISTORY_VARIABLE} is empty, so no conversation is kept")
    for path in _list_conversations(find_folder()):
        version = _read_version(path)
        try:
            values = json.loads(read_file(_owner_path(path), _MAX_OWNER, own_only=True))
            model, adapter = values["model"], values["adapter"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(model, str) and isinstance(adapter, str | None):
            return KeptConversation(path, Owner(model, adapter), version)
    raise PromptError("there is no conversation to go on with; mlx-smolvlm chat begins one")


def resume_conversation(
    vlm: SmolVLM, options: ChatOptions, kept: KeptConversation | None
) -> Conversation:
    """Return the conversation that `kept` holds, or a new one, with the options of the command.

    Raises:
        CheckpointError: It belongs to another model, or its file is damaged.
    """
    conversation = vlm.chat(
        system=options.system,
        sampling=options.sampling,
        detail=options.detail,
        on_full=options.on_full,
    )
    if kept is None:
        return conversation
    owner = describe_owner(vlm)
    if owner != kept.owner:
        with_adapter = f" --adapter {kept.owner.adapter}" if kept.owner.adapter else ""
        raise CheckpointError(
            f"the last conversation was held with -m {kept.owner.model}{with_adapter}; leave out "
            "--model and --adapter to go on with it"
        )
    try:
        conversation.load(kept.path)
    except CheckpointError as error:  # such as a model that was converted again
        raise CheckpointError(f"{error}; mlx-smolvlm chat begins another conversation") from None
    if options.system is not None:
        conversation.system = options.system
    return conversation


def describe_owner(vlm: SmolVLM) -> Owner:
    """Return what says which model `vlm` is."""
    from mlx_smolvlm.convert.hub import DEMO

    adapter = None if vlm.adapter is None else str(vlm.adapter.resolve())
    return Owner(DEMO if vlm.path == DEMO_FOLDER else str(vlm.path.resolve()), adapter)


class Keeper:
    """Keeps a conversation in a file of its own.

    Args:
        vlm: Its model.
        kept: The conversation that goes on, in the same file; None for a new one.
        messages: Those that the file of `kept` has; None if they have changed since.
    """

    def __init__(
        self,
        vlm: SmolVLM,
        kept: KeptConversation | None = None,
        messages: list[Message] | None = None,
    ) -> None:
        self._vlm, self._path = vlm, None if kept is None else kept.path
        self._version = None if kept is None else kept.version
        self._messages = messages  # those in the file
        self._is_on = is_keeping()

    @property
    def has_file(self) -> bool:
        """Whether there is something to go on with."""
        return self._path is not None and self._path.exists()

    def start_new(self) -> None:
        """Leave the file as it is, and use another one from now on."""
        self._path = self._messages = None

    def keep(self, conversation: Conversation) -> None:
        """Write the conversation if it has changed; if that fails, say so once, and stop.

        The file of one whose questions were all removed is removed too.
        """
        messages = conversation.messages
        if not self._is_on or messages == self._messages:
            return
        try:
            if any(message["role"] == "user" for message in messages):
                self._write(conversation)
            elif self._path is not None:
                self._remove()
            self._messages = messages
        except Exception as error:  # it must not end the session
            self._is_on = False
            text = describe_os_error(error) if isinstance(error, OSError) else str(error)
            say(f"this conversation is not kept for --continue: {text}", dim=True)

    def _write(self, conversation: Conversation) -> None:
        folder = find_folder()
        make_private_folder(folder)
        self._read_digest()  # before the lock, since it may take seconds
        with _lock_folder(folder):
            if self._path is None or self._is_foreign(self._path):
                stamp = time.strftime("%Y-%m-%d-%H%M%S")
                self._path = folder / f"{stamp}-{secrets.token_hex(3)}{SUFFIX}"
            if not _owner_path(self._path).exists():
                owner = json.dumps(dataclasses.asdict(describe_owner(self._vlm)))
                write_file(_owner_path(self._path), owner, mode=0o600, follow_links=False)
            conversation.save(self._path, with_cache=False)
            self._version = _read_version(self._path)
            remove_leftovers(folder)
            _remove_old(folder, self._path)

    def _read_digest(self) -> None:
        """Compute the digest of the checkpoint; say so if that takes long, as the first time."""
        text = "reading the model's files, once, to recognize it with --continue"
        timer = threading.Timer(NOTICE_S, say, [text], {"dim": True})
        timer.start()
        try:
            _ = self._vlm.engine.checkpoint_digest
        finally:
            timer.cancel()

    def _remove(self) -> None:
        """Remove the file, unless another program has written it since."""
        assert self._path is not None
        with _lock_folder(find_folder()):
            if not self._is_foreign(self._path):
                _remove(self._path)

    def _is_foreign(self, path: Path) -> bool:
        """Return whether another program has written the file since this one read or wrote it."""
        return _read_version(path) not in (None, self._version)


def _read_version(path: Path) -> tuple[int, int] | None:
    """Return what changes whenever the file is written; None if it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Let other programs that write conversations wait, where the disk has locks.

    After `LOCK_S`, this one goes on without the lock: the program that has it may be suspended.
    """
    end = time.monotonic() + LOCK_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.callback(os.close, lock(folder))
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.05)
                    continue
            except OSError:
                pass
            break
        yield


def _owner_path(path: Path) -> Path:
    """Return the file that holds the `Owner` of the conversation at `path`."""
    return path.with_suffix(".json")


def _list_conversations(folder: Path) -> list[Path]:
    """Return the files of conversations in `folder`, the one written last first."""
    with_times = []
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            with_times.append((path.stat().st_mtime_ns, path))
        except OSError:  # removed by another process
            continue
    return [path for _, path in sorted(with_times, reverse=True)]


def _remove_old(folder: Path, newest: Path) -> None:
    """Remove the oldest conversations but `newest`, so that they are few and small enough."""
    total = newest.stat().st_size
    others = [path for path in _list_conversations(folder) if path != newest]
    for number, path in enumerate(others, 1):
        with contextlib.suppress(OSError):  # removed by the user
            total += path.stat().st_size
        if number >= MAX_FILES or total > MAX_BYTES:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a conversation."""
    path.unlink(missing_ok=True)
    _owner_path(path).unlink(missing_ok=True)
