"""Files at URLs: fetched whole into the user's cache when they are needed, and read from there.

``s3://``, ``gs://``, ``hf://``, ``az://``, ``memory://`` and whatever else fsspec knows go through it, ``http(s)://``
through the standard library, and a ``file://`` URL is the file itself. A URL has one place in the cache: a folder of
URLs is a folder there, and relative image paths of a remote data file lead to URLs beside it.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from vapr.cache import one_at_a_time, user_cache, written_whole
from vapr.errors import UserError, one_line
from vapr.progress import Display

CHUNK = 8 * 2**20
TRIES = 3
PAUSE = 1.0
"""Seconds before a failed transfer is tried again, and twice as long before the third try."""

GLOB = re.compile(r"[*?[]")

IDENTITY = (
    "size", "mtime", "created", "etag", "lastmodified", "last_modified", "md5hash", "content_md5", "generation",
    "blob_id", "sha256",
)  # fmt: skip
"""What storage systems say of a file that changes with its content; case does not matter."""

CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or 'aws configure'",
    "gs": "'gcloud auth application-default login'",
    "gcs": "'gcloud auth application-default login'",
    "hf": "HF_TOKEN, or 'hf auth login'",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "abfs": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
"""Where each storage's own library looks for them."""


def is_url(source: str) -> bool:
    """Return whether a source is named by a URL instead of a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", source) is not None


def local_place(url: str) -> Path:
    """Return where a URL's file lies once it is fetched."""
    scheme, _, rest = url.partition("://")
    if scheme.lower() in ("file", "local"):
        return Path(urllib.parse.unquote(rest) if "%" in rest else rest)
    parts = rest.rstrip("/").split("/")
    if any(len(part.encode()) > 150 for part in parts) or "?" in rest:  # a signed URL is no name for a file
        place = (
            _folder() / "long" / (hashlib.sha256(url.encode()).hexdigest()[:32] + Path(rest.partition("?")[0]).suffix)
        )
        if not (named := place.with_name(place.name + ".url")).exists():
            with written_whole(named) as file:
                file.write(url.encode())
        return place
    return join(_folder() / scheme.lower(), "/".join(parts))


def join(folder: Path, relative: str) -> Path:
    """Return the place of a path below a folder, whose parts are quoted where the folder stands for a URL."""
    if not is_remote(folder) or relative.startswith("/"):
        return folder / relative
    return Path(os.path.normpath(folder.joinpath(*(_quoted(part) for part in relative.split("/")))))


def is_remote(path: Path) -> bool:
    """Return whether a path is the place of a URL's file, fetched or not."""
    return path.is_relative_to(_folder())


def url_of(path: Path) -> str:
    """Return the URL whose file has this place."""
    if path.parent == _folder() / "long":
        named = path.with_name(path.name + ".url")
        if not named.exists():
            raise UserError(f"'{path.name}' stands beside a URL with a query, which has no folder; set data.image_root")
        return named.read_text()
    scheme, *parts = path.relative_to(_folder()).parts
    return f"{scheme}://{'/'.join('' if part == '%' else urllib.parse.unquote(part) for part in parts)}"


def display_name(path: Path) -> str:
    """Return the name by which a user knows a file: its URL, or its path."""
    return url_of(path) if is_remote(path) else str(path)


def fetched(path: Path) -> Path:
    """Return a path whose file is there; a URL's file is fetched once and never looked for again.

    Raises:
        UserError: if it cannot be fetched.
    """
    if is_remote(path) and not path.exists():
        url = url_of(path)
        _transfer(url, path, None, lambda amount: None)
    return path


