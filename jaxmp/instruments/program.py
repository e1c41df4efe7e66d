"""`Program`: a function as XLA compiled it for GPUs: its kernels, their dtypes, memory and collectives.

It is read from the optimised HLO of a compiled function. XLA fuses, splits and converts after tracing, so the program
shows what a jaxpr cannot: which library computes a product, which copies and conversions are kernels of their own,
which collectives the partitioner added, and which sums became half precision.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxmp.html.elements import cell_of
from jaxmp.jaxprs import in_library
from jaxmp.text_table import table

MIB = 2**20
PRODUCT_KERNELS = ("product", "convolution", "attention")
"""kinds of kernels that multiply"""

_DTYPES = {"pred": "bool", "bf16": "bfloat16"} | {
    f"{letter}{bits}": f"{name}{bits}"
    for letter, name, widths in (("f", "float", (16, 32, 64)), ("s", "int", (4, 8, 16, 32, 64)))
    for bits in widths
}
_DTYPES |= {f"u{bits}": f"uint{bits}" for bits in (4, 8, 16, 32, 64)} | {"c64": "complex64", "c128": "complex128"}

_NO_KERNEL = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id"),
    *("opt-barrier", "domain", "add-dependency", "async-update", "async-done", "copy-done"),
}
"""operations that launch nothing: names for memory, and the ends of what was started before"""

_COLLECTIVES = {
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast"),
    "ragged-all-to-all",
}
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%([^\s,)}]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%(\S+) \(.*\{$")


class Kernel(NamedTuple):
    """One launch on the GPU, or a kind of launches in a loop."""

    kind: str
    """product, convolution, attention, library call, reduction, scatter, conversion, copy, or elementwise"""
    dtype: str
    """dtype of a product's or convolution's wider operand; of a reduction's sums; else of the result"""
    name: str
    """name of the library's function, such as __cublas$gemm; of XLA's own kernels, the name in the HLO"""
    path: str
    """name stack of the operation that it computes, "" if XLA names none"""
    source: str
    """file:line of the operation, or "" """
    times: int
    """launches in one call; see `Program.read`"""


class Collective(NamedTuple):
    """One exchange between the GPUs."""

    kind: str
    """all-reduce, all-gather, reduce-scatter, ..."""
    dtype: str
    nbytes: int
    """bytes that one GPU gives or gets, whichever is more, all tensors of the exchange together"""
    path: str
    source: str
    times: int
    in_loop: bool = False
    """whether it stands in a loop; XLA may not know how often that turns"""


