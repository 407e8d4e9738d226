"""HTTP connections that do not stay open for nothing: limits on their number, and on the time for headers and for a body."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 100  # a browser opens six
HEADERS = 10.0  # seconds for the headers of a request
BODY = 60.0  # seconds for its body, and for taking an answer


class LimitedConnection(H11Protocol):
    """uvicorn has a limit of time between requests only; a request that never ends would be kept for ever."""

    phase: tuple[str, int] = ("", 0)
    timer: asyncio.TimerHandle | None = None
    taking = False  # the answer was there when the time was looked at

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
            return
        self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.watch()

    def watch(self) -> None:
        """Start the time of what is waited for, where it is another than before."""
        if self.cycle is None or (self.cycle.response_complete and not self.cycle.more_body):
            kind = "headers"
        else:
            kind = "body" if self.cycle.more_body or self.cycle.response_complete else "answer"
        phase = kind, self.server_state.total_requests if self.cycle is None else id(self.cycle)
        if phase == self.phase:
            return
        self.phase, self.taking = phase, False
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(HEADERS if kind == "headers" else BODY, self.late, phase)

    def late(self, phase: tuple[str, int]) -> None:
        """End the connection, unless a model is at work on the answer, or was when this was last looked at."""
        if phase[0] == "answer" and not (self.taking and self.transport.get_write_buffer_size()):
            self.taking = bool(self.transport.get_write_buffer_size())
            self.timer = self.loop.call_later(BODY, self.late, phase)
            return
        self.transport.abort()
