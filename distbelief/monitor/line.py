"""Lines: bytes that come piece by piece, as whole lines of a bounded length. Pure."""

LINE_MAX = 4 * 2**20
"""A look at 10,000 workers has some 1.5 MB."""


class Lines:
    """See the top of this file."""

    def __init__(self, longest: int = LINE_MAX) -> None:
        self.num_long = 0
        """Lines that were passed over because they do not end."""
        self._longest = longest
        self._rest = bytearray()
        self._is_passing = False
        """What comes up to the next end belongs to a line that is passed over."""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, without their ends."""
        *whole, rest = data.split(b"\n")
        found = []
        for line in whole:
            if self._is_passing:
                self._is_passing = False
            elif len(self._rest) + len(line) > self._longest:
                self.num_long += 1
            else:
                found.append(bytes(self._rest) + line)
            self._rest.clear()
        if not self._is_passing:
            self._rest += rest
            if len(self._rest) > self._longest:
                self.num_long += 1
                self._is_passing = True
                self._rest.clear()
        return found