class HalfSum(NamedTuple):
    """A sum that the compiled program computes in half precision."""

    dtype: str
    terms: int
    """how many terms are added up for one number"""
    path: str
    source: str
    times: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """The compiler's account of one GPU's memory, in bytes."""

    arguments: int
    """bytes of the arguments"""
    results: int
    """bytes of the results, those in `aliased` included"""
    aliased: int
    """bytes of the results that reuse the memory of donated arguments"""
    temporaries: int
    """the most bytes that live at once besides arguments and results"""

    @property
    def peak(self) -> int:
        """The bytes of arguments, results and temporaries together, aliased ones once."""
        return self.arguments + self.results - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled function. `print` shows tables; `to_json` returns the same for programs."""

    target: str
    """name of what it was compiled for"""
    kernels: tuple[Kernel, ...]
    collectives: tuple[Collective, ...]
    half_sums: tuple[HalfSum, ...]
    memory: Memory

    @classmethod
    def read(cls, compiled: Any, target: str = "") -> Program:
        """Reads the program of a compiled function; its GPUs need not be there.

        The body of a loop counts as often as it turns, and its condition not at all, if XLA knows the number; else both
        count once. Of a conditional, the branch counts that launches most products (of equals, most kernels); the sums
        in half are those of all branches.

        Args:
          compiled: the result of `jax.jit(...).lower(...).compile()`.
          target: a name for what it was compiled for.
        """
        stats = compiled.memory_analysis()
        memory = Memory(
            stats.argument_size_in_bytes,
            stats.output_size_in_bytes,
            stats.alias_size_in_bytes,
            stats.temp_size_in_bytes,
        )
        reader = _Reader(compiled.as_text())
        reader.computation(reader.entry, 1)
        return cls(target, tuple(reader.kernels), tuple(reader.collectives), tuple(reader.half_sums), memory)

    def launches(self) -> dict[tuple[str, str], int]:
        """Counts the launches of kernels by (kind, dtype), most first."""
        counts: collections.Counter[tuple[str, str]] = collections.Counter()
        for kernel in self.kernels:
            counts[kernel.kind, kernel.dtype] += kernel.times
        return dict(counts.most_common())

    def exchanged(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Counts the collectives by (kind, dtype): how many, and their bytes together."""
        sums: dict[tuple[str, str], tuple[int, int]] = {}
        for collective in self.collectives:
            key = collective.kind, collective.dtype
            times, nbytes = sums.get(key, (0, 0))
            sums[key] = times + collective.times, nbytes + collective.times * collective.nbytes
        return sums

    def to_json(self) -> dict[str, Any]:
        """Returns the program as dicts, lists, strings and integers."""
        return {
            "target": self.target,
            "launches": [{"kind": k, "dtype": d, "times": n} for (k, d), n in self.launches().items()],
            "memory": {**dataclasses.asdict(self.memory), "peak": self.memory.peak},
            "collectives": [collective._asdict() for collective in self.collectives],
            "kernels": [kernel._asdict() for kernel in self.kernels],
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        """Shows the same in a notebook."""
        return cell_of(self.lines())

    def lines(self) -> Iterator[str]:
        """Yields the parts of the text."""
        launches = self.launches()
        yield f"compiled for {self.target}: {sum(launches.values())} kernels a call"
        dtypes = sorted({dtype for _, dtype in launches})
        kinds = sorted({kind for kind, _ in launches}, key=lambda kind: _KINDS.index(kind))
        rows = [(kind, *(str(launches.get((kind, dtype), "")) for dtype in dtypes)) for kind in kinds]
        columns = range(1, len(dtypes) + 1)
        yield table(rows, header=("", *dtypes), right=columns, widths=(14, *(10 for _ in dtypes)), indent=2)
        yield "  libraries: " + (", ".join(f"{name} {n}" for name, n in self._libraries().items()) or "none")
        yield "memory of each GPU, in MiB"
        memory = self.memory
        parts = {
            "arguments": memory.arguments,
            "results": memory.results,
            "  of which in the place of arguments": memory.aliased,
            "temporaries": memory.temporaries,
            "together": memory.peak,
        }
        sizes = [(name, f"{size / MIB:,.2f}") for name, size in parts.items()]
        yield table(sizes, right=[1], widths=(36, 10), indent=2)
        yield "collectives" if self.collectives else "collectives\n  none"
        for (kind, dtype), (times, nbytes) in self.exchanged().items():
            yield f"  {kind} of {dtype}: {times}, of {nbytes:,} bytes"

    def _libraries(self) -> dict[str, int]:
        names: collections.Counter[str] = collections.Counter()
        for kernel in self.kernels:
            if "$" in kernel.name:
                names[kernel.name] += kernel.times
        return dict(names.most_common())


_KINDS = (
    *("product", "convolution", "attention", "library call", "reduction", "scatter", "conversion", "copy"),
    "elementwise",
)


class _Instruction(NamedTuple):
    name: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """dtype and shape of each array of the result"""
    opcode: str
    operands: tuple[str, ...]
    rest: str
    """attributes and metadata"""
    root: bool


class _Reader:
    """Reads the text of an HLO module."""

    def __init__(self, text: str) -> None:
        lines = text.splitlines()
        self.computations = dict(_computations(lines))
        self.entry = next(match[2] for line in lines if (match := _HEADER.match(line)) and match[1])
        self.sources = _Sources(lines)
        self.kernels: list[Kernel] = []
        self.collectives: list[Collective] = []
        self.half_sums: list[HalfSum] = []

    def computation(self, name: str, times: int, in_loop: bool = False) -> None:
        """Everything that running a computation launches."""
        body = self.computations[name]
        for instruction in body.values():
            opcode = instruction.opcode
            kind = opcode.removesuffix("-start").removesuffix("-done")
            if opcode in _NO_KERNEL or (opcode.endswith("-done") and kind in _COLLECTIVES):
                continue
            if kind in _COLLECTIVES:
                self._collective(kind, instruction, body, times, in_loop)
            elif opcode == "while":
                turns = _turns(instruction)
                for inner in _called(instruction) if turns is None else _called(instruction, "body"):
                    self.computation(inner, times * (turns or 1), in_loop=True)
            elif opcode == "conditional":
                self._conditional(_called(instruction), times, in_loop)
            elif opcode in ("call", "async-start"):
                for inner in _called(instruction):
                    self.computation(inner, times, in_loop)
            else:
                self._kernel(instruction, body, times)

    def _conditional(self, branches: list[str], times: int, in_loop: bool) -> None:
        """What the branch launches that launches most products, then most of all; of all branches, the sums in half."""
        readers = []
        for branch in branches:
            reader = copy.copy(self)
            reader.kernels, reader.collectives = [], []
            reader.computation(branch, times, in_loop)
            readers.append(reader)
        largest = max(readers, key=_Reader.launches)
        self.kernels += largest.kernels
        self.collectives += largest.collectives

    def launches(self) -> tuple[int, int]:
        """How many products were read, and how many launches of any kind."""
        products = sum(kernel.times for kernel in self.kernels if kernel.kind in PRODUCT_KERNELS)
        return products, sum(kernel.times for kernel in self.kernels) + sum(each.times for each in self.collectives)

    def _collective(
        self, kind: str, instruction: _Instruction, body: Mapping[str, _Instruction], times: int, in_loop: bool
    ) -> None:
        given = [shape for operand in instruction.operands for shape in body[operand].shapes]
        # What starts one returns what it was given beside what it will get.
        got = instruction.shapes[len(given) :] if instruction.opcode.endswith("-start") else instruction.shapes
        larger = max(given, got or given, key=_nbytes)
        path, source = self._place(instruction)
        self.collectives.append(Collective(kind, _widest(larger), _nbytes(larger), path, source, times, in_loop))

    def _kernel(self, instruction: _Instruction, body: Mapping[str, _Instruction], times: int) -> None:
        # What a fusion computes stands in a computation of its own.
        called = _called(instruction) if instruction.opcode == "fusion" else []
        inside = self.computations[called[0]] if called else {**body, instruction.name: instruction}
        parts = list(inside.values()) if called else [instruction]
        path, source = self._place(instruction)
        kind, main = _kind(parts)
        operands = [shape for name in main.operands[:2] for shape in inside[name].shapes[:1] if shape[1]]
        results = main.shapes if kind in ("reduction", "scatter") else instruction.shapes
        dtype = _widest(operands if kind in ("product", "convolution") and operands else results)
        target = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
        name = target[1] if target else re.sub(r"[.\d]+$", "", instruction.name)
        self.kernels.append(Kernel(kind, dtype, name, path, source, times))
        for part in parts:
            if part.opcode == "reduce" and _adds(self.computations[_called(part)[0]]):
                self._sum(part, inside, (path, source), times)

    def _sum(self, part: _Instruction, inside: Mapping[str, _Instruction], place: tuple[str, str], times: int) -> None:
        dtype, shape = part.shapes[0]
        if dtype in ("float16", "bfloat16"):
            of = inside[part.operands[0]].shapes[0][1]
            path, source = self._place(part)
            terms = math.prod(of) // max(math.prod(shape), 1)
            self.half_sums.append(HalfSum(dtype, terms, path or place[0], source or place[1], times))

    def _place(self, instruction: _Instruction) -> tuple[str, str]:
        name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.rest)
        frame = re.search(r"stack_frame_id=(\d+)", instruction.rest)
        return name[1] if name else "", self.sources.line(int(frame[1])) if frame else ""


