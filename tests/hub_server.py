"""
A stand-in for the Hugging Face hub on 127.0.0.1. Repositories are plain folders
<root>/{models,datasets}/<owner>/<name>/, and pushes are written there. It answers what the real
clients ask (HF_ENDPOINT points them here).
"""
import base64
import hashlib
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "a" * 40  # the one commit of every repository
DATE = "2026-01-01T00:00:00.000Z"


class HubServer:
    """
    A context manager.

    log       [(method, path)] of every request
    truncate  names of files whose downloads break off half-way
    hangs     whether it answers nothing but the probe of its front page
    """
    def __init__(self, root):
        self.root = str(root)
        self.log = []
        self.truncate = set()
        self.hangs = False

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home):
        """Environment of a client process: this server, an empty cache at `home`, no telemetry."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    def folder(self, kind, repo):
        return os.path.join(self.root, kind, *repo.split("/"))

    def files(self, kind, repo):
        top = self.folder(kind, repo)
        paths = []
        for parent, _, names in os.walk(top):
            for name in names:
                paths.append(os.path.relpath(os.path.join(parent, name), top))
        return sorted(paths)


def etag(path):
    with open(path, "rb") as f:
        return hashlib.sha1(f.read()).hexdigest()


# What a client asks for: kind, repository ("owner/name"), and more
INFO = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?")
TREE = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+/?(.*)")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")
PREUPLOAD = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/[^/]+")
COMMIT = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/[^/]+")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self):
        return self.server.hub

    def log_message(self, *args):
        pass

    def send(self, status, value, headers=None):
        """value: bytes, or what becomes JSON."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        all_headers = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        all_headers.update(headers or {})
        self.send_response(status)
        for name, header in all_headers.items():
            self.send_header(name, header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_missing(self, kind, repo):
        # The clients raise the error that this code names.
        exists = os.path.isdir(self.hub.folder(kind, repo))
        code = "EntryNotFound" if exists else "RepoNotFound"
        self.send(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    # -------------------------------------------------------------------------
    # Reading

    def do_GET(self):
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.log.append((self.command, path))
        if self.hub.hangs and path != "/":
            time.sleep(3)  # more than the test waits
            self.close_connection = True
            return
        if match := INFO.fullmatch(path):
            self.send_info(*match.groups())
        elif match := TREE.fullmatch(path):
            recursive = parse_qs(url.query).get("recursive") == ["true"]
            self.send_tree(*match.groups(), recursive)
        elif match := RESOLVE.fullmatch(path):
            prefix, repo, name = match.groups()
            self.send_file("datasets" if prefix else "models", repo, name)
        else:
            self.send(200 if path == "/" else 404, {})

    do_HEAD = do_GET

    def send_info(self, kind, repo):
        if not os.path.isdir(self.hub.folder(kind, repo)):
            return self.send_missing(kind, repo)
        self.send(200, {
            "id": repo,
            "sha": SHA,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": DATE,
            "createdAt": DATE,
            "siblings": [{"rfilename": name} for name in self.hub.files(kind, repo)],
        })

    def send_tree(self, kind, repo, folder, recursive):
        """The entries of a folder, or everything under it."""
        top = self.hub.folder(kind, repo)
        if not os.path.isdir(os.path.join(top, folder)):
            return self.send_missing(kind, repo)
        prefix = folder.rstrip("/") + "/" if folder else ""
        entries = {}
        for name in self.hub.files(kind, repo):
            if not name.startswith(prefix):
                continue
            child = prefix + name[len(prefix):].split("/")[0]
            if child != name:
                entries[child] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": child}
            if child == name or recursive:
                path = os.path.join(top, name)
                size = os.path.getsize(path)
                entries[name] = {"type": "file", "oid": etag(path), "size": size, "path": name}
        self.send(200, [entries[path] for path in sorted(entries)])

    def send_file(self, kind, repo, name):
        """A file, or the range of its bytes that the client asks for."""
        path = os.path.join(self.hub.folder(kind, repo), name)
        if not os.path.isfile(path):
            return self.send_missing(kind, repo)
        with open(path, "rb") as f:
            data = f.read()
        headers = {
            "ETag": f'"{etag(path)}"',
            "X-Repo-Commit": SHA,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        status = 200
        part = data
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted:
            status = 206
            first = int(wanted[1])
            last = min(int(wanted[2] or len(data)), len(data) - 1)
            part = data[first:last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        headers["Content-Length"] = str(len(part))
        if name in self.hub.truncate and self.command == "GET":
            self.send(status, part[:len(part) // 2], headers)  # less than was announced
            self.close_connection = True
        else:
            self.send(status, part, headers)

    # -------------------------------------------------------------------------
    # Pushing

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.log.append((self.command, path))
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.send(200, {"errors": [], "warnings": []})
        elif PREUPLOAD.fullmatch(path):
            self.choose_upload(json.loads(body)["files"])
        elif match := COMMIT.fullmatch(path):
            kind, repo = match.groups()
            self.commit(kind, repo, body.splitlines())
        else:
            self.send(404, {"error": path})

    def create(self, asked):
        repo = asked["name"]
        if asked.get("organization"):
            repo = f"{asked['organization']}/{repo}"
        kind = asked.get("type", "model") + "s"
        os.makedirs(self.hub.folder(kind, repo), exist_ok=True)
        self.send(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def choose_upload(self, files):
        """Every file is to come within the commit: "regular" avoids LFS and xet."""
        answers = []
        for file in files:
            answers.append({"path": file["path"], "uploadMode": "regular", "shouldIgnore": False,
                            "oid": None})
        self.send(200, {"files": answers})

    def commit(self, kind, repo, lines):
        """lines: JSON, one per file, its content in base64."""
        for line in map(json.loads, lines):
            if line["key"] != "file":
                continue
            target = os.path.join(self.hub.folder(kind, repo), line["value"]["path"])
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as f:
                f.write(base64.b64decode(line["value"]["content"]))
        self.send(200, {
            "success": True,
            "commitOid": SHA,
            "commitUrl": f"{self.hub.url}/{repo}",
            "pullRequestUrl": None,
        })
