"""What a person reads while a server starts: a line per stage, then what to try.

Knows nothing of what the stages do.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.text import Text

from serving.settings import Settings

Note = Callable[[str], None]
"""Adds a detail to the line of the stage that runs."""

_MAX_NAMES = 12
_MESSAGE = "Write one sentence about the sea."
_DEMO_MODEL, _DEMO_MESSAGE = "json-extract", "Maria from Lisbon ordered 12 lamps."


class Stages:
    """A spinner while a stage lasts; a line with its details and seconds when it is done."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def tell(self, line: str) -> None:
        """Show one line at once."""
        self._console.print(Text(f"… {line}", "dim"), soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Note]:
        """Show `title` while the body runs; nothing stays of a stage that raises."""
        begun, notes = time.monotonic(), list[str]()
        with self._console.status(title):
            yield notes.append
        line = Text.assemble(("✓ ", "green"), title, *(f", {note}" for note in notes))
        line.append(f"  {time.monotonic() - begun:.1f} s", "dim")
        self._console.print(line, soft_wrap=True)


def ready_message(settings: Settings, base_name: str, adapter_ids: Sequence[str]) -> Text:
    """That the server is ready, the models that it serves and a curl to try."""
    url = server_url(settings)
    names = [base_name, *adapter_ids[:_MAX_NAMES]]
    more = len(adapter_ids) - _MAX_NAMES
    listed = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    model, message = adapter_ids[0] if adapter_ids else base_name, _MESSAGE
    if settings.model is None and _DEMO_MODEL in adapter_ids:
        model, message = _DEMO_MODEL, _DEMO_MESSAGE
    curl = curl_command(url, model, message, needs_key=bool(settings.api_keys))
    return Text.assemble(
        ("\nREADY", "bold green"),
        f" at {url}, serving {listed}\n\nTry:\n\n{curl}\n\nCtrl-C stops the server.",
    )


def server_url(settings: Settings) -> str:
    """Where the server is reached from this machine."""
    return f"http://{_reachable(settings.host)}:{settings.port}"


def curl_command(url: str, model: str, message: str, *, needs_key: bool) -> str:
    """A chat completion with `model`, as a person would type it."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": message}],
        "max_tokens": 48,
    }
    key = '-H "Authorization: Bearer $VBSERVE_CLIENT_KEY" ' if needs_key else ""
    return (
        f"  curl {url}/v1/chat/completions {key}-H 'Content-Type: application/json' \\\n"
        f"    -d {shlex.quote(json.dumps(body))}"
    )


def _reachable(host: str) -> str:
    """An address to use from this machine where `host` means all of them."""
    if host == "0.0.0.0":  # noqa: S104  # compared, not bound
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host
