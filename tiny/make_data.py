"""Rebuilds the embedded world from DiceBear's avatars: the tasks' figures, or the base's pool.

Only this script needs more than requirements.txt: `pip install resvg-py`, and npm on the PATH.

    python -m tiny.make_data                    # writes tiny/data, which is committed (3 minutes)
    python -m tiny.make_data --pool 60000       # writes tiny/work/pool, to train the base

Everything about figure i is a function of (seed, i). Its split is a function of its shapes alone:
a tenth of each style's hair shapes is `unseen`, and of the rest a hash of the drawing without its
colours and without mirroring decides.

Shapes: H W rows and columns, up to 256 where a figure is drawn, 64 where it is stored.
"""
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import multiprocessing
import re
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from inputs.files import write_lines
from inputs.options import BASE, Parser, positive, run_script
from tiny import world
from tiny.tasks import CLASSES
from weights import UserError, replacing

PACKAGES = ("@dicebear/core@9.4.3", "@dicebear/collection@9.4.3")
LARGE = 256                     # px at which figures are drawn
POOL_SIZES = (128, 64, 64)      # where only the picture and the visible parts are needed
CHUNK = 250                     # figures that one Node process draws
TEST_SHARE, VAL_SHARE = 0.10, 0.03
COUNTS = dict(train=1000, val=60, test=200, unseen=100)         # figures of the tasks
ARTISTIC_COUNTS = dict(train=40, val=20, test=60)
TASK_SEED, ARTISTIC_SEED, POOL_SEED = 1, 2, 3
WHITE_SHARE = 0.6               # of the grounds
CONTRAST = 90                   # least distance of a task figure's colours from each other, RGB
VISIBLE = 0.012                 # share of the picture from which a part's colour is named
EDGE = 24                       # difference of 255 that makes a border between regions
INK = 70                        # grey of an all-white rendering below which it is black ink
PENS = (3, 5, 7)                # widths at 256 px
# The square of each style's drawing that becomes the picture: left, top, side (shares of its own).
FRAMES = {"adventurer": (0.02, 0.04, 0.96), "avataaars": (0.04, 0, 0.94),
          "bigEars": (0.05, 0.05, 0.9), "bigSmile": (0.02, 0, 0.96), "bottts": (0, 0, 1),
          "dylan": (0.04, 0.01, 0.92), "lorelei": (0.06, 0.07, 0.9), "micah": (0.02, 0, 0.96),
          "miniavs": (0, 0, 1), "toonHead": (0.03, 0, 0.95), "pixelArt": (0, 0, 1)}
HAIR_KEYS = {"avataaars": "top", "bottts": "top", "toonHead": "rearHair"}
UNSEEN_HAIR = {
    "adventurer": ("long13", "short01", "short07", "long05", "short12"),
    "avataaars": ("curly", "hat", "straight01"),
    "bigEars": ("long06", "short07", "long03", "long08"),
    "bigSmile": ("shortHair",), "bottts": ("radar",), "dylan": ("buns",),
    "lorelei": ("variant01", "variant31", "variant05", "variant02", "variant12"),
    "micah": ("mrT",), "miniavs": ("balndess",),
    "toonHead": ("shoulderHigh",)}


# ---- drawing with DiceBear and resvg -------------------------------------------------------

def install(folder):
    """Install DiceBear in `folder`, and check that resvg-py is there."""
    if importlib.util.find_spec("resvg_py") is None:
        raise UserError("resvg-py is not installed. Run `pip install resvg-py`.")
    if shutil.which("npm") is None:
        raise UserError("npm is not on the PATH. Install Node.js.")
    subprocess.run(["npm", "install", "--silent", "--prefix", folder, *PACKAGES], check=True)


def create_avatars(figures, folder):
    """DiceBear's answer to each planned figure: {svgs: true, black and coded, parts}."""
    jobs = []
    for figure in figures:
        body = "robot" if figure["style"] == "bottts" else "skin"
        colours = {part: world.COLOURS[part][figure[part]] for part in ("hair", "clothes")}
        colours["skin"] = world.COLOURS[body][figure[body]]
        jobs.append(dict(style=figure["style"], seed=figure["name"], colours=colours))
    script = (Path(__file__).parent / "avatars.mjs").read_text()
    process = subprocess.run(["node", "--input-type=module", "--eval", script], cwd=folder,
                             input="\n".join(map(json.dumps, jobs)), capture_output=True,
                             check=True, encoding="utf-8")
    return list(map(json.loads, process.stdout.splitlines()))


