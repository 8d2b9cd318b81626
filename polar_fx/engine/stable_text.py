"""How much of a text that is being generated will stay as it is, so that it may be sent already.

Decoding is not always a matter of appending: some tokenizers take out the space before what turns
out to be punctuation, and bytes that make no character yet are shown as U+FFFD until they do.
"""

import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNFINISHED = "\ufffd"  # what the first bytes of a character are decoded to


class StableText:
    """Decodes tokens of one tokenizer; `known` is the part that further tokens cannot change."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._rejoins = _rejoins_words(tokenizer)

    def whole(self, ids: Sequence[int]) -> str:
        """The text of these tokens, as it is now."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def known(self, ids: Sequence[int]) -> str:
        """The beginning of that text which stays, whatever tokens follow."""
        kept = list(ids)
        # bytes in a row are decoded together: a wrong one changes those before it
        while kept and _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(kept[-1]))):
            kept.pop()
        text = self.whole(kept).rstrip(_UNFINISHED)
        if self._rejoins:  # what follows may be joined to the last word
            text = text[: max(text.rstrip().rfind(" "), 0)]
        return text


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where in a text the first of some stop texts begins."""
    return min((at for at in map(text.find, stops) if at >= 0), default=None)


def _rejoins_words(tokenizer: Any) -> bool:
    """Whether decoding takes out spaces that stood before a word."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    # transformers leaves those of byte pairs alone, unless it is told not to
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    return type(model).__name__ != "BPE" or bool(getattr(tokenizer, forced, False))
