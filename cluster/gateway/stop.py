"""Stop strings, matched across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string to be completed in a text that arrives in pieces.

    Of several matches the one that ends first counts, and of these the longest: that does not
    depend on where the pieces begin. Text that may still become a match is held back.

    Args:
        stops: Not empty, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert stops and all(stops), "no stop strings, no matcher"
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str, *, is_armed: bool = True) -> tuple[str, bool]:
        """Take the next piece; return the text that is free to go, and whether a stop matched.

        After a match the text is over, and the matcher too.

        Args:
            is_armed: Whether a match may be completed within this piece.
        """
        if not text:
            return "", False
        buffer = self._held + text
        match = self._first_match(buffer) if is_armed else None
        if match is not None:
            return buffer[:match], True
        num_held = self._num_held(buffer)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held], False

    def flush(self) -> str:
        """Return what is held back: no more text follows."""
        return self._held

    def _first_match(self, buffer: str) -> int | None:
        """Return the start of the match that ends first, in the part that is new."""
        best: tuple[int, int] | None = None
        for stop in self._stops:
            # A match that ends within the held text was seen before, while not armed.
            start = buffer.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _num_held(self, buffer: str) -> int:
        """Return the length of the longest end of `buffer` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            start = buffer.find(stop[0], max(0, len(buffer) - len(stop) + 1))
            while start >= 0 and len(buffer) - start > longest:
                if stop.startswith(buffer[start:]):
                    longest = len(buffer) - start
                    break
                start = buffer.find(stop[0], start + 1)
        return longest