def render(svg, frame, size):
    """A square of a drawing: RGBA (size, size, 4) in [0, 1], colours multiplied by alpha.

    frame: left, top and side of the square, as shares of the drawing's own side.
    """
    import resvg_py
    side = float(re.search(r'viewBox="0 0 ([\d.]+)', svg).group(1))
    box = " ".join(f"{share * side:.4f}" for share in (*frame, frame[2]))
    svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{box}"', svg, count=1)
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    rgba = np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).astype(np.float32) / 255
    rgba[..., :3] *= rgba[..., 3:]
    return rgba


def shrink(image):
    """The mean of each square of pixels: (H, W, ..) to (64, 64, ..)."""
    factor = len(image) // world.SIZE
    return image.reshape(world.SIZE, factor, world.SIZE, factor, *image.shape[2:]).mean((1, 3))


def to_picture(rgba, ground):
    """RGB uint8 (64, 64, 3) of a rendering over a plain ground."""
    colour = np.array(world.rgb("ground", ground)) / 255
    rgba = shrink(rgba)
    return np.round(255 * (rgba[..., :3] + (1 - rgba[..., 3:]) * colour)).astype(np.uint8)


def part_shares(black, coded):
    """How much of hair, skin or robot, and clothes each pixel holds: (H, W, 3) in [0, 1]."""
    return np.clip(coded[..., :3] - black[..., :3], 0, 1)


# ---- conditions ----------------------------------------------------------------------------

def find_ink(black, coded, pen):
    """Borders of a figure's regions as the pen draws them, and its black ink: (256, 256) uint8.

    Both are independent of the figure's colours. coded: the rendering in pure colours.
    """
    image = Image.fromarray(np.round(255 * coded).astype(np.uint8), "RGBA")
    image = np.asarray(image.filter(ImageFilter.MedianFilter(5))).astype(int)
    border = np.zeros(image.shape[:2], bool)
    border[:, 1:] |= np.abs(np.diff(image, axis=1)).max(-1) > EDGE
    border[1:] |= np.abs(np.diff(image, axis=0)).max(-1) > EDGE
    lines = Image.fromarray(np.uint8(255 * border)).filter(ImageFilter.MaxFilter(pen))
    white = black[..., :3] + part_shares(black, coded).sum(-1, keepdims=True)
    grey = 255 * (white + 1 - black[..., 3:]).mean(-1)
    return np.maximum(np.asarray(lines), np.uint8(255 * (grey < INK)))


def smooth_noise(rng, cells=6):
    """Smooth noise (256, 256) with a standard deviation of about one."""
    field = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    noise = np.asarray(field.resize((LARGE, LARGE), Image.Resampling.BICUBIC))
    return noise / noise.std()


def wobble(ink, share, rng):
    """The ink moved smoothly by about `share` of the side, as an unsteady hand moves a pen."""
    rows, columns = np.mgrid[:LARGE, :LARGE]
    rows, columns = (np.clip(np.round(grid + share * LARGE * smooth_noise(rng)), 0, LARGE - 1)
                     for grid in (rows, columns))
    return ink[rows.astype(int), columns.astype(int)]


def erase(ink, share, rng):
    """The ink with gaps: `share` of it is missing."""
    noise = smooth_noise(rng, cells=16)
    return np.where(noise < np.quantile(noise[ink > 0], share), 0, ink).astype(np.uint8)


def to_drawing(ink):
    """A drawing uint8 (64, 64), black on white."""
    return np.round(255 - shrink(ink.astype(np.float32))).astype(np.uint8)


def to_part_map(black, coded, is_robot):
    """Indices into tasks.CLASSES (64, 64) uint8: what most of each pixel is."""
    shares, alpha = shrink(part_shares(black, coded)), shrink(black[..., 3])
    hair, body, clothes = np.moveaxis(shares, -1, 0)
    each = {"ground": 1 - alpha, "hair": hair, "robot" if is_robot else "skin": body,
            "clothes": clothes, "features": alpha - shares.sum(-1)}
    absent = np.zeros_like(alpha)
    return np.stack([each.get(name, absent) for name in CLASSES]).argmax(0).astype(np.uint8)


