"""Files that lie on the web and on no hub, kept beside the hub's cache."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import urllib.request
import zlib
from pathlib import Path

from tlora.artefact import staged
from tlora.errors import UserError


def web_file(url: str, sha256: str) -> Path:
    """Return the local copy of a file, fetched where there is none yet.

    Parameters
    ----------
    url
        Its last part is the name of the copy.
    sha256
        Checksum of the content; of what is packed, where the name ends in .gz: the same content
        can be packed in many ways.

    Raises
    ------
    UserError
        When it cannot be had, HF_HUB_OFFLINE is set, or its content is another one.
    """
    from huggingface_hub import constants

    path = Path(constants.HF_HOME) / "web" / sha256[:12] / url.rpartition("/")[2]
    if path.is_file():
        return path
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{url}: not in the cache ({path}), and HF_HUB_OFFLINE is set: run `tlora download` "
            "first; or set data_root to a folder of local files"
        )
    try:
        with staged(path) as temporary:
            with urllib.request.urlopen(url, timeout=60) as response, open(temporary, "wb") as file:
                shutil.copyfileobj(response, file)
            found = _checksum(temporary, url.endswith(".gz"))
            if found != sha256:
                raise UserError(
                    f"{url}: the content's SHA-256 is {found}: expected {sha256}; "
                    "or set data_root to a folder of local files"
                )
    except (OSError, zlib.error, EOFError) as error:
        raise UserError(
            f"{url}: not loaded: {' '.join(str(error).split())[:200]}; "
            "or set data_root to a folder of local files"
        ) from error
    return path


def _checksum(path: Path, packed: bool) -> str:
    with (gzip.open if packed else open)(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