def fetch_source(source: str, chosen: Callable[[list[str]], list[str]]) -> str:
    """Fetch those data files of a URL that are new or changed; return the local file, folder or glob.

    Args:
        source: URL of a file, a folder or a glob.
        chosen: picks the wanted names from those of a folder's or a glob's files.

    Raises:
        UserError: if nothing is there or it cannot be read, naming the URL and the way out.
    """
    place = local_place(source)
    if source.split("://")[0].lower() in ("file", "local"):
        return str(place)
    try:
        with _as_user_error(source):
            found = _list(source)
    except _Transient as error:
        if not place.exists():
            raise
        print(f"{'fetch':<10} {error}; what was fetched before is used", flush=True)
        return str(place)
    if not found:
        raise UserError(f"{source}: no such file or folder")
    several = [url for url in found if url != source.rstrip("/")]
    if several:
        wanted = set(chosen([url.rsplit("/", 1)[1] for url in several]))
        found = {url: info for url, info in found.items() if url.rsplit("/", 1)[1] in wanted}
        if not found:
            raise UserError(f"{source}: no data file there")
    _fetch_changed(source, found)
    if not several:
        return str(place)
    pattern = place / "*"
    if re.search(GLOB, source):
        parts = source.split("://")[1].split("/")
        named = "/".join(part if re.search(GLOB, part) else _quoted(part) for part in parts)
        place = pattern = _folder() / source.split("://")[0].lower() / named
    keep = {local_place(url) for url in found}
    for old in map(Path, glob.glob(str(pattern))):
        if old not in keep and _origin(old).exists():  # a data file that is no longer at the URL
            old.unlink()
            _origin(old).unlink()
    return str(place)


def _list(source: str) -> dict[str, dict[str, Any]]:
    """Return the URLs of the files that a source names, each with what its storage says of it."""
    if source.startswith(("http://", "https://")):
        return {source: _http_info(source)}
    system, path = _file_system(source)
    if re.search(GLOB, source):
        entries = system.glob(path, detail=True).values()
    elif system.isdir(path):
        inner = f"{path.rstrip('/')}/pairs"  # as an edit job's folder has them
        entries = [*system.ls(path, detail=True), *(system.ls(inner, detail=True) if system.isdir(inner) else ())]
    else:
        return {source.rstrip("/"): dict(system.info(path))}
    scheme = source.split("://")[0]
    files = (entry for entry in entries if entry["type"] == "file")
    return {f"{scheme}://{system._strip_protocol(entry['name']).lstrip('/')}": dict(entry) for entry in files}