# ---- figures -------------------------------------------------------------------------------

def pick(rng, names):
    """One of the names, at random."""
    names = list(names)
    return names[rng.integers(len(names))]


def plan(seed, i, styles, contrast):
    """The figure i of a seed as a dict: style, colour names, ground, mirroring and frame.

    contrast: least distance between any two of its colours.
    """
    rng = np.random.default_rng((seed, i))
    figure = dict(name=f"{seed}-{i:06d}", style=pick(rng, styles))
    while True:
        colours = {part: pick(rng, world.COLOURS[part]) for part in world.PARTS}
        white = rng.random() < WHITE_SHARE
        colours["ground"] = "white" if white else pick(rng, list(world.COLOURS["ground"])[1:])
        body = ("robot",) if figure["style"] == "bottts" else ("hair", "skin", "clothes")
        values = [np.array(world.rgb(part, colours[part])) for part in (*body, "ground")]
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(values, 2)]
        if min(distances) >= contrast:
            break
    left, top, side = FRAMES[figure["style"]]
    if figure["style"] != world.ARTISTIC_STYLE:             # whose cells are as wide as 4 pixels
        larger = side * rng.uniform(1, 1.08)                # a little smaller, or to one side
        left -= (larger - side) * rng.random()
        top, side = top - (larger - side), larger
    return figure | colours | dict(frame=(left, top, side), mirror=bool(rng.random() < 0.5))


def split_of(figure, parts, digest):
    """The split of a figure, from its style, DiceBear's parts and the hash of its drawing."""
    hair = parts.get(HAIR_KEYS.get(figure["style"], "hair"))
    if hair in UNSEEN_HAIR.get(figure["style"], ()):
        return "unseen"
    u = int(digest[:8], 16) / 2**32
    return "test" if u < TEST_SHARE else "val" if u < TEST_SHARE + VAL_SHARE else "train"


def hash_shapes(coded):
    """SHA-256 in hex of a rendering in pure colours, to a sixteenth of a shade."""
    return hashlib.sha256(np.round(15 * shrink(coded)).astype(np.uint8).tobytes()).hexdigest()


def draw_figure(figure, avatar, splits, for_pool):
    """(row of figures.jsonl, pictures) of a planned figure, or None if its split is not wanted.

    pictures: {folder: image} of a task's figure, or the pool's array of one picture.
    """
    style, parts = figure["style"], avatar["parts"]
    digest = hash_shapes(render(avatar["svgs"][2], FRAMES[style], world.SIZE))
    split = split_of(figure, parts, digest)
    if split not in splits:
        return None
    sizes = POOL_SIZES if for_pool else [LARGE] * 3
    renderings = [render(svg, figure["frame"], size) for svg, size in zip(avatar["svgs"], sizes)]
    if figure["mirror"]:
        renderings = [image[:, ::-1] for image in renderings]
    hair, body, clothes = part_shares(*renderings[1:]).mean((0, 1)) > VISIBLE
    visible = dict(hair=hair, clothes=clothes, **{"robot" if style == "bottts" else "skin": body})
    row = {key: figure[key] for key in ("name", "style", "ground")}
    row |= {part: figure[part] for part in world.PARTS if visible.get(part)}
    row |= world.describe(parts, HAIR_KEYS.get(style, "hair"))
    row |= dict(split=split, hash=digest[:16])
    picture = to_picture(renderings[0], row["ground"])
    return row, picture if for_pool else make_pictures(row, picture, *renderings[1:])


