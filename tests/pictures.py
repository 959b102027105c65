"""Folders of images of one colour."""

from PIL import Image

RED, GREEN = (255, 0, 0), (0, 255, 0)


def save(path, colour=RED, size=(12, 10), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


def two_classes(root):
    """Two classes of two training images each, and one test image of the second class."""
    for name, colour in (("ants", RED), ("bees", GREEN)):
        for i in range(2):
            save(root / "train" / name / f"{i}.png", colour)
    save(root / "val" / "bees" / "0.png", GREEN)
    (root / "train" / "ants" / "notes.txt").write_text("not an image")
    return root
