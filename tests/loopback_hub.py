"""A small Hugging Face Hub on 127.0.0.1, which the real `huggingface_hub` client talks to through
`HF_ENDPOINT`.

It knows the Hub's HTTP interface as far as model repositories need it: who am I, create a
repository, branches, pre-upload, Git LFS batch, commit, model info, tree, refs, and resolve with
ranges; tokens, private repositories, the error codes that the client turns into its exceptions,
and failures ordered by a test (`LoopbackHub.fail_next`). Two servers run, as on the
Hub: the Hub itself, and the storage of large files, on another port and therefore another origin,
reached by signed addresses only. Everything is kept in memory.

It knows nothing of PEFT or of this package, and not the Xet protocol, which the client prefers
where `hf_xet` is
installed: clients must run with `HF_HUB_DISABLE_XET=1`, upon which they use Git LFS. What is not
implemented (datasets, spaces, pull requests, deleting, copying, multi-part upload) is answered
with 501 and says so.
"""

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.npz")
LFS_FROM_SIZE = 10 * 2**20  # bytes: larger files are large files whatever their name
GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS
).encode()


@dataclass(frozen=True)
class File:
    """One file of a commit.

    Args:
        data: its bytes.
        large: whether it came through Git LFS, and is served from the storage.
    """

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        """The name of a large file in Git LFS, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself stores for a large file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
            f"size {len(self.data)}\n"
        ).encode()

    @property
    def blob_id(self) -> str:
        """The git object id: of the file, or of the pointer to a large file."""
        stored = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\x00" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        """The name under which clients cache the file."""
        return self.sha256 if self.large else self.blob_id

    def to_tree_entry(self, path: str) -> dict[str, Any]:
        """The file as an entry of the tree listing."""
        entry: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": len(self.data),
            "oid": self.blob_id,
        }
        if self.large:
            entry["lfs"] = {
                "oid": self.sha256,
                "size": len(self.data),
                "pointerSize": len(self.pointer),
            }
        return entry


@dataclass(frozen=True)
class Commit:
    """One commit: its 40-digit name, and all the files of the repository by path."""

    sha: str
    files: Mapping[str, File]


@dataclass
class Repo:
    """One model repository: its commits by name, and the commit that each branch points to."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: Mapping[str, File]) -> Commit:
        """Put a commit on a branch, at once and as a whole."""
        parent = self.branches.get(branch, "")
        content = [f"{path} {file.blob_id}" for path, file in sorted(files.items())]
        sha = hashlib.sha1(
            "\n".join([parent, str(len(self.commits)), title, *content]).encode()
        ).hexdigest()
        self.commits[sha] = Commit(sha, dict(files))
        self.branches[branch] = sha
        return self.commits[sha]


@dataclass(frozen=True)
class Request:
    """A request as it came in: its body, its headers, and the query of its address."""

    body: bytes
    headers: Message
    query: Mapping[str, list[str]]

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: object, status: int = 200) -> "Reply":
        """An answer in JSON."""
        return cls(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


class HubError(Exception):
    """An answer that is an error: HTTP status, message, and the Hub's code that tells the client
    which exception to raise.
    """

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.reply = Reply(
            status,
            json.dumps({"error": message}).encode(),
            {"Content-Type": "application/json", "X-Error-Message": message}
            | ({"X-Error-Code": code} if code else {}),
        )


@dataclass
class Failure:
    """A failure that a test ordered; see `LoopbackHub.fail_next`."""

    status: int | None
    times: int
    skip: int


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_HUB_ROUTES = {
    "GET whoami": r"/api/whoami-v2",
    "POST create": r"/api/repos/create",
    "GET auth-check": rf"/api/models/{_REPO}/auth-check/write",
    "POST validate-yaml": r"/api/validate-yaml",
    "POST branch": rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)",
    "POST preupload": rf"/api/models/{_REPO}/preupload/{_REVISION}",
    "POST commit": rf"/api/models/{_REPO}/commit/{_REVISION}",
    "POST batch": rf"/{_REPO}\.git/info/lfs/objects/batch",
    "GET tree": rf"/api/models/{_REPO}/tree/{_REVISION}",
    "GET refs": rf"/api/models/{_REPO}/refs",
    "GET info": rf"/api/models/{_REPO}(?:/revision/{_REVISION})?",
    "HEAD resolve": rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)",
    "GET resolve": rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)",
}
_STORAGE_ROUTES = {
    "PUT lfs": r"/lfs/(?P<oid>[0-9a-f]{64})",
    "GET lfs": r"/lfs/(?P<oid>[0-9a-f]{64})",
}
ENDPOINTS = (*_HUB_ROUTES, *_STORAGE_ROUTES)


