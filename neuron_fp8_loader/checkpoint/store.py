"""Object stores: ``s3://``, ``gs://``, ``az://`` and plain ``http(s)://``, by obstore (extra ``s3``).

Facts, read and tried in obstore 0.12: ``get`` lets go of the GIL, takes ``if_match``, and gives what there is of a
range that reaches past the end. Requests are repeated with backoff by the library. Its runtime does not live on in
a child of ``fork``. Credentials come from the environment, web identity, container and instance roles; from profiles
and SSO of ``~/.aws`` by boto3 only.
"""

from __future__ import annotations

import configparser
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import CheckpointError
from .remote import Entry, register

CLIENT = {"timeout": "120s", "connect_timeout": "10s"}
RETRY: dict[str, Any] = {"max_retries": 10}

_user: list[int] = []  # the process that obstore's runtime belongs to

_OWN_WAYS = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)  # fmt: skip
_METADATA = "://169.254."
_KEYS = "export AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"


def require(place: str) -> None:
    """Raise CheckpointError if there is no obstore to read the place with."""
    try:
        import obstore.store  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{place}: is read by obstore, which is not installed: pip install 'neuron-fp8-loader[s3]'; or copy the "
            "checkpoint to a directory"
        ) from error


class ObjectStore:
    """One bucket, or one host.

    Raises:
        CheckpointError: obstore is missing, the process is a child of one that used it, or there are no credentials.
    """

    def __init__(self, root: str) -> None:
        require(root)
        from obstore.store import from_url

        open_url: Any = from_url  # its overloads go by the scheme
        self._root, self.lists = root, not root.startswith("http")
        _require_own_process(root)
        client: dict[str, Any] = dict(CLIENT)
        more: dict[str, Any] = {}
        if root.startswith("s3:"):
            more = _s3_settings(root)
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            if endpoint.startswith("http:"):
                client["allow_http"] = True
        elif root.startswith("http:"):
            client["allow_http"] = True
        with self._worded(""):
            self._store = open_url(root, client_options=client, retry_config=RETRY, **more)

    def listed(self, directory: str) -> tuple[list[Entry], list[str]]:
        import obstore

        with self._worded(directory):
            found = obstore.list_with_delimiter(self._store, directory or None)
        prefixes = [prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]
        return [_entry(meta) for meta in found["objects"]], sorted(prefixes)

    def entry(self, key: str) -> Entry:
        import obstore

        with self._worded(key):
            return _entry(obstore.head(self._store, key))

    def get(self, key: str, known: Entry, start: int, end: int) -> Any:
        import obstore

        options: dict[str, Any] = {"range": (start, end)}
        if known.tag and not known.tag.startswith("W/"):  # a weak one never matches
            options["if_match"] = known.tag
        with self._worded(key):
            result = obstore.get(self._store, key, options=options)  # type: ignore[arg-type]
            now = _entry(result.meta)
            if not _same(now, known):
                raise CheckpointError(_replaced(f"{self._root}/{key}"))
            return result.bytes()

    def _refused(self, code: str) -> str:
        return _refused_by_s3(code) if self._root.startswith("s3:") else "access is denied; give other credentials"

    @contextmanager
    def _worded(self, key: str) -> Iterator[None]:
        """The library's errors in our words."""
        from obstore import exceptions

        _require_own_process(self._root)
        where = f"{self._root}/{key}" if key else self._root
        try:
            yield
        except exceptions.PreconditionError as error:
            raise CheckpointError(_replaced(where)) from error
        except (exceptions.BaseError, OSError, ValueError) as error:
            text = str(error)
            code = re.search(r"<Code>(\w+)</Code>", text)
            if "NoSuchBucket" in text:
                raise CheckpointError(f"{where}: there is no bucket {self._root.partition('//')[2]!r}") from error
            if isinstance(error, FileNotFoundError):
                raise
            # of an instance without a role, or where something stands before it, the metadata service refuses, not S3
            denied = isinstance(error, exceptions.PermissionDeniedError) or re.search(r"status code: 40[13]", text)
            if denied and _METADATA not in text:
                raise PermissionError(f"{where}: {self._refused(code[1] if code else '')}") from error
            if code and "Expired" in code[1]:
                raise CheckpointError(f"{where}: the credentials have expired ({code[1]}); renew them") from error
            raise CheckpointError(f"{where}: {_reason(text)}") from error


