"""A Hub on this machine, for tests: the real client creates a repository, uploads a folder, and loads a model from it.

Only what that takes, over LFS (the client needs HF_HUB_DISABLE_XET=1), and branches. Everything is in memory, on 127.0.0.1.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml
from tiny_run import ROOT


TOKEN = "hf_test_secret"


def environment_of(endpoint: str, home: Path) -> dict[str, str]:
    """Nothing of this process's Hugging Face settings: its own home, and the Hub at `endpoint`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    return environment


class Refusal(Exception):
    """An HTTP status, the code by which the client tells the reasons apart, and what else the answer holds."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "HubServer"

    def log_message(self, *_):
        pass

    def answer(self):
        request = f"{self.command} {unquote(urlsplit(self.path).path)}"
        body, headers = self.read_body(), {}  # always read: the connection is used again
        try:
            for pattern, status in self.server.broken.items():
                if re.fullmatch(pattern, request):
                    if status == CUT:
                        self.server.requests.append((request, status))
                        self.close_connection = True
                        return
                    raise Refusal(status, "Broken")
            for pattern, (needs_token, route) in ROUTES.items():
                if match := re.fullmatch(pattern, request):
                    if needs_token and not self.has_token():
                        raise Refusal(401, "InvalidToken")
                    content, headers = route(self, body, **match.groupdict())
                    status = 200
                    break
            else:
                raise Refusal(404, "EntryNotFound")
        except Refusal as refusal:
            status, code, *rest = refusal.args
            content, headers = dict(*rest, error=code), {"X-Error-Code": code}
        self.server.requests.append((request, status))
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def commit_of(self, name: str, revision: str | None) -> tuple[str, dict[str, bytes]]:
        commits = self.server.commits.get(name)
        if commits is None or (self.server.private[name] and not self.has_token()):
            raise Refusal(404, "RepoNotFound")
        commit = self.server.branches[name].get(revision or "main", revision)
        if commit not in commits:
            raise Refusal(404, "RevisionNotFound")
        return commit, commits[commit]

    # One method for each route: what is returned is the content of the answer and its own headers.

    def name_the_user(self, body):
        return {"type": "user", "name": self.server.user}, {}

    def create_repository(self, body):
        wish = json.loads(body)
        name = f"{wish.get('organization') or self.server.user}/{wish['name']}"
        answer = {"url": f"{self.server.endpoint}/{name}"}
        if name in self.server.commits:
            raise Refusal(409, "RepoExists", answer)
        self.server.private[name] = wish.get("visibility") == "private"
        self.server.add_commit(name, {})
        return answer, {}

    def validate_card(self, body):
        yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        return {"errors": [], "warnings": []}, {}

    def create_branch(self, body, name, branch):
        commit, _ = self.commit_of(name, "main")
        if branch in self.server.branches[name]:
            raise Refusal(409, "BranchExists")
        self.server.branches[name][branch] = commit
        return {}, {}

    def choose_upload_modes(self, body, name, revision):
        modes = {True: "lfs", False: "regular"}
        files = [(file["path"], modes[file["path"].endswith(".safetensors")]) for file in json.loads(body)["files"]]
        return {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in files]}, {}

    def offer_large_uploads(self, body, name):
        objects = json.loads(body)["objects"]
        for item in objects:
            if item["oid"] not in self.server.large_files:
                item["actions"] = {"upload": {"href": f"{self.server.endpoint}/large-files/{item['oid']}"}}
        return {"transfer": "basic", "objects": objects}, {}

    def take_large_file(self, body, digest):
        if hashlib.sha256(body).hexdigest() != digest:
            raise Refusal(400, "DigestMismatch")
        self.server.large_files[digest] = body
        return b"", {}

    def commit(self, body, name, revision):
        files = dict(self.commit_of(name, revision)[1])
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
        commit = self.server.add_commit(name, files, revision)
        return {"commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}", "commitOid": commit}, {}

    def describe(self, body, name, revision=None):
        commit, files = self.commit_of(name, revision)
        card = yaml.safe_load(files["README.md"].decode().split("---\n")[1]) if "README.md" in files else None
        siblings = [{"rfilename": path} for path in files]
        private = self.server.private[name]
        return {"id": name, "sha": commit, "private": private, "siblings": siblings, "cardData": card}, {}

    def send_file(self, body, name, revision, path):
        commit, files = self.commit_of(name, revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        return files[path], {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"'}


CUT = "cut"  # in place of a status: the connection ends without an answer
NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = {  # request -> whether only the owner's token opens it, and what answers
    r"GET /api/whoami-v2": (True, Handler.name_the_user),
    r"POST /api/repos/create": (True, Handler.create_repository),
    r"POST /api/validate-yaml": (False, Handler.validate_card),
    rf"POST /api/models/{NAME}/branch/(?P<branch>[^/]+)": (True, Handler.create_branch),
    rf"POST /api/models/{NAME}/preupload/{REVISION}": (True, Handler.choose_upload_modes),
    rf"POST /{NAME}\.git/info/lfs/objects/batch": (True, Handler.offer_large_uploads),
    r"PUT /large-files/(?P<digest>[0-9a-f]{64})": (False, Handler.take_large_file),
    rf"POST /api/models/{NAME}/commit/{REVISION}": (True, Handler.commit),
    rf"GET /api/models/{NAME}(/revision/{REVISION})?": (False, Handler.describe),
    rf"(GET|HEAD) /{NAME}/resolve/{REVISION}/(?P<path>.+)": (False, Handler.send_file),
}


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` answers at `hub.endpoint`.

    Attributes:
        commits: repository -> commit -> path -> content, in the order in which they came.
        branches: repository -> branch -> its newest commit.
        private: repository -> whether only the owner may see it.
        requests: ("METHOD /path", status) of every request so far.
        broken: regular expression for "METHOD /path" -> status with which such requests fail, or `CUT`; may change at any time.
    """

    def __init__(self, token: str, user: str = "user"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token, self.user, self.endpoint = token, user, f"http://127.0.0.1:{self.server_address[1]}"
        self.commits, self.branches, self.private, self.large_files, self.requests, self.broken = (
            {},
            {},
            {},
            {},
            [],
            {},
        )

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def add_commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        commits = self.commits.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = files
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        return self.commits[name][self.branches[name][branch]]
