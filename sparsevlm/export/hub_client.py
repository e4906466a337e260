"""The conversation with the Hub: one commit for all files, nothing sent twice, errors that say what to do.

Weights go up first, through huggingface_hub (Xet where it is installed, else git LFS); the Hub keeps them although no
commit names them yet, so that an interrupted upload goes on where it stopped. The commit that makes them visible comes
last: a repository never holds half a model.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsevlm.export.hub_files import Item, stale
from sparsevlm.export.hub_scan import mask

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ATTEMPTS = 6
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_MAIN = "main"
_T = TypeVar("_T")


@dataclass(frozen=True)
class Pushed:
    """What an upload did.

    Attributes:
        url: Of the commit, or of the repository where nothing had changed.
        sent: Names of the files in the commit.
        unchanged: Names of the files that were there already.
        removed: Names of the files of another model that the commit removed.
        commit: The commit that now holds all of them.
        endpoint: Address of the Hub.
    """

    url: str
    sent: tuple[str, ...]
    unchanged: tuple[str, ...]
    removed: tuple[str, ...]
    commit: str = ""
    endpoint: str = ""


def check_repo(repo: str, revision: str | None) -> None:
    """Check the names that the command was given.

    Raises:
        ValueError: One of them cannot be.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if repo.count("/") != 1:
        raise ValueError(f"{repo!r} is no repository; give OWNER/NAME, e.g. your-name/my-model")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(
            f"{repo!r} is no repository: {str(error).split(':')[0].rstrip('.')}. Give OWNER/NAME"
        ) from None
    if revision is None:
        return
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(f"--revision {revision} is a commit; files are pushed to a branch, e.g. --revision v2")
    if not re.fullmatch(r"[\w.-]+(?:/[\w.-]+)*", revision) or ".." in revision or revision.startswith("-"):
        raise ValueError(f"--revision {revision!r} cannot be the name of a branch; use letters, digits, '.', '_', '-'")


def upload(
    items: Sequence[Item],
    repo: str,
    *,
    message: str,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    pause: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Bring files into a repository, making it where there is none.

    Args:
        items: The files.
        repo: ``OWNER/NAME``.
        message: Of the commit.
        private: Make the repository private; refuses one that is there and public.
        revision: Branch; made from the main one where there is none. Default `main`.
        token: Default: the one that huggingface_hub finds.
        endpoint: Address of the Hub; default huggingface_hub's.
        pause: Waits between attempts, in seconds.
        tell: Told what goes wrong meanwhile, a line each.

    Raises:
        ValueError: The Hub refuses, with what to do.
        OSError: It could not be reached, or was not well, `ATTEMPTS` times in a row.
    """
    check_repo(repo, revision)
    api, token = _api(token, endpoint)
    branch = revision or _MAIN

    def attempt() -> Pushed:
        _open(api, repo, private, [branch])
        return _commit(api, items, repo, branch, message)

    with _quiet_client():
        return _persist(attempt, repo, branch, token, pause, tell)


def ensure_repo(repo: str, *, private: bool, branches: Sequence[str], attempts: int = 2) -> None:
    """Make a repository and branches where there are none; shows early whether the token may write there.

    Raises:
        ValueError: It may not, or the repository is public and should be private.
        OSError: The Hub could not be reached.
    """
    check_repo(repo, None)
    api, token = _api(None, None)
    with _quiet_client():
        _persist(lambda: _open(api, repo, private, branches), repo, _MAIN, token, time.sleep, lambda _: None, attempts)


def _open(api: HfApi, repo: str, private: bool, branches: Sequence[str]) -> None:
    """Make a repository and branches where there are none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        about = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=True if private else None, exist_ok=True)
        about = api.model_info(repo)
    if private and about.private is False:
        raise ValueError(
            f"--private: {repo} exists and is public; nothing was sent. Make it private in its settings on the Hub, or "
            "push to another name"
        )
    for branch in branches:
        if branch != _MAIN and not branch.startswith("refs/"):
            api.create_branch(repo, branch=branch, exist_ok=True)


