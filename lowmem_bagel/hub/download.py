"""Downloading a checkpoint: which files of which repository, completed from the base, into one folder."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ..checkpoint.weight_sets import SUFFIX
from ..errors import DownloadError
from .choice import PICKLES, Choice, choose, companions
from .hubs import HUBS, Source, can_be_saved
from .known import KNOWN
from .peek import Remote
from .transfer import DISK_MARGIN, PARTS_FOLDER, FileResult, Patience, Progress, Wanted, bring
from .web import Web, one_line, shown

__all__ = ["BAGEL_REPO", "DISK_MARGIN", "DownloadResult", "FileResult", "Patience", "Progress", "download", "spec_of"]

BAGEL_REPO = "ByteDance-Seed/BAGEL-7B-MoT"
PAGE = re.compile(
    r"https?://(?:www\.)?(huggingface|hf|modelscope)\.(?:co|cn)/(?:models/)?([\w-][\w.-]*/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|summary|files)(?:/([^/?#]+)(?:/([^?#]*))?)?)?/?(?:[?#].*)?",
    re.ASCII,
)
"""What the address bar of a browser shows of a repository: hub, repository, revision and path."""
REPOSITORY = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class DownloadResult:
    """A finished download; `revision` is the commit where the hub names one.

    `weights` are the files that hold the model, `left` what else of weights and training the repository has.
    `completed` are the files that came from `base`, `lacking` what a checkpoint needs and no base was asked for.
    """

    folder: Path
    repo: str
    source: Source
    revision: str
    seconds: float
    files: tuple[FileResult, ...]
    weights: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()
    base: str = ""
    lacking: tuple[str, ...] = ()

    @property
    def received(self) -> int:
        """Bytes that came over the network."""
        return sum(file.received for file in self.files)


@dataclass(frozen=True)
class Spec:
    """What is to be fetched: a repository, a revision of it (None: the main one), and a folder in it ("": all).

    The folder may be a file of weights, which then are meant.
    """

    repo: str
    revision: str | None = None
    folder: str = ""

    @property
    def name(self) -> str:
        """What the folder that is filled is called where nothing else is said."""
        inside = [part for part in self.folder.split("/") if part and not part.endswith(SUFFIX)]
        return "-".join([self.repo.rpartition("/")[2], *inside])


def download(
    repo: str = BAGEL_REPO,
    folder: Path | None = None,
    *,
    source: Source = "huggingface",
    endpoint: str | None = None,
    revision: str | None = None,
    workers: int = 4,
    files: Sequence[str] = (),
    on_progress: Callable[[Progress], None] | None = None,
    patience: Patience = Patience(),
    subfolder: str = "",
    weights: str | None = None,
    base: str | os.PathLike[str] | None = None,
) -> DownloadResult:
    """Fetch a checkpoint, or the named `files` of a repository, into `folder` (default: the repository's last name).

    `repo` is OWNER/NAME, with a folder of the repository behind it (or `subfolder`) and @REVISION (or `revision`), the
    address of its page, or a short name of `hub.known`. One set of weights is fetched: `weights` names its file, or
    else it is the first by the order in which a folder is read. What a checkpoint needs besides and the repository
    lacks (configuration, tokenizer, VAE) comes from `base`: a repository, a folder on this machine, or "none"; by
    default the published BAGEL.

    Files that are there and have the right checksum are kept, others are replaced. `endpoint` is a mirror's address
    (for Hugging Face the default is HF_ENDPOINT, else huggingface.co). `workers` files are fetched at a time.
    `on_progress` is called on the calling thread; an exception from it, or Ctrl-C, stops the download, and the same
    call later resumes it.

    Raises:
        DownloadError: unreachable, refused, no such repository, revision or file, too little disk, or damaged.
    """
    spec = spec_of(repo, source, revision, subfolder)
    if source not in HUBS:
        raise DownloadError(f"unknown source {source!r}; choose one of {', '.join(HUBS)}")
    if workers < 1:
        raise DownloadError(f"{workers} workers cannot fetch anything; give at least 1")
    folder = Path(folder) if folder is not None else Path(spec.name)
    if "\0" in str(folder):
        raise DownloadError(f"{shown(str(folder))} cannot be a folder; choose another")
    started = time.monotonic()
    hub = _Hub(Web(patience.timeout), source, endpoint)
    remote = hub.remote(spec.repo, spec.revision, repo)
    if files:
        made = _Made(_chosen_files(remote, files))
    else:
        made = _completed(hub, remote, choose(remote, spec.folder, weights), base)
    for name in made.wanted.files:
        if not can_be_saved(name) or name.startswith(f"{PARTS_FOLDER}/"):
            raise DownloadError(f"{spec.repo}: no disk takes the file name {shown(name)}; give another repository")
    results = bring(made.wanted, folder, hub.web, workers, patience, on_progress or (lambda progress: None))
    seconds = time.monotonic() - started
    told = (made.weights, made.left, made.completed, made.base, made.lacking)
    return DownloadResult(folder, spec.repo, source, remote.listing.revision, seconds, results, *told)


def spec_of(repo: str, source: Source, revision: str | None = None, subfolder: str = "") -> Spec:
    """Read what is to be fetched: a short name, OWNER/NAME[/FOLDER][@REVISION], or a page's address.

    Raises:
        DownloadError: neither, or two revisions or folders.
    """
    where, _, at = _off_page(repo, source).partition("@")
    if where.lower() in KNOWN:
        where = KNOWN[where.lower()].place(source)
    parts = where.split("/")
    name, folder = "/".join(parts[:2]), "/".join(part for part in parts[2:] if part)
    if not REPOSITORY.fullmatch(name) or ("@" in repo and not at):
        raise DownloadError(
            f"{shown(repo)} is not a repository; write it as owner/name, or as `lowmem-bagel download --list` names it"
        )
    if at and revision not in (None, at):
        raise DownloadError(f"{shown(at)} and {shown(revision)} are two revisions; give one")
    folder = folder or subfolder.strip("/")
    if subfolder.strip("/") not in ("", folder):
        raise DownloadError(f"{shown(folder)} and {shown(subfolder)} are two folders; give one")
    if any(part in ("", ".", "..") for part in folder.split("/")) and folder:
        raise DownloadError(f"{shown(folder)} is not a folder of a repository; write it as owner/name/folder")
    return Spec(name, at or revision, folder)


def _off_page(text: str, source: Source) -> str:
    """What a page of a hub shows, as `spec_of` reads it; anything else as it is.

    Raises:
        DownloadError: it is another hub's page.
    """
    page = PAGE.fullmatch(text)
    if page is None:
        return text
    host, repo, revision, path = page.groups(default="")
    at: Source = "modelscope" if host == "modelscope" else "huggingface"
    if at != source:
        raise DownloadError(f"{shown(text)} is a page of {at}; give --source {at}")
    where = f"{repo}/{unquote(path)}" if path else repo
    return f"{where}@{unquote(revision)}" if revision else where


@dataclass(frozen=True)
class _Made:
    """What is brought, and what is told of it afterwards."""

    wanted: Wanted
    weights: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    completed: tuple[str, ...] = ()
    base: str = ""
    lacking: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Hub:
    web: Web
    source: Source
    endpoint: str | None

    def remote(self, repo: str, revision: str | None, said: str) -> Remote:
        """A repository; `said` is what was asked for.

        Raises:
            DownloadError: as of listings.
        """
        try:
            return Remote(self.web, repo, HUBS[self.source](self.web, repo, revision, self.endpoint))
        except DownloadError as error:
            if said.count("/") > 1 and f"repository {repo}" in str(error):
                raise DownloadError(
                    f"{shown(said)} is not a repository; write it as owner/name, or owner/name/folder ({error})"
                ) from error
            raise


def _chosen_files(remote: Remote, names: Sequence[str]) -> Wanted:
    """Files that were asked for by name.

    Raises:
        DownloadError: one is not there, or is never fetched.
    """
    listed = remote.listing.files
    for name in names:
        if PurePosixPath(name).suffix in PICKLES:
            raise DownloadError(f"{one_line(name)} is a pickle, which can run code when it is read: never downloaded")
        if name not in listed:
            there = one_line(", ".join(sorted(listed)), 600)
            raise DownloadError(f"{remote.repo} has no file {one_line(name)}; it has {there}")
    return Wanted({name: (listed[name], remote.listing) for name in names})


def _completed(hub: _Hub, remote: Remote, choice: Choice, base: str | os.PathLike[str] | None) -> _Made:
    """A choice with what it lacks from the base.

    Raises:
        DownloadError: the base cannot be had, or lacks it too.
    """
    files = {name: (remote.listing.files[place], remote.listing) for name, place in choice.files.items()}
    made = _Made(Wanted(files), choice.weights, choice.left)
    given = os.fspath(base) if base is not None else BAGEL_REPO
    if not choice.lacking or given == "none" or (base is None and remote.repo == BAGEL_REPO):
        return replace(made, lacking=choice.lacking)
    if base is not None and os.path.isdir(given):
        copies = _of_folder(Path(given), choice.lacking)
        return replace(made, wanted=Wanted(files, copies), completed=tuple(copies), base=given)
    if not REPOSITORY.fullmatch(given):
        raise DownloadError(f"--base {shown(given)} is no folder and no repository; write it as owner/name, or none")
    try:
        other = hub.remote(given, None, given)
        found = companions(other.listing.files, choice.lacking, given)
    except DownloadError as error:
        raise DownloadError(
            f"{remote.repo} lacks {', '.join(choice.lacking)}: {error}; or give --base FOLDER, or --base none"
        ) from error
    more = {name: (other.listing.files[name], other.listing) for name in found}
    return replace(made, wanted=Wanted({**files, **more}), completed=tuple(more), base=given)


def _of_folder(folder: Path, lacking: Sequence[str]) -> Mapping[str, Path]:
    """What completes a checkpoint from a folder on this machine.

    Raises:
        DownloadError: the folder cannot be read, or lacks it too.
    """
    try:
        files = [path for pattern in ("*", "vae/*") for path in folder.glob(pattern) if path.is_file()]
    except OSError as error:
        raise DownloadError(f"--base {folder} cannot be read ({error.strerror}); give another") from error
    found = companions({path.relative_to(folder).as_posix() for path in files}, lacking, str(folder))
    return {name: folder / name for name in found}
