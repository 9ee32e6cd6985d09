"""What the page asks for: draws the newest request, opens pictures as conditions, saves.

Whatever draws here is sample.py's: the same options, the same denoiser, the same sampler.
"""
import base64
import functools
import io
import itertools
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

import diffusion
from bps import Steering, load_bps
from inputs.conditions import TASKS, open_condition, read_condition, to_image
from inputs.options import DTYPES, shell_command
from inputs.pictures import describe, unused, write_picture
from inputs.sample_options import (
    Job,
    check_fit,
    check_settings,
    fingerprints,
    finish,
    make_parser,
)
from sample import draw_job, load_base
from weights import UserError, fingerprint, replacing

PREVIEW_STEPS = 5
CANVAS_SIDE = 256                       # pixels of the page's canvas at least
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0)     # strengths
# entries of a request that are options of sample.py
SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "sampler", "strength")


class Dropped(Exception):
    """A newer request has come."""


class Drawn(NamedTuple):
    """A picture x (3, H, W), and what it was drawn of."""
    number: int                 # the request's
    args: object                # sample.py's arguments
    job: Job
    x: torch.Tensor
    size: tuple
    drawing: bytes | None


def data_url(image):
    """Returns a PIL image as a URL that a page shows."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def from_data_url(url):
    """Returns the bytes of a picture in a page's URL. Errors: UserError."""
    try:
        return base64.b64decode(url.split(",", 1)[1], validate=True)
    except (AttributeError, IndexError, ValueError):
        raise UserError("the picture is not a data URL; give data:image/png;base64,...") from None


