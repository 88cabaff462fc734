"""What `tests/fuzz.py` damages, and how a user would open it.

Each function takes an empty folder and returns a function of a random generator. That one
writes a damaged file and returns the action that opens it.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import mlx_smolvlm  # noqa: F401  (before mlx.core, so that it loads OpenBLAS)

# isort: split
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_smolvlm import CacheOptions, Sampling, Video, load
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.media.picture import open_image
from mlx_smolvlm.media.tiles import tile_picture
from mlx_smolvlm.media.video import open_video
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.smolvlm import SmolVLM
from tests import conftest
from tests.helpers import file_damage, gguf_cases, heic_writer, hf_folder, video_cases

Action = Callable[[], object]
Case = Callable[[Random], Action]

SHORT = Sampling(max_tokens=3)


def write_tiny(folder: Path, video: bool = False) -> Path:
    """The checkpoint with random weights of conftest.py."""
    folder.mkdir(parents=True)
    config = conftest.tiny_config()
    if video:
        text = replace(config.text, max_position_embeddings=1024)
        config = replace(config, video=conftest.VideoConfig(1.0, 64, 32, 1.0), text=text)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    shutil.copy(Path(__file__).with_name("tiny_tokenizer.json"), folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(conftest.TEMPLATE)
    weights = dict(tree_flatten(conftest.randomize(Model(config), seed=1).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def answer(vlm: SmolVLM) -> str:
    """A short answer, free and by a regular expression."""
    vlm.ask("Hi", sampling=replace(SHORT, regex="[a-z]+"))
    return vlm.ask("Hi", images=[Image.new("RGB", (40, 30))], sampling=SHORT).text


def pictures(folder: Path) -> Case:
    """Pictures of every format, opened and cut into tiles."""
    config = conftest.tiny_config()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    plain: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("PNG", rgb, {}),
        ("PNG", rgb.convert("RGBA"), {"exif": exif}),
        ("PNG", rgb.convert("P"), {"transparency": 3}),
        ("PNG", Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)), {}),
        ("PNG", rgb.convert("1"), {}),
        ("JPEG", rgb, {"exif": exif}),
        ("JPEG", rgb.convert("CMYK"), {"progressive": True}),
        ("GIF", rgb.convert("P"), {}),
        ("WEBP", rgb.convert("RGBA"), {"exif": exif}),
        ("WEBP", rgb, {"lossless": True}),
        ("BMP", rgb, {}),
        ("TIFF", rgb, {"compression": "tiff_lzw"}),
        ("TIFF", rgb.convert("F"), {}),
        ("PPM", rgb, {}),
        ("ICO", rgb, {}),
        ("JPEG2000", rgb, {}),
        ("TGA", rgb, {}),
        ("AVIF", rgb, {}),
        ("EPS", rgb, {}),
        ("PDF", rgb, {}),
        ("PCX", rgb, {}),
        ("DDS", rgb, {}),
        ("SGI", rgb, {}),
    ]
    seeds = []
    for form, image, options in plain:
        file = io.BytesIO()
        image.save(file, form, **options)
        seeds.append(file.getvalue())
    seeds.append(heic_writer.write_heic(heic_writer.make_grid(rgb, 32)))
    seeds.append(heic_writer.write_heic([heic_writer.encode(rgb, "yuv420p10le")], wide=True))

    def case(random: Random) -> Action:
        path = folder / "photo.png"
        path.write_bytes(file_damage.damage_bytes(seeds[random.randrange(len(seeds))], random))
        return lambda: tile_picture(open_image(path), config)

    return case


def clips(folder: Path) -> Case:
    """Video files and animations, opened and decoded as a prompt needs them."""
    config = replace(conftest.tiny_config(), video=conftest.VideoConfig(1.0, 16, 32, 1.0))
    names = ("h264 mp4", "fragmented", "vp9 webm", "vp8 webm", "mpeg-4 avi", "mpeg-2 ts", "vfr")
    specs = [video_cases.SPECS[name] for name in names]
    specs += [
        video_cases.Spec("flv", "flv1"),
        video_cases.Spec("asf", "wmv2"),
        video_cases.Spec("nut", "mpeg4"),
        video_cases.Spec("matroska", "mpeg4", times=tuple(range(0, 1000, 20))),
        video_cases.Spec("yuv4mpegpipe", "wrapped_avframe", frames=8),
        video_cases.Spec("ivf", "libvpx", options=video_cases.VP9),
        video_cases.Spec("mov", "mjpeg", pix_fmt="yuvj420p", frames=10),
    ]
    seeds = [video_cases.make(replace(spec, frames=min(spec.frames, 12))) for spec in specs]
    frames = [Image.fromarray(video_cases.moving(number, (40, 30))) for number in range(6)]
    for form in ("GIF", "PNG", "WEBP"):
        file = io.BytesIO()
        frames[0].save(file, form, save_all=True, append_images=frames[1:], duration=100)
        seeds.append(file.getvalue())
    ranges = ({}, {"fps": 25.0}, {"start_s": 0.2}, {"start_s": 0.1, "end_s": 0.3})

    def case(random: Random) -> Action:
        path = folder / "clip.mp4"
        path.write_bytes(file_damage.damage_bytes(seeds[random.randrange(len(seeds))], random))
        options: Any = ranges[random.randrange(len(ranges))]
        return lambda: [0 for _ in open_video(Video(path, **options), config).read_frames()]

    return case


def checkpoints(folder: Path) -> Case:
    """Our own folders: configuration, index, weights, checksums."""
    whole = write_tiny(folder / "whole")
    answer(load(whole))

    def case(random: Random) -> Action:
        broken = folder / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        if random.random() < 0.7:
            path = broken / "config.json"
            path.write_bytes(file_damage.damage_json(path.read_text(), random))
        else:
            path = broken / "model.safetensors"
            path.write_bytes(file_damage.damage_safetensors(path.read_bytes(), random))
        return lambda: answer(load(broken))

    return case


def sources(folder: Path) -> Case:
    """Hugging Face folders, converted."""
    whole = hf_folder.make(folder / "whole")
    hf_folder.write_json(whole / "chat_template.json", {"chat_template": conftest.TEMPLATE})
    load(convert_checkpoint(whole, folder / "made"))
    names = [path.name for path in sorted(whole.iterdir()) if path.suffix == ".json"]

    def case(random: Random) -> Action:
        broken, made = folder / "broken", folder / "made"
        for path in (broken, made):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(whole, broken)
        if random.random() < 0.8:
            path = broken / names[random.randrange(len(names))]
            path.write_bytes(file_damage.damage_json(path.read_text(), random))
        else:
            path = broken / "model.safetensors"
            path.write_bytes(file_damage.damage_safetensors(path.read_bytes(), random))
        return lambda: load(convert_checkpoint(broken, made))

    return case


def gguf_files(folder: Path) -> Case:
    """GGUF files of a language model, converted."""
    kinds = (("Q4_0", "Q8_0"), ("Q4_1", "F16"), ("F32", "F32"))
    seeds = [gguf_cases.write_model(folder / "model.gguf", *one).read_bytes() for one in kinds]
    convert_checkpoint(folder / "model.gguf", folder / "made")

    def case(random: Random) -> Action:
        shutil.rmtree(folder / "made", ignore_errors=True)
        path = folder / "model.gguf"
        path.write_bytes(file_damage.damage_bytes(seeds[random.randrange(len(seeds))], random))
        return lambda: convert_checkpoint(path, folder / "made")

    return case


def tokenizers(folder: Path) -> Case:
    """tokenizer.json of our own folders."""
    whole = write_tiny(folder / "whole")
    text = (whole / "tokenizer.json").read_text()

    def case(random: Random) -> Action:
        (whole / "tokenizer.json").write_bytes(file_damage.damage_json(text, random))
        return lambda: answer(load(whole))

    return case


def templates(folder: Path) -> Case:
    """chat_template.jinja of our own folders."""
    whole = write_tiny(folder / "whole")

    def case(random: Random) -> Action:
        changed = file_damage.damage_template(conftest.TEMPLATE, random)
        (whole / "chat_template.jinja").write_bytes(changed)
        return lambda: answer(load(whole))

    return case


def cache_files(folder: Path) -> Case:
    """Files of `--cache-dir`; what is damaged must not change an answer."""
    whole, cache = write_tiny(folder / "whole"), folder / "cache"
    options = CacheOptions(folder=cache, memory_bytes=0)
    question = "What is in this picture, and where is it in the picture?"
    cold = load(whole).ask(question, sampling=SHORT).text
    load(whole, cache=options).ask(question, sampling=SHORT)
    kept = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}

    def case(random: Random) -> Action:
        shutil.rmtree(cache)
        for path, data in kept.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        path = sorted(kept)[random.randrange(len(kept))]
        if path.suffix == ".safetensors":
            path.write_bytes(file_damage.damage_safetensors(kept[path], random))
        else:
            path.write_bytes(file_damage.damage_bytes(kept[path], random))

        def use() -> None:
            warm = load(whole, cache=options).ask(question, sampling=SHORT).text
            assert warm == cold, f"{warm!r} instead of {cold!r}"

        return use

    return case


def conversations(folder: Path) -> Case:
    """Saved conversations, loaded and gone on with."""
    vlm = load(write_tiny(folder / "whole", video=True))
    conversation = vlm.chat(system="Be short.", sampling=SHORT)
    conversation.ask("What is it?", images=[Image.new("RGB", (40, 30))])
    frames = Video(np.zeros((4, 24, 32, 3), np.uint8), source_fps=2.0)
    conversation.ask("And this?", videos=[frames])
    path = folder / "saved"
    conversation.save(path)
    whole = path.read_bytes()

    def case(random: Random) -> Action:
        path.write_bytes(file_damage.damage_safetensors(whole, random))

        def use() -> None:
            loaded = vlm.chat(sampling=SHORT)
            loaded.load(path)
            loaded.ask("Go on.")
            loaded.save(folder / "again")

        return use

    return case


KINDS: dict[str, tuple[Callable[[Path], Case], int]] = {
    "pictures": (pictures, 1200),
    "clips": (clips, 700),
    "checkpoints": (checkpoints, 600),
    "sources": (sources, 500),
    "tokenizers": (tokenizers, 500),
    "templates": (templates, 500),
    "GGUF files": (gguf_files, 500),
    "cache files": (cache_files, 250),
    "conversations": (conversations, 250),
}
"""Each kind of file, and how many of them a full run damages."""
