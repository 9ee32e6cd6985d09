"""What the page asks for: draws the newest request, opens pictures as conditions, saves.

Whatever draws here is sample.py's: the same options, the same denoiser, the same sampler.
"""
import base64
import binascii
import functools
import io
import itertools
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

import diffusion
from bps import Steering, load_bps
from inputs.conditions import TASKS, open_boxes, read_condition, to_image
from inputs.options import DTYPES
from inputs.sample_options import (
    Job,
    check_fit,
    check_settings,
    fingerprints,
    finish,
    make_parser,
)
from sample import describe, draw_job, load_base, unused, write_picture
from weights import UserError, fingerprint

PREVIEW_STEPS = 5
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0)     # strengths
# of a request, what is an option of sample.py, too
SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "sampler", "strength")


class Dropped(Exception):
    """A newer request has come."""


class Drawn(NamedTuple):
    """A picture x (3, H, W), and what it was drawn of."""
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
    except (AttributeError, IndexError, binascii.Error):
        raise UserError("the picture is not a data URL; give data:image/png;base64,...") from None


class Studio:
    """A base, a BPS for each task, and the picture that was drawn last."""

    def __init__(self, args, files):
        """args: of the pad. files: of the BPS, the last one of a task counts. Errors: UserError."""
        self.args, self.networks = args, {}
        self.base = load_base(args.base, args.tokenizer, args.device, DTYPES[args.dtype], args.vae,
                              args.prediction_type)
        for file in files:
            bps = load_bps(file, DTYPES[args.dtype], args.device)
            check_fit(bps, file, self.base, args.base)
            self.networks[bps.metadata["task"]] = file, bps
        self.drawing, self.counting = threading.Lock(), threading.Lock()
        self.newest, self.prior, self.last = 0, (None, None), None      # the latter two: Drawn
        self.scratch = tempfile.TemporaryDirectory()        # removed when the pad ends
        self.fingerprint = functools.cache(fingerprint)

    def setup(self):
        """Returns what the page has to know (a dict, as JSON takes it)."""
        tasks = {task: dict(command=f"python train.py --task {task}") for task in TASKS}
        for task, (file, bps) in self.networks.items():
            tasks[task] = dict(file=str(file), size=bps.metadata["size"],
                               classes=bps.metadata.get("classes") or {},
                               has_labels=TASKS[task].has_labels)
        defaults = finish(self.parser(), self.parser().parse_args(self.fixed_words(None, None)))
        return dict(tasks=tasks, samplers=diffusion.SAMPLERS, preview_steps=PREVIEW_STEPS,
                    strip=STRIP, defaults={name: getattr(defaults, name) for name in SETTINGS[:-1]})

    # ---- drawing ---------------------------------------------------------------------------

    def draw(self, request, send):
        """Draws a request, the newest one, and calls send with dicts about its progress.

        Of {"progress": 0 to 1}, {"picture": URL, "strength": s}, {"prior": URL}, {"seconds": s} the
        last ends it, as {"dropped": true} does: a newer request has come, between two steps.
        request: SETTINGS, task, drawing (a URL, or none for the prior alone), strip (whether to
        draw STRIP's strengths), preview (whether to leave out the prior). Errors: UserError.
        """
        with self.counting:
            self.newest += 1
            number = self.newest
        start = time.monotonic()

        def check():
            if number != self.newest:
                raise Dropped

        try:
            with self.drawing:
                check()
                self.draw_pictures(request, check, send)
                send(dict(seconds=time.monotonic() - start))
        except Dropped:
            send(dict(dropped=True))

    def draw_pictures(self, request, check, send):
        """Draws a request's pictures one after the other, at last the prior's if it is a new one.
        """
        _, bps = self.network(request)
        size, tasks = (bps.metadata["size"],) * 2, []       # (arguments, conditions, steerings)
        content = request.get("drawing") and from_data_url(request["drawing"])
        if content:
            args, cond = self.read(request, content)
            strengths = STRIP if request.get("strip") else [args.conditions[0].strength]
            for s in strengths:
                steering = Steering(bps, self.base.unet, cond.to(self.args.device), strength=s)
                tasks.append((args, [args.conditions[0]._replace(strength=s)], [steering]))
        prior_of = size, [request.get(name) for name in SETTINGS if name != "strength"]
        if self.prior[0] != prior_of and not request.get("preview"):
            tasks.append((self.parse(request, "none"), [], []))
        steps = itertools.count(1)

        def on_step():
            check()
            send(dict(progress=next(steps) / sum(args.steps for args, _, _ in tasks)))

        for args, conditions, steerings in tasks:
            job = Job("", conditions, args.prompt)
            x, = draw_job(job, steerings, args, self.base, None, size, on_step)
            drawn = Drawn(args, job, x, size, content)
            if not conditions:
                self.prior = prior_of, drawn
                continue
            send(dict(picture=data_url(to_image(x)), strength=conditions[0].strength))
            if not request.get("strip") and not request.get("preview"):
                self.last = drawn
        if not request.get("preview"):
            send(dict(prior=data_url(to_image(self.prior[1].x))))
            self.last = self.last if content else self.prior[1]

    def network(self, request):
        """Returns (file, BPS) for the task of a request. Errors: UserError."""
        if request.get("task") not in self.networks:
            raise UserError(f"task {request.get('task')}: no BPS for it; allowed are "
                            f"{', '.join(self.networks)}")
        return self.networks[request["task"]]

    def read(self, request, content):
        """Returns (sample.py's arguments, cond (1, C, H, W)) for a drawing's bytes."""
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
        check_settings(parser, args)
        return args

    # ---- files -----------------------------------------------------------------------------

    def open(self, request):
        """Returns {"picture": URL} of an image file as a condition of a task, to draw on.

        Errors: UserError if it cannot be read, is too large, or holds unknown classes.
        """
        _, bps = self.network(request)
        kind, size = TASKS[request["task"]], bps.metadata["size"]
        with tempfile.NamedTemporaryFile(dir=self.scratch.name, delete=False) as file:
            file.write(from_data_url(request["file"]))
        try:
            if kind.has_labels:
                read_condition(file.name, request["task"], size, size, bps.metadata.get("classes"))
            image = open_boxes(file.name) if kind.has_labels else kind.open(file.name)
        except UserError as error:
            raise UserError(str(error).replace(file.name, "picture")) from None
        finally:
            os.unlink(file.name)
        side = request["side"]
        return dict(picture=data_url(kind.fit(image, side, side).convert("RGB")))

    def save(self):
        """Writes the picture that was drawn last, and its drawing; returns {"files": [paths]}."""
        with self.drawing:
            if self.last is None:
                raise UserError("nothing is drawn yet; draw first")
            args, job, x, size, content = self.last
            self.args.out.mkdir(parents=True, exist_ok=True)
            picture, drawing = unused([self.args.out / name for name in
                                       ("pad.png", "pad-drawing.png")])
            if job.conditions:
                drawing.write_bytes(content)
                job = job._replace(conditions=[job.conditions[0]._replace(cond=drawing)])

            def fingerprint_once(*files):
                """Reads a base once only, but a drawing of the same name anew."""
                return (fingerprint if drawing in files else self.fingerprint)(*files)

            files = fingerprints(args, job.conditions, fingerprint_once)
            write_picture(x, describe(args, job, args.seed, size, files, self.base), picture)
            return dict(files=[str(picture), str(drawing)][:1 + len(job.conditions)])