class _Sources:
    """The tables at the head of a module that say where in the code an operation stands."""

    def __init__(self, lines: list[str]) -> None:
        self.tables: dict[str, dict[int, str]] = {}
        table: dict[int, str] | None = None
        for line in lines:
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = self.tables.setdefault(line, {})
            elif table is not None and (entry := re.match(r"^(\d+) (.*)$", line)):
                table[int(entry[1])] = entry[2]
            elif not line:
                table = None

    @functools.cache  # noqa: B019 (lives as long as the reading)
    def line(self, frame: int) -> str:
        """file:line of a stack frame: the innermost outside of installed libraries, else the innermost."""
        innermost = ""
        while frame:
            entry = _numbers(self.tables.get("StackFrames", {}).get(frame, ""))
            location = _numbers(self.tables.get("FileLocations", {}).get(entry.get("file_location_id", 0), ""))
            file = self.tables.get("FileNames", {}).get(location.get("file_name_id", 0), "").strip('"')
            here = f"{file}:{location.get('line', 0)}" if file else ""
            if file and not in_library(file):
                return here
            innermost = innermost or here
            parent = entry.get("parent_frame_id", 0)
            frame = parent if parent != frame else 0
        return innermost


def _numbers(text: str) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", text)}


def _computations(lines: list[str]) -> Iterator[tuple[str, dict[str, _Instruction]]]:
    name, body = "", dict[str, _Instruction]()
    for line in lines:
        if header := _HEADER.match(line):
            name, body = header[2], {}
        elif name and line == "}":
            yield name, body
            name = ""
        elif name and (match := _INSTRUCTION.match(line)):
            body[match[2]] = _instruction(match[2], match[3], root=bool(match[1]))


