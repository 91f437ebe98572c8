"""Networks: the Inception module and GoogLeNet. A leaf that imports torch only."""

if __name__ != "distbelief.model":  # pragma: no cover
    raise ImportError("import distbelief.model, not model: the top-level folder is the source")
