"""The work behind the page: draw the newest request, open a picture as a condition, save.

All drawing is sample.py's: the same options, the same denoiser, the same sampler.
"""
import base64
import contextlib
import functools
import io
import itertools
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor

import diffusion
from bps import Condition, load_bps
from data import load_pairs
from inputs.conditions import TASKS, load_image, open_condition, read_condition, to_image
from inputs.files import fingerprint
from inputs.options import DTYPES, is_embedded, shell_command, to_argv
from inputs.pictures import fingerprints, png_fields, write_new
from sample import Job, check_fit, draw, load_base, make_parser, parse_args
from weights import MALFORMED, UserError, as_user_error

PREVIEW_STEPS = 5
CANVAS_SIDE = 256                       # least side of the page's canvas, pixels
STRIP = (0.0, 0.25, 0.5, 0.75, 1.0)     # strengths
NOISE = 8                               # levels that a privacy browser may change a canvas by
EXAMPLES = 3                            # conditions to start from, for each task
# options of the pad, and entries of a request, that are options of sample.py
OPTIONS = ("base", "tokenizer", "vae", "prediction_type", "dtype", "device", "out")
SETTINGS = ("prompt", "negative_prompt", "seed", "steps", "guidance", "sampler", "strength")


class Dropped(Exception):
    """A newer request has arrived."""


class Drawn(NamedTuple):
    """A picture x (3, H, W), and what it was drawn from."""
    number: int                 # the request's
    args: object                # sample.py's arguments
    job: Job
    x: torch.Tensor
    drawing: Image.Image | None


def data_url(image):
    """A PIL image as a URL that a page can show."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def side_of(bps):
    """The canvas's side for a BPS, in pixels."""
    return max(CANVAS_SIDE, bps.metadata["size"])


def canvas_url(image, task, bps):
    """The URL of a condition's image, as large as the canvas."""
    return data_url(TASKS[task].fit(image, side_of(bps), side_of(bps)).convert("RGB"))


