"""Derive a command's options from the signature and the docstring of its function."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from fastssl.cli.console import log_to_console


def call(command: str, function: Callable[..., Any], positionals: Sequence[str], arguments: Sequence[str]) -> None:
    """Parse the arguments of a command and call its function with them.

    Every parameter becomes an option with the same name, type and default. The exception is a parameter `settings`: it
    must be a dataclass, and each of its fields becomes an option. The help texts are the entries in the docstring.

    Args:
        command: Name of the command.
        function: The function to call.
        positionals: Parameters that are given by position instead of as options.
        arguments: The command's arguments, as typed.
    """
    parameters = inspect.signature(function).parameters
    description, helps = documented(function)
    parser = new_parser(command, description)
    for name in positionals:
        parser.add_argument(name, metavar=name.upper(), help=helps[name])
    several = [name for name in parameters if parameters[name].annotation == Sequence[str]]
    for name in several:  # --compare A B, where jsonargparse would want a list: --compare [A,B]
        parser.add_argument(f"--{name}", nargs="+", default=[], help=helps[name])
    parser.add_function_arguments(function, as_group=False, skip={*positionals, *several, "settings"})
    if "settings" in parameters:
        parser.add_class_arguments(parameters["settings"].annotation, as_group=False)
    given = vars(parser.parse_args(list(arguments)))
    if "settings" in parameters:
        settings = parameters["settings"].annotation
        given["settings"] = settings(**{field.name: given.pop(field.name) for field in dataclasses.fields(settings)})
    log_to_console()
    function(**given)


def new_parser(command: str, description: str) -> ArgumentParser:
    """Return a parser for a command, without options.

    Args:
        command: Name of the command.
        description: Text at the top of its help.
    """
    return ArgumentParser(prog=f"fastssl {command}", description=description, allow_abbrev=False)


def documented(source: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """Return the description in a docstring, and the entries of its arguments by name.

    Args:
        source: Function or class whose docstring to read.
    """
    description, _, rest = (inspect.getdoc(source) or "").partition("\n\nArgs:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", rest.partition("\n\n")[0], re.MULTILINE)
    return description, dict(entries)
