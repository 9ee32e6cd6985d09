"""Pictures that several test files draw, and a folder of pairs of them."""
import numpy as np
from PIL import Image, ImageDraw


def ring(width, height, color="black"):
    """A ring on white, RGB."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width // 5, height // 5, width * 4 // 5, height * 4 // 5),
                                  outline=color, width=max(2, width // 16))
    return image


def label_map(mode="P", size=48, colours=((10, 20, 30), (200, 100, 50))):
    """Two classes, 0 and 7, in halves; the colours are for mode P."""
    array = np.zeros((size, size), np.uint8)
    array[:, size // 2:] = 7
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([*colours[0] * 7, *colours[1]])
    return image


def mask(mode, inside):
    """A half in one bit, in grey as 0 and `inside`, or in a palette of black and white."""
    array = np.zeros((48, 48), np.uint8)
    array[:, 24:] = inside
    image = Image.fromarray(array)
    if mode == "1":
        return image.point(lambda value: 255 * (value > 0)).convert("1")
    return image.convert("RGB").quantize(2) if mode == "P" else image.convert(mode)


def with_orientation(orientation):
    """The EXIF of a picture that has to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def flip_bit(content, place=-16):
    """Bytes with one bit changed, by default in the checksum of a PNG's pixels."""
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


def write_shapes(folder):
    """Write ten pairs of a shape and its outline, no two alike, with captions, to a folder."""
    for kind, width in (("images", 20), ("conditions", 3)):
        (folder / kind).mkdir(parents=True)
        for i in range(10):
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).ellipse((8 + i, 8, 40 + i, 50), outline="black", width=width)
            image.save(folder / kind / f"{i}.png")
            (folder / "images" / f"{i}.txt").write_text(f"shape {i}")
    return folder
