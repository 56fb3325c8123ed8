"""A small server of Google Cloud Storage's JSON API, in memory, with faults on demand.

It has what the three clients of a run ask for (TensorFlow, TensorStore, google-cloud-storage): generations and
conditions on them, ranges, media, multipart and resumable uploads, pages of listings, rewrite. TensorFlow's client has
the API's host name built in; it comes through the proxy that the server is as well (CONNECT), with a certificate made
for it.
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import ssl
import subprocess
import threading
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from typing import Any

import google_crc32c
from helpers.gcs_bucket import Bucket

HOSTS = ("www.googleapis.com", "storage.googleapis.com", "oauth2.googleapis.com")
READS = ("GET", "HEAD")
JSON = "application/json"


@dataclasses.dataclass(frozen=True)
class Server:
    """A running server: its bucket, and the environment in which the clients find it."""

    bucket: Bucket
    environment: dict[str, str]

    @property
    def url(self) -> str:
        """The address of the bucket."""
        return f"gs://{self.bucket.name}"


@contextlib.contextmanager
def serving(folder: pathlib.Path, bucket: Bucket | None = None) -> Iterator[Server]:
    """Serve a bucket on a free port; the certificate is made in `folder`."""
    bucket = bucket or Bucket()
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    names = ",".join(f"DNS:{host}" for host in ("localhost", *HOSTS))
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    made += ["-keyout", str(key), "-out", str(certificate), "-addext", f"subjectAltName={names}"]
    subprocess.run(made, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    handler = type("Handler", (_Handler,), {"bucket": bucket, "tls": tls})
    server = _Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": url,  # google-cloud-storage
        "GOOGLE_CLOUD_PROJECT": "project",
        "TENSORSTORE_GCS_HTTP_URL": url,
        "https_proxy": url,  # TensorFlow
        "CURL_CA_BUNDLE": str(certificate),
        "NO_GCE_CHECK": "true",  # and nobody asks a metadata server for credentials
        "GCE_METADATA_HOST": "127.0.0.1:1",
    }
    try:
        yield Server(bucket, environment)
    finally:
        server.shutdown()
        server.server_close()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that is killed breaks its connections."""


