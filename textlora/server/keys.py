"""API keys: who may use which adapters, and who may load and unload them."""

import hashlib
import hmac
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from textlora.core.errors import UsageError


@dataclass(frozen=True)
class Key:
    """One client. `name` stands in logs; `adapters` are fnmatch patterns of the names it may see and use."""

    name: str
    adapters: tuple[str, ...] = ("*",)
    manage: bool = False
    digest: bytes = field(default=b"", repr=False)

    def sees(self, adapter: str) -> bool:
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    @property
    def sees_all(self) -> bool:
        return "*" in self.adapters


class KeyRing:
    """All keys; without any, everybody is one client that may do everything."""

    def __init__(self, keys: tuple[Key, ...] = ()):
        self.keys = keys
        self._nobody = Key("-", manage=True)

    def find(self, token: str | None) -> Key | None:
        """The key of a token, None where there is none. Every key is compared, in time that does not depend
        on the token."""
        if not self.keys:
            return self._nobody
        digest = _digest(token or "")
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def read_keys(path: str | None, single: str | None = None) -> KeyRing:
    """Keys of a TOML file: a table for each client with `key`, `adapters` (patterns, default all) and
    `manage` (default false).

    Args:
        single: one more key, which may do everything; from the environment.

    Raises:
        UsageError: the file cannot be read, or a table is not as said.
    """
    keys = [] if not single else [Key("environment", manage=True, digest=_digest(single))]
    if path is not None:
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(
                f"{path}: {error.strerror}", "give the path of a TOML file as --api-keys"
            ) from error
        except ValueError:  # its message might show a key
            raise UsageError(f"{path}: not a TOML file") from None
        keys += [_key(path, name, table) for name, table in tables.items()]
        if not keys:
            raise UsageError(f"{path}: holds no key", "leave out --api-keys to serve everybody")
    if len({key.digest for key in keys}) < len(keys):
        raise UsageError(f"{path}: two clients have the same key")
    return KeyRing(tuple(keys))


def _key(path: str, name: str, table: object) -> Key:
    if not isinstance(table, dict) or not set(table) <= {"key", "adapters", "manage"}:
        raise UsageError(f"{path}: [{name}] should hold key, adapters and manage, nothing else")
    token, patterns, manage = table.get("key"), table.get("adapters", ["*"]), table.get("manage", False)
    if not isinstance(token, str) or len(token) < 8:
        raise UsageError(f"{path}: [{name}] needs a key of at least 8 characters")
    if (
        not isinstance(patterns, list)
        or not patterns
        or not all(isinstance(one, str) and one for one in patterns)
    ):
        raise UsageError(f"{path}: [{name}] adapters should be a list of name patterns")
    if not isinstance(manage, bool):
        raise UsageError(f"{path}: [{name}] manage should be true or false")
    return Key(name, tuple(patterns), manage, _digest(token))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