def _instruction(name: str, text: str, *, root: bool) -> _Instruction:
    """`TYPE OPCODE(OPERANDS), ATTRIBUTES`, of which TYPE may be a tuple."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    stop = _closing(text, start)
    shapes = tuple(
        (_DTYPES.get(dtype, _float8(dtype)), tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in _SHAPE.findall(text[:end])
    )
    operands = tuple(re.findall(r"%([^\s,()]+)", text[start:stop]))
    return _Instruction(name, shapes, opcode, operands, text[stop:], root)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, start):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return bracket.start()
    raise ValueError(f"no end of {text[start : start + 80]!r}")


def _float8(dtype: str) -> str:
    return dtype.replace("f8", "float8_", 1) if dtype.startswith("f8") else dtype


def _kind(parts: list[_Instruction]) -> tuple[str, _Instruction]:
    """What a kernel does, of all that it does, and the operation that says so."""
    by_opcode = {part.opcode: part for part in reversed(parts)}
    main = parts[-1]
    if call := by_opcode.get("custom-call"):
        for kind, names in _LIBRARY_KINDS.items():
            if any(name in call.rest for name in names):
                return kind, call
        return "library call", call
    for opcode, kind in _OPCODE_KINDS.items():
        if opcode in by_opcode:
            return kind, by_opcode[opcode]
    computing = {part.opcode for part in parts} - _NO_KERNEL - _MOVING
    if not computing:
        return "copy", main
    return ("conversion" if computing == {"convert"} else "elementwise"), main


_LIBRARY_KINDS = {
    "convolution": ('"__cudnn$conv',),
    "attention": ('"__cudnn$fmha',),
    "product": ('"__cublas$', '"__triton', '"__cudnn$'),
}
_OPCODE_KINDS = {
    "dot": "product",
    "convolution": "convolution",
    "scatter": "scatter",
    "reduce": "reduction",
    "reduce-window": "reduction",
    "sort": "library call",
}
_MOVING = {"copy", "copy-start", "transpose", "reshape", "slice", "concatenate", "broadcast", "dynamic-slice", "pad"}
_MOVING |= {"dynamic-update-slice", "reverse", "gather"}


def _called(instruction: _Instruction, role: str = "") -> list[str]:
    """The computations that an instruction runs, or those in one role, such as the body of a loop."""
    names = [name for part, name in _CALLED.findall(instruction.rest) if role in ("", part)]
    for group in _BRANCHES.findall(instruction.rest):
        names += re.findall(r"%([^\s,]+)", group)
    return names


def _turns(loop: _Instruction) -> int | None:
    """How often a loop turns; None if XLA does not know, and the condition is computed in each turn."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    return int(known[1]) if known else None


def _adds(computation: Mapping[str, _Instruction]) -> bool:
    return any(instruction.root and instruction.opcode == "add" for instruction in computation.values())


def _bits(dtype: str) -> int:
    return 8 if dtype == "bool" else int(digits[0]) if (digits := re.findall(r"\d+", dtype)) else 0


def _nbytes(shapes: Any) -> int:
    return sum(math.prod(shape) * _bits(dtype) for dtype, shape in shapes) // 8


def _widest(shapes: Any) -> str:
    """The widest float among them, else the widest of what there is."""
    return max((dtype for dtype, _ in shapes), key=lambda dtype: ("float" in dtype, _bits(dtype)), default="")
