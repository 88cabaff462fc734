"""Constrains the tokens of an answer to a schema or a regular expression."""

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
    """Makes constraints for the tokenizer of one checkpoint, which llguidance reads only once."""

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
        """Return a new constraint for the schema or the regular expression of `sampling`."""
        text = make_grammar(sampling.schema, sampling.regex, self._lead)
        return Constraint(self._tokenizer, text, self._lead)


class Constraint:
    """The state of one constrained answer.

    Attributes:
        lead: White space before the text that the schema or the regular expression describes.
    """

    def __init__(self, tokenizer: llguidance.LLTokenizer, grammar: str, lead: str) -> None:
        self.lead = lead
        self._vocab_size = tokenizer.vocab_size
        self._bits = np.zeros(-(-tokenizer.vocab_size // 32), np.uint32)
        self._matcher = import_llguidance().LLMatcher(tokenizer, grammar, log_level=0)
        self._check()

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete and no token may follow."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def compute_mask(self) -> mx.array:
        """Return which tokens may come next, bool (vocabulary,)."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        bits = np.unpackbits(self._bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        return mx.array(bits.view(np.bool_))

    def allows(self, token_id: int) -> bool:
        """Return whether `token_id` may come next."""
        is_allowed: bool = self._matcher.validate_tokens([token_id]) == 1
        self._check()
        return is_allowed

    def take(self, token_id: int) -> None:
        """Append `token_id`, which must be allowed, to the answer."""
        self._matcher.consume_token(token_id)
        self._check()

    def take_forced(self, most: int) -> list[int]:
        """Append up to `most` tokens that have no alternative, and return them."""
        token_ids: list[int] = self._matcher.compute_ff_tokens()[:most]
        self._matcher.consume_tokens(token_ids)
        self._check()
        return token_ids

    def undo(self, count: int) -> None:
        """Remove the last `count` tokens from the answer."""
        if count:
            self._matcher.rollback(count)
            self._check()

    def _check(self) -> None:
        """Raise ConstraintError if llguidance has failed."""
        if self._matcher.is_error():
            raise ConstraintError(
                "the answer's schema or regex cannot be followed: "
                f"{read_matcher_error(self._matcher)}; simplify it"
            )


def _rename_special_tokens(tokenizer_json: str) -> str:
    """Return a tokenizer.json whose special tokens have names that occur in no text.

    In a schema, `<image>` is text, as in a prompt. With the original names, llguidance would
    match the special tokens with such text, and then refuse them.
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
