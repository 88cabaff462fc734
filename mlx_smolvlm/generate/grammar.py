"""Which tokens may come next, so that an answer fits a schema or a regular expression."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_smolvlm.errors import ConstraintError
from mlx_smolvlm.generate.json_schema import import_llguidance, make_grammar, read_matcher_error
from mlx_smolvlm.generate.sampling import Sampling
from mlx_smolvlm.prompt.tokenizer import convert_native_errors

if TYPE_CHECKING:
    import llguidance

    from mlx_smolvlm.prompt.builder import PromptBuilder


class Constrainer:
    """Makes constraints for one checkpoint's tokenizer, which llguidance takes a moment to read."""

    def __init__(self, builder: PromptBuilder) -> None:
        config = builder.config
        self._lead = builder.answer_lead
        module = import_llguidance()
        with convert_native_errors(ConstraintError, "llguidance cannot read the tokenizer"):
            self._tokenizer: llguidance.LLTokenizer = module.LLTokenizer(
                _rename_special_tokens(builder.tokenizer.to_str()),
                n_vocab=config.text.vocab_size,
                eos_token=list(config.eos_token_ids),
            )

    def __call__(self, sampling: Sampling) -> Constraint:
        """A new constraint for the schema or the regular expression of `sampling`."""
        text = make_grammar(sampling.schema, sampling.regex, self._lead)
        return Constraint(self._tokenizer, text, self._lead)


class Constraint:
    """What may follow in one answer, as it grows.

    `lead` is what the answer begins with before that which the grammar describes.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str, lead: str) -> None:
        self.lead = lead
        self._eos = frozenset(tokenizer.eos_tokens)
        self._vocab_size = tokenizer.vocab_size
        self._bits = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        self._matcher = import_llguidance().LLMatcher(tokenizer, grammar, log_level=0)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether the answer is whole and nothing can be added to it."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def compute_mask(self) -> mx.array:
        """Which tokens may come next, bool (vocabulary,)."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        return mx.array(bits.view(np.bool_))

    def take(self, token_id: int) -> None:
        """The answer goes on with `token_id`, one of those allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    def take_forced(self, most: int) -> list[int]:
        """Up to `most` tokens that the answer must go on with; it has done so."""
        token_ids: list[int] = self._matcher.compute_ff_tokens()[:most]
        self._matcher.consume_tokens(token_ids)
        self._check()
        return token_ids

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConstraintError(
                "the answer's schema or regex cannot be followed: "
                f"{read_matcher_error(self._matcher)}; simplify it"
            )


def _rename_special_tokens(tokenizer_json: str) -> str:
    """The tokenizer with special tokens renamed to what no text holds.

    In a schema `<image>` is text, as in a prompt. Under their own names llguidance would
    take the tokens for it, and then refuse them.
    """
    values = json.loads(tokenizer_json)
    vocabulary: dict[str, Any] = values["model"]["vocab"]
    for token in values["added_tokens"]:
        if token["special"]:
            name = f"\U0010fffd{token['id']}"
            if token["content"] in vocabulary:
                vocabulary[name] = vocabulary.pop(token["content"])
            token["content"] = name
    return json.dumps(values)
