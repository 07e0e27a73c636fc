"""Adapters on disk: those named at the start, a watched folder, and what may be loaded over HTTP."""

import asyncio
import contextlib
import os
from pathlib import Path

from textlora.core.errors import (
    AdapterError,
    TextloraError,
    UnavailableError,
    UnknownAdapterError,
    UsageError,
)
from textlora.core.predictions import NAME
from textlora.server.http_errors import Refusal, refusal
from textlora.server.keys import Key
from textlora.server.log import log
from textlora.server.service import Service

FILES = ("textlora.json", "adapter_model.safetensors", "adapter_config.json")
Signature = tuple[tuple[int, int, int], ...]


class Folders:
    """Keeps the bank of a service in step with the disk."""

    def __init__(self, service: Service):
        self.service, self.bank = service, service.bank
        settings = service.settings
        self.watched = Path(settings.adapter_dir).resolve() if settings.adapter_dir else None
        self.roots = [Path(root).resolve() for root in settings.load_from]
        for root in [*self.roots, *([self.watched] if self.watched else [])]:
            if not root.is_dir():
                raise UsageError(f"{root}: no such folder")
        self._seen: dict[str, Signature] = {}  # what was found in the watched folder, refused ones included
        self._ours: set[str] = set()  # and is registered
        self._running = False  # what is there at the start is not news

    def open_all(self) -> None:
        """Register what the settings name. Raises UsageError and AdapterError; in the watched folder bad ones
        are logged instead."""
        for name, path in self.service.settings.named_adapters().items():
            self.bank.add(path, name)
        self.look()
        self._running = True
        default = self.service.settings.default_adapter
        if default is not None and default not in self.bank:
            raise UsageError(f"--default-adapter {default}: no such adapter")

    async def watch(self) -> None:
        """Look at the watched folder again and again."""
        while self.watched is not None:
            await asyncio.sleep(self.service.settings.poll_seconds)
            try:
                await self.service.in_loader(self.look)
            except OSError as error:
                log("watch_failed", reason=error.strerror or type(error).__name__)

    def look(self) -> None:
        """Register new folders, take up replaced ones when they are whole, forget deleted ones."""
        if self.watched is None:
            return
        found = {
            name: signature
            for name in os.listdir(self.watched)
            if NAME.fullmatch(name) and (signature := _signature(f"{self.watched}/{name}"))
        }
        for name in [name for name in self._seen if name not in found]:
            del self._seen[name]
            if name in self._ours:
                self._ours.discard(name)
                self._forget(name)
        for name, signature in sorted(found.items()):
            if self._seen.get(name) == signature:
                continue
            folder, self._seen[name] = self.watched / name, signature
            again = name in self._ours
            if again and name not in self.bank:  # unloaded over HTTP
                again = False
            try:
                if not folder.resolve().is_relative_to(self.watched):
                    raise UsageError("it is a link to outside of the watched folder")
                self.bank.add(folder, name, replace=again, load=again)
                self._ours.add(name)
                if self._running:
                    log("adapter_replaced" if again else "adapter_added", adapter=name)
            except UnavailableError:  # until there is a process again
                del self._seen[name]
                return
            except (
                TextloraError,
                OSError,
            ) as error:  # half-copied, perhaps: its signature changes as it grows
                log("adapter_refused", adapter=name, reason=str(error))

    def _forget(self, name: str) -> None:
        with contextlib.suppress(UsageError):  # unloaded before, or in use: then its last user frees it
            self.bank.remove(name, timeout=0)
        log("adapter_removed", adapter=name)

    async def load(self, key: Key, name: str, path: str, replace: bool) -> None:
        """Load a folder that lies inside an allowed one, read and checked whole. Raises Refusal."""
        if not NAME.fullmatch(name):
            raise Refusal(400, "lora_name: use letters, digits, '.', '_' and '-', at most 128")
        if not key.sees(name):
            raise Refusal(403, "this key may not use that name")
        folder = await asyncio.to_thread(self._allowed, path)
        if folder is None:
            raise Refusal(
                404, "lora_path: no adapter folder of that path inside the folders that may be loaded from"
            )
        try:
            await self.service.in_loader(lambda: self.bank.add(folder, name, replace=replace, load=True))
        except AdapterError as error:
            log("adapter_refused", adapter=name, reason=str(error))
            raise Refusal(
                400,
                f"adapter '{name}' cannot be loaded: its folder is damaged, incomplete, or of another base",
            ) from None
        except TextloraError as error:
            raise refusal(error) from None
        log("adapter_added", adapter=name, client=key.name)

    async def unload(self, name: str) -> None:
        """Forget an adapter; returns when its last batch is done. Raises Refusal."""
        try:
            await asyncio.to_thread(self.bank.remove, name, self.service.settings.deadline_seconds)
        except UnknownAdapterError:
            raise Refusal(404, f"no adapter '{name}'") from None
        except TextloraError as error:
            raise refusal(error) from None
        log("adapter_removed", adapter=name)

    def _allowed(self, path: str) -> Path | None:
        """The real folder of a path, where it and its files lie inside a folder of --load-from, links
        followed."""
        try:
            for root in self.roots:
                folder = (root / path).resolve()
                inside = folder != root and folder.is_relative_to(root) and folder.is_dir()
                if inside and all(child.resolve().is_relative_to(root) for child in folder.iterdir()):
                    return folder
        except (OSError, ValueError, RuntimeError):  # a null byte, a loop of links
            pass
        return None


def _signature(folder: str) -> Signature:
    """Changes with any of an adapter's files; empty where there is no adapter."""
    found = []
    for name in FILES:
        try:
            stat = os.stat(f"{folder}/{name}")
            found.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except OSError:
            if not found:
                return ()
            found.append((0, 0, 0))
    return tuple(found)
