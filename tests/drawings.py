"""Pictures that several test files draw, and a folder of pairs of them."""
from PIL import Image, ImageDraw


def ring(width, height, color="black"):
    """A ring on white, RGB."""
    image = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(image).ellipse((width // 5, height // 5, width * 4 // 5, height * 4 // 5),
                                  outline=color, width=max(2, width // 16))
    return image


def write_shapes(folder):
    """Writes ten pairs of a shape and its outline, no two alike, with captions; returns the folder.
    """
    for kind, width in (("images", 20), ("conditions", 3)):
        (folder / kind).mkdir(parents=True)
        for i in range(10):
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).ellipse((8 + i, 8, 40 + i, 50), outline="black", width=width)
            image.save(folder / kind / f"{i}.png")
            (folder / "images" / f"{i}.txt").write_text(f"shape {i}")
    return folder
