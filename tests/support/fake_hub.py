"""A local server that speaks as much of the Hub's HTTP API as an upload needs, and keeps what was sent.

Tokens: "good" may write to jane/*, "readonly" may write nowhere; any other is unknown. No Xet (HF_HUB_DISABLE_XET=1).
"""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

USERS = {"hf_good": "write", "hf_readonly": "read"}
LARGE = (".safetensors", ".gguf")


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []


class FakeHub(ThreadingHTTPServer):
    """``repos``: what was published. ``requests``: (method, path, token). ``stall``: uploads wait while it is set."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256, published or not
        self.requests: list[tuple[str, str, str]] = []
        self.bodies: list[bytes] = []  # of commits
        self.fail: dict = {}  # part of a path -> status, or (status, message), or (status, message, so many times)
        self.headers: dict[str, str] = {}  # of those answers
        self.scoped: list | None = None  # of a fine-grained token: [{entity, permissions}]
        self.made: list[tuple[str, bool]] = []  # repositories as they were created: (name, private)
        self.stall = threading.Event()
        self.uploading = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def running():
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stall.clear()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer("GET")

    def do_HEAD(self):
        self.answer("HEAD")

    def do_POST(self):
        self.answer("POST")

    def do_PUT(self):
        self.answer("PUT")

    def do_DELETE(self):
        self.answer("DELETE")

    # ---- one request

    def answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append((method, path, token))
        body = self.body()
        for part, told in list(self.server.fail.items()):
            if part in path:
                status, *more = told if isinstance(told, tuple) else (told,)
                said = more[0] if more else f"told to fail with {status}, token {token}"
                if len(more) > 1:  # so many times
                    self.server.fail[part] = (status, said, more[1] - 1)
                    if more[1] == 1:
                        del self.server.fail[part]
                return self.reply(status, {"error": said}, self.server.headers)
        if path.startswith("/lfs/"):
            return self.store(path, body)
        if token not in USERS:
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/whoami-v2":
            rights = {"displayName": "t", "role": USERS[token]}
            if self.server.scoped is not None:
                rights = {"role": "fineGrained", "fineGrained": {"global": [], "scoped": self.server.scoped}}
            auth = {"type": "access_token", "accessToken": rights}
            return self.reply(200, {"type": "user", "name": "jane", "orgs": [], "auth": auth})
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if path == "/api/repos/delete":
            asked = json.loads(body)
            del self.server.repos[f"{asked.get('organization') or 'jane'}/{asked['name']}"]
            return self.reply(200, {})
        name, rest = self.split(path)
        repo = self.server.repos.get(name)
        if repo is None:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "/resolve/" in rest:
            return self.resolve(repo, rest.partition("/resolve/main/")[2])
        if method == "GET":
            there = [{"rfilename": file} for file in (".gitattributes", *repo.files)]
            return self.reply(200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": there})
        if not self.may_write(name, token):
            return self.reply(403, {"error": "You don't have the rights to write here."})
        if rest == "/settings":
            repo.private = json.loads(body)["visibility"] == "private"
            return self.reply(200, {})
        if rest.startswith("/preupload/"):
            return self.preupload(repo, json.loads(body))
        if rest == ".git/info/lfs/objects/batch":
            return self.batch(json.loads(body))
        if rest.startswith("/commit/"):
            return self.commit(name, repo, body)
        return self.reply(404, {"error": f"unknown path {path}"})

    def split(self, path: str) -> tuple[str, str]:
        parts = path.removeprefix("/api/models").strip("/").split("/", 2)
        owner, name = parts[0], parts[1] if len(parts) > 1 else ""
        rest = "/" + parts[2] if len(parts) > 2 else ""
        if ".git" in name:
            name, rest = name.partition(".git")[0], ".git" + rest
        return f"{owner}/{name}", rest

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, value=None, headers: dict | None = None, raw: bytes | None = None) -> None:
        data = raw if raw is not None else json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- what the Hub does

    def may_write(self, name: str, token: str) -> bool:
        return USERS[token] == "write" and name.startswith("jane/")

    def create(self, asked: dict, token: str) -> None:
        name = f"{asked.get('organization') or 'jane'}/{asked['name']}"
        if not self.may_write(name, token):
            return self.reply(403, {"error": "You don't have the rights to create this."})
        if name in self.server.repos:
            return self.reply(409, {"error": "You already created this repo", "url": f"{self.server.url}/{name}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.server.repos[name] = Repo(bool(private))
        self.server.made.append((name, bool(private)))
        return self.reply(200, {"url": f"{self.server.url}/{name}", "name": name, "id": name})

    def preupload(self, repo: Repo, asked: dict) -> None:
        files = []
        for file in asked["files"]:
            large = file["path"].endswith(LARGE) or file["size"] > 10_000_000
            there = repo.files.get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if there is not None:
                entry["oid"] = hashlib.sha256(there).hexdigest() if large else git_oid(there)
            files.append(entry)
        self.reply(200, {"files": files})

    def batch(self, asked: dict) -> None:
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self.reply(200, {"transfer": "basic", "objects": objects})

    def store(self, path: str, body: bytes) -> None:
        self.server.uploading.set()
        while self.server.stall.is_set():
            threading.Event().wait(0.02)
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            return self.reply(400, {"error": "the hash differs"})
        self.server.objects[oid] = body
        return self.reply(200, {})

    def commit(self, name: str, repo: Repo, body: bytes) -> None:
        self.server.bodies.append(body)
        new = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                new[value["path"]] = self.server.objects[value["oid"]]
        repo.files |= new
        repo.commits.append(hashlib.sha1(body).hexdigest())
        url = f"{self.server.url}/{name}/commit/{repo.commits[-1]}"
        self.reply(200, {"success": True, "commitOid": repo.commits[-1], "commitUrl": url})

    def resolve(self, repo: Repo, file: str) -> None:
        if file not in repo.files:
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        data = repo.files[file]
        commit = (repo.commits or ["0" * 40])[-1]
        return self.reply(200, headers={"ETag": f'"{git_oid(data)}"', "X-Repo-Commit": commit}, raw=data)


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
