"""An HTTP server that speaks as vLLM does and fails as told.

It stands in where a real server cannot be made to fail on purpose: it answers 500, 503, garbage or
half a body, hangs, or hangs up. What it "generates" is a pure function of the request, so that a
test sees whether every request got its own answer.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nemo_trd.generation.api import ARRAYS

EOS = 3
KEY = "a-secret-key-of-a-test"


def tokens_for(prompt: list[int], seed: int | None, max_tokens: int) -> list[int]:
    digest = hashlib.blake2b(f"{prompt} {seed}".encode(), digest_size=16).digest()
    length = min(max_tokens - 1, digest[0] % 6)
    return [10 + byte for byte in digest[1 : 1 + length]] + [EOS]


class FakeVllm:
    """`fault(number)` names what becomes of the generation request with that number, from 0 on.

    "ok", "500", "503", "garbage", "arrays" (binary garbage), "shape", "half", "hang", "hangup",
    "short", "stale", "abort", "400", "cut" (the reason is "stop", and there is no EOS).
    """

    def __init__(self, fault: Callable[[int], str] = lambda number: "ok", port: int = 0) -> None:
        self.fault = fault
        self.version = "default"
        self.paused = False
        self.max_model_len = 512
        self.root: str | None = "/models/fake"
        self.tokens: list[int] = []  # what it makes of any text; none: it does not tell
        self.delay = 0.0
        self.healthy = True
        self.params: list[dict[str, Any]] = []  # of the sampling, of each request
        self.models: set[str | None] = set()  # that requests name
        self.served: list[tuple[int, ...]] = []  # prompts of the requests answered well
        self.asked = 0
        self.working = 0
        self.most_working = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body leave together

            def do_GET(self) -> None:
                owner.answer_question(self)

            def do_POST(self) -> None:
                if self.path == "/tokenize":
                    self.rfile.read(int(self.headers["Content-Length"]))
                    _send(self, 200 if owner.tokens else 404, {"tokens": owner.tokens})
                else:
                    owner.generate(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients hang up when their time is over

        self._http = Server(("127.0.0.1", port), Handler)
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self) -> FakeVllm:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._http.shutdown()
        self._http.server_close()

    def answer_question(self, handler: BaseHTTPRequestHandler) -> None:
        if self._ended.is_set():  # a connection of before
            _hang_up(handler)
            return
        answers: dict[str, Any] = {
            "/weight_info": {"weight_version": self.version},
            "/is_paused": {"is_paused": self.paused},
            "/v1/models": {
                "data": [{"id": "nemo_trd", "root": self.root, "max_model_len": self.max_model_len}]
            },
        }
        if handler.headers["Authorization"] != f"Bearer {KEY}":
            _send(handler, 401, {"error": f"Unauthorized: {handler.headers['Authorization']}"})
        elif not self.healthy:
            _send(handler, 503, {"error": "not now"})
        else:
            _send(handler, 200, answers[handler.path])

    def generate(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            number = self.asked
            self.asked += 1
            self.working += 1
            self.most_working = max(self.most_working, self.working)
        try:
            time.sleep(self.delay)
            fault = self.fault(number)
        finally:  # before the answer: who has it asks the next
            with self._lock:
                self.working -= 1
        self._answer(handler, body, "hangup" if self._ended.is_set() else fault)

    def _answer(self, handler: BaseHTTPRequestHandler, body: Any, fault: str) -> None:
        params = body["sampling_params"]
        self.params.append(params)
        self.models.add(body.get("model"))
        ids = tokens_for(body["token_ids"], params.get("seed"), params["max_tokens"])
        reason, version = "stop", self.version
        if fault in ("400", "500", "503"):
            key = handler.headers["Authorization"]
            _send(handler, int(fault), {"error": f"as told, to {key}"})
            return
        if fault == "hang":
            self._ended.wait(30)
            return
        if fault == "hangup":
            _hang_up(handler)
            return
        if fault == "garbage":
            _send_bytes(handler, 200, b"<html>It works!</html>")
            return
        if fault == "arrays":
            _send_bytes(handler, 200, b"none", kind=ARRAYS)
            return
        if fault == "short":
            ids, reason = ids[:-1], "length"
        if fault == "cut":
            ids = ids[:-1]
        if fault == "abort":
            ids, reason = ids[:-1], "abort"
        if fault == "stale":
            version = "41"
        content: Any = {
            "choices": [
                {
                    "token_ids": ids if fault != "shape" else "many",
                    "finish_reason": reason,
                    "weight_versions": [{"version": version, "start": 0, "end": len(ids)}],
                    "logprobs": {"content": [{"token_id": i, "logprob": -0.5} for i in ids]},
                }
            ]
        }
        if "prompt_logprobs" in params:
            asked = body["token_ids"]
            content["prompt_logprobs"] = [None, *({str(i): {"logprob": -0.5}} for i in asked[1:])]
        encoded = json.dumps(content).encode()
        if fault == "half":
            _send_bytes(handler, 200, encoded[: len(encoded) // 2], length=len(encoded))
            _hang_up(handler)
            return
        if fault == "ok":
            with self._lock:
                self.served.append(tuple(body["token_ids"]))
        _send_bytes(handler, 200, encoded)


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def _send(handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
    _send_bytes(handler, status, json.dumps(content).encode())


def _send_bytes(
    handler: BaseHTTPRequestHandler,
    status: int,
    content: bytes,
    length: int | None = None,
    kind: str = "application/json",
) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(content) if length is None else length))
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()