class _Handler(http.server.BaseHTTPRequestHandler):
    bucket: Bucket
    tls: ssl.SSLContext
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    scheme = "http"

    def do_CONNECT(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.connection = self.request = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = self.connection.makefile("rb"), self.connection.makefile("wb", 0)
        self.scheme, self.close_connection = "https", False

    def finish(self) -> None:
        super().finish()
        if self.scheme == "https":
            self.connection.close()

    def answer(self) -> None:
        body, bucket = self.read_body(), self.bucket
        bucket.requests.append(f"{self.command} {urllib.parse.unquote(self.path)}")
        if bucket.delay:
            time.sleep(bucket.delay)
        with bucket.lock:
            if bucket.unavailable > 0:
                bucket.unavailable -= 1
                self.refuse(503, "backendError")
                return
            if self.command in bucket.forbidden:
                self.refuse(403, "the caller does not have permission")
                return
            self.route(body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def route(self, body: bytes) -> None:
        parts = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        name = re.escape(self.bucket.name)
        if re.fullmatch(rf"/(upload|resumable/upload)/(storage/v1/)?b/{name}/o", parts.path):
            self.upload(query, body)
        elif found := re.fullmatch(rf"/storage/v1/b/{name}/o/([^/]+)/rewriteTo/b/{name}/o/([^/]+)", parts.path):
            self.rewrite(*map(urllib.parse.unquote, found.groups()), query)
        elif found := re.fullmatch(rf"(?:/download)?/storage/v1/b/{name}/o/(.+)", parts.path):
            self.object(urllib.parse.unquote(found[1]), query)
        elif re.fullmatch(rf"/storage/v1/b/{name}/o/?", parts.path):
            self.listing(query)
        elif parts.path == f"/storage/v1/b/{self.bucket.name}/storageLayout":
            layout = {"kind": "storage#storageLayout", "location": "US", "hierarchicalNamespace": {"enabled": False}}
            self.send(200, layout | {"bucket": self.bucket.name})
        elif parts.path == f"/storage/v1/b/{self.bucket.name}":
            self.send(200, {"kind": "storage#bucket", "id": self.bucket.name, "name": self.bucket.name})
        elif (found := re.fullmatch(rf"/{name}/(.+)", parts.path)) and self.command in READS:
            self.media(urllib.parse.unquote(found[1]))
        else:
            self.refuse(404, f"not found: {parts.path}")

    def upload(self, query: dict[str, str], body: bytes) -> None:
        """The three kinds of uploads."""
        if query.get("uploadType") == "media":
            self.write(query["name"], body, query)
        elif query.get("uploadType") == "multipart":
            boundary = re.search(r"boundary=['\"]?([^'\";]+)", self.headers["Content-Type"])[1].encode()
            _, described, content, *_ = body.split(b"--" + boundary)
            name = json.loads(described.split(b"\r\n\r\n", 1)[1]).get("name") or query["name"]
            self.write(name, content.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n"), query)
        elif "upload_id" not in query:
            name, session = query.get("name") or json.loads(body)["name"], uuid.uuid4().hex
            self.bucket.uploads[session] = {"name": name, "data": b"", "query": query}
            path = f"{self.path.split('?')[0]}?uploadType=resumable&upload_id={session}"
            self.send(200, b"", Location=f"{self.scheme}://{self.headers['Host']}{path}")
        else:
            self.resume(self.bucket.uploads.get(query["upload_id"]), body)

    def resume(self, session: dict[str, Any] | None, body: bytes) -> None:
        """A part of a resumable upload, or the question how far it has come."""
        if session is None:
            self.refuse(404, "no such upload")
            return
        said = self.headers.get("Content-Range", "")
        if part := re.fullmatch(r"bytes (\d+)-(\d+)/(\*|\d+)", said):
            session["data"] = session["data"][: int(part[1])] + body
        elif not said:
            session["data"] = body
        total = said.partition("/")[2] or str(len(body))
        if total != "*" and len(session["data"]) >= int(total):
            self.write(session["name"], session["data"], session["query"])
        else:
            have = len(session["data"])
            self.send(308, b"", **({"Range": f"bytes=0-{have - 1}"} if have else {}))

    def write(self, name: str, data: bytes, query: dict[str, str]) -> None:
        """Write an object, if the conditions hold."""
        if not self.holds(name, query):
            return
        self.bucket.put(name, data)
        if self.bucket.lost_answers > 0:
            self.bucket.lost_answers -= 1
            self.refuse(503, "the answer is lost")
        else:
            self.send(200, self.describe(name))

    def rewrite(self, source: str, target: str, query: dict[str, str]) -> None:
        """A copy on the server."""
        if source not in self.bucket.objects:
            self.refuse(404, f"no such object: {source}")
        elif self.holds(target, query):
            self.bucket.put(target, self.bucket.objects[source].data)
            size = str(len(self.bucket.objects[source].data))
            done = {"kind": "storage#rewriteResponse", "done": True, "objectSize": size, "totalBytesRewritten": size}
            self.send(200, done | {"resource": self.describe(target)})

    def object(self, name: str, query: dict[str, str]) -> None:
        """Read, describe or delete an object."""
        if name not in self.bucket.objects:
            self.refuse(404, f"no such object: {name}")
        elif not self.holds(name, query):
            return
        elif self.command == "DELETE":
            del self.bucket.objects[name]
            self.send(204, b"")
        elif query.get("alt") == "media":
            self.media(name)
        else:
            self.send(200, self.describe(name))

    def holds(self, name: str, query: dict[str, str]) -> bool:
        """Whether the conditions on the generation hold; where not, the answer is sent."""
        stored = self.bucket.objects.get(name)
        now = stored.generation if stored else 0
        if int(query.get("ifGenerationMatch", now)) != now:
            self.refuse(412, "conditionNotMet")
            return False
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == now:
            self.refuse(304 if self.command in READS else 412, "conditionNotMet")
            return False
        return True

    def media(self, name: str) -> None:
        """The content of an object, or a range of it."""
        if name not in self.bucket.objects:
            self.refuse(404, f"no such object: {name}")
            return
        stored = self.bucket.objects[name]
        size, headers = len(stored.data), {"X-Goog-Generation": str(stored.generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            self.send(200, stored.data, **headers)
            return
        start = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
        stop = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
        if start >= size:
            self.send(416, b"", **headers)
        else:
            self.send(206, stored.data[start:stop], **headers, **{"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    def listing(self, query: dict[str, str]) -> None:
        """A page of objects and, with a delimiter, of prefixes."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        entries: dict[str, str] = {}  # entry -> its kind
        for name in self.bucket.names(prefix):
            if name < query.get("startOffset", "") or name >= query.get("endOffset", "\U0010ffff"):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                entries[prefix + rest.split(delimiter)[0] + delimiter] = "prefixes"
            else:
                entries[name] = "items"
        after = base64.urlsafe_b64decode(query.get("pageToken", "")).decode()
        left = sorted(entry for entry in entries if entry > after)
        page = left[: min(int(query.get("maxResults", self.bucket.page)), self.bucket.page)]
        answer: dict[str, Any] = {"kind": "storage#objects"}
        for entry in page:
            kind = entries[entry]
            answer.setdefault(kind, []).append(entry if kind == "prefixes" else self.describe(entry))
        if len(page) < len(left):
            answer["nextPageToken"] = base64.urlsafe_b64encode(page[-1].encode()).decode()
        self.send(200, answer)

    def describe(self, name: str) -> dict[str, Any]:
        """The metadata of an object."""
        stored, bucket = self.bucket.objects[name], self.bucket.name
        quoted = urllib.parse.quote(name, safe="")
        link = f"http://{self.headers['Host']}/download/storage/v1/b/{bucket}/o/{quoted}"
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{stored.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(stored.generation),
            "metageneration": "1",
            "size": str(len(stored.data)),
            "updated": stored.updated,
            "timeCreated": stored.updated,
            "crc32c": base64.b64encode(google_crc32c.value(stored.data).to_bytes(4, "big")).decode(),
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "contentType": "application/octet-stream",
            "etag": str(stored.generation),
            "mediaLink": f"{link}?generation={stored.generation}&alt=media",
        }

    def read_body(self) -> bytes:
        """The body of a request."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def refuse(self, code: int, message: str) -> None:
        """An error in the form of the API."""
        self.send(code, {"error": {"code": code, "message": message}})

    def send(self, code: int, body: Any, **headers: str) -> None:
        """An answer: bytes, or an object as JSON."""
        if not isinstance(body, bytes):
            body, headers["Content-Type"] = json.dumps(body).encode(), JSON
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        empty = code in (204, 304)
        self.send_header("Content-Length", "0" if empty else str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and not empty:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
