"""
The Hugging Face hub, through its own clients.

Without a network the clients retry every call for twenty seconds and more. So one quick probe comes
first; if the hub does not answer it, only what is already cached is used.
"""
import hashlib
import os
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from functools import lru_cache

PROBE_SECONDS = 5
ANSWER_SECONDS = 20  # for a small answer about a repository
FIRST_WORD = 10      # seconds before the first "still waiting" message,
NEXT_WORD = 60       # and between later ones

# -----------------------------------------------------------------------------
# Is it there, and what went wrong

def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@lru_cache(None)
def online():
    """Whether the hub answers: one request per process. If not, its clients are put offline."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    request = urllib.request.Request(endpoint(), method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        return True
    except urllib.error.HTTPError:
        return True  # a refusal is an answer, too
    except OSError:
        go_offline()
        return False


@lru_cache(None)
def check_answers(repo, repo_type="model"):
    """
    ConnectionError if the hub says nothing about this repository: one request, once per process.
    A hub can be up and hang all the same, and its clients would then retry for minutes in silence.
    """
    url = f"{endpoint()}/api/{repo_type}s/{repo}"
    try:
        with waiting_for(f"the hub's answer about {repo}"):
            urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it will tell the clients the same
    except OSError as error:
        raise ConnectionError(f"{repo}: the hub ({endpoint()}) is there, but did not answer within "
                              f"{ANSWER_SECONDS} s ({error}). Give a local path, try again later, "
                              f"or set HF_HUB_OFFLINE=1 to use what is cached") from error


@contextmanager
def waiting_for(what):
    """Says on standard error what the block is waiting for, if it takes long."""
    over = threading.Event()

    def remind():
        seconds = 0
        pause = FIRST_WORD
        while not over.wait(pause):
            seconds += pause
            print(f"still waiting for {what}, {seconds:.0f} s so far", file=sys.stderr, flush=True)
            pause = NEXT_WORD

    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def go_offline():
    """Puts the hub's clients into their offline mode, in which they read their cache only."""
    # The clients read the variable when they are imported. Those that have been imported already
    # need their constant changed.
    os.environ["HF_HUB_OFFLINE"] = "1"
    for client in ("huggingface_hub.constants", "datasets.config"):
        if client in sys.modules:
            sys.modules[client].HF_HUB_OFFLINE = True


def asked(what, call, *args, **kwargs):
    """
    call(*args, **kwargs), a request to the hub. Every failure of the network or the hub becomes one
    line that starts with `what`: FileNotFoundError for what is not there, else ConnectionError.
    """
    hub_answers = online()
    from huggingface_hub.errors import (
        HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    try:
        with waiting_for(f"the hub: {what}"):
            return call(*args, **kwargs)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        reason = f"the download failed ({error})"
        if not hub_answers:
            reason = (f"the hub ({endpoint()}) does not answer or HF_HUB_OFFLINE is set, "
                      "and it is not cached")
        advice = "Give a local path, or try again with a network"
        raise ConnectionError(f"{what}: {reason}. {advice}") from error
    except HfHubHTTPError as error:
        first_line = str(error).splitlines()[0]
        status = 404 if error.response is None else error.response.status_code
        if status == 429 or status >= 500:
            raise ConnectionError(f"{what}: the hub is busy or broken ({first_line}). Try again "
                                  f"later") from error
        hint = " (private or gated: set HF_TOKEN)" if status in (401, 403) else ""
        raise FileNotFoundError(f"{what}: not on the hub{hint}: {first_line}") from error
    except Exception as error:
        # The clients let the errors of their transport through, from whichever library it is.
        if not type(error).__module__.startswith(("httpx", "httpcore", "requests")):
            raise
        raise ConnectionError(f"{what}: the download broke off ({error}). Try again") from error


# -----------------------------------------------------------------------------
# Files. A repository is a hub name ("owner/name") or a local folder.

def check_name(repo):
    """FileNotFoundError for what can only be a mistyped path. The hub's answer tells less."""
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no such folder {repo}, and it is no hub name (owner/name) either")


def download(repo, filename, repo_type="model", revision=None):
    """Local path of one file of `repo`. From the hub it is downloaded once, then cached."""
    if os.path.isdir(repo):
        path = os.path.join(repo, filename)
        if not os.path.exists(path):
            some = sorted(os.listdir(repo))[:10]
            raise FileNotFoundError(f"{repo} has no {filename}: it holds {some}")
        return path
    check_name(repo)
    if online():  # before the import: offline mode is read from the environment there
        check_answers(repo, repo_type)
    from huggingface_hub import hf_hub_download
    what = f"{filename} of {repo}"
    return asked(what, hf_hub_download, repo, filename, repo_type=repo_type, revision=revision)


def list_files(repo, repo_type="model", revision=None):
    """
    Names of the files at the top of a local folder, or of all files of a hub repository (offline:
    at the top of its cached copy).
    """
    if os.path.isdir(repo):
        return sorted(os.listdir(repo))
    check_name(repo)
    which = {"repo_type": repo_type, "revision": revision}
    # Offline there is no list, but the cached snapshot is a folder.
    if online():
        check_answers(repo, repo_type)
        from huggingface_hub import list_repo_files
        return asked(repo, list_repo_files, repo, **which)
    from huggingface_hub import snapshot_download
    folder = asked(repo, snapshot_download, repo, local_files_only=True, **which)
    return sorted(os.listdir(folder))


# -----------------------------------------------------------------------------
# Data sets

def dataset(repo, config=None, split="train", streaming=False):
    """A `datasets` Dataset (or, streaming, an IterableDataset) of a hub name or a local copy."""
    is_local = os.path.isdir(repo)
    if not is_local:
        check_name(repo)
    if online() and not is_local:  # before the import, as above
        check_answers(repo, "dataset")
    from datasets import config as settings
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    # datasets caches a local folder under its name and README alone, and would go on reading files
    # that have changed since. So each state of a local folder gets a cache of its own.
    cache_dir = None
    if is_local:
        cache_dir = os.path.join(settings.HF_DATASETS_CACHE, "local", folder_state(repo))

    what = f"data set {repo} ({config or 'default'}, {split})"
    options = {"split": split, "streaming": streaming, "cache_dir": cache_dir}
    # Not a failure of the network: `datasets` says it for local folders without data files, too.
    try:
        return asked(what, load_dataset, repo, config, **options)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"data set {repo}: {error}") from error


def folder_state(folder):
    """A short hash of the names, sizes and times of all files in a folder."""
    state = []
    for parent, _, names in os.walk(os.path.abspath(folder)):
        for name in names:
            path = os.path.join(parent, name)
            stat = os.stat(path)
            state.append((path, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(repr(sorted(state)).encode()).hexdigest()[:16]
