"""A local server that speaks the Hub's protocol for downloads: HEAD and GET of /REPOSITORY/resolve/REVISION/FILE."""

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator

COMMIT = "1" * 40
TOKEN = "hf_secret"


class Hub:
    """Files by "REPOSITORY/FILE", and what goes wrong when they are fetched."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.private: set[str] = set()  # repositories
        self.gated: set[str] = set()
        self.truncated: set[str] = set()  # files whose transfer breaks off half way
        self.wrong: dict[str, str] = {}  # file -> the digest that is announced
        self.elsewhere = ""  # another host that large files are redirected to
        self.requests: list[str] = []  # "METHOD path"
        self.url = ""

    @property
    def repositories(self) -> set[str]:
        """OWNER/REPOSITORY of all files."""
        return {"/".join(name.split("/")[:2]) for name in self.files}


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve a Hub on a free port; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0].lstrip("/")
            if path.startswith("cdn/"):
                self.send_file(path.removeprefix("cdn/"), body)
                return
            owner, name, _, revision, *rest = path.split("/")
            repository, file = f"{owner}/{name}", f"{owner}/{name}/{'/'.join(rest)}"
            authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repository not in hub.repositories or (repository in hub.private and not authorized):
                self.refuse(401 if not authorized else 404, "RepoNotFound")
            elif repository in hub.gated and not authorized:
                self.refuse(403, "GatedRepo")
            elif revision not in ("main", COMMIT):
                self.refuse(404, "RevisionNotFound")
            elif file not in hub.files:
                self.refuse(404, "EntryNotFound")
            elif hub.elsewhere:
                self.describe(302, file, length=0, Location=f"{hub.elsewhere}/cdn/{file}")
            else:
                self.describe(200, file, length=len(hub.files[file]))
                self.send_body(file, body)

        def describe(self, code: int, file: str, *, length: int, **headers: str) -> None:
            digest = hub.wrong.get(file) or hashlib.sha256(hub.files[file]).hexdigest()
            self.send_response(code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(hub.files[file])))
            self.send_header("Content-Length", str(length))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

        def send_file(self, file: str, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(hub.files[file])))
            self.end_headers()
            self.send_body(file, body)

        def send_body(self, file: str, body: bool) -> None:
            if not body:
                return
            content = hub.files[file]
            if file in hub.truncated:
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
            else:
                self.wfile.write(content)

        def refuse(self, code: int, reason: str) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", reason)
            self.send_header("X-Error-Message", reason)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        yield hub.url
    finally:
        server.shutdown()
        server.server_close()
