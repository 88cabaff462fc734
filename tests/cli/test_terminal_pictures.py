"""Pictures for terminals, decoded as the protocols' documents say."""

import re

import numpy as np
import pytest
from PIL import Image

from mlx_smolvlm.cli.terminal import device, pictures
from mlx_smolvlm.cli.terminal.pictures import (
    COLUMNS,
    ROWS,
    Thumbnails,
    encode_picture,
    make_thumbnail,
)


def decoded_sixel(text: str) -> np.ndarray:
    """Pixels (H, W, 3) of a Sixel picture, by the VT340's rules; -1 where none is set."""
    assert text.startswith("\x1bP")
    assert text.endswith("\x1b\\")
    _, _, body = text[2:-2].partition("q")
    size = re.match(r'"(\d+);(\d+);(\d+);(\d+)', body)
    assert size is not None
    width, height = int(size[3]), int(size[4])
    pixels = np.full((height + 6, width, 3), -1, np.int16)
    palette: dict[int, list[float]] = {}
    x = y = colour = 0
    for part in re.finditer(r"#(\d+)(?:;2;(\d+);(\d+);(\d+))?|!(\d+)(.)|([?-~])|(\$)|(-)", body):
        if part[1]:
            colour = int(part[1])
            if part[2]:
                palette[colour] = [int(v) * 2.55 for v in part.group(2, 3, 4)]
        elif part[8]:
            x = 0
        elif part[9]:
            x, y = 0, y + 6
        else:
            count, character = (int(part[5]), part[6]) if part[5] else (1, part[7])
            for bit in range(6):
                if (ord(character) - 63) >> bit & 1:
                    pixels[y + bit, x : x + count] = palette[colour]
            x += count
            assert x <= width
    assert (pixels[height:] == -1).all()
    return pixels[:height]


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (64, 48), (33, 13)])
def test_sixel_holds_the_picture(size: tuple[int, int]) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (9, 3))
    places = np.random.default_rng(1).integers(0, 9, size[::-1])
    picture = Image.fromarray(colours[places].astype(np.uint8))
    shown = decoded_sixel(encode_picture(picture, "sixel"))
    assert np.abs(shown - np.asarray(picture, np.int16)).max() <= 2  # per cent, not 1 of 255


def test_sixel_of_many_colours() -> None:
    ramp = np.add.outer(np.arange(60), np.arange(80)).astype(np.uint8)
    picture = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], axis=2))
    shown = decoded_sixel(encode_picture(picture, "sixel"))
    assert (shown >= 0).all()
    assert np.abs(shown - np.asarray(picture, np.int16)).mean() < 8


def test_kitty_is_sent_in_pieces() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3)).astype(np.uint8)
    text = encode_picture(Image.fromarray(noise), "kitty")
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", text)
    assert "".join(f"\x1b_G{keys};{data}\x1b\\" for keys, data in pieces) == text
    assert len(pieces) > 2
    assert all(len(data) <= 4096 for _, data in pieces)
    assert all(len(data) % 4 == 0 for _, data in pieces)
    assert [keys for keys, _ in pieces[1:]] == ["m=1"] * (len(pieces) - 2) + ["m=0"]


def test_a_thumbnail_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "cell_size", lambda: (10, 20))
    for size in ((4000, 3000), (3000, 20), (20, 3000), (8, 6)):
        small = make_thumbnail([Image.new("RGB", size)])
        assert small.width <= min(10 * COLUMNS, size[0])
        assert small.height <= min(20 * ROWS, size[1])
        assert small.width in (size[0], 10 * COLUMNS) or small.height == 20 * ROWS
    three = [Image.new("RGB", (400, 100), colour) for colour in ("red", "lime", "blue")]
    sheet = make_thumbnail(three)
    assert sheet.size == (480, 40)
    colours = [sheet.getpixel((x, 20)) for x in (80, 240, 400)]
    assert colours == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_a_clip_shows_three_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_smolvlm as smolvlm
    from mlx_smolvlm.config import Config
    from mlx_smolvlm.media.video import Video, open_video

    frames = np.zeros((9, 8, 8, 3), np.uint8)
    frames[:, :, :, 0] = 20 * np.arange(9)[:, None, None]
    config: Config = smolvlm.load("demo").config
    clip = open_video(Video(frames, source_fps=1.0), config)
    shown: list[list[int]] = []

    def take(sheets: list[Image.Image]) -> Image.Image:
        shown.append([np.asarray(sheet)[0, 0, 0] // 20 for sheet in sheets])
        return sheets[0]

    monkeypatch.setattr(pictures, "make_thumbnail", take)
    thumbnails = Thumbnails(True)
    thumbnails._graphics = "iterm"
    thumbnails.show_clip(clip)
    wanted = [clip.indices[0], clip.indices[len(clip.indices) // 2], clip.indices[-1]]
    assert shown == [wanted]


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm"),
        ({"LC_TERMINAL": "iTerm2"}, "iterm"),
        ({"TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"KITTY_WINDOW_ID": "1", "TMUX": "x"}, "none"),
        ({"TERM_PROGRAM": "iTerm.app", "STY": "x"}, "none"),
        ({"LC_TERMINAL": "iTerm2", "TERM": "tmux-256color"}, "none"),
        ({"TERM": "xterm-256color"}, "none"),
    ],
)
def test_how_a_terminal_shows_pictures(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], wanted: str
) -> None:
    monkeypatch.setattr(device, "_query_attributes", list)
    assert device.detect_graphics(environ) == wanted
    monkeypatch.setattr(device, "_query_attributes", lambda: [b"4", b"22"])
    assert device.detect_graphics(environ) == ("sixel" if wanted == "none" else wanted)


def test_nothing_is_shown_where_stderr_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM_PROGRAM", "iTerm.app")
    Thumbnails(True).show(Image.new("RGB", (8, 8)))
    assert capsys.readouterr() == ("", "")
