"""Identity: who speaks to a server: a run, a name in it, which process of that name, its token."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a client is."""

    run: str
    w: str
    inc: int = 0
    """Granted by the controller and rising; 0 for readers such as an evaluator."""
    token: str = field(repr=False)
