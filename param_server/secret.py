"""Secret: a text that no log, error or repr shows. No I/O."""

HIDDEN = "***"


class Secret(str):
    """A text like any other to whoever sends or compares it, and hidden where it would be shown.

    `str`, `repr`, `format` and a logger show HIDDEN. `encode`, `==` and JSON have the text itself:
    that is how it gets to where it is meant for.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> "Secret":
        return super().__new__(cls, str.__str__(text))  # of a secret, str() would be HIDDEN

    def __repr__(self) -> str:
        return f"Secret({HIDDEN})"

    def __str__(self) -> str:
        return HIDDEN

    def __format__(self, spec: str) -> str:
        return format(HIDDEN, spec)