class LoopbackHub:
    """A Hub of one user, which runs as long as its `with` block.

    `with LoopbackHub(token="hf_test") as hub:` then point a client to `hub.url` with that token.

    Args:
        token: the token of the one user.
        user: the user's name, and the only namespace in which repositories can be created.

    Attributes:
        url: the address for `HF_ENDPOINT`.
        calls: what was asked and how it was answered, in order: pairs such as `("PUT lfs", 200)`;
            the status is `None` where the connection was broken off.
        stored: the large files that arrived in the storage, by SHA-256, whether a commit names
            them or not.
    """

    def __init__(self, token: str = "hf_test", user: str = "user") -> None:
        self.token = token
        self.user = user
        self.calls: list[tuple[str, int | None]] = []
        self.stored: dict[str, bytes] = {}
        self._repos: dict[str, Repo] = {}
        self._failures: dict[str, Failure] = {}
        self._lock = threading.Lock()
        self._signature = secrets.token_hex(16)
        self._hub = _Server(self, _HUB_ROUTES)
        self._storage = _Server(self, _STORAGE_ROUTES)
        self.url = self._hub.url

    def __enter__(self) -> "LoopbackHub":
        for server in (self._hub, self._storage):
            threading.Thread(
                target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
            ).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    # What a test does with the Hub

    def fail_next(
        self, endpoint: str, status: int | None = 500, times: int = 1, skip: int = 0
    ) -> None:
        """Let requests fail. A request that fails changes nothing here, even if its body arrived.

        Args:
            endpoint: one of `ENDPOINTS`, e.g. `"PUT lfs"` (upload of a large file) or `"POST
                commit"`.
            status: the HTTP status of the answer. `None`: half of the body is read, and the
                connection broken off.
            times: how many requests fail. The client repeats most requests five times upon 500 and
                upon a broken connection, so a failure that it shall notice takes `times=6`.
            skip: how many requests succeed before.

        Raises:
            ValueError: for an endpoint that does not exist.
        """
        if endpoint not in ENDPOINTS:
            raise ValueError(
                f"`{endpoint}` is no endpoint of this Hub. Use one of {list(ENDPOINTS)}."
            )
        with self._lock:
            self._failures[endpoint] = Failure(status, times, skip)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision (a branch or a commit) by path, as whoever may read the
        repository sees them.
        """
        with self._lock:
            return {
                path: file.data
                for path, file in self._commit(self._repos[repo_id], revision).files.items()
            }

    def head(self, repo_id: str, revision: str = "main") -> str:
        """The name of the commit that a revision stands for."""
        with self._lock:
            return self._commit(self._repos[repo_id], revision).sha

    # How a request is answered

    def answer(self, endpoint: str, request: Request, **parts: str) -> Reply:
        """Answer a request to one of `ENDPOINTS`; `parts` are the variable parts of its address."""
        method, name = endpoint.split()
        respond: Callable[..., Reply] = getattr(self, f"_{method.lower()}_{name.replace('-', '_')}")
        with self._lock:
            try:
                return respond(request, **parts)
            except HubError as error:
                return error.reply

    def next_failure(self, endpoint: str) -> Failure | None:
        """The failure ordered for this request, if any; counts it."""
        with self._lock:
            failure = self._failures.get(endpoint)
            if failure is None:
                return None
            if failure.skip:
                failure.skip -= 1
                return None
            failure.times -= 1
            if failure.times == 0:
                del self._failures[endpoint]
            return failure

    def _signed_in(self, request: Request) -> bool:
        authorization = request.headers.get("Authorization")
        if authorization not in (None, f"Bearer {self.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        return authorization is not None

    def _require_token(self, request: Request) -> None:
        if not self._signed_in(request):
            raise HubError(401, "Invalid username or password.")

    def _readable(self, request: Request, repo_id: str) -> Repo:
        """The repository, if it exists and whoever asks may read it. Strangers are not told which
        of the two fails.

        The Hub's 401 carries no code: the client infers it from the address, but only for https.
        With the code it raises over http what it raises over https.
        """
        signed_in = self._signed_in(request)
        repo = self._repos.get(repo_id)
        if repo is None or (repo.private and not signed_in):
            if signed_in:
                raise HubError(404, "Repository not found", "RepoNotFound")
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        return repo

    def _writable(self, request: Request, repo_id: str) -> Repo:
        self._require_token(request)
        return self._readable(request, repo_id)

    def _commit(self, repo: Repo, revision: str) -> Commit:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[sha]

    def _get_whoami(self, request: Request) -> Reply:
        self._require_token(request)
        return Reply.of({"type": "user", "name": self.user, "orgs": []})

    def _get_auth_check(self, request: Request, repo_id: str) -> Reply:
        self._writable(request, repo_id)
        return Reply()

    def _post_create(self, request: Request) -> Reply:
        self._require_token(request)
        asked = request.json()
        if asked.get("type", "model") != "model":
            raise HubError(
                501, f"This Hub has no repositories of type `{asked['type']}`, only models."
            )
        namespace = asked.get("organization") or self.user
        if namespace != self.user:
            raise HubError(
                403, f"You don't have the rights to create a model under the namespace {namespace}"
            )
        repo_id = f"{namespace}/{asked['name']}"
        description = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self._repos:
            return Reply.of(
                {"error": "You already created this model repo", **description}, status=409
            )
        repo = Repo(private=asked.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": File(GITATTRIBUTES, large=False)})
        self._repos[repo_id] = repo
        return Reply.of(description)

    def _post_validate_yaml(self, request: Request) -> Reply:
        header = re.match(r"---\n(.*?)\n---", request.json()["content"], re.DOTALL)
        try:
            valid = header is None or isinstance(yaml.safe_load(header[1]), dict)
        except yaml.YAMLError:
            valid = False
        if valid:
            return Reply.of({"errors": [], "warnings": []})
        return Reply.of(
            {"errors": [{"message": "The metadata is no YAML mapping."}], "warnings": []},
            status=400,
        )

    def _post_branch(self, request: Request, repo_id: str, branch: str) -> Reply:
        repo = self._writable(request, repo_id)
        if branch in repo.branches:
            raise HubError(409, f"Reference already exists: {branch}")
        repo.branches[branch] = self._commit(repo, request.json().get("startingPoint", "main")).sha
        return Reply()

    def _post_preupload(self, request: Request, repo_id: str, revision: str) -> Reply:
        repo = self._writable(request, repo_id)
        present = self._commit(repo, revision).files
        answers = []
        for asked in request.json()["files"]:
            path, size = asked["path"], asked["size"]
            large = size >= LFS_FROM_SIZE or any(
                fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS
            )
            answers.append(
                {
                    "path": path,
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": present[path].etag if path in present else None,
                }
            )
        return Reply.of({"files": answers})

    def _post_batch(self, request: Request, repo_id: str) -> Reply:
        self._writable(request, repo_id)
        objects = []
        for asked in request.json()["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.stored:
                answer["actions"] = {"upload": {"href": self._storage_url(asked["oid"])}}
            objects.append(answer)
        return Reply.of({"transfer": "basic", "objects": objects})

    def _post_commit(self, request: Request, repo_id: str, revision: str) -> Reply:
        repo = self._writable(request, repo_id)
        if "create_pr" in request.query:
            raise HubError(501, "This Hub has no pull requests.")
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = dict(self._commit(repo, revision).files)
        title = ""
        for line in request.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.stored:
                    raise HubError(
                        400, f"LFS pointer pointed to a file that does not exist: `{value['path']}`"
                    )
                files[value["path"]] = File(self.stored[value["oid"]], large=True)
            else:
                raise HubError(501, f"This Hub does not know the operation `{item['key']}`.")
        commit = repo.commit(revision, title, files)
        return Reply.of(
            {"commitUrl": f"{self.url}/{repo_id}/commit/{commit.sha}", "commitOid": commit.sha}
        )

    def _get_tree(self, request: Request, repo_id: str, revision: str) -> Reply:
        if request.query.get("recursive", ["false"])[0].lower() != "true":
            raise HubError(501, "This Hub lists trees with `recursive=True` only.")
        files = self._commit(self._readable(request, repo_id), revision).files
        return Reply.of([file.to_tree_entry(path) for path, file in sorted(files.items())])

    def _get_refs(self, request: Request, repo_id: str) -> Reply:
        repo = self._readable(request, repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in repo.branches.items()
        ]
        return Reply.of({"branches": branches, "converts": [], "tags": []})

    def _get_info(self, request: Request, repo_id: str, revision: str = "main") -> Reply:
        repo = self._readable(request, repo_id)
        commit = self._commit(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return Reply.of(
            {
                "id": repo_id,
                "sha": commit.sha,
                "private": repo.private,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _get_resolve(self, request: Request, repo_id: str, revision: str, path: str) -> Reply:
        commit = self._commit(self._readable(request, repo_id), revision)
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            missing = HubError(404, "Entry not found", "EntryNotFound").reply
            return Reply(missing.status, missing.body, {**missing.headers, **headers})
        file = commit.files[path]
        if not file.large:
            return _content(request, file.data, {**headers, "ETag": f'"{file.etag}"'})
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
        return Reply(302, headers={**headers, "Location": self._storage_url(file.sha256)})

    _head_resolve = _get_resolve

    def _storage_url(self, oid: str) -> str:
        return f"{self._storage.url}/lfs/{oid}?signature={self._signature}"

    def _require_signature(self, request: Request) -> None:
        """Storage checks the signature in the address, and wants no token: a client that sends one
        leaks it.
        """
        if "Authorization" in request.headers:
            raise HubError(
                400,
                "Only one auth mechanism allowed: the address is signed, "
                "send no Authorization header",
            )
        if request.query.get("signature") != [self._signature]:
            raise HubError(403, "The signature of this address is not valid")

    def _put_lfs(self, request: Request, oid: str) -> Reply:
        self._require_signature(request)
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, f"The content that arrived is not `{oid}`")
        self.stored[oid] = request.body
        return Reply()

    def _get_lfs(self, request: Request, oid: str) -> Reply:
        self._require_signature(request)
        return _content(request, self.stored[oid], {"ETag": f'"{oid}"'})


def _content(request: Request, data: bytes, headers: Mapping[str, str]) -> Reply:
    """A file, or the range of it asked for (`Range: bytes=FIRST-` or `bytes=FIRST-LAST`)."""
    headers = {**headers, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if asked is None:
        return Reply(200, data, headers)
    first = int(asked[1])
    last = min(int(asked[2] or len(data) - 1), len(data) - 1)
    if first > last:
        return Reply(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return Reply(206, data[first : last + 1], headers)


class _Server(ThreadingHTTPServer):
    """One of the Hub's two servers, on a free port of 127.0.0.1."""

    daemon_threads = True

    def __init__(self, hub: LoopbackHub, routes: Mapping[str, str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.routes = [(endpoint, re.compile(pattern)) for endpoint, pattern in routes.items()]
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its endpoint, and writes the answer."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        address = urlsplit(self.path)
        endpoint, parts = self._route(address.path)
        hub = self.server.hub
        failure = hub.next_failure(endpoint)
        size = int(self.headers.get("Content-Length", 0))
        if failure is not None and failure.status is None:
            self.rfile.read(size // 2)
            self.close_connection = True
            hub.calls.append((endpoint, None))
            return
        request = Request(self.rfile.read(size), self.headers, parse_qs(address.query))
        if failure is not None and failure.status is not None:
            reply = HubError(failure.status, f"The test ordered this failure of `{endpoint}`").reply
        elif endpoint not in ENDPOINTS:
            reply = HubError(501, f"This Hub does not implement `{endpoint}`").reply
        else:
            reply = hub.answer(endpoint, request, **parts)
        hub.calls.append((endpoint, reply.status))
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _route(self, path: str) -> tuple[str, dict[str, str]]:
        """The endpoint of an address, and the variable parts of the address."""
        for endpoint, pattern in self.server.routes:
            found = pattern.fullmatch(path)
            if found and endpoint.split()[0] == self.command:
                return endpoint, {
                    name: unquote(part)
                    for name, part in found.groupdict().items()
                    if part is not None
                }
        return f"{self.command} {path}", {}

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: `LoopbackHub.calls` holds what was asked."""
