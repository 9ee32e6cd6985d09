"""Draw in the browser, and see it drawn: a page on this computer beside whose pen a picture grows.

    python -m pad                           # prints, and opens, http://127.0.0.1:8765
    python -m pad --bps runs/layout/bps.safetensors

Without --bps it takes what comes with the project, and for each task the newest that train.py has
written to runs/TASK. A BPS that is trained meanwhile is seen when the pad is started again.
"Save" writes to --out a PNG that `sample.py --from` draws again, and the drawing. The page is
served to this computer only: to no other address, and to no page of another site.
"""
import http.server
import json
import os
import signal
import sys
import webbrowser
from pathlib import Path

from inputs.conditions import TASKS
from inputs.options import BASE, DEFAULT_BPS, DTYPES, Parser, run_script
from inputs.run_folder import CHECKPOINT
from pad.studio import Studio
from weights import UserError, first_line

ADDRESS, PORT = "127.0.0.1", 8765
HOSTS = [ADDRESS, "localhost"]
DRAW_TIMEOUT = 5                # seconds that a page may take to read, for others wait meanwhile
PAGE = Path(__file__).with_name("page.html")
MOST_BYTES = 32 * 2**20         # the largest request
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff",
           "Cross-Origin-Resource-Policy": "same-origin",
           "Content-Security-Policy": "default-src 'self' 'unsafe-inline'; img-src data: blob:; "
                                      "frame-ancestors 'none'"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer the page; the server has a `studio`."""
    timeout = 60                # seconds without a byte
    started = False             # whether the head of the answer is sent

    def log_message(self, *_):
        """Print nothing of a request that went well."""

    def do_GET(self):
        """Send the page, or what it has to know."""
        self.guard(self.get)

    def do_POST(self):
        """Draws, opens or saves."""
        self.guard(self.post)

    def guard(self, respond):
        """Answer with respond(); an error is one line, and harms no other request."""
        try:
            if self.is_own():
                respond()
            else:
                self.discard()
                self.answer_json(403, dict(error="only the pad's own page may send requests."))
        except (ConnectionError, TimeoutError):
            pass                            # the page has gone, or has sent a newer request
        except Exception as error:          # a mistake in one request must not end the pad
            message = first_line(error) or type(error).__name__
            if not isinstance(error, (UserError, OSError)):
                print(f"error: {type(error).__name__}: {message}", file=sys.stderr)
            self.send_error_line(message)

    def get(self):
        """Answer a GET."""
        if self.path == "/":
            self.answer(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif self.path == "/setup":
            self.answer_json(200, self.server.studio.setup())
        else:
            self.answer_json(404, dict(error=f"{self.path} is missing."))

    def post(self):
        """Answer a POST."""
        request, studio = self.read_request(), self.server.studio
        if self.path == "/draw":
            self.connection.settimeout(DRAW_TIMEOUT)
            self.start(200, "application/x-ndjson")
            studio.draw(request, self.send_line)
        elif self.path == "/open":
            self.answer_json(200, studio.open(request))
        elif self.path == "/save":
            self.answer_json(200, studio.save(request))
        else:
            self.answer_json(404, dict(error=f"{self.path} is missing."))

    def is_own(self):
        """Whether a request is from the pad's own page, or from a program on this computer.

        Another site's page is told by Origin or Sec-Fetch-Site, and by Host if its own name leads
        here.
        """
        port = self.server.server_port
        own = [f"{host}:{port}" for host in HOSTS] + (HOSTS if port == 80 else [])
        return (self.headers.get("Host") in own
                and self.headers.get("Origin") in (None, *(f"http://{host}" for host in own))
                and self.headers.get("Sec-Fetch-Site") in (None, "same-origin", "none"))

    def discard(self):
        """Read what was sent, within limits, so that the answer is read before a reset."""
        length = self.headers.get("Content-Length", "")
        left = min(int(length), 2 * MOST_BYTES) if length.isdecimal() else 0
        while left > 0 and (part := self.rfile.read(min(left, 2**20))):
            left -= len(part)

    def read_request(self):
        """The JSON object that was sent."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isdecimal():
            raise UserError("a request must be a JSON object with a Content-Length.")
        if int(length) > MOST_BYTES:
            self.discard()
            raise UserError(f"a request must have at most {MOST_BYTES:,} bytes, got "
                            f"{int(length):,}.")
        try:
            request = json.loads(self.rfile.read(int(length)))
        except ValueError:
            raise UserError("a request must be JSON.") from None
        if not isinstance(request, dict):
            raise UserError("a request must be a JSON object.")
        return request

    def start(self, status, kind):
        """Send the head of an answer."""
        self.started = True
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": kind}).items():
            self.send_header(name, value)
        self.end_headers()

    def answer(self, status, kind, content):
        """Send a whole answer."""
        self.start(status, kind)
        self.wfile.write(content)

    def answer_json(self, status, content):
        """Send a JSON object."""
        self.answer(status, "application/json", json.dumps(content).encode())

    def send_line(self, content):
        """Send one JSON object of several, at once."""
        self.wfile.write(json.dumps(content).encode() + b"\n")
        self.wfile.flush()

    def send_error_line(self, message):
        """Send an error, as a line of an answer that has begun or as an answer."""
        try:
            if self.started:
                self.send_line(dict(error=message))
            else:
                self.answer_json(400, dict(error=message))
        except OSError:                     # the page has gone
            pass


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
        raise UserError(f"--port {port} can't be used ({error.strerror}). Give another, or 0 for "
                        f"any free one.") from None
    server.studio = studio
    return server


def main():
    """Serve the page until it is interrupted."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--bps", type=Path, nargs="+", help="trained BPS files, one for each task (default: see "
        "above)")
    parser.add_base()
    add("--dtype", choices=DTYPES, default="fp32", help="as in sample.py (default: %(default)s)")
    add("--port", type=int, default=PORT, help="0 is any free one (default: %(default)s)")
    add("--out", type=Path, default=Path("pictures"), help="folder of what is saved (default: "
        "%(default)s)")
    parser.add_device()
    args = parser.parse_args()
    if not 0 <= args.port < 2**16:
        parser.error(f"--port must be in 0..{2**16 - 1}, got {args.port}.")
    parser.check_out(args.out)
    is_embedded = args.base.resolve() == BASE.resolve()
    if not args.bps and not is_embedded:
        parser.error(f"--base {args.base} needs --bps, a file that train.py wrote for it.")
    studio = Studio(args, args.bps or [DEFAULT_BPS], () if args.bps else trained_files())
    server = make_server(studio, args.port)
    address = f"http://{ADDRESS}:{server.server_port}"
    print(address, *(f"{task}: {file}" for task, (file, _) in studio.networks.items()),
          "Ctrl-C ends", sep="\n", flush=True)
    if sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
        webbrowser.open(address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        studio.scratch.cleanup()
        print("\nended", file=sys.stderr, flush=True)
        os._exit(130)           # at once: Python would wait for a thread that is drawing


if __name__ == "__main__":
    run_script(main)
