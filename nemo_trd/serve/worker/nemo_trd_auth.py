"""Middleware of our vLLM servers: nothing but /health is answered without the API key.

vLLM's own check covers /v1 and /inference only. It leaves open what replaces weights, pauses the
server, or runs methods in its workers. Imports nothing, so that it loads in any environment.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

Message = dict[str, Any]


class RequireKey:
    """ASGI middleware; the key is in VLLM_API_KEY. Without one, everything is answered."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        key = os.environ.get("VLLM_API_KEY")
        self._expected = f"Bearer {key}".encode() if key else None

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        if scope["type"] not in ("http", "websocket") or self._admits(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _admits(self, scope: Message) -> bool:
        if self._expected is None or scope["path"] == "/health":
            return True
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(header, self._expected)
