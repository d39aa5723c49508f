"""Registries: things known by name, one file each in a package; a new file is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
Thing = TypeVar("Thing")


class Registry(Generic[T]):
    """What the modules of a package register when they are imported, which happens when it is first asked for."""

    def __init__(self, kind: str, package: str) -> None:
        """An empty registry.

        Args:
            kind: What it holds, in one word.
            package: Dotted name of the package whose modules, in folders too, register themselves.
        """
        self._kind, self._package = kind, package
        self._found: dict[str, T] = {}
        self._complete = False

    def add(self, name: str, thing: T) -> T:
        """Make a thing known; each name once."""
        assert name not in self._found, f"{self._kind} {name} is registered twice"
        self._found[name] = thing
        return thing

    def register(self, name: str) -> Callable[[Thing], Thing]:
        """A decorator that makes a function or a class known; a class is told its name."""

        def decorate(thing: Thing) -> Thing:
            if isinstance(thing, type):
                thing.name = name  # pyright: ignore[reportAttributeAccessIssue]
            self.add(name, thing)  # pyright: ignore[reportArgumentType]
            return thing

        return decorate

    def drop(self, name: str) -> None:
        """Forget a thing; for tests that add their own."""
        del self._found[name]

    def all(self) -> dict[str, T]:
        """Everything there is, by name, in the order of the modules' names."""
        if not self._complete:
            package = importlib.import_module(self._package)
            for module in pkgutil.walk_packages(package.__path__, f"{self._package}."):
                importlib.import_module(module.name)
            self._complete = True
        return dict(self._found)
