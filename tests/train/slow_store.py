"""An object store that is slow: the part of Google Cloud Storage's JSON API that TensorStore uses,
on localhost, and the same objects for epath, through fsspec.

    with slow_store.serve(seconds) as store: ...   # each request then takes that long
"""

import contextlib
import http.server
import io
import json
import os
import threading
import time
import urllib.parse
from collections.abc import Iterator

import fsspec


class Store:
    """Objects by "bucket/name"; ``seconds`` is what a request takes."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.objects: dict[str, tuple[bytes, int]] = {}  # content, generation
        self.requests: list[float] = []  # when each began
        self._lock = threading.Lock()

    def wait(self) -> None:
        self.requests.append(time.monotonic())
        time.sleep(self.seconds)

    def put(self, name: str, content: bytes, match: str | None = None) -> int | None:
        """Return the generation; None where that before is not ``match``."""
        with self._lock:
            before = self.objects.get(name, (b"", 0))[1]
            if match is not None and int(match) != before:
                return None
            self.objects[name] = content, before + 1
            return before + 1

    def below(self, prefix: str) -> list[str]:
        with self._lock:
            return sorted(name for name in self.objects if name.startswith(prefix))


_store: list[Store] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def _parts(self) -> tuple[str, str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        bucket, _, rest = url.path.partition("/b/")[2].partition("/o")
        name = urllib.parse.unquote(rest.removeprefix("/"))
        return bucket, name, dict(urllib.parse.parse_qsl(url.query))

    def _answer(self, code: int, content: bytes, generation: int = 0) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        store = _store[0]
        bucket, name, query = self._parts()
        store.wait()
        if not name:
            names = [each.removeprefix(f"{bucket}/") for each in store.below(f"{bucket}/")]
            items = [
                {"name": each, "size": str(len(store.objects[f"{bucket}/{each}"][0]))}
                for each in names
                if each.startswith(query.get("prefix", ""))
                and each >= query.get("startOffset", "")
                and (not query.get("endOffset") or each < query["endOffset"])
            ]
            self._answer(200, json.dumps({"items": items}).encode())
            return
        found = store.objects.get(f"{bucket}/{name}")
        if found is None:
            self._answer(404, b"{}")
            return
        content, generation = found
        if query.get("ifGenerationNotMatch") == str(generation):
            self._answer(304, b"", generation)
            return
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            stop = int(last) + 1 if first and last else len(content)
            part = content[start:stop]
            self.send_response(206)
            self.send_header("Content-Length", str(len(part)))
            self.send_header(
                "Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}"
            )
            self.send_header("x-goog-generation", str(generation))
            self.end_headers()
            self.wfile.write(part)
            return
        self._answer(200, content, generation)

    def do_POST(self) -> None:
        store = _store[0]
        bucket, _, query = self._parts()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        store.wait()
        name = f"{bucket}/{query['name']}"
        generation = store.put(name, content, query.get("ifGenerationMatch"))
        if generation is None:
            self._answer(412, b"{}")
            return
        told = {"name": query["name"], "generation": str(generation), "size": str(len(content))}
        self._answer(200, json.dumps(told).encode(), generation)

    def do_DELETE(self) -> None:
        store = _store[0]
        bucket, name, _ = self._parts()
        store.wait()
        found = store.objects.pop(f"{bucket}/{name}", None)
        self._answer(404 if found is None else 204, b"")


class _Files(fsspec.AbstractFileSystem):
    """The objects as files, with the delay of a request for each call."""

    protocol = ("gs", "gcs")
    cachable = False

    def _name(self, path) -> str:
        return os.fspath(path).removeprefix("gs://").strip("/")

    def info(self, path, **_):
        store = _store[0]
        store.wait()
        name = self._name(path)
        if name in store.objects:
            return {"name": name, "type": "file", "size": len(store.objects[name][0])}
        if store.below(name + "/"):
            return {"name": name, "type": "directory", "size": 0}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        store = _store[0]
        store.wait()
        name = self._name(path) + "/"
        children = {name + each[len(name) :].partition("/")[0] for each in store.below(name)}
        found = [
            {
                "name": each,
                "type": "file" if each in store.objects else "directory",
                "size": len(store.objects.get(each, (b"", 0))[0]),
            }
            for each in sorted(children)
        ]
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [each["name"] for each in found]

    def mkdir(self, path, create_parents=True, **_) -> None:
        pass  # an object store has no folders

    def makedirs(self, path, exist_ok=False) -> None:
        pass

    def rm(self, path, recursive=False, maxdepth=None) -> None:
        store = _store[0]
        store.wait()
        name = self._name(path)
        gone = [each for each in store.below(name) if each == name or each.startswith(name + "/")]
        if not gone:
            raise FileNotFoundError(path)
        for each in gone:
            store.objects.pop(each, None)

    def mv(self, path1, path2, recursive=False, **_) -> None:
        store = _store[0]
        store.wait()
        old = self._name(path1)
        new = self._name(path2)
        for each in store.below(old):
            store.put(new + each[len(old) :], store.objects.pop(each)[0])

    rename = mv

    def _open(self, path, mode="rb", **_):
        store = _store[0]
        store.wait()
        name = self._name(path)
        if "r" in mode:
            if name not in store.objects:
                raise FileNotFoundError(path)
            return io.BytesIO(store.objects[name][0])

        class Writing(io.BytesIO):
            def close(self) -> None:
                if not self.closed:
                    store.put(name, self.getvalue())
                super().close()

        return Writing()


@contextlib.contextmanager
def serve(seconds: float) -> Iterator[Store]:
    """Serve gs:// in this process until the end of the context."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), _Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    # TensorStore reads both once, at its first use of gs://.
    os.environ["TENSORSTORE_GCS_HTTP_URL"] = f"http://localhost:{server.server_address[1]}"
    os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "any"
    for name in _Files.protocol:
        fsspec.register_implementation(name, _Files, clobber=True)
    _store[:] = [Store(seconds)]
    try:
        yield _store[0]
    finally:
        server.shutdown()
        server.server_close()
