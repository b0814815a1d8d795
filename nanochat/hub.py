"""
The Hugging Face hub through its own clients. They retry for twenty seconds and more on every call when there is no network, so
one quick probe comes first; without an answer only what is cached already is used.
"""
import hashlib
import os
import sys
import urllib.error
import urllib.request
from functools import lru_cache

PROBE_SECONDS = 5


def endpoint():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


@lru_cache(None)
def online():
    """Whether the hub answers: one request a process. If not, its clients are put into their offline mode (cache only)."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint(), method="HEAD"), timeout=PROBE_SECONDS).close()
        return True
    except urllib.error.HTTPError:
        return True  # it answers, if with a refusal
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the clients are imported ...
        for client in ("huggingface_hub.constants", "datasets.config"):  # ... and by those that have been
            if client in sys.modules:
                sys.modules[client].HF_HUB_OFFLINE = True
        return False


def asked(what, call):
    """call(), a request to the hub, with every failure of the network or the hub as one line that names `what`."""
    here = online()
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
    try:
        return call()
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as e:
        reason = f"the download failed ({e})" if here else f"the hub ({endpoint()}) does not answer or HF_HUB_OFFLINE is set, and it is not cached"
        raise ConnectionError(f"{what}: {reason}. Give a local path, or try again with a network") from e
    except HfHubHTTPError as e:
        hint = " (private or gated: set HF_TOKEN)" if e.response is not None and e.response.status_code in (401, 403) else ""
        raise FileNotFoundError(f"{what}: not on the hub{hint}: {str(e).splitlines()[0]}") from e
    except Exception as e:
        if not type(e).__module__.startswith(("httpx", "httpcore", "requests")):  # the clients let their transport's errors through
            raise
        raise ConnectionError(f"{what}: the download broke off ({e}). Try again") from e


def download(repo, filename, repo_type="model", revision=None):
    """Local path of a file of `repo`, a hub name ("owner/name", then cached) or a local folder."""
    if os.path.isdir(repo):
        path = os.path.join(repo, filename)
        if not os.path.exists(path):
            raise FileNotFoundError(f"{repo} has no {filename}: it holds {sorted(os.listdir(repo))[:10]}")
        return path
    if repo.count("/") != 1 or repo.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{repo} is neither a folder here nor a hub name (owner/name)")
    online()
    from huggingface_hub import hf_hub_download
    return asked(f"{filename} of {repo}", lambda: hf_hub_download(repo, filename, repo_type=repo_type, revision=revision))


def list_files(repo, repo_type="model", revision=None):
    """Names of the files at the top of a local folder, or of all files of a hub repository (offline: of its cached copy)."""
    if os.path.isdir(repo):
        return sorted(os.listdir(repo))
    if online():
        from huggingface_hub import list_repo_files
        return asked(repo, lambda: list_repo_files(repo, repo_type=repo_type, revision=revision))
    from huggingface_hub import snapshot_download
    folder = asked(repo, lambda: snapshot_download(repo, repo_type=repo_type, revision=revision, local_files_only=True))
    return sorted(os.listdir(folder))


def dataset(repo, config=None, split="train", streaming=False):
    """A `datasets` Dataset (or IterableDataset) of a hub name or a local copy of its folder."""
    online()
    from datasets import config as settings
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError
    cache = None
    if os.path.isdir(repo):  # datasets caches a local folder by its name and README alone, and would go on reading files that have changed
        files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(os.path.abspath(repo)) for name in names)
        state = repr([(path, os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files])
        cache = os.path.join(settings.HF_DATASETS_CACHE, "local", hashlib.sha256(state.encode()).hexdigest()[:16])
    try:
        return asked(f"data set {repo} ({config or 'default'}, {split})",
                     lambda: load_dataset(repo, config, split=split, streaming=streaming, cache_dir=cache))
    except DatasetNotFoundError as e:
        raise FileNotFoundError(f"data set {repo}: {e}") from e
