"""Download a file once, checked and whole, into the cache."""

from __future__ import annotations

import hashlib
import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .._files import written_whole
from .._settings import settings
from ..errors import DownloadError, ScpertError

__all__ = ["file_hash", "fetch", "provenance"]

logger = logging.getLogger("scpert")

_TIMEOUT = 60  # seconds without any answer


def file_hash(path: str | Path, algorithm: str = "sha256") -> str:
    """Hexadecimal hash of a file, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def provenance(path: str | Path) -> dict[str, Any]:
    """Where a cached file came from: ``url``, ``date`` (UTC, ISO 8601), ``sha256``; for any other file its hash only."""
    path = Path(path)
    try:
        record = json.loads(_record_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    return record if {"url", "date", "sha256"} <= set(record) else {"sha256": file_hash(path)}


def fetch(
    url: str,
    filename: str,
    sha256: str | None = None,
    *,
    md5: str | None = None,
    subfolder: str = "",
    timeout: float = _TIMEOUT,
) -> Path:
    """Return the local copy of ``url``; download it if it is not in the cache yet.

    The file is downloaded beside its place under a temporary name, checked, and only then renamed: a wrong, cut-off
    or interrupted download leaves nothing in the cache, and an older copy as it was. Beside it,
    ``<filename>.provenance.json`` keeps ``url``, ``date`` and ``sha256``; where no hash is known beforehand, later
    calls check the cached file against that of the first download.

    Parameters
    ----------
    url
        ``http://`` or ``https://`` address.
    filename
        Name in the cache.
    sha256, md5
        Known hashes, in hexadecimal.
    subfolder
        Folder below :attr:`scpert.settings.cache_dir <scpert._settings.Settings>`.
    timeout
        Seconds to wait for an answer.

    Returns
    -------
    Path of the file.

    Raises
    ------
    DownloadError
        If the server cannot be reached, answers with an error, stops too early, or sends another file than expected.
    """
    if Path(filename).name != filename or not filename:
        raise ScpertError(f"filename={filename!r}: give a plain file name, without folders.")
    expected = {name: value.lower() for name, value in (("sha256", sha256), ("md5", md5)) if value}
    folder = Path(settings.cache_dir).expanduser() / subfolder
    path = folder / filename
    if path.exists():
        recorded = {"sha256": value} if (value := _recorded_hash(path)) else {}
        known = expected or recorded
        if all(file_hash(path, name) == value for name, value in known.items()):
            return path
        logger.warning("The cached file %s is not what it was or should be: downloading it again from %s", path, url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"Cannot make the cache folder {folder}: {error}. Set scpert.settings.cache_dir (or the environment variable "
            "SCPERT_CACHE) to a folder that you can write to."
        ) from error
    with written_whole(path) as part:
        _download(url, part, timeout)
        for name, value in expected.items():
            found = file_hash(part, name)
            if found != value:
                raise DownloadError(
                    f"{url} is not the file that was expected: its {name} is {found}, expected {value}. Nothing was "
                    "kept. The server may have a newer version, or the download was altered: check the source, or "
                    "download a file that you trust and pass it as path=."
                )
        record = {"url": url, "date": datetime.now(UTC).isoformat(timespec="seconds"), "sha256": file_hash(part)}
    with written_whole(_record_of(path)) as part:
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return path


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".provenance.json")


def _recorded_hash(path: Path) -> str | None:
    try:
        return json.loads(_record_of(path).read_text(encoding="utf-8")).get("sha256")
    except (OSError, ValueError, AttributeError):
        return None


def _download(url: str, part: Path, timeout: float) -> None:
    import pooch
    from requests.exceptions import ChunkedEncodingError, HTTPError, RequestException
    from tqdm.auto import tqdm

    by_hand = "Or download it by hand and pass the file as path=."
    # pooch sets the total; with none it would take the bar for absent
    bar = tqdm(
        total=1,
        desc=url.rsplit("/", 1)[-1][:40],
        unit="B",
        unit_scale=True,
        disable=not settings.progress,
        delay=0.5,
        leave=False,
    )
    # identity: with a compressed transfer, the length received could not be compared with the length announced
    get = pooch.HTTPDownloader(
        progressbar=bar, chunk_size=1 << 20, timeout=timeout, headers={"Accept-Encoding": "identity"}
    )
    try:
        get(url, str(part), None)
    except HTTPError as error:
        answer = f"{error.response.status_code} ({error.response.reason})" if error.response is not None else str(error)
        raise DownloadError(
            f"The server answered {answer} for {url}. The file may have moved, or the server is overloaded: look at the "
            f"address in a browser, try again later. {by_hand}"
        ) from error
    except ChunkedEncodingError as error:
        raise DownloadError(
            f"The download of {url} was cut off; nothing was kept ({error}). Check the connection and try again. {by_hand}"
        ) from error
    except RequestException as error:
        raise DownloadError(
            f"Cannot download {url}: {error}. Check the connection (and a proxy), or try again later. {by_hand}"
        ) from error
    except OSError as error:
        raise DownloadError(
            f"Cannot write the download of {url} into {part.parent}: {error}. Free some space, or set "
            "scpert.settings.cache_dir to another folder."
        ) from error
    finally:
        bar.close()
