"""Tokens of a step, from an engine replica to an ingress replica: one message per step and ingress.

`TokenSender` (engine, ZeroMQ PUSH) never blocks: a message that finds its queue full is dropped.
`TokenReceiver` (ingress, PULL) checks a secret in each message and hands each output to the
`RequestStream` of its request, which makes good for messages that were lost. Knows nothing of Ray,
HTTP or text.
"""

from __future__ import annotations

import hmac
import secrets
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from core.requests import RequestOutput
from serving.cluster.engine_wire import (
    ReplyAddress,
    SequencedOutput,
    StepFrame,
    decode_frame,
    encode,
)
from serving.cluster.request_stream import RequestStream

_QUEUED_MESSAGES = 1000  # per socket and side; beyond it the sender drops
_MAX_MESSAGE_BYTES = 64 * 2**20
_MAX_SOCKETS = 64  # ingress addresses remembered by one engine; restarted ingresses change theirs


@dataclass
class _Route:
    reply_to: ReplyAddress
    next_index: int = 0  # written by `TokenSender.send` alone


class TokenSender:
    """The engine's end. `open` and `close` from any thread; `send` from one thread only."""

    def __init__(self, engine: str) -> None:
        self._engine = engine
        self._context = zmq.Context()
        self._routes: dict[str, _Route] = {}
        self._sockets: OrderedDict[str, zmq.Socket[bytes]] = OrderedDict()
        self.num_dropped_messages = 0

    def open(self, request_id: str, reply_to: ReplyAddress) -> None:
        """Send this request's outputs to `reply_to` until `close`."""
        self._routes[request_id] = _Route(reply_to)

    def close(self, request_id: str) -> None:
        """Forget the request; its further outputs go nowhere. Idempotent."""
        self._routes.pop(request_id, None)

    def send(self, outputs: Sequence[RequestOutput]) -> None:
        """Send one message to each ingress concerned. Never blocks, never raises for a peer."""
        by_address: dict[ReplyAddress, list[SequencedOutput]] = {}
        for output in outputs:
            route = self._routes.get(output.request_id)
            if route is not None:
                sequenced = SequencedOutput(route.next_index, output)
                by_address.setdefault(route.reply_to, []).append(sequenced)
                route.next_index += 1
        for address, sequenced_outputs in by_address.items():
            self._push(address, tuple(sequenced_outputs))

    def shutdown(self) -> None:
        """Close all sockets, dropping what is unsent. Only when no thread sends any more."""
        self._context.destroy(linger=0)

    def _push(self, address: ReplyAddress, outputs: tuple[SequencedOutput, ...]) -> None:
        frame = encode(StepFrame(address.secret, self._engine, outputs))
        try:
            self._socket(address.endpoint).send(frame, zmq.DONTWAIT)
        except zmq.ZMQError:
            self.num_dropped_messages += 1

    def _socket(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._sockets.pop(endpoint, None)
        if socket is None:
            socket = self._connect(endpoint)
        self._sockets[endpoint] = socket
        if len(self._sockets) > _MAX_SOCKETS:
            _, oldest = self._sockets.popitem(last=False)
            oldest.close(linger=0)
        return socket

    def _connect(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PUSH)
        socket.set_hwm(_QUEUED_MESSAGES)
        socket.linger = 0
        socket.connect(endpoint)
        return socket


class TokenReceiver:
    """The ingress's end, bound to one address of this node. Made and used in one event loop."""

    def __init__(self, node_ip: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.set_hwm(_QUEUED_MESSAGES)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IPV6, int(":" in node_ip))
        host = f"[{node_ip}]" if ":" in node_ip else node_ip
        port = self._socket.bind_to_random_port(f"tcp://{host}")
        self.address = ReplyAddress(f"tcp://{host}:{port}", secrets.token_urlsafe(32))
        self._streams: dict[str, RequestStream] = {}
        self.num_refused_messages = 0

    def open(self, request_id: str) -> RequestStream:
        """Collect the outputs of a request, before it is sent to an engine."""
        stream = self._streams[request_id] = RequestStream()
        return stream

    def close(self, request_id: str) -> None:
        """Drop what still comes for a request. Idempotent."""
        self._streams.pop(request_id, None)

    async def run(self) -> None:
        """Hand on messages until cancelled."""
        while True:
            self._dispatch(await self._socket.recv())

    def shutdown(self) -> None:
        """Close the socket."""
        self._context.destroy(linger=0)

    def _dispatch(self, data: bytes) -> None:
        try:
            frame = decode_frame(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            self.num_refused_messages += 1
            return
        if not hmac.compare_digest(frame.secret.encode(), self.address.secret.encode()):
            self.num_refused_messages += 1
            return
        for sequenced in frame.outputs:
            stream = self._streams.get(sequenced.output.request_id)
            if stream is not None:
                stream.push_message(frame.engine, sequenced)
