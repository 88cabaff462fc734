"""Settings of a training: what a file says, and what is said of a wrong one."""

from pathlib import Path

import pytest

from mlx_smolvlm.errors import TrainingError
from mlx_smolvlm.train.settings import (
    DataSettings,
    LoraSettings,
    OptimizerSettings,
    Settings,
    read_settings,
)

LEAST = 'model = "demo"\nsteps = 3\n[[data]]\npath = "d"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "c.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults(tmp_path: Path) -> None:
    settings = read_settings(written(tmp_path, LEAST))
    assert settings.data == (DataSettings("d"),)
    assert settings.trained_parts == ("text", "connector")
    assert settings.resolve_path("d") == tmp_path / "d"
    assert (settings.method, settings.detail, settings.lora.rank) == ("lora", "high", 8)


def test_everything(tmp_path: Path) -> None:
    text = """
    model = "demo"
    method = "full"
    parts = ["vision", "embeddings"]
    detail = 2
    epochs = 2
    [optimizer]
    rate = 1
    schedule = "linear"
    [lora]
    dropout = 0.1
    [[data]]
    path = "text"
    weight = 14
    [[data]]
    path = "/video"
    weight = 33.5
    """
    settings = read_settings(written(tmp_path, text))
    assert [one.weight for one in settings.data] == [14.0, 33.5]
    assert settings.resolve_path(settings.data[1].path) == Path("/video")
    assert (settings.detail, settings.epochs, settings.optimizer.rate) == (2, 2.0, 1.0)
    assert settings.trained_parts == ("vision", "embeddings")


BAD = {
    "model = 3\n" + LEAST: "TOML",
    LEAST.replace('"demo"', "3"): "model must be a text, not 3",
    LEAST.replace("model", "modell"): "key 'modell' is not known; known: model, data",
    'folder = "x"\n' + LEAST: "key 'folder' is not known",
    'steps = 3\n[[data]]\npath = "d"\n': "key 'model' is missing",
    'model = "demo"\nsteps = 3\n': "key 'data' is missing",
    'model = "demo"\nsteps = 3\ndata = []\n': r"\[\[data\]\] is missing",
    'model = "demo"\nsteps = 3\ndata = ["d"]\n': r"data must be a table, not 'd'",
    'model = "demo"\nsteps = 3\n[data]\npath = "d"\n': r"write \[\[data\]\], not \[data\]",
    LEAST.replace("path", "name"): "key 'data.name' is not known",
    LEAST + "weight = 0\n": "data.weight is 0.0; it must be from 1e-09",
    LEAST + '[[data]]\npath = "e"\nweight = 1\n': "some .* have a weight",
    LEAST.replace("3", "0"): "steps is 0; it must be from 1",
    LEAST.replace("3", "3.5"): "steps must be a whole number",
    LEAST.replace("3", "true"): "steps must be a whole number, not True",
    LEAST.replace("steps = 3", ""): "give either steps or epochs",
    "epochs = 1\n" + LEAST: "give either steps or epochs",
    'method = "qlora"\n' + LEAST: "method is 'qlora'; it must be one of lora, full",
    'parts = "text"\n' + LEAST: "parts must be a list of texts",
    'parts = ["decoder"]\n' + LEAST: "parts is 'decoder'; it must be one of text, vision",
    "parts = []\n" + LEAST: "parts is empty",
    'detail = "highest"\n' + LEAST: "detail is 'highest'; it must be one of high, auto, low",
    "detail = 7\n" + LEAST: "detail is 7; it must be from 1 to 6",
    "detail = 1.5\n" + LEAST: "detail must be a text or a whole number",
    "batch_size = 0\n" + LEAST: "batch_size is 0",
    "seed = -1\n" + LEAST: "seed is -1",
    'dtype = "int8"\n' + LEAST: "dtype is 'int8'",
    'too_long = "cut"\n' + LEAST: "too_long is 'cut'",
    'fuse = true\nmethod = "full"\n' + LEAST: "fuse needs method lora",
    "fuse = 1\n" + LEAST: "fuse must be true or false",
    "lora = 3\n" + LEAST: "lora must be a table",
    LEAST + "[lora]\nrank = 0\n": "lora.rank is 0",
    LEAST + "[lora]\nalpha = 16\n": "key 'lora.alpha' is not known; known: rank, scale, dropout",
    LEAST + "[lora]\ndropout = 1.0\n": "lora.dropout is 1.0",
    LEAST + "[optimizer]\nrate = nan\n": "optimizer.rate is nan",
    LEAST + '[optimizer]\nschedule = "step"\n': "optimizer.schedule is 'step'",
    LEAST + "[optimizer]\nclip = -1\n": "optimizer.clip is -1.0; it must be 0 or more",
}


@pytest.mark.parametrize("text", BAD, ids=list(BAD.values()))
def test_a_wrong_file_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=rf"c\.toml.* {BAD[text]}|c\.toml: {BAD[text]}"):
        read_settings(written(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="cannot be read"):
        read_settings(tmp_path / "none.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff")
    with pytest.raises(TrainingError, match="not UTF-8"):
        read_settings(tmp_path / "c.toml")


def test_settings_check_themselves() -> None:
    with pytest.raises(TrainingError, match=r"lora\.rank is 0"):
        LoraSettings(rank=0)
    with pytest.raises(TrainingError, match=r"optimizer\.clip is -1"):
        OptimizerSettings(clip=-1)
    with pytest.raises(TrainingError, match=r"data\.weight is 0"):
        DataSettings("d", weight=0)
    with pytest.raises(TrainingError, match="either steps or epochs"):
        Settings("demo", (DataSettings("d"),))
