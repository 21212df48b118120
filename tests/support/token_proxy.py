"""A small reverse proxy that lets nobody through without ``Authorization: Bearer TOKEN``, as a company's gateway."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import HTTPError
from urllib.request import Request, urlopen

KEPT = ("Content-Type", "Content-Length")  # headers that are handed on


@contextmanager
def token_proxy(behind: str, token: str, answered: list[int]) -> Iterator[str]:
    """Its address; the status of each answer is added to ``answered``. ``behind``: the address of the server."""

    class Handler(BaseHTTPRequestHandler):
        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Authorization") != f"Bearer {token}":
                return self.answer(401, b'{"error_code": "UNAUTHENTICATED", "message": "no token"}')
            headers = {name: self.headers[name] for name in KEPT if name in self.headers}
            request = Request(behind + self.path, data=body or None, headers=headers, method=self.command)
            try:
                with urlopen(request, timeout=60) as found:
                    return self.answer(found.status, found.read())
            except HTTPError as error:
                return self.answer(error.code, error.read())
            except OSError:
                return self.answer(502, b"nobody behind")

        def answer(self, status: int, body: bytes) -> None:
            answered.append(status)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
