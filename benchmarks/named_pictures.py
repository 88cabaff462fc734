"""Count right answers about a picture that the question names by its file, and in words.

    python -m benchmarks.named_pictures [--model MODEL] [--count N]

Each picture is a colored shape on white; an answer is right if it has both words.
"""

from __future__ import annotations

import argparse
import random

from PIL import Image, ImageDraw

from mlx_smolvlm import load

QUESTIONS = ("What is in {}?", "Describe {}.")
NAMES = (
    *("the picture", "photo.png", "IMG_1234.HEIC", "cat.jpg", "DSC00017.JPG"),
    "~/Desktop/Screenshot 2026-01-01 at 10.00.00.png",
)
COLORS = {"red": (220, 40, 40), "blue": (40, 70, 220), "green": (40, 160, 60), "black": (10,) * 3}
SIDE = 256


def draw_shape(chance: random.Random) -> tuple[Image.Image, str, str]:
    """Return a picture of one shape, and the names of its color and shape."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    color, shape = chance.choice([*COLORS]), chance.choice(("circle", "square", "triangle"))
    x, y, half = chance.randint(60, 190), chance.randint(60, 190), chance.randint(35, 55)
    if shape == "circle":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=COLORS[color])
    elif shape == "square":
        draw.rectangle((x - half, y - half, x + half, y + half), fill=COLORS[color])
    else:
        corners = ((x, y - half), (x - half, y + half), (x + half, y + half))
        draw.polygon(corners, fill=COLORS[color])
    return image, color, shape


def main() -> None:
    """Print a table: for each question and name, how many answers are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--count", type=int, default=60)
    options = parser.parse_args()
    chance, vlm = random.Random(0), load(options.model)
    pictures = [draw_shape(chance) for _ in range(options.count)]
    for question in QUESTIONS:
        for name in NAMES:
            right = 0
            for image, *words in pictures:
                answer = vlm.ask(question.format(name), image, max_tokens=30, detail="low").text
                right += all(word in answer.lower() for word in words)
            print(f"{right:3} of {options.count}  {question.format(name)}")


if __name__ == "__main__":
    main()
