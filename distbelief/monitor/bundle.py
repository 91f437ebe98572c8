"""Bundle: the page's modules as one script, for a report that opens without a server.

A browser loads no module from a file on disk, so they are put together here: each becomes a
function that returns what it exports, called once, the imported ones first. All together are a
module again. Only the forms that our own modules use are understood; any other is an error, not a
guess. Pure.
"""

import re
from collections.abc import Iterator, Mapping

_IMPORT = re.compile(r'^import\s+(?:\{([^}]*)\}\s+from\s+)?"\./([\w.-]+)";[ \t]*$', re.MULTILINE)
_DECLARED = re.compile(
    r"^export\s+(?=(?:async\s+)?(?:function\*?|class|const)\s+(\w+))", re.MULTILINE
)
_LISTED = re.compile(r"^export\s+\{([^}]*)\};[ \t]*$", re.MULTILINE)
_ENDS = re.compile(r"</script|<!--", re.IGNORECASE)
_LEFT = re.compile(r"^(?:import|export)\b.*$", re.MULTILINE)


class BundleError(ValueError):
    """A module of a form that is not understood here."""


def bundle(modules: Mapping[str, str], entry: str) -> str:
    """The script of `entry` and all that it imports.

    modules: text by file name, as "app.js". Raises: BundleError for a module that is not there,
    imports in a circle, or a form of import or export that is not understood.
    """
    order: list[str] = []
    _visit(modules, entry, order, ())
    script = "\n".join(_function(name, modules[name]) for name in order)
    odd = _ENDS.search(script)
    if odd is not None:
        raise BundleError(f"{odd[0]!r} would end the element that the script is in")
    return script


def _visit(modules: Mapping[str, str], name: str, order: list[str], path: tuple[str, ...]) -> None:
    if name in path:
        raise BundleError(f"modules import each other: {' -> '.join((*path, name))}")
    if name in order:
        return
    if name not in modules:
        raise BundleError(f"{path[-1] if path else 'the page'} imports {name}, which is not there")
    for match in _IMPORT.finditer(modules[name]):
        _visit(modules, match[2], order, (*path, name))
    order.append(name)


def _function(name: str, text: str) -> str:
    """A module as a call whose result is an object of what it exports."""
    exported: list[str] = _DECLARED.findall(text)
    for match in _LISTED.finditer(text):
        exported += [f"{new}: {old}" if new != old else new for old, new in _names(match[1])]
    text = _IMPORT.sub(_taken, text)
    text = _LISTED.sub("", _DECLARED.sub("", text))
    left = _LEFT.search(text)
    if left is not None:
        raise BundleError(f"{name}: {left[0]!r} is not understood here")
    return (
        f"const {_variable(name)} = (() => {{\n{text}\nreturn {{ {', '.join(exported)} }};\n}})();"
    )


def _taken(match: "re.Match[str]") -> str:
    if match[1] is None:  # for what it does, not for what it exports
        return ""
    names = ", ".join(f"{old}: {new}" if new != old else new for old, new in _names(match[1]))
    return f"const {{ {names} }} = {_variable(match[2])};"


def _names(text: str) -> Iterator[tuple[str, str]]:
    """(name there, name here) of `a, b as c`."""
    for one in filter(None, map(str.strip, text.split(","))):
        old, _, new = one.partition(" as ")
        yield old.strip(), (new or old).strip()


def _variable(name: str) -> str:
    return "module_" + re.sub(r"\W", "_", name.removesuffix(".js"))