@contextlib.contextmanager
def picture_file(url):
    """A file with the picture in a page's URL while it is read; its errors name a picture."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "picture"
        with as_user_error(MALFORMED, "the picture must be a data URL"):
            file.write_bytes(base64.b64decode(url.split(",", 1)[1], validate=True))
        try:
            yield file
        except UserError as error:
            raise UserError(str(error).replace(str(file), "picture")) from None


def without_noise(image, classes):
    """A label map with each pixel that is nearly of a class in the colour of that class."""
    pixels = np.asarray(image.convert("RGB").convert("RGBX"))
    packed, rows = np.unique(pixels.view(np.uint32), return_inverse=True)       # sorts fast
    unique = packed.view(np.uint8).reshape(-1, 4)[:, :3].astype(int)
    nearest, least = unique.copy(), np.full(len(unique), NOISE + 1)
    for colour in classes:
        rgb = ImageColor.getrgb(colour)
        distance = abs(unique - rgb).max(1)
        nearest[distance < least] = rgb
        least = np.minimum(least, distance)
    return Image.fromarray(nearest.astype(np.uint8)[rows.reshape(pixels.shape[:2])])


class Studio:
    """A base, a BPS for each task, and the picture that was drawn last."""

    def __init__(self, args, files, trained=()):
        """args: of the pad. files: of the BPS, the last one of a task counts; those of `trained`
        that do not fit the base are left out, with a note.
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
        self.drawing, self.counting = threading.Lock(), threading.Lock()
        self.newest, self.last = 0, None            # a request's number, a Drawn
        self.prior = None, None                     # what it depends on, a Drawn

    def setup(self):
        """What the page has to know (a dict, as JSON takes it)."""
        tasks = {task: dict(command=f"python train.py --task {task}") for task in TASKS}
        for task, (file, bps) in self.networks.items():
            classes = bps.metadata.get("classes") or {}
            ground = next(iter(classes), "#ffffff") if "#000000" not in classes else "#000000"
            tasks[task] = dict(file=str(file), side=side_of(bps), classes=classes, ground=ground,
                               has_labels=TASKS[task].has_labels, examples=self.examples(task, bps))
        defaults = self.parse({}, "none")
        return dict(tasks=tasks, samplers=diffusion.SAMPLERS, preview_steps=PREVIEW_STEPS,
                    strip=STRIP, settings=SETTINGS, newest=self.newest,
                    defaults={name: getattr(defaults, name) for name in SETTINGS[:-1]})

    def examples(self, task, bps):
        """[{picture: URL, prompt}] of the first embedded test pairs, for the embedded base."""
        if not is_embedded(self.args.base):
            return []
        return [dict(picture=canvas_url(pair.open_cond(), task, bps), prompt=pair.prompts[0])
                for pair in load_pairs(task, "test")[:EXAMPLES]]

    # ---- drawing ---------------------------------------------------------------------------

    def draw(self, request, send):
        """Draw a request, and call send with dicts about its progress.

        They are {"progress": 0 to 1}, {"picture": URL, "strength": s}, {"prior": URL}, and last
        {"seconds": s}, or {"dropped": true} if there is a request with a higher number. request:
        number, SETTINGS, task, drawing (a URL, or none for the prior alone), strip (draw STRIP's
        strengths), preview (take few steps and leave out the prior).
        """
        start, number = time.monotonic(), request.get("number")
        if not isinstance(number, int):
            raise UserError(f"number must be an integer, got {number}.")
        with self.counting:
            self.newest = max(self.newest, number)
        try:
            with self.drawing:
                self.check_newest(number)
                self.draw_pictures(request, send)
                send(dict(seconds=time.monotonic() - start))
        except Dropped:
            send(dict(dropped=True))

    def check_newest(self, number):
        """Raise Dropped if there is a newer request."""
        if number < self.newest:
            raise Dropped

    def draw_pictures(self, request, send):
        """Draw a request's pictures, and last the prior's if that is a new one."""
        _, bps = self.network(request)
        size, is_preview = (bps.metadata["size"],) * 2, bool(request.get("preview"))
        drawings, drawing = [], None            # (options, strength, Conditions) of each
        if request.get("drawing"):
            args, cond, drawing = self.read(request)
            strengths = STRIP if request.get("strip") else [args.condition_args[0].strength]
            drawings = [(args, s, [Condition(bps, cond, s)]) for s in strengths]
        prior_of = size, [request.get(name) for name in SETTINGS[:-1]]
        if self.prior[0] != prior_of and not is_preview:
            drawings.append((self.parse(request, "none"), None, []))
        step, steps = itertools.count(1), sum(args.steps for args, *_ in drawings)

        def on_step():
            self.check_newest(request["number"])
            send(dict(progress=next(step) / steps))

        for args, strength, conditions in drawings:
            context, empty = self.base.encode([args.prompt, args.negative_prompt]).split(1)
            x, = draw(self.base, context, empty, [args.seed], size, diffusion.Sampling(
                args.sampler, args.steps, args.guidance), conditions, on_step=on_step)
            condition_args = [c._replace(strength=strength) for c in args.condition_args]
            job = Job("", condition_args, args.prompt)
            drawn = Drawn(request["number"], args, job, x, drawing)
            if not conditions:
                self.prior = prior_of, drawn
                continue
            if not request.get("strip") and not is_preview:
                self.last = drawn
            send(dict(picture=data_url(to_image(x)), strength=strength))
        if not is_preview:
            if drawing is None:
                self.last = self.prior[1]._replace(number=request["number"])
            send(dict(prior=data_url(to_image(self.prior[1].x))))

    def network(self, request):
        """(file, BPS) for the task of a request."""
        if str(request.get("task")) not in self.networks:
            raise UserError(f"task must be one of {', '.join(self.networks)}, got "
                            f"{request.get('task')}.")
        return self.networks[request["task"]]

    def read(self, request):
        """(sample.py's options, cond (1, C, H, W), image without noise) of a request's drawing."""
        file, bps = self.network(request)
        task, size, classes = request["task"], bps.metadata["size"], bps.metadata.get("classes")
        with picture_file(request["drawing"]) as drawing:
            if classes and TASKS[task].has_labels:
                without_noise(load_image(drawing), classes).save(drawing, "PNG")
            args = self.parse(request, file, drawing)
            cond = read_condition(drawing, task, size, size, classes)
            return args, cond[None].to(self.args.device), load_image(drawing)

    def parse(self, request, bps, drawing=None):
        """sample.py's checked options for a request."""
        options = {name: getattr(self.args, name) for name in OPTIONS if getattr(self.args, name)}
        options |= dict(n=1, bps=bps) | (dict(cond=drawing) if drawing else {})
        options |= {name: str(request[name]) for name in (SETTINGS if drawing else SETTINGS[:-1])
                    if name in request}

        def refuse(message):
            raise UserError(message.removeprefix("argument "))

        parser = make_parser()
        parser.error = refuse
        args = parse_args(to_argv(options), parser)
        if request.get("preview"):
            args.steps = min(args.steps, PREVIEW_STEPS)
        return args

    # ---- files -----------------------------------------------------------------------------

    def open(self, request):
        """{"picture": URL} of an image file as a condition to draw on, as large as the canvas.

        request: task, and file, a URL.
        """
        _, bps = self.network(request)
        with picture_file(request.get("file")) as file:
            image = open_condition(file, request["task"], bps.metadata.get("classes"))
        return dict(picture=canvas_url(image, request["task"], bps))

    def save(self, request):
        """Write the picture that was drawn last, and its drawing.

        request: number, that of its request. The answer is {"files": [paths], "command": what
        draws it again}.
        """
        last = self.last
        if last is None or last.number != request.get("number"):
            raise UserError("this picture is gone. Draw it again, then save.")
        self.args.out.mkdir(parents=True, exist_ok=True)
        job, files = last.job, []
        used = fingerprints(last.args, [c._replace(cond=None) for c in job.condition_args],
                            self.fingerprint)           # which reads each file only once
        if job.condition_args:
            files.append(write_new(last.drawing, self.args.out / "pad-drawing.png"))
            job = job._replace(condition_args=[job.condition_args[0]._replace(cond=files[0])])
            used["cond 1"] = fingerprint(files[0])      # another one may have had its name
        size = last.x.shape[2], last.x.shape[1]
        fields = png_fields(last.args, job, last.args.seed, size, used, self.base)
        picture = write_new(to_image(last.x), self.args.out / "pad.png", fields)
        return dict(files=[str(file) for file in (picture, *files)],
                    command=shell_command(["python", "sample.py", "--from", picture]))