def _entry(meta: Any) -> Entry:
    modified: datetime | None = meta.get("last_modified")
    seconds = modified.timestamp() if modified is not None else 0.0
    return Entry(
        str(meta["path"]).rpartition("/")[2], int(meta["size"]), meta.get("e_tag") or "", int(seconds * 1_000_000_000)
    )


def _same(now: Entry, known: Entry) -> bool:
    """By the tag; without one by the time, which HTTP tells in seconds."""
    seconds = now.modified_ns // 10**9 == known.modified_ns // 10**9
    return now.size == known.size and (now.tag == known.tag if now.tag and known.tag else seconds)


def _require_own_process(root: str) -> None:
    if not _user:
        _user.append(os.getpid())
    if _user[0] != os.getpid():
        raise CheckpointError(
            f"{root}: this process was forked from one that had read from a store already, and the threads of the "
            "library that reads do not live on in it. Start processes by 'spawn', or fork before the first read"
        )


# -- settings of S3 that are not in the environment --------------------------------------------------------------


def _s3_settings(root: str) -> dict[str, Any]:
    """What obstore does not find by itself: the region of a profile, and a profile's credentials."""
    found: dict[str, Any] = {}
    profile = os.environ.get("AWS_PROFILE", "")
    config = Path(os.environ.get("AWS_CONFIG_FILE", "~/.aws/config")).expanduser()
    if not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        found["region"] = _region(config, profile) or "us-east-1"
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "yes", "on"):
        return found
    if not profile and any(os.environ.get(name) for name in _OWN_WAYS):
        return found
    shared = Path(os.environ.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")).expanduser()
    try:
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            found["credential_provider"] = Boto3CredentialProvider()
        except Exception as error:  # boto3's own kinds, and ValueError where it finds none
            raise CheckpointError(f"{root}: {_no_credentials(str(error))}") from error
        return found
    except ImportError:
        pass
    if profile or shared.is_file():
        what = f"the profile {profile!r}" if profile else str(shared)
        raise CheckpointError(
            f"{root}: the credentials are in {what}, which is read by boto3: pip install boto3; or {_KEYS}"
        )
    if not _metadata_answers():
        raise CheckpointError(f"{root}: {_no_credentials('')}")
    return found


def _region(config: Path, profile: str) -> str:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(config, encoding="utf-8")
    except (OSError, configparser.Error, UnicodeError):
        return ""
    name = profile or "default"
    return next((parser[s].get("region", "") for s in (f"profile {name}", name) if parser.has_section(s)), "")


def _metadata_answers() -> bool:
    """Is this an EC2 instance, whose role may have credentials? Else the library would ask for minutes."""
    place = urlsplit(os.environ.get("AWS_METADATA_ENDPOINT") or "http://169.254.169.254")
    try:
        with socket.create_connection((place.hostname or "", place.port or 80), timeout=2):
            return True
    except OSError:
        return False


# -- words ---------------------------------------------------------------------------------------------------------


def _no_credentials(text: str) -> str:
    found = f" ({text})" if text else ""
    return (
        f"no AWS credentials were found{found}: {_KEYS}, set AWS_PROFILE (with boto3 installed), run where a role "
        "gives them, or for a public bucket export AWS_SKIP_SIGNATURE=true"
    )


def _replaced(where: str) -> str:
    return f"{where}: was replaced while it was read (its ETag is another); load again"


def _refused_by_s3(code: str) -> str:
    said = f" ({code})" if code else ""
    return (
        f"access is denied{said}: the credentials may lack s3:GetObject or s3:ListBucket here, or be another "
        "account's; for a public bucket export AWS_SKIP_SIGNATURE=true"
    )


def _reason(text: str) -> str:
    """The library's text without its debug print; for what is known, what to do."""
    lines = text.split("\n\nDebug source")[0].strip()
    flat = " ".join(lines.split())
    if "configured region" in flat or "PermanentRedirect" in flat or "AuthorizationHeaderMalformed" in flat:
        return f"the bucket lies in another region: set AWS_REGION to its own ({flat[:300]})"
    if _METADATA in flat or re.search(r"credential|Missing (AccessKeyId|SecretAccessKey)", flat):
        return _no_credentials(flat[:300])
    if "range" in flat.lower() and ("NotPartial" in text or "not supported" in flat.lower() or "non-partial" in flat):
        return f"the server does not answer requests for ranges ({flat[:200]}); download the file"
    return flat[:600]


for _scheme in ("s3", "gs", "az", "http", "https"):
    register(_scheme, ObjectStore)