def _fetch_changed(source: str, found: dict[str, dict[str, Any]]) -> None:
    """Fetch the files that are missing here or changed, and print how large they are."""
    wanted = {url: info for url, info in found.items() if not _is_current(url, info)}
    if not wanted:
        return
    with one_at_a_time(local_place(next(iter(wanted)))):  # another rank may have fetched them meanwhile
        wanted = {url: info for url, info in wanted.items() if not _is_current(url, info)}
        size = sum(info.get("size") or 0 for info in wanted.values())
        _folder().mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(_folder()).free
        files = f"{len(wanted):,} files, " if len(wanted) > 1 else ""
        line = f"{source}: {files}{size / 2**20:,.1f} MiB"
        if size > free:
            raise UserError(
                f"{line} do not fit {_folder()} ({free / 2**20:,.1f} MiB free); XDG_CACHE_HOME names another"
            )
        if not wanted:
            return
        print(f"{'fetch':<10} {line} into {_folder()}", flush=True)
        with Display("fetch", max(1, size // 2**20), unit="MiB") as display:
            rest = 0

            def count(amount: int) -> None:
                nonlocal rest
                rest += amount
                display.advance("", rest // 2**20)
                rest %= 2**20

            for url, info in wanted.items():
                _transfer(url, local_place(url), info.get("size"), count)
                with written_whole(_origin(local_place(url))) as file:
                    file.write(_identity(info).encode())


def _is_current(url: str, info: dict[str, Any]) -> bool:
    place = local_place(url)
    with contextlib.suppress(OSError):
        return place.is_file() and bool(info) and _origin(place).read_text() == _identity(info)
    return False


def _transfer(url: str, place: Path, size: int | None, count: Callable[[int], None]) -> None:
    """Copy a URL's file to its place, whole or not at all; a transfer that breaks off is tried again."""
    for attempt in range(TRIES):
        try:
            with written_whole(place) as file, _as_user_error(url), _open(url) as stream:
                while chunk := stream.read(CHUNK):
                    _write(file, chunk, place)
                    count(len(chunk))
                if size is not None and file.tell() != size:
                    raise OSError(f"{file.tell():,} of {size:,} bytes came")
            return
        except _Transient as error:
            if attempt == TRIES - 1:
                raise UserError(str(error)) from None
            time.sleep(PAUSE * 2**attempt)


def _write(file: IO[bytes], chunk: bytes, place: Path) -> None:
    try:
        file.write(chunk)
    except OSError as error:  # not the storage's fault
        raise UserError(
            f"{place}: cannot be written ({error.strerror}); XDG_CACHE_HOME can name another folder"
        ) from None


class _Transient(UserError):
    """A transfer that broke off, and may succeed when it is tried again."""


@contextlib.contextmanager
def _as_user_error(url: str) -> Iterator[None]:
    """Raise UserError in place of whatever a storage library raises, with the way out."""
    scheme = url.split("://")[0].lower()
    log_in = f"; credentials: {CREDENTIALS[scheme]}" if scheme in CREDENTIALS else ""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: no such file or folder") from None
    except PermissionError as error:
        raise UserError(f"{url}: may not be read ({_reason(error)}){log_in}") from None
    except urllib.error.HTTPError as error:
        missing = "no such file (" if error.code in (404, 410) else "cannot be read ("
        kind = UserError if error.code < 500 and error.code != 429 else _Transient
        raise kind(f"{url}: {missing}HTTP {error.code} {error.reason})") from None
    except Exception as error:  # noqa: BLE001 - each storage library raises its own
        kind = UserError if "redential" in f"{type(error).__name__}{error}" else _Transient
        raise kind(f"{url}: cannot be read ({_reason(error)}){log_in}") from None


def _reason(error: BaseException) -> str:
    return one_line(error) or type(error).__name__


@contextlib.contextmanager
def _open(url: str) -> Iterator[IO[bytes]]:
    if url.startswith(("http://", "https://")):
        with urllib.request.urlopen(_requestable(url), timeout=60) as stream:
            yield stream
    else:
        system, path = _file_system(url)
        with system.open(path, "rb") as stream:
            yield stream


def _http_info(url: str) -> dict[str, Any]:
    """Return what a server says of a file; where it answers no HEAD the file is fetched every time."""
    request = urllib.request.Request(_requestable(url), method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            headers = answer.headers
            size = headers.get("Content-Length")
            names = ("ETag", "Last-Modified")
            known = {name.replace("-", ""): headers[name] for name in names if headers.get(name)}
            return {**known, **({"size": int(size)} if size else {})}
    except urllib.error.HTTPError as error:
        if error.code not in (403, 405, 501):
            raise
        return {}


def _requestable(url: str) -> str:
    """Return a URL with everything quoted that is not, a % that begins no quoted character included."""
    return urllib.parse.quote(re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", url), safe="%/:=&?~#+!$,;'@()*[]")


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it. Raises UserError where its library is missing."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = url.split("://")[0].lower()
    known = known_implementations.get(scheme)
    try:
        return url_to_fs(url)
    except ImportError:
        package = known["class"].split(".")[0] if known else scheme
        raise UserError(f"{url}: reading {scheme}:// needs the package {package}; pip install {package}") from None
    except ValueError as error:
        if "rotocol not known" not in str(error):
            raise
        raise UserError(f"{url}: fsspec knows no {scheme}://; copy the data here") from None


def _identity(info: dict[str, Any]) -> str:
    return json.dumps({key: str(info[key]) for key in sorted(info) if key.lower().replace("-", "") in IDENTITY})


def _origin(place: Path) -> Path:
    return place.with_name(f".{place.name}.origin")


def _folder() -> Path:
    return user_cache() / "remote"


def _quoted(part: str) -> str:
    """Return a part of a URL as the name of a file, from which :func:`url_of` finds it again."""
    return urllib.parse.quote(part, safe=" !#$&'()+,;=@[]^`{}~*") if part else "%"