def _api(token: str | None, endpoint: str | None) -> tuple[HfApi, str]:
    """Return the client and the token that it uses.

    Raises:
        ValueError: There is no token, or the network is switched off.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError("HF_HUB_OFFLINE is set, and a push needs the network: run it with HF_HUB_OFFLINE=0")
    token = token or get_token()
    if token is None:
        raise ValueError("no token of the Hub: run `hf auth login` with a token that may write, or set HF_TOKEN")
    return HfApi(endpoint=endpoint, token=token), token


def find_commit(
    repo: str,
    revision: str | None,
    folder: str | None,
    weights: Mapping[str, Path],
    *,
    token: str | None = None,
    endpoint: str | None = None,
    pause: Callable[[float], None] = time.sleep,
    tell: Callable[[str], None] = lambda line: None,
) -> str:
    """Return the commit of a model on the Hub, having compared its weights with files on this machine.

    Args:
        repo: ``OWNER/NAME``.
        revision: Branch or commit; default `main`.
        folder: Folder of the repository that holds it; None for its root.
        weights: Weight files that it must hold, by name.
        token: As for `upload`, as are the following.
        endpoint: Address of the Hub.
        pause: Waits between attempts.
        tell: Told what goes wrong meanwhile.

    Raises:
        ValueError: It is not there, or holds other weights.
        OSError: The Hub could not be reached.
    """
    from huggingface_hub.hf_api import RepoFile

    api, token = _api(token, endpoint)

    def attempt() -> str:
        commit = api.model_info(repo, revision=revision).sha
        files = api.list_repo_tree(repo, path_in_repo=folder, recursive=True, revision=commit)
        present = {file.path: file for file in files if isinstance(file, RepoFile)}
        for name, file in weights.items():
            there = present.get("/".join(filter(None, (folder, name))))
            if there is None or not _is(Item(name, file, file.stat().st_size), there):
                raise ValueError(
                    f"{repo} at {revision or _MAIN} is not the model that the adapter was trained on: its {name} is "
                    f"{'missing' if there is None else 'another'} (compared with {file}). Name the right one with "
                    "--base OWNER/NAME@REVISION"
                )
        return str(commit)

    with _quiet_client():
        return _persist(attempt, repo, revision or _MAIN, token, pause, tell)


def _commit(api: HfApi, items: Sequence[Item], repo: str, branch: str, message: str) -> Pushed:
    """Send what the branch does not hold and commit it; an attempt, which may follow one that got halfway."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.hf_api import RepoFile

    head = api.model_info(repo, revision=branch).sha
    files = api.list_repo_tree(repo, recursive=True, revision=branch)
    present = {file.path: file for file in files if isinstance(file, RepoFile)}
    same = [item.name for item in items if item.name in present and _is(item, present[item.name])]
    removed = stale(present, items)
    new = [item for item in items if item.name not in same]
    if not new and not removed:
        return Pushed(f"{api.endpoint}/{repo}", (), tuple(same), (), str(head), api.endpoint)
    additions = [CommitOperationAdd(item.name, item.content) for item in new]
    for addition in additions:
        if addition.path_in_repo.endswith(".safetensors"):  # one after the other: what has arrived stays there
            api.preupload_lfs_files(repo, [addition], revision=branch, num_threads=1)
    operations = [*additions, *(CommitOperationDelete(name) for name in removed)]
    made = api.create_commit(repo, operations, commit_message=message, revision=branch, parent_commit=head)
    sent = tuple(item.name for item in new)
    return Pushed(made.commit_url, sent, tuple(same), tuple(removed), made.oid, api.endpoint)


def _is(item: Item, file: Any) -> bool:
    """Tell whether a file of a repository holds an item's bytes: by SHA-256 for large files, by git's hash else."""
    if file.size != item.size:
        return False
    if file.lfs is not None:
        return _digest(item, hashlib.sha256()) == file.lfs.sha256
    return _digest(item, hashlib.sha1(b"blob %d\0" % item.size)) == file.blob_id


