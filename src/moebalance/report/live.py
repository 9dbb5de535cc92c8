"""The report while training: the same page, served to this machine alone, that renews itself.

The page asks for `/stamp` every two seconds, a word for the state of all logs; where it changed, it
asks for `/page` and puts the new content in place of the old. Nothing is kept between requests but
the last page made.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from moebalance.cleaning import for_page
from moebalance.report.page import render_report
from moebalance.runlog import LOG_NAME, Run, read_run

HOST = "127.0.0.1"


class ReportServer(ThreadingHTTPServer):
    """Serves the report of run folders on the loopback address; `serve_forever()` starts it.

    Folders may be empty or missing yet: the page waits for their first run. A log that cannot be
    read is named on the page, and the others are shown.

    Args:
        folders: run folders, or folders of them; looked through again at every question.
        port: 0 takes a free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int = 0) -> None:
        self.folders = list(folders)
        self._lock, self._made = threading.Lock(), ("", "")
        super().__init__((HOST, port), _Handler)

    @property
    def url(self) -> str:
        """Where to look at it."""
        return f"http://{HOST}:{self.server_port}/"

    def stamp(self) -> str:
        """A word that changes when a log does."""
        parts = []
        for file in _logs(self.folders):
            state = file.stat()
            parts.append(f"{file}|{state.st_size}|{state.st_mtime_ns}")
        return hashlib.sha256("\n".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]

    def page(self) -> str:
        """The page as things stand, made anew only where a log changed."""
        with self._lock:
            stamp = self.stamp()
            if self._made[0] != stamp:
                runs, problems = readable_runs(self.folders)
                waiting = _waiting(self.folders, problems, stamp)
                page = render_report(runs, stamp=stamp, problems=problems) if runs else waiting
                self._made = (stamp, page)
            return self._made[1]


def readable_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs under some folders, and what is wrong with the logs that cannot be read."""
    runs, problems = [], []
    for file in _logs(folders):
        try:
            runs.append(read_run(file))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    return runs, problems


def _logs(folders: Sequence[Path]) -> list[Path]:
    found = (sorted(f.rglob(LOG_NAME)) if f.is_dir() else [f] for f in folders if f.exists())
    return [file for files in found for file in files]


def _waiting(folders: Sequence[Path], problems: Sequence[str], stamp: str) -> str:
    """A page without runs, that looks again by itself."""
    words = "".join(f"<li>{escape(text)}</li>" for text in problems)
    where = ", ".join(str(folder) for folder in folders)
    return for_page(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Waiting for a run'
        '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta http-equiv="refresh" content="2">'
        "<style>body{font:17px/1.6 system-ui,sans-serif;max-width:44em;margin:15vh auto;padding:"
        f'0 20px}}</style></head><body data-stamp="{stamp}"><main><h1>Waiting for a run</h1>'
        f"<p>No run log can be read under {escape(where)} yet. This page looks again every two "
        f"seconds.</p><ul>{words}</ul></main></body></html>"
    )


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = 10
    """Seconds that a visitor may be silent; each holds a thread and a socket."""

    def do_GET(self) -> None:
        """Answer `/`, `/page` and `/stamp`."""
        # A page elsewhere must not read this one through a name that it points to this machine.
        if self.headers.get("Host") not in (self._host(HOST), self._host("localhost")):
            self._answer(403, "Ask for this page by its address on this machine.", "text/plain")
        elif self.path == "/stamp":
            self._answer(200, self.server.stamp(), "text/plain")
        elif self.path in ("/", "/page"):
            self._answer(200, self.server.page(), "text/html")
        elif self.path == "/favicon.ico":
            self._answer(204, "", "image/x-icon")  # browsers ask, and complain of a 404
        else:
            self._answer(404, "There is only /.", "text/plain")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing for every question of every page."""

    def _host(self, name: str) -> str:
        return f"{name}:{self.server.server_port}"

    def _answer(self, status: int, text: str, kind: str) -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        try:
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the reader left
