"""An output that is told while it is generated.

tokens, one by one --OutputStream.add--> pieces of text that will not change any more
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hasten.task.contract import PredictSettings


class OutputStream:
    """Tells one output as it comes, in pieces that together are the whole of it.

    Args:
        settings: with whom to tell, and the strings that end the output.
        to_text: from tokens to text.
    """

    def __init__(self, settings: PredictSettings, to_text: Callable[[Sequence[int]], str]) -> None:
        self._settings, self._to_text = settings, to_text
        self._ids: list[int] = []
        self._num_told = 0
        self._num_held = max(map(len, settings.stop), default=1) - 1

    def add(self, _: int, token: int) -> None:
        """Tells what is certain with one more token."""
        self._ids.append(token)
        # Half a character, or what may become a stop string, waits for the next token.
        text = self._settings.cut(self._to_text(self._ids)).rstrip("\ufffd")
        self.tell(text[: max(0, len(text) - self._num_held)])

    def tell(self, text: str) -> None:
        """Tells what of the beginning of the output has not been told yet."""
        assert self._settings.stream is not None
        if len(text) > self._num_told:
            self._settings.stream(text[self._num_told :])
            self._num_told = len(text)