def _digest(item: Item, hasher: Any) -> str:
    """Return the hexadecimal digest of an item's bytes, read in pieces."""
    if isinstance(item.content, bytes):
        hasher.update(item.content)
    else:
        with Path(item.content).open("rb") as stream:
            while piece := stream.read(1 << 20):
                hasher.update(piece)
    return hasher.hexdigest()


def _persist(
    attempt: Callable[[], _T],
    repo: str,
    branch: str,
    token: str,
    pause: Callable[[float], None],
    tell: Callable[[str], None],
    attempts: int = ATTEMPTS,
) -> _T:
    """Try until it works, waiting longer each time; what cannot pass by waiting is raised at once."""
    wait = 1.0
    for number in range(1, attempts + 1):
        try:
            return attempt()
        except Exception as error:
            cause = _http_cause(error)
            if cause is None:
                raise
            status, after = _status(cause)
            if status is not None and status not in _PASSING:
                raise ValueError(_remedy(status, cause, repo, branch).replace(token, "***")) from None
            told = f"the Hub answered {status}" if status is not None else f"the connection broke ({_kind(cause)})"
            told = told.replace(token, "***")
            if number == attempts:
                raise OSError(
                    f"{told}, {attempts} times in a row; nothing is visible in {repo} yet. Run the same command "
                    "again later: what has arrived is not sent again"
                ) from None
            seconds = max(wait, after)
            tell(f"{told}; attempt {number + 1} of {attempts} in {seconds:.0f} s")
            pause(seconds)
            wait = min(2 * wait, 60.0)
    raise AssertionError("the last attempt returns or raises")


def _http_cause(error: BaseException | None) -> BaseException | None:
    """Return the error of the connection or of the Hub that stands behind an error, or None.

    huggingface_hub wraps those of its upload threads in a RuntimeError, and hf_xet's own are nothing else. A page in
    place of JSON comes from a proxy or from a Hub that is not well.
    """
    from huggingface_hub.errors import HfHubHTTPError

    base = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, whichever this version was built on
    first = error
    while error is not None:
        if isinstance(error, (base, ConnectionError, TimeoutError, json.JSONDecodeError)):
            return error
        error = error.__cause__
    return first if type(first) is RuntimeError else None


def _status(error: BaseException) -> tuple[int | None, float]:
    """Return the status of a reply and the seconds that it asks to wait; None for a broken connection."""
    response = getattr(error, "response", None)
    if response is None:
        return None, 0.0
    asked = response.headers.get("Retry-After", "")
    return response.status_code, min(float(asked), 300.0) if asked.isdigit() else 0.0


def _kind(error: BaseException) -> str:
    return mask(str(error).splitlines()[0] if str(error) else type(error).__name__)[:120]


def _remedy(status: int, error: BaseException, repo: str, branch: str) -> str:
    """Say what a refusal means and what to do."""
    owner = repo.split("/")[0]
    said = getattr(error, "server_message", None) or ""
    told = f" The Hub says: {mask(str(said))[:300]}" if said else ""
    meaning = {
        400: f"the Hub does not take this (400).{told}",
        401: "the Hub does not know the token (401): it is wrong, expired or revoked. Make one that may write at "
        "https://huggingface.co/settings/tokens, then `hf auth login` or HF_TOKEN",
        402: f"{owner} has used up what its plan allows (402).{told}",
        403: f"the token may not write to {repo} (403). Check the name {owner!r}, or make a token with write access to "
        f"{owner}'s repositories (`hf auth whoami` shows whose it is).{told}",
        404: f"{repo} at {branch} is not there for this token (404). Check the name; a branch of the form refs/… must "
        "exist, others are made",
        409: f"somebody else changes {repo} at this moment, or its name is taken (409); run the same command again, "
        "what has arrived is not sent again",
        413: f"the Hub finds a file too large (413).{told}",
    }
    meaning[412] = meaning[409].replace("409", "412")
    return meaning.get(status, f"the Hub refused ({status}).{told}")


@contextmanager
def _quiet_client() -> Iterator[None]:
    """Keep huggingface_hub's log to errors meanwhile: its warnings print addresses that are signed."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
