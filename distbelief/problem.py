"""Problem: an error for a person: what happened, why, and what to do. The codes are in the docs."""

from distbelief.param_server.errors import DistBeliefError

EXIT_OF = {
    "DB-USE": 2,  # usage or configuration
    "DB-MODEL": 1,  # the user's model
    "DB-DATA": 2,
    "DB-TRAIN": 1,
    "DB-SCRIPT": 1,  # the user's script
    "DB-KEY": 3,
    "DB-ENV": 3,  # the environment is not ready
    "DB-RUN": 1,  # processes of the run
    "DB-STORE": 5,
    "DB-CLUSTER": 2,  # the file of a cluster
    "DB-CLUSTER-005": 1,  # Ray, or a host
    "DB-CLUSTER-006": 1,
    "DB-CLUSTER-007": 3,  # what is here is not ready
    "DB-CLUSTER-008": 3,
    "DB-CLUSTER-010": 3,
    "DB-BUG": 1,  # ours
    "DB-RUN-008": 3,  # not ready: the run is still going on
}
"""Exit code by family; a whole code goes before its family."""
MORE = "docs/errors.md"


class Problem(DistBeliefError):
    """Shown without a traceback. `code` is looked up in docs/errors.md."""

    def __init__(self, code: str, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.why = why
        self.fix = fix

    @property
    def exit_code(self) -> int:
        """Exit code of the command that ends with this problem."""
        return EXIT_OF.get(self.code) or EXIT_OF[self.code.rpartition("-")[0]]

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.what}"]
        if self.why:
            lines.append("  why   " + self.why.replace("\n", "\n        "))
        if self.fix:
            lines.append("  try   " + self.fix.replace("\n", "\n        "))
        return "\n".join(lines)

    @property
    def text(self) -> str:
        """As the command line shows it: with the place where the code is explained."""
        return f"{self}\n  more  {MORE}#{self.code.lower()}"
