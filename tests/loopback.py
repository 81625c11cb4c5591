"""A server on this machine that gives files out badly, and sessions that take it for the internet."""
import hashlib
import http.server
import threading
import time

import requests

from models.runtime import files


class Server(http.server.ThreadingHTTPServer):
    """Answers with its body as its plan says, one entry per request; the last one for all that follow.

    A number is an HTTP status. In words: whole, wrong (bytes of the right number), cut (fewer than said),
    short (and announced so, but not as the hub does), long, no length, stall (in the middle), silent (no
    answer), close (at once), redirect, redirect to http.
    """

    def __init__(self, body):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.requests, self.kinds = body, [], ["whole"]
        self.digest = hashlib.sha256(body).hexdigest()      # that the hub states
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def plan(self, *kinds):
        self.kinds = list(kinds)
        self.requests.clear()

    def close(self):
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append((self.command, self.path, dict(self.headers)))
        kind = server.kinds.pop(0) if len(server.kinds) > 1 else server.kinds[0]
        if kind in ("close", "silent"):
            time.sleep(2 if kind == "silent" else 0)
            self.close_connection = True
            return
        if kind == "redirect to http":
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/x")
        elif kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "https://cdn.example/x")
        elif isinstance(kind, int):
            self.send_response(kind)
        else:
            self.send_response(200)
            if kind not in ("no length", "long"):
                self.send_header("Content-Length", str(len(server.body) - 10 * (kind == "short")))
        self.send_header("X-Linked-Size", str(len(server.body)))
        self.send_header("X-Linked-ETag", f'"{server.digest}"')
        self.end_headers()
        if self.command == "HEAD" or isinstance(kind, int) or kind.startswith("redirect"):
            return
        body = {"cut": server.body[:-10], "short": server.body[:-10], "wrong": b"0" * len(server.body),
                "long": server.body * 2 + b"0" * 2 ** 21}.get(kind, server.body)
        try:
            if kind == "stall":
                self.wfile.write(body[:100])
                self.wfile.flush()
                time.sleep(2)
            self.wfile.write(body)
        except OSError:
            pass  # the client had enough

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class ToLoopback(requests.adapters.HTTPAdapter):
    """https://anywhere/ goes to the server above: the addresses are https, and no certificate is needed."""

    def __init__(self, port):
        super().__init__()
        self.port = port

    def send(self, request, **options):
        address, request.url = request.url, f"http://127.0.0.1:{self.port}/{request.url.split('/', 3)[3]}"
        answer = super().send(request, **options | {"proxies": {}})
        request.url = answer.url = address
        return answer


def sessions(port, https_session=files.https_session):
    """What files.https_session is to be replaced by."""
    def to_loopback():
        session = https_session()
        session.mount("https://", ToLoopback(port))
        return session
    return to_loopback
