"""Default texts, pictures and questions to compare two checkpoints on.

The texts were written for this project; the pictures are drawn by code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_smolvlm.prompt.messages import ImageSource

if TYPE_CHECKING:
    import PIL.Image

SIDE = 384  # width and height of a picture, in pixels

TEXTS = (
    """The ferry leaves the island at seven, long before the shops open. On the upper deck it is \
cold even in June, so most people stay below, near the coffee machine, and read or sleep. An old \
man who repairs clocks travels on Mondays only. He carries his tools in a wooden box, and if the \
sea is calm he opens it and sorts the smallest screws by size. Nobody talks to him before the \
ferry has passed the lighthouse. After that he will tell anybody who sits down beside him how his \
grandfather wound the town's great clock every eighth day, and why it has been four minutes late \
since the winter of the storm.""",
    """Lentil soup for four. Chop one onion, two carrots and a stalk of celery, and fry them \
slowly in three spoons of olive oil until they are soft, which takes about ten minutes. Add two \
cloves of garlic, a spoon of cumin and half a spoon of paprika; stir for a minute. Add 250 grams \
of red lentils, a can of tomatoes and a litre of water. Let the soup boil gently for 25 minutes, \
and stir it now and then so that it does not burn. Season with salt, pepper and the juice of half \
a lemon. It tastes better on the second day.""",
    """How does a bicycle stay upright? A common answer is that its wheels are gyroscopes, but \
the effect is small at the speed of a cyclist. What matters more is steering: when a bicycle \
leans to the left, its front wheel turns to the left as well, and the path that follows brings \
the wheels back under the weight. A rider does this without thinking. Experiments with a bicycle \
whose handlebar was locked showed that even skilled riders fall within a few metres. In 2011, \
researchers built one without gyroscopic effect and without trail, and it still balanced \
itself.""",
    '''def median(values: list[float]) -> float:
    """Return the middle value, or the mean of the two middle values."""
    if not values:
        raise ValueError("median of an empty list")
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
''',
    """| city | country | inhabitants | founded |
| --- | --- | --- | --- |
| Lisbon | Portugal | 545,000 | about 1200 BC |
| Helsinki | Finland | 675,000 | 1550 |
| Canberra | Australia | 467,000 | 1913 |

The table lists three capitals. The youngest of them, Canberra, was planned as a capital from the \
beginning; the largest is Helsinki.""",
    """User: The printer says that it is out of paper, but the tray is full. What can I do?
Assistant: Take the tray out and check three things. First, the paper guides should touch the \
stack without bending it. Second, the stack must not be higher than the mark. Third, wipe the \
rubber rollers with a damp cloth; dust makes them slip. Then push the tray back until it clicks, \
switch the printer off, wait for ten seconds, and switch it on again.
User: It works now, thank you!
Assistant: You are welcome.""",
)

QUESTIONS = (
    "Describe this picture.",
    "What text is in this picture?",
    "What colors are in this picture?",
)
PLAIN_QUESTION = "Explain in two sentences why the sky is blue."


@dataclass(frozen=True)
class PictureQuestion:
    """A question, and the picture that it is about with its name; None without a picture."""

    text: str
    picture: ImageSource | None = None
    name: str | None = None


def draw_pictures() -> dict[str, PIL.Image.Image]:
    """Draw a page, a chart, shapes and a landscape, and return them by name.

    The pixels are the same on every machine.
    """
    makers: dict[str, Callable[[Any], None]] = {
        "page": _draw_page,
        "chart": _draw_chart,
        "shapes": _draw_shapes,
        "landscape": _draw_landscape,
    }
    from PIL import Image, ImageDraw

    pictures = {}
    for name, maker in makers.items():
        pictures[name] = Image.new("RGB", (SIDE, SIDE), "white")
        maker(ImageDraw.Draw(pictures[name]))
    return pictures


def _load_font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _draw_page(draw: Any) -> None:
    draw.text((30, 24), "OPENING HOURS", fill="black", font=_load_font(36))
    lines = ("Monday      9 - 17", "Tuesday     9 - 17", "Wednesday   9 - 13", "Closed on Sunday")
    for number, line in enumerate(lines):
        draw.text((36, 110 + 56 * number), line, fill=(30, 30, 60), font=_load_font(30))


def _draw_chart(draw: Any) -> None:
    draw.text((90, 16), "Rain in mm", fill="black", font=_load_font(30))
    draw.line([(50, 60), (50, 330), (360, 330)], fill="black", width=3)
    bars = (("Jan", 120, "red"), ("Feb", 210, "green"), ("Mar", 70, "blue"), ("Apr", 160, "orange"))
    for number, (name, height, color) in enumerate(bars):
        x = 75 + 72 * number
        draw.rectangle([x, 330 - height, x + 46, 329], fill=color)
        draw.text((x, 340), name, fill="black", font=_load_font(24))


def _draw_shapes(draw: Any) -> None:
    draw.rectangle([0, 0, SIDE, SIDE], fill=(235, 235, 225))
    draw.ellipse([30, 40, 170, 180], fill=(200, 30, 40))
    draw.rectangle([220, 60, 350, 190], fill=(30, 80, 190))
    draw.polygon([(190, 220), (90, 360), (300, 360)], fill=(40, 150, 60))


def _draw_landscape(draw: Any) -> None:
    for y in range(SIDE):
        shade = y / SIDE
        draw.line([(0, y), (SIDE, y)], fill=(int(90 + 150 * shade), int(150 + 70 * shade), 235))
    draw.ellipse([270, 40, 340, 110], fill=(255, 230, 120))
    for x in range(SIDE):
        hill = int(250 + 40 * math.sin(x / 60) + 15 * math.sin(x / 17))
        draw.line([(x, hill), (x, SIDE)], fill=(60, 120 + x // 12, 60))
