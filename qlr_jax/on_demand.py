"""Names of a package that are imported when they are first used (PEP 562): importing the package stays light."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def resolver(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package whose names lie in other modules.

    Args:
        package: its name, for messages.
        homes: name -> the module that holds it.

    Example:
        >>> resolver("demo", {"sqrt": "math"})("sqrt")(4.0)
        2.0
    """

    def resolve(name: str) -> Any:
        if name in homes:
            return getattr(import_module(homes[name]), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return resolve
