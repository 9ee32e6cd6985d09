"""Draw in the browser: a page on this computer where a picture follows your pen.

    python -m pad                           # prints, and opens, http://127.0.0.1:8765
    python -m pad --bps runs/layout/bps.safetensors

Without --bps, the pad uses the newest BPS that train.py wrote to runs/TASK, for each task. If there
is none for sketch, it uses the included one. Restart the pad after a training to use the new BPS.
"Save" writes the drawing to --out, and a PNG that `sample.py --from` draws again. The pad serves
the page to this computer only, and refuses requests from other addresses and other sites' pages.
"""
import contextlib
import http.server
import json
import os
import signal
import sys
import webbrowser
from pathlib import Path

from inputs.conditions import TASKS
from inputs.options import DEFAULT_BPS, DTYPES, Parser, in_range, is_embedded, run_script
from inputs.run_folder import CHECKPOINT
from pad.studio import Studio
from weights import UserError, reason

ADDRESS, PORT = "127.0.0.1", 8765
DRAW_TIMEOUT = 5                # seconds that a page may take to read, because others wait
PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 32 * 2**20         # the largest request
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Cross-Origin-Resource-Policy": "same-origin",
           "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data: blob:; "
                                      "frame-ancestors 'none'"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the page; the server has a `studio`."""
    timeout = 60                # seconds without a byte
    started = False             # whether the head of the answer is sent

    def log_message(self, *_):
        """Print nothing of a request that went well."""

    def handle(self):
        """Handle a connection; that its other end has gone is no error."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def do_GET(self):
        """Answer a request; an error is one line, and harms no other request."""
        try:
            self.respond()
        except Exception as error:          # a mistake in one request must not end the pad
            message = reason(error)
            if not isinstance(error, (UserError, OSError)):
                print(f"error: {type(error).__name__}: {message}", file=sys.stderr)
            with contextlib.suppress(OSError):
                self.send_line(dict(error=message), 400)

    do_POST = do_GET

    def respond(self):
        """Read a request, and send its answer."""
        studio, length = self.server.studio, self.headers.get("Content-Length", "")
        # also what is refused is read, or the page would see a reset and no answer
        body = self.rfile.read(min(int(length), 2 * MOST_BYTES) if length.isdecimal() else 0)
        if not self.is_own():
            return self.send_line(dict(error=f"only the pad's own page may send requests. Open "
                                             f"{self.server.address} on the pad's computer, or "
                                             f"forward a port to it (ssh -L)."), 403)
        match self.command, self.path:
            case "GET", "/":
                self.start(200, "text/html; charset=utf-8")
                self.wfile.write(PAGE.read_bytes())
            case "GET", "/setup":
                self.send_line(studio.setup())
            case "POST", "/draw":
                self.connection.settimeout(DRAW_TIMEOUT)
                studio.draw(self.read_request(body), self.send_line)
            case "POST", "/open":
                self.send_line(studio.open(self.read_request(body)))
            case "POST", "/save":
                self.send_line(studio.save(self.read_request(body)))
            case _:
                self.send_line(dict(error=f"{self.path} is missing."), 404)

    def is_own(self):
        """Whether a request is from the pad's own page, or from a program on this computer.

        Another site's page has another Origin or Sec-Fetch-Site, and another Host if its own name
        leads here. The port is free: a tunnel may have one of its own.
        """
        host = self.headers.get("Host", "")
        return (host.partition(":")[0] in (ADDRESS, "localhost")
                and self.headers.get("Origin") in (None, f"http://{host}")
                and self.headers.get("Sec-Fetch-Site") in (None, "same-origin", "none"))

    def read_request(self, body):
        """The JSON object in a body."""
        if self.headers.get_content_type() == "application/json" and len(body) <= MOST_BYTES:
            with contextlib.suppress(ValueError):
                if isinstance(request := json.loads(body), dict):
                    return request
        raise UserError(f"a request must be a JSON object, sent as application/json with a "
                        f"Content-Length of at most {MOST_BYTES:,}.")

    def start(self, status, kind):
        """Send the head of an answer."""
        self.started = True
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": kind}).items():
            self.send_header(name, value)
        self.end_headers()

    def send_line(self, content, status=200):
        """Send a JSON object as a line at once, after the head if it is the first one."""
        if not self.started:
            self.start(status, "application/x-ndjson")
        self.wfile.write(json.dumps(content).encode() + b"\n")
        self.wfile.flush()


def trained_files():
    """The newest BPS file of each task among the finished runs of train.py."""
    newest = []
    for task in TASKS:
        files = [file for pattern in (task, f"{task}-[0-9]*")
                 for file in Path("runs").glob(f"{pattern}/bps.safetensors")
                 if not (file.parent / CHECKPOINT).exists()]
        newest += sorted(files, key=lambda file: file.stat().st_mtime)[-1:]
    return newest


def make_server(studio, port):
    """The server of a Studio's page; port 0 is any free one."""
    try:
        server = http.server.ThreadingHTTPServer((ADDRESS, port), Handler)
    except OSError as error:
        raise UserError(f"--port {port} can't be used ({reason(error)}). Give another, or 0 for "
                        f"any free one.") from None
    server.studio, server.address = studio, f"http://{ADDRESS}:{server.server_port}"
    return server


def main():
    """Serve the page until it is interrupted."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--bps", type=Path, nargs="+", help="trained BPS files, one for each task (default: see "
        "above)")
    parser.add_base()
    add("--dtype", choices=DTYPES, default="fp32", help="as in sample.py (default: %(default)s)")
    add("--port", type=in_range(int, 0, 2**16 - 1), default=PORT, help="0 is any free one "
        "(default: %(default)s)")
    add("--out", type=Path, default=Path("pictures"), help="folder of what is saved (default: "
        "%(default)s)")
    parser.add_device()
    args = parser.parse_args()
    parser.check_out(args.out)
    if not args.bps and not is_embedded(args.base):
        parser.error(f"--base {args.base} needs --bps, a file that train.py wrote for it.")
    studio = Studio(args, args.bps or [DEFAULT_BPS], () if args.bps else trained_files())
    server = make_server(studio, args.port)
    print(server.address, *(f"{task}: {file}" for task, (file, _) in studio.networks.items()),
          "Ctrl-C ends", sep="\n", flush=True)
    if sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        webbrowser.open(server.address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("\nended", file=sys.stderr, flush=True)
        os._exit(130)           # at once: Python would wait for a thread that is drawing


if __name__ == "__main__":
    run_script(main)
