"""
A stand-in for the Hugging Face hub on 127.0.0.1: repositories are plain folders <root>/{models,datasets}/<owner>/<name>/, and pushes are
written there. It answers what the real clients ask (HF_ENDPOINT points them here); every request is kept in `log`.
"""
import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "a" * 40


class HubServer:
    """`truncate` holds names of files whose downloads break off half-way. A context manager; `env` is what a client process needs."""

    def __init__(self, root):
        self.root, self.log, self.truncate = str(root), [], set()

    def __enter__(self):
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                outer.answer(self)

            do_GET = do_POST = do_HEAD

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def env(self, home):
        """Environment of a client: this server, an empty cache at `home`, no telemetry."""
        return {**os.environ, "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}

    def folder(self, kind, repo):
        return os.path.join(self.root, kind, *repo.split("/"))

    def answer(self, h):
        url = urlsplit(h.path)
        path, query = unquote(url.path), parse_qs(url.query)
        body = h.rfile.read(int(h.headers.get("Content-Length") or 0))
        self.log.append((h.command, path))
        if h.command == "POST":
            return self.post(h, path, body)
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self.info(h, *m.groups())
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            return self.tree(h, *m.groups(), recursive=query.get("recursive") == ["true"])
        if m := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.resolve(h, "datasets" if m[1] else "models", m[2], m[3])
        return self.send(h, 404 if path != "/" else 200, {})

    def send(self, h, status, value, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        h.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), **dict(headers)}
        for k, v in headers.items():
            h.send_header(k, v)
        h.end_headers()
        if h.command != "HEAD":
            h.wfile.write(data)

    def missing(self, h, kind, repo):
        code = "EntryNotFound" if os.path.isdir(self.folder(kind, repo)) else "RepoNotFound"
        self.send(h, 404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def files(self, kind, repo):
        top = self.folder(kind, repo)
        return sorted(os.path.relpath(os.path.join(d, f), top) for d, _, fs in os.walk(top) for f in fs)

    def info(self, h, kind, repo):
        if not os.path.isdir(self.folder(kind, repo)):
            return self.missing(h, kind, repo)
        date = "2026-01-01T00:00:00.000Z"
        self.send(h, 200, {"id": repo, "sha": SHA, "private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [],
                           "lastModified": date, "createdAt": date, "siblings": [{"rfilename": f} for f in self.files(kind, repo)]})

    def tree(self, h, kind, repo, sub, recursive):
        top, prefix, entries = self.folder(kind, repo), sub.rstrip("/") + "/" if sub else "", {}
        if not os.path.isdir(os.path.join(top, sub)):
            return self.missing(h, kind, repo)
        for f in self.files(kind, repo):
            if f.startswith(prefix):
                child = prefix + f[len(prefix):].split("/")[0]
                if child != f:
                    entries[child] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": child}
                if child == f or recursive:
                    entries[f] = {"type": "file", "oid": self.etag(os.path.join(top, f)), "size": os.path.getsize(os.path.join(top, f)), "path": f}
        self.send(h, 200, [entries[k] for k in sorted(entries)])

    def etag(self, path):
        with open(path, "rb") as f:
            return hashlib.sha1(f.read()).hexdigest()

    def resolve(self, h, kind, repo, name):
        path = os.path.join(self.folder(kind, repo), name)
        if not os.path.isfile(path):
            return self.missing(h, kind, repo)
        with open(path, "rb") as f:
            data = f.read()
        headers = {"ETag": f'"{self.etag(path)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        status, first, last = 200, 0, len(data) - 1
        if m := re.fullmatch(r"bytes=(\d+)-(\d*)", h.headers.get("Range") or ""):
            status, first, last = 206, int(m[1]), min(int(m[2] or last), last)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        part = data[first:last + 1]
        if name in self.truncate and h.command == "GET":
            headers["Content-Length"] = str(len(part))
            self.send(h, status, part[:len(part) // 2], headers)
            h.close_connection = True
            return
        self.send(h, status, part, {**headers, "Content-Length": str(len(part))})

    def post(self, h, path, body):
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
            os.makedirs(self.folder(asked.get("type", "model") + "s", repo), exist_ok=True)
            return self.send(h, 200, {"url": f"{self.url}/{repo}", "name": repo, "id": repo})
        if path == "/api/validate-yaml":
            return self.send(h, 200, {"errors": [], "warnings": []})
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in json.loads(body)["files"]]
            return self.send(h, 200, {"files": files})
        if m := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/[^/]+", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    target = os.path.join(self.folder(m[1], m[2]), line["value"]["path"])
                    os.makedirs(os.path.dirname(target), exist_ok=True)
                    with open(target, "wb") as f:
                        f.write(base64.b64decode(line["value"]["content"]))
            return self.send(h, 200, {"success": True, "commitOid": SHA, "commitUrl": f"{self.url}/{m[2]}", "pullRequestUrl": None})
        self.send(h, 404, {"error": path})
