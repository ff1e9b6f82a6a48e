"""Read PTX, as Triton writes it: one kernel per file, a flat body, and registers declared at its start."""

import re
from dataclasses import dataclass
from functools import cached_property

from tests.emulation.ptx.values import Kind, kind_of


class UnknownPtxError(NotImplementedError):
    """The emulator does not know this instruction, or this form of it."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    """A register that the hardware sets, such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: an integer, or the bits of a floating-point number."""

    bits: int


@dataclass(frozen=True)
class Symbol:
    """The name of a label, of a kernel's parameter, or of shared memory, which begins at address 0."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


Operand = Register | Special | Immediate | Symbol | Vector | Address


@dataclass(frozen=True)
class Guard:
    """The predicate in front of an instruction: `@%p` or `@!%p`."""

    register: str
    negated: bool


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        text: The instruction as written, for messages.
        parts: The opcode split at its dots, such as ("add", "s32").
        operands: The operands, in order.
        guard: The predicate that decides which threads execute it; None for all.
    """

    text: str
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Guard | None

    @property
    def opcode(self) -> str:
        return self.parts[0]

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The types in the opcode, in order."""
        return tuple(kind for part in self.parts[1:] if (kind := kind_of(part)) is not None)

    def unknown(self) -> UnknownPtxError:
        return UnknownPtxError(f"the emulator does not know {'.'.join(self.parts)!r}: {self.text}")


@dataclass(frozen=True)
class Kernel:
    """A parsed kernel.

    Attributes:
        name: Name of the kernel.
        threads: Number of threads of a program.
        parameters: Name and type of each parameter, in order.
        registers: Name of each register -> its number of bits, 1 for a predicate.
        instructions: The instructions.
        labels: Label -> index of the instruction after it.
    """

    name: str
    threads: int
    parameters: tuple[tuple[str, Kind], ...]
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\((?P<parameters>.*?)\)(?P<directives>.*?)\n\{(?P<body>.*?)\n\}", re.S)
_DIRECTIVE = re.compile(r"^[ \t]*\.(loc|pragma|file|section)\b[^\n]*$", re.M)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+?)(?:<(\d+)>)?\s*;")
_LABEL = re.compile(r"(\$?[A-Za-z_$][\w$]*):")


def parse(ptx: str) -> Kernel:
    """Parse the only kernel of a PTX file.

    Raises:
        UnknownPtxError: Something is written in a way that the emulator does not know.
    """
    entry = _ENTRY.search(re.sub(r"//[^\n]*", "", ptx))
    if entry is None:
        raise UnknownPtxError("the PTX has no kernel")
    threads = re.search(r"\.reqntid\s+(\d+)", entry["directives"])
    if threads is None:
        raise UnknownPtxError(f"{entry['name']} does not say how many threads a program has")
    body = _DIRECTIVE.sub("", entry["body"])
    registers: dict[str, int] = {}
    for kind, name, count in _REGISTERS.findall(body):
        names = [f"{name}{index}" for index in range(int(count))] if count else [name]
        registers |= dict.fromkeys(names, 1 if kind == "pred" else int(kind[1:]))
    instructions, labels = _instructions(_REGISTERS.sub("", body))
    return Kernel(
        entry["name"], int(threads[1]), _parameters(entry["parameters"]), registers, tuple(instructions), labels
    )


def _parameters(text: str) -> tuple[tuple[str, Kind], ...]:
    found = []
    for declaration in filter(str.strip, text.split(",")):
        words = declaration.split()
        kind = kind_of(words[1].removeprefix("."))
        if words[0] != ".param" or kind is None:
            raise UnknownPtxError(f"a parameter declared as {declaration.strip()!r}")
        found.append((words[-1], kind))
    return tuple(found)


def _instructions(body: str) -> tuple[list[Instruction], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement in body.split(";"):
        text = " ".join(statement.split())
        while match := _LABEL.match(text):
            labels[match[1]] = len(instructions)
            text = text[match.end() :].strip()
        text = re.sub(r"^([{}]\s*)+", "", text)  # inline assembly may open and close a scope
        if text:
            instructions.append(_instruction(text))
    return instructions, labels


def _instruction(text: str) -> Instruction:
    guard, rest = None, text
    if text[0] == "@":
        predicate, rest = text[1:].split(" ", 1)
        guard = Guard(predicate.lstrip("!"), predicate[0] == "!")
    opcode, _, operands = rest.strip().partition(" ")
    parts = tuple(opcode.replace("::", ".").split("."))
    return Instruction(text, parts, tuple(_operand(part) for part in _split(operands)), guard)


def _split(text: str) -> list[str]:
    """Split operands at commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def _operand(text: str) -> Operand:
    if text[0] == "{":
        return Vector(tuple(_operand(item.strip()) for item in text[1:-1].split(",")))
    if text[0] == "[":
        match = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise UnknownPtxError(f"the address {text}")
        return Address(_operand(match[1]), int(match[2] or "0", 0))
    if "|" in text:
        return Vector(tuple(_operand(item) for item in text.split("|")))
    if re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid)", text):
        return Special(text)
    if text[0] == "%" or text == "_":  # `_` takes a result that nobody needs
        return Register(text)
    if text[:2].lower() in ("0f", "0d"):
        return Immediate(int(text[2:], 16))
    if re.match(r"-?\d", text):
        return Immediate(int(text.rstrip("U"), 0))
    if text in ("true", "false"):
        return Immediate(int(text == "true"))
    return Symbol(text)
