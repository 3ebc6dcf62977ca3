"""Where a model's files are: in a folder, or in a Hub repository that they are downloaded from."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, XetDownloadError

# What a download ends in where the Hub refuses, or it, a proxy or the line between fails. The first is from the HTTP
# library, whichever huggingface_hub is built on, and the last three are from the one for its large files.
UNREACHABLE = (HTTPError, LocalEntryNotFoundError, XetDownloadError, ConnectionError, TimeoutError, RuntimeError)


@dataclass(frozen=True)
class Repository:
    """
    A folder, or a Hub repository.

    Args:
        source: path or id; a folder of this name comes first.
        revision: branch, tag or commit of a Hub repository.
        token: for a private or gated one.
        cache_dir: where downloads are kept.
        local_files_only: read what was downloaded before and do not ask the Hub.
    """

    source: str | os.PathLike
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike | None = None
    local_files_only: bool = False

    def __post_init__(self):
        if os.path.isdir(self.source):  # still the same one when the working directory is another
            object.__setattr__(self, "source", os.path.abspath(self.source))

    def fetch(self, *patterns: str) -> Path:
        """
        The local folder that has the files matching any of the patterns (`*` goes across folders), as far as the
        repository has them; those of a Hub repository are downloaded first.

        Raises:
            FileNotFoundError: if it is no folder, and no Hub repository that can be read from here.
        """
        if os.path.isdir(self.source):
            return Path(self.source)
        if not isinstance(self.source, str) or self.source.count("/") != 1 or self.source.startswith((".", "/")):
            raise FileNotFoundError(
                f"{str(self.source)!r} is neither a folder nor a Hub id: give a folder that is there or an id like "
                "'nvidia/NV-Generate-CT'"
            )
        try:
            folder = snapshot_download(
                self.source,
                revision=self.revision,
                token=self.token,
                cache_dir=self.cache_dir,
                local_files_only=self.local_files_only,
                allow_patterns=list(patterns),
            )
        except UNREACHABLE as error:
            raise FileNotFoundError(
                f"{self.source!r} at revision={self.revision!r} is neither a folder nor a Hub repository that can be "
                f"read from here ({type(error).__name__}): check name, network and proxy, and `hf auth login` if it "
                "is private or gated; what is downloaded stays for another try"
            ) from error
        return Path(folder)

    def pinned(self, *patterns: str) -> Self:
        """
        This repository at the commit that the files matching the patterns are of, see [`fetch`]; a folder as it is.
        """
        folder = self.fetch(*patterns)
        # The cache has a folder a commit, named by it.
        return self if os.path.isdir(self.source) else replace(self, revision=folder.name)
