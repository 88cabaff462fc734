"""What two checkpoints are tried on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_smolvlm.convert.observe import Work
from mlx_smolvlm.convert.samples import PLAIN_QUESTION, QUESTIONS, TEXTS, Asked, drawn_pictures
from mlx_smolvlm.image import Detail
from mlx_smolvlm.messages import ImageSource

ASKED_PICTURES = 8  # how many pictures a question is asked about


@dataclass(frozen=True)
class CompareOptions:
    """What two checkpoints are tried on.

    Attributes:
        texts: Whose tokens are predicted; None takes those of this package.
        pictures: Pairs of a name and a picture, as `SmolVLM.ask` takes one; None takes those
            of this package.
        questions: Asked about the first pictures, one each, in turn.
        text_tokens: The most tokens of texts that are read, in all.
        max_tokens: The longest answer, in tokens.
        detail: How pictures are cut into tiles, see `SmolVLM.ask`; datasets' are by "high".
        data: Datasets whose questions both answer, as `mlx-smolvlm eval` takes them.
        data_limit: Of each of their tasks, the first so many lines; None takes all.

    Raises:
        ValueError: A number that is below 1.
    """

    texts: tuple[str, ...] | None = None
    pictures: tuple[tuple[str, ImageSource], ...] | None = None
    questions: tuple[str, ...] = QUESTIONS
    text_tokens: int = 8192
    max_tokens: int = 48
    detail: Detail = "low"
    data: tuple[Path, ...] = ()
    data_limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("text_tokens", "max_tokens", "data_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value!r}; it must be 1 or above")

    @property
    def named_pictures(self) -> list[tuple[str, ImageSource]]:
        """Names and pictures."""
        return list(drawn_pictures().items()) if self.pictures is None else list(self.pictures)

    def work(self) -> Work:
        """Texts and questions."""
        pictures = self.named_pictures[:ASKED_PICTURES] if self.questions else []
        count = len(self.questions)
        asked = [
            Asked(self.questions[number % count], picture, name)
            for number, (name, picture) in enumerate(pictures)
        ]
        texts = TEXTS if self.texts is None else self.texts
        questions = (*asked, Asked(PLAIN_QUESTION))
        return Work(texts, self.text_tokens, questions, self.max_tokens, self.detail)