class Studio:
    """A base, a BPS for each task, and the picture that was drawn last."""

    def __init__(self, args, files, trained=()):
        """args: of the pad. files: of the BPS, the last one of a task counts; those of `trained`
        that do not fit the base are left out, with a note. Errors: UserError.
        """
        self.args, self.networks = args, {}
        self.base = load_base(args.base, args.tokenizer, args.device, DTYPES[args.dtype], args.vae,
                              args.prediction_type)
        self.fingerprint = functools.cache(fingerprint)
        for file in [*files, *trained]:
            try:
                bps = load_bps(file, DTYPES[args.dtype], args.device)
                check_fit(bps, file, self.base)
            except UserError as error:
                if file in files:
                    raise
                print(f"note: not used: {error}", file=sys.stderr)
                continue
            self.fingerprint(file)                  # now: a training may replace the file
            self.networks[bps.metadata["task"]] = file, bps
        self.drawing, self.counting, self.saving = (threading.Lock() for _ in range(3))
        self.newest, self.last = 0, None            # a request's number, a Drawn
        self.prior = None, None                     # what it depends on, a Drawn
        self.scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def setup(self):
        """Returns what the page has to know (a dict, as JSON takes it)."""
        tasks = {task: dict(command=f"python train.py --task {task}") for task in TASKS}
        for task, (file, bps) in self.networks.items():
            classes = bps.metadata.get("classes") or {}
            ground = next(iter(classes), "#ffffff") if "#000000" not in classes else "#000000"
            tasks[task] = dict(file=str(file), side=max(CANVAS_SIDE, bps.metadata["size"]),
                               classes=classes, ground=ground, has_labels=TASKS[task].has_labels)
        parser = self.parser()
        defaults = finish(parser, parser.parse_args(self.fixed_words(None, None)))
        return dict(tasks=tasks, samplers=diffusion.SAMPLERS, preview_steps=PREVIEW_STEPS,
                    strip=STRIP, settings=SETTINGS, newest=self.newest,
                    defaults={name: getattr(defaults, name) for name in SETTINGS[:-1]})

    # ---- drawing ---------------------------------------------------------------------------

    def draw(self, request, send):
        """Draws a request, and calls send with dicts about its progress.

        They are {"progress": 0 to 1}, {"picture": URL, "strength": s}, {"prior": URL}, and last
        {"seconds": s}, or {"dropped": true} if there is a request with a higher number. request:
        number, SETTINGS, task, drawing (a URL, or none for the prior alone), strip (whether to
        draw STRIP's strengths), preview (whether to take few steps and leave out the prior).
        Errors: UserError.
        """
        start, number = time.monotonic(), request.get("number")
        if not isinstance(number, int):
            raise UserError(f"number {number}: give a whole number, higher than the last one")
        with self.counting:
            self.newest = max(self.newest, number)

        def check():
            """Ends the drawing if there is a newer request."""
            if number < self.newest:
                raise Dropped

        try:
            with self.drawing:
                check()
                self.draw_pictures(request, check, send)
                send(dict(seconds=time.monotonic() - start))
        except Dropped:
            send(dict(dropped=True))

    def draw_pictures(self, request, check, send):
        """Draws a request's pictures, at last the prior's if it is a new one. Errors: UserError."""
        _, bps = self.network(request)
        size, is_preview = (bps.metadata["size"],) * 2, bool(request.get("preview"))
        drawings = []                           # (arguments, conditions, steerings) of each
        content = request.get("drawing") and from_data_url(request["drawing"])
        if content:
            args, cond = self.read(request, content)
            strengths = STRIP if request.get("strip") else [args.conditions[0].strength]
            for s in strengths:
                steering = Steering(bps, self.base.unet, cond.to(self.args.device), strength=s)
                drawings.append((args, [args.conditions[0]._replace(strength=s)], [steering]))
        prior_of = size, [request.get(name) for name in SETTINGS if name != "strength"]
        if self.prior[0] != prior_of and not is_preview:
            drawings.append((self.parse(request, "none"), [], []))
        step, steps = itertools.count(1), sum(args.steps for args, _, _ in drawings)

        def on_step():
            """Reports a step."""
            check()
            send(dict(progress=next(step) / steps))

        for args, conditions, steerings in drawings:
            job = Job("", conditions, args.prompt)
            x, = draw_job(job, steerings, args, self.base, None, size, on_step)
            drawn = Drawn(request["number"], args, job, x, size, content)
            if not conditions:
                self.prior = prior_of, drawn
                continue
            if not request.get("strip") and not is_preview:
                self.last = drawn
            send(dict(picture=data_url(to_image(x)), strength=conditions[0].strength))
        if not is_preview:
            if not content:
                self.last = self.prior[1]._replace(number=request["number"])
            send(dict(prior=data_url(to_image(self.prior[1].x))))

    def network(self, request):
        """Returns (file, BPS) for the task of a request. Errors: UserError."""
        if str(request.get("task")) not in self.networks:
            raise UserError(f"task {request.get('task')}: no BPS for it; allowed are "
                            f"{', '.join(self.networks)}")
        return self.networks[request["task"]]

    def read(self, request, content):
        """Returns (sample.py's arguments, cond (1, C, H, W)) for a drawing's bytes.

        Errors: UserError.
        """
        file, bps = self.network(request)
        drawing = Path(self.scratch.name) / "drawing.png"
        drawing.write_bytes(content)
        args, size = self.parse(request, file, drawing), bps.metadata["size"]
        try:
            cond, _ = read_condition(drawing, request["task"], size, size,
                                     bps.metadata.get("classes"))
        except UserError as error:
            raise UserError(str(error).replace(str(drawing), "drawing")) from None
        return args, cond[None]

    def parser(self):
        """Returns sample.py's parser, whose errors are UserErrors."""
        def refuse(message):
            """Raises what the parser would end the script with."""
            raise UserError(message.removeprefix("argument "))

        parser = make_parser("")
        parser.error = refuse
        return parser

    def fixed_words(self, bps, drawing):
        """Returns the words of sample.py's command line that no request changes."""
        words = ["--n=1", f"--dtype={self.args.dtype}", f"--device={self.args.device}",
                 f"--base={self.args.base}", f"--out={self.args.out}"]
        words += [f"--{name.replace('_', '-')}={getattr(self.args, name)}" for name in
                  ("tokenizer", "vae", "prediction_type") if getattr(self.args, name)]
        words += ["--bps", str(bps)] if bps else []
        return words + (["--cond", str(drawing)] if drawing else [])

    def parse(self, request, bps, drawing=None):
        """Returns sample.py's checked arguments for a request. Errors: UserError names an option.
        """
        settings = SETTINGS if drawing else SETTINGS[:-1]
        words = [f"--{name.replace('_', '-')}={request.get(name, '')}" for name in settings]
        parser = self.parser()
        args = finish(parser, parser.parse_args(words + self.fixed_words(bps, drawing)))
        if request.get("preview"):
            args.steps = min(args.steps, PREVIEW_STEPS)
        check_settings(parser, args)
        return args

    # ---- files -----------------------------------------------------------------------------

    def open(self, request):
        """Returns {"picture": URL} of an image as a condition, to draw on, as large as the canvas.

        request: task, and file, a URL. Errors: UserError if it cannot be read, is too large, or
        holds unknown classes.
        """
        _, bps = self.network(request)
        content, side = from_data_url(request.get("file")), max(CANVAS_SIDE, bps.metadata["size"])
        with tempfile.TemporaryDirectory(dir=self.scratch.name) as folder:
            file = Path(folder) / "picture"
            file.write_bytes(content)
            try:
                image = open_condition(file, request["task"], bps.metadata.get("classes"))
            except UserError as error:
                raise UserError(str(error).replace(str(file), "picture")) from None
        image = TASKS[request["task"]].fit(image, side, side)
        return dict(picture=data_url(image.convert("RGB")))

    def save(self, request):
        """Writes the picture that was drawn last, and its drawing.

        request: number, that of its request. Returns {"files": [paths], "command": what draws it
        again}. Errors: UserError if another picture has been drawn since.
        """
        last = self.last
        if last is None or last.number != request.get("number"):
            raise UserError("this picture is no longer there; draw it again, then save")
        with self.saving:
            self.args.out.mkdir(parents=True, exist_ok=True)
            picture, drawing = unused([self.args.out / name for name in
                                       ("pad.png", "pad-drawing.png")])
            job = last.job
            if job.conditions:
                with replacing(drawing) as temporary:
                    temporary.write_bytes(last.drawing)
                job = job._replace(conditions=[job.conditions[0]._replace(cond=drawing)])

            def fingerprint_once(*files):
                """Reads a base once only, but a drawing of the same name anew."""
                return (fingerprint if drawing in files else self.fingerprint)(*files)

            files = fingerprints(last.args, job.conditions, fingerprint_once)
            text = describe(last.args, job, last.args.seed, last.size, files, self.base)
            write_picture(last.x, text, picture)
        return dict(files=[str(picture), str(drawing)][:1 + len(job.conditions)],
                    command=shell_command(["python", "sample.py", "--from", picture]))