def make_pictures(row, picture, black, coded):
    """{folder: image} of a task's figure; see world.open_part."""
    rng = np.random.default_rng((TASK_SEED, int(row["hash"], 16)))
    pen = int(rng.choice(PENS))
    ink = find_ink(black, coded, pen)
    shaky = wobble(ink, 0.006, rng) if row["split"] == "train" else ink
    hand = find_ink(black, coded, int(rng.choice([1 if pen == 3 else 3, 2 * pen - 1])))
    hand = erase(wobble(hand, 0.02, rng), 0.1, rng)
    parts = Image.fromarray(to_part_map(black, coded, "robot" in row))
    parts.putpalette(bytes.fromhex("".join(CLASSES.values()).replace("#", "")))
    images = dict(picture=Image.fromarray(picture))
    if row["style"] != world.ARTISTIC_STYLE:
        images |= dict(drawing=Image.fromarray(to_drawing(shaky)), parts=parts)
        if row["split"] == "test":
            images["hand"] = Image.fromarray(to_drawing(hand))
    return images


def draw_chunk(first, folder, seed, styles, splits, contrast):
    """[(row, pictures)] of the figures from `first` on whose split is wanted."""
    figures = [plan(seed, i, styles, contrast) for i in range(first, first + CHUNK)]
    drawn = (draw_figure(figure, avatar, splits, for_pool=seed == POOL_SEED)
             for figure, avatar in zip(figures, create_avatars(figures, folder)))
    return list(filter(None, drawn))


def draw_figures(folder, seed, styles, splits, contrast=CONTRAST):
    """Yield (row, pictures) of figure 0, 1, 2 .. of a seed; two processes work ahead."""
    draw = functools.partial(draw_chunk, folder=folder, seed=seed, styles=tuple(styles),
                             splits=tuple(splits), contrast=contrast)
    with multiprocessing.Pool(2) as processes:
        for chunk in processes.imap(draw, itertools.count(step=CHUNK)):
            yield from chunk


# ---- writing -------------------------------------------------------------------------------

def collect(figures, counts):
    """[(row, pictures)] with so many figures of each split, no two of the same shapes."""
    left, hashes, chosen = dict(counts), set(), []
    with tqdm(total=sum(counts.values()), desc="figures") as bar:
        for row, pictures in figures:
            if left[row["split"]] and row["hash"] not in hashes:
                left[row["split"]] -= 1
                hashes.add(row["hash"])
                chosen.append((row, pictures))
                bar.update()
            if not any(left.values()):
                return sorted(chosen, key=lambda entry: world.SPLITS.index(entry[0]["split"]))


def write_figures(folder, out=world.DATA):
    """Write figures.jsonl and figures.zip: the figures of the four tasks."""
    chosen = collect(draw_figures(folder, TASK_SEED, world.STYLES, COUNTS), COUNTS)
    chosen += collect(draw_figures(folder, ARTISTIC_SEED, [world.ARTISTIC_STYLE], ARTISTIC_COUNTS),
                      ARTISTIC_COUNTS)
    with (replacing(out / "figures.zip") as temporary,
          zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive):
        for row, pictures in chosen:
            for name, image in pictures.items():
                file = io.BytesIO()
                image.save(file, "PNG", optimize=True)
                entry = zipfile.ZipInfo(f"{name}/{row['name']}.png")    # a fixed date: same bytes
                archive.writestr(entry, file.getvalue())
    write_lines([row for row, _ in chosen], out / "figures.jsonl")
    print(f"{len(chosen)} figures -> {out}")


def write_pool(folder, count, out=BASE.parent / "work" / "pool"):
    """Write figures.jsonl and pictures.npy (count, 64, 64, 3): training figures for the base."""
    figures = draw_figures(folder, POOL_SEED, world.STYLES, ["train"], contrast=0)
    rows, pictures = zip(*tqdm(itertools.islice(figures, count), total=count, desc="pool"))
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / "pictures.npy") as temporary:
        np.save(temporary, np.stack(pictures))
    write_lines(rows, out / "figures.jsonl")
    np.save(world.DATA / "pool_hashes.npy",
            np.array([int(row["hash"], 16) for row in rows], np.uint64))
    print(f"{count} figures -> {out}")


def main():
    """Draw and write the tasks' figures, or the pool."""
    parser = Parser(__doc__)
    parser.add_argument("--pool", type=positive, help="figures to train the base on (default: "
                        "draw the tasks' own)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        install(folder)
        if args.pool:
            write_pool(folder, args.pool)
        else:
            write_figures(folder)


if __name__ == "__main__":
    run_script(main)
