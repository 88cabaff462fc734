"""Estimates of memory: against numbers computed by hand, and against real allocations."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import PIL.Image
import pytest

from mlx_smolvlm.checkpoint.headers import read_headers
from mlx_smolvlm.config import Config, Quantization, QuantizationConfig
from mlx_smolvlm.errors import MemoryLimitError, SmolVLMWarning
from mlx_smolvlm.generate import memory_plan as plan
from mlx_smolvlm.generate.engine import describe_work
from mlx_smolvlm.generate.memory_guard import MemoryGuard, list_changes
from mlx_smolvlm.generate.memory_plan import MB, Backend, Setup, Work, estimate
from mlx_smolvlm.kv.options import CacheOptions
from mlx_smolvlm.media.encode import Footage, Picture
from mlx_smolvlm.media.tiles import compute_grid
from mlx_smolvlm.model import products
from mlx_smolvlm.model.model import Model
from mlx_smolvlm.smolvlm import SmolVLM, load
from tests import conftest
from tests.helpers import hf_folder
from tests.helpers.media_cases import picture

GB = 1000 * MB


def make_setup(config: Config, **changes: Any) -> Setup:
    return replace(Setup(config, 100 * MB, "mlx-gpu", 2), **changes)


@pytest.fixture
def real(tiny: SmolVLM) -> Config:
    """The sizes of SmolVLM2-256M."""
    config = tiny.config
    vision = replace(
        config.vision, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, image_size=512, patch_size=16,
    )  # fmt: skip
    text = replace(
        config.text, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, vocab_size=49280,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    return replace(config, vision=vision, text=text, scale_factor=4)


@pytest.fixture
def restored() -> Iterator[None]:
    """MLX's limits as they were."""
    memory, cache = mx.set_memory_limit(GB), mx.set_cache_limit(GB)
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def test_keys_and_values_are_counted_as_by_hand(real: Config) -> None:
    # 30 layers and one that grows; 2 * 3 * 64 numbers of 4 bytes a token; 1,024 tokens of 900
    assert plan.count_kv_bytes(real.text, CacheOptions(), 4, 900) == 31 * 384 * 4 * 1024
    packed = CacheOptions(kv_bits=8)  # and two scales of 4 bytes for 64 numbers
    assert plan.count_kv_bytes(real.text, packed, 4, 900) == 31 * (384 + 384 // 8) * 1024
    bounded = CacheOptions(max_kv_tokens=512)
    assert plan.count_kv_bytes(real.text, bounded, 4, 9000) == 31 * 384 * 4 * 512


def test_features_and_pictures_are_counted_as_by_hand(real: Config) -> None:
    work = Work(tiles=13, encoded_tiles=2, pixels=640 * 480, tokens=900)
    result = estimate(make_setup(real), work)
    assert result.features == 15 * 64 * 576 * 2
    assert result.media == 3 * 640 * 480 + 2 * 3 * 512 * 512 * 13
    assert estimate(make_setup(real), replace(work, has_video=True)).media - result.media == (
        plan.VIDEO_BYTES
    )
    assert estimate(make_setup(real), Work(tokens=9)).encoding == 0


def test_the_larger_of_encoding_and_generating_counts(real: Config) -> None:
    result = estimate(make_setup(real), Work(tiles=4, tokens=300), limit=160 * MB)
    always = plan.PROCESS_BYTES + 100 * MB + result.features + 10 * MB
    assert result.while_encoding == always + result.media + result.encoding
    generating = result.keys_values + result.prefill + result.logits
    assert result.while_generating == always + generating
    assert result.total == max(result.while_encoding, result.while_generating)
    loading = estimate(make_setup(real, loading=GB), Work(tokens=9))
    assert loading.total == plan.PROCESS_BYTES + 100 * MB + GB


def test_more_work_takes_more(real: Config) -> None:
    work = Work(tiles=3, pixels=10**6, tokens=400, max_tokens=50)
    for backend in ("numpy", "mlx-cpu", "mlx-gpu"):
        setup = make_setup(real, backend=backend)
        least = estimate(setup, work)
        assert estimate(replace(setup, tile_batch=1), work).encoding < least.encoding
        assert estimate(replace(setup, prefill_chunk=64), work).prefill < least.prefill
        assert estimate(replace(setup, item_bytes=4), work).total > least.total
        for name, more in (("tiles", 4), ("tokens", 1000), ("max_tokens", 900), ("rows", 64)):
            assert estimate(setup, replace(work, **{name: more})).total >= least.total
    packed = make_setup(real, backend="numpy", is_packed=True)
    whole = replace(packed, is_packed=False)
    assert estimate(packed, work).encoding - estimate(whole, work).encoding == 5 * 768 * 3072
    assert plan.UNPACK_BLOCK == products.UNPACK_BLOCK


def test_weights_are_counted_from_headers(tiny: SmolVLM, tiny_folder: Path) -> None:
    tensors = {n: (one.dtype, one.num_items) for n, one in read_headers(tiny_folder).items()}
    flat = [array for _, array in _flatten(tiny.model)]
    stored, unpacked = plan.count_weights(tiny.config, tensors, 4)
    assert stored == unpacked == sum(4 * array.size for array in flat)


def _flatten(model: Model) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    flat: list[tuple[str, mx.array]] = tree_flatten(model.parameters())  # type: ignore[assignment]
    return flat


def test_packed_weights_are_counted_packed_and_unpacked(real: Config) -> None:
    four = QuantizationConfig(Quantization(4, 64, "affine"), None, None, None)
    config = replace(real, quantization=four)
    name = "text_model.layers.0.mlp.down_proj"
    tensors = {
        f"{name}.weight": ("U32", 576 * 1536 // 8),
        f"{name}.scales": ("F32", 576 * 1536 // 64),
        f"{name}.biases": ("BF16", 576 * 1536 // 64),
        "text_model.norm.weight": ("BF16", 576),
    }
    stored, unpacked = plan.count_weights(config, tensors, 4)
    assert stored == 576 * 1536 // 2 + 2 * 4 * 576 * 1536 // 64 + 4 * 576
    assert unpacked == 4 * 576 * 1536 + 4 * 576
    setup = Setup(config, 0, "numpy", 4)
    assert not plan.plan_setup(setup, tensors, None, 100 * GB).is_packed
    whole = plan.plan_setup(setup, tensors, None, 100 * GB)
    assert (whole.weights, whole.loading) == (unpacked, stored * 9 // 8)
    assert plan.plan_setup(setup, tensors, None, 100 * MB).is_packed
    assert plan.plan_setup(setup, tensors, 300 * MB, 100 * GB).weights == stored
    assert not plan.plan_setup(setup, tensors, 3 * GB, 100 * MB).is_packed


def test_a_conversion_is_predicted(real: Config) -> None:
    # the published SmolVLM2-256M at 4 bits, scales in float32: 240 MB in memory, as measured
    assert plan.count_converted_bytes(real, 4, 4) == pytest.approx(240 * MB, rel=0.03)


def test_batches_shrink_until_the_work_fits(real: Config) -> None:
    setup = make_setup(real, backend="mlx-cpu", item_bytes=4)
    work = Work(tiles=13, pixels=640 * 480, tokens=900, max_tokens=64)
    assert plan.fit_batches(setup, work, None) is setup
    assert plan.fit_batches(setup, work, 4 * GB) == setup
    assert plan.fit_batches(setup, work, 100 * MB) == replace(
        setup, tile_batch=1, prefill_chunk=128
    )
    two = replace(setup, tile_batch=2)
    encoding = estimate(two, work, GB).while_encoding - GB // 16
    assert plan.fit_batches(setup, work, encoding * 16 // 15 + MB) == two
    text = replace(work, tiles=0, pixels=0)
    fewer = replace(setup, prefill_chunk=256)
    generating = estimate(fewer, text, GB).while_generating - GB // 16
    assert plan.fit_batches(setup, text, generating * 16 // 15 + MB) == fewer


def test_estimates_of_mlx_cover_what_it_allocates(tiny: SmolVLM) -> None:
    """The encoder's and the decoder's activations, at sizes where they count."""
    config = tiny.config
    vision = replace(config.vision, image_size=512, patch_size=16, num_hidden_layers=2)
    text = replace(config.text, max_position_embeddings=4096)
    config = replace(config, vision=vision, text=text, scale_factor=4)
    model = Model(config)
    mx.eval(model.parameters())
    setup = make_setup(config, backend="mlx-cpu", item_bytes=4)
    for tiles in (1, 3):
        pixels = mx.zeros((tiles, 512, 512, 3))
        mx.eval(pixels)
        peak = _measure_peak(lambda pixels=pixels: model.encode(pixels))
        guess = estimate(replace(setup, tile_batch=tiles), Work(tiles=tiles)).encoding
        assert peak < guess - plan.BLAS_BYTES < 4 * peak


def _measure_peak(compute: Any) -> int:
    """Bytes that `compute` allocates at most, beside those that are allocated before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute())
    return mx.get_peak_memory() - before


def test_limits_of_mlx_follow_the_limit() -> None:
    calls: dict[str, int] = {}

    def make_device(kind: str, **info: int) -> Any:
        calls.clear()
        names = ("set_memory_limit", "set_cache_limit", "set_wired_limit")
        return SimpleNamespace(
            **{name: lambda value, name=name: calls.update({name: value}) for name in names},
            device_info=lambda: info,
            default_device=lambda: SimpleNamespace(type=kind),
            DeviceType=SimpleNamespace(cpu="cpu", gpu="gpu"),
        )

    large, small = ({"max_recommended_working_set_size": size * GB} for size in (8, 1))
    plan.limit_mlx(make_device("cpu", **large), "numpy", 640 * MB)
    own = 640 * MB - plan.PROCESS_BYTES
    assert calls == {"set_memory_limit": own, "set_cache_limit": 10 * MB}
    plan.limit_mlx(make_device("gpu", **large), "mlx-gpu", 640 * MB)
    limits = {"set_memory_limit": own, "set_cache_limit": 40 * MB, "set_wired_limit": own}
    assert calls == limits
    plan.limit_mlx(make_device("gpu", **small), "mlx-gpu", 4 * GB)
    assert calls["set_wired_limit"] == GB
    plan.limit_mlx(make_device("gpu"), "mlx-gpu", 4 * GB)
    assert "set_wired_limit" not in calls
    old = make_device("gpu", max_recommended_working_set_size=GB)
    del old.set_wired_limit
    plan.limit_mlx(old, "mlx-gpu", 4 * GB)
    assert "set_wired_limit" not in calls


def test_the_memory_of_a_container_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plan, "CGROUPS", tmp_path)
    whole = plan.measure_machine()
    assert whole is not None
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.measure_machine() == whole
    (tmp_path / "memory.max").write_text("64000000\n")
    assert plan.measure_machine() == 64 * MB


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_smolvlm.checkpoint.load.load_model", None)  # would be a TypeError
    with pytest.raises(MemoryLimitError, match=r"memory_limit is 60 MB; .*--memory-limit\) of \d+"):
        load(tiny_folder, memory_limit=60 * MB)
    for wrong in (0, -1, 6e8, True, "600MB", 2**63):
        with pytest.raises(ValueError, match=f"memory_limit is {wrong!r}; it must be an integer"):
            load(tiny_folder, memory_limit=wrong)  # type: ignore[arg-type]


def test_a_smaller_conversion_is_named(real: Config) -> None:
    guard = MemoryGuard(make_setup(real, weights=2 * GB), 700 * MB)
    with pytest.raises(MemoryLimitError, match=r"use a conversion with 4 bits \(--bits 4\), or a"):
        guard.check_weights()
    MemoryGuard(make_setup(real, weights=2 * GB), 3 * GB).check_weights()


def test_without_a_limit_only_the_machine_counts(real: Config) -> None:
    setup = make_setup(real, weights=2 * GB)
    MemoryGuard(setup, None, None).check_weights()
    MemoryGuard(setup, None, 4 * GB).check_weights()
    close = MemoryGuard(setup, None, 2 * GB)
    with pytest.warns(SmolVLMWarning, match="this machine has 2000 MB"):
        close.check_weights()
    close.check_weights()  # a second warning would be an error
    with pytest.raises(MemoryLimitError, match=r"this machine has 1000 MB; use a conversion"):
        MemoryGuard(setup, None, GB).check_weights()


def find_advised_limit(error: pytest.ExceptionInfo[MemoryLimitError]) -> int:
    """The limit that a refusal recommends, in bytes."""
    advice = re.search(r"--memory-limit\) of (\d+) MB", str(error.value))
    assert advice is not None
    return int(advice[1]) * MB


@pytest.mark.parametrize("backend", ["numpy", "mlx-cpu", "mlx-gpu"])
@pytest.mark.parametrize("limit", [1, MB, 150 * MB])
def test_the_recommended_limit_is_accepted(
    tiny: SmolVLM, real: Config, backend: Backend, limit: int
) -> None:
    """MLX's reserve grows with the limit, and counts in it."""
    setup = make_setup(real, backend=backend)
    with pytest.raises(MemoryLimitError) as error:
        MemoryGuard(setup, limit).check_weights()
    MemoryGuard(setup, find_advised_limit(error)).check_weights()
    work = Work(tokens=3000, max_tokens=300)
    answer = tiny.engine.prompt_builder, [], work
    with pytest.raises(MemoryLimitError) as error:
        MemoryGuard(setup, limit).check_answer(*answer)
    least = find_advised_limit(error)
    MemoryGuard(setup, least).check_answer(*answer)
    with pytest.raises(MemoryLimitError):
        MemoryGuard(setup, least - MB).check_answer(*answer)


@pytest.fixture
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX keeps nothing for reuse, so that estimates do not depend on the limit."""
    monkeypatch.setattr(plan, "CACHE_SHARE", 10**18)
    monkeypatch.setattr(plan, "SMALL_CACHE_SHARE", 10**18)


def advise(vlm: SmolVLM, setup: Setup, work: Work, spare: int) -> str:
    """The advice about a picture of 13 tiles if the limit is `spare` bytes below the need."""
    image = PIL.Image.new("RGB", (640, 480))
    medium = Picture(image, compute_grid(image.size, setup.config, "high"), "high")
    assert medium.num_tiles == work.tiles
    guard = MemoryGuard(setup, estimate(setup, work).total - spare)
    with pytest.raises(MemoryLimitError) as error:
        guard.check_answer(vlm.engine.prompt_builder, [medium], work)
    advice = re.search(r" MB; (.*) \(--memory-limit\) of \d+ MB$", str(error.value))
    assert advice is not None
    return advice[1].removesuffix(" a memory_limit").removesuffix(", or")


@pytest.mark.usefixtures("no_reserve")
def test_the_smallest_change_that_fits_is_named(tiny: SmolVLM, real: Config) -> None:
    real = replace(real, image=replace(real.image, longest_edge=2048))
    setup = make_setup(real, item_bytes=4, tile_batch=1, prefill_chunk=128)
    work = Work(tiles=13, pixels=640 * 480, tokens=900, max_tokens=2000)
    assert advise(tiny, setup, work, MB) == "use kv_bits 8 (--kv-bits 8)"
    on_cpu = replace(setup, backend="mlx-cpu")
    assert advise(tiny, on_cpu, work, MB) == "use max_tokens 1856 (--max-tokens 1856)"
    packed = replace(setup, cache=CacheOptions(kv_bits=8))
    long = replace(work, max_tokens=4000)
    assert advise(tiny, packed, long, 20 * MB) == "use max_tokens 3136 (--max-tokens 3136)"
    short = replace(work, max_tokens=64, tokens=3000)
    assert advise(tiny, packed, short, MB // 10) == "use detail 3 (--detail 3)"
    assert advise(tiny, packed, short, MB) == "use detail 2 (--detail 2)"
    large = replace(packed, weights=GB)
    assert advise(tiny, large, short, 300 * MB) == ("use a conversion with 4 bits (--bits 4)")
    assert advise(tiny, packed, short, 250 * MB) == "give"


@pytest.mark.parametrize("backend", ["mlx-cpu", "mlx-gpu"])
def test_only_what_the_caller_can_change_is_named(
    tiny: SmolVLM, real: Config, backend: Backend
) -> None:
    real = replace(real, image=replace(real.image, longest_edge=2048))
    setup = make_setup(real, backend=backend, weights=2 * GB)
    image = PIL.Image.new("RGB", (640, 480))
    times = SimpleNamespace(timestamps_s=(0.0, 1.0, 2.0), duration_s=3.0)
    media = [
        Picture(image, compute_grid(image.size, real, "high"), "high"),
        Footage(times, digest="clip"),
    ]
    work = Work(tiles=16, tokens=900, max_tokens=500, has_video=True)
    names = {"bits", "kv_bits", "max_tokens", "detail", "max_frames"}

    def list_named(*fixed: str) -> set[str]:
        changes = list_changes(setup, tiny.engine.prompt_builder, media, work, frozenset(fixed))
        options = re.findall(r"--([\w-]+)", " ".join(text for text, *_ in changes))
        return {option.replace("-", "_") for option in options}

    assert list_named() == names
    for name in names:
        assert list_named(name) == names - {name}
    guard = MemoryGuard(setup, GB, fixed=frozenset({"bits"}))
    with pytest.raises(MemoryLimitError, match=r"1000 MB; give a memory_limit"):
        guard.check_weights()
    with pytest.raises(MemoryLimitError, match=r"1000 MB; give a memory_limit"):
        guard.check_answer(tiny.engine.prompt_builder, media, work)


def test_a_conversion_is_named_only_where_it_has_an_effect(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SMOLVLM_CACHE", str(tmp_path / "cache"))
    source = hf_folder.make(tmp_path / "source")
    hf_folder.write_json(source / "chat_template.json", {"chat_template": conftest.TEMPLATE})

    def list_fixed(model: str | Path, bits: int | None = None) -> frozenset[str]:
        guard = load(model, bits=bits).engine.guard
        assert guard is not None
        return guard.fixed

    assert list_fixed(source) == list_fixed(source, 8) == frozenset()
    assert list_fixed(source, 4) == {"bits"}  # done already
    kept = load(source, bits=8).path
    assert kept.is_relative_to(tmp_path / "cache")
    assert list_fixed(kept) == list_fixed(tiny_folder) == list_fixed("demo") == {"bits"}


def test_no_advice_names_the_sum_of_all_answers(
    tiny: SmolVLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[frozenset[str]] = []
    guard = SimpleNamespace(
        check_answer=lambda *arguments: seen.append(arguments[3]),
        count_spare=lambda _: None,
        setup=SimpleNamespace(tile_batch=4, prefill_chunk=tiny.model.prefill_chunk),
    )
    monkeypatch.setattr(tiny.engine, "guard", guard)
    tiny.ask("Hi", max_tokens=2)
    tiny.choose("Hi", ["A", "B"])
    tiny.ask_many([picture((32, 32))], ["Hi", "Ho"], max_tokens=2)
    assert seen == [frozenset(), {"max_tokens"}, {"max_tokens"}]


def test_fewer_frames_are_named(tiny: SmolVLM, real: Config) -> None:
    setup = make_setup(real, item_bytes=4, cache=CacheOptions(kv_bits=8))
    times = SimpleNamespace(timestamps_s=(*map(float, range(40)),), duration_s=40.0)
    clip = Footage(times, digest="clip")
    work = Work(tiles=40, tokens=40 * 80, max_tokens=64, has_video=True)
    changes = [*list_changes(setup, tiny.engine.prompt_builder, [clip], work)]
    assert [text for text, *_ in changes[:2]] == [
        "max_frames 39 (--max-frames 39)",
        "max_frames 38 (--max-frames 38)",
    ]
    per_frame = tiny.engine.prompt_builder.count_clip_tokens(times) // 40
    assert [work.tokens - fewer.tokens for *_, fewer in changes[:2]] == [per_frame, 2 * per_frame]
    assert [fewer.tiles for *_, fewer in changes] == [*range(39, 0, -1)]


@pytest.mark.usefixtures("restored", "no_reserve")
def test_an_answer_that_cannot_fit_is_refused_before_it_begins(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load(tiny_folder, memory_limit=10 * GB)
    monkeypatch.setattr(vlm.engine, "encoder", None)  # would be a TypeError
    guard = vlm.engine.guard
    assert guard is not None
    guard.limit = plan.PROCESS_BYTES
    asked = "What?", [picture((32, 32))]
    with pytest.raises(MemoryLimitError, match="this answer needs about"):
        vlm.stream(*asked)
    with pytest.raises(MemoryLimitError, match="this answer needs about"):
        vlm.ask_many(asked[1], ["What?", "Who?"])
    with pytest.raises(MemoryLimitError, match="this answer needs about"):
        vlm.choose(asked[0], ["A", "B"], images=asked[1])
    with pytest.raises(MemoryLimitError, match="this answer needs about"):
        vlm.chat().stream(*asked)


@pytest.mark.usefixtures("restored", "no_reserve")
def test_work_of_earlier_prompts_makes_room(tiny_folder: Path) -> None:
    vlm = load(tiny_folder, memory_limit=10 * GB)
    vlm.ask("Hi", [picture((32, 32))], max_tokens=2)
    memory, guard = vlm.engine.memory, vlm.engine.guard
    assert memory.nbytes > 0
    assert guard is not None
    tokens = vlm.stream("Hello", max_tokens=2).reply.prompt_tokens
    assert memory.nbytes > 0
    work = Work(tokens=tokens, max_tokens=2)
    guard.limit = estimate(guard.setup, work).total
    vlm.stream("Hello", max_tokens=2)
    assert memory.nbytes == 0


@pytest.mark.usefixtures("restored", "no_reserve")
def test_a_limit_changes_no_answer(
    tiny: SmolVLM, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    question, pictures = "What is this?", [picture((96, 64))]
    text = "word " * 80
    expected = [tiny.ask(question, pictures, max_tokens=6), tiny.ask(text, max_tokens=6)]
    limited = load(tiny_folder, memory_limit=10 * GB)
    calls: list[int] = []
    encoder = limited.engine.encoder
    monkeypatch.setattr(limited.engine, "encoder", lambda x: calls.append(len(x)) or encoder(x))
    guard = limited.engine.guard
    assert guard is not None
    monkeypatch.setattr(plan, "LEAST_CHUNK", 16)
    monkeypatch.setattr(plan, "_estimate_encoding", lambda _, tiles: tiles * GB)  # it counts most
    smallest = replace(guard.setup, tile_batch=1, prefill_chunk=16)
    for prompt, media, answer in ((question, pictures, expected[0]), (text, [], expected[1])):
        built = limited.stream(prompt, media, max_tokens=6)._prompt
        guard.limit = estimate(smallest, describe_work(built, 6)).total
        assert limited.ask(prompt, media, max_tokens=6).token_ids == answer.token_ids
        guard.limit = 10 * GB
    assert {*calls} == {1}
    assert limited.model.prefill_chunk == guard.setup.prefill_chunk == 16
