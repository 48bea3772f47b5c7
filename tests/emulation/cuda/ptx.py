"""PTX, what NVIDIA's front end makes of kernels' CUDA text, to C++ for the emulator.

A register holds its bits as an unsigned number; an instruction reads them as what its type says.
Addresses in shared memory are offsets into the block's; all others are pointers. An instruction
that is not known is an error that shows it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
    "hi": ">", "hs": ">=", "equ": "==", "neu": "!=", "ltu": "<", "leu": "<=", "gtu": ">",
    "geu": ">=",
}  # fmt: skip
_UNORDERED = ("equ", "neu", "ltu", "leu", "gtu", "geu")
_OPERATORS = {
    "add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^", "div": "/", "rem": "%",
}  # fmt: skip
_SPECIAL = {
    "%tid.x": "emu::self->index.x", "%ctaid.x": "emu::self->block->index.x",
    "%ntid.x": "emu::block_size.x", "%nctaid.x": "emu::grid.x",
    "%laneid": "(emu::self->index.x % emu::WARP)",
}  # fmt: skip
# Other results than a CPU's.
_REFUSED = {"approx", "full", "sat", "satfinite", "ftz"}
_ROUNDED = ("add", "sub", "mul", "div", "rcp", "sqrt", "fma")
_ROUNDINGS = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
_SPACES = ("param", "shared", "global", "local", "const")
_MMA = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
_MMA_SPARSE = (
    "mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32",
    "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32",
)


def translate_ptx(ptx: str) -> str:
    """C++ with a function for each entry and each function of ``ptx``, of their names; to be
    included after emulator.h.

    Raises NotImplementedError naming an instruction that it does not know.
    """
    text = re.sub(r"//[^\n]*", "", ptx)
    functions = [
        _Function(found["name"], found["parameters"], found["body"])
        for found in re.finditer(
            r"\.(?:entry|func)\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)"
            r"(?P<bounds>[^{;]*)\{(?P<body>.*?)^\}",
            text,
            re.S | re.M,
        )
    ]
    assert functions, "no function in the PTX"
    declared = [f"{f.signature};" for f in functions]
    return "\n".join(['#include "ptx.h"', *declared, *(f.text() for f in functions)])


def _c_type(token: str) -> str:
    kind, bits = token[0], token[1:]
    if token == "pred":
        return "bool"
    if kind == "f":
        return {"16": "_Float16", "32": "float", "64": "double"}[bits]
    return f"{'int' if kind == 's' else 'uint'}{bits}_t"


def _size(token: str) -> int:
    return int(token[1:]) // 8


def _operands(text: str) -> list[str]:
    found = re.findall(r"\s*(\{[^}]*\}|\[[^]]*\]|\([^)]*\)|[^,]+)", text)
    return [part.strip() for part in found if part.strip()]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}() ").split(",") if part.strip()]


class _Function:
    def __init__(self, name: str, parameters: str, body: str) -> None:
        self._name = name
        self._lines: list[str] = []
        self._registers: dict[str, str] = {}
        self._arrays: dict[str, int] = {}
        self._targets: dict[str, list[str]] = {}
        self._parameters = re.findall(r"\.param\s+\.(\w+)[^,]*?\s([\w$]+)\s*(?:,|$)", parameters)
        statements = _statements(body)
        for statement in statements:  # tables stand behind what uses them
            if found := re.fullmatch(r"(\S+):\s*\.branchtargets\s+(.*)", statement, re.S):
                self._targets[found[1]] = _listed(found[2])
        for statement in statements:
            self._statement(statement)

    @property
    def signature(self) -> str:
        takes = ", ".join(f"{_c_type(kind)} {name}" for kind, name in self._parameters)
        return f"void {self._name}({takes})"

    def text(self) -> str:
        body = "\n".join(self._lines)
        used = set(re.findall(r"\bR_\w+", body))
        declared = [
            f"  {'bool' if kind == 'pred' else f'uint{kind[1:]}_t'} {name} = 0;"
            for name, kind in self._registers.items()
            if name in used
        ]
        declared += [f"  alignas(16) char {name}[{n}];" for name, n in self._arrays.items()]
        return "\n".join([self.signature + " {", *declared, body, "  return;", "}", ""])

    def _emit(self, line: str) -> None:
        self._lines.append(f"  {line}")

    def _statement(self, text: str) -> None:
        if ".branchtargets" in text:
            return
        if found := re.fullmatch(r"([\w$]+):", text):
            self._emit(f"{_label(found[1])}:;")
        elif text.startswith("."):
            self._declare(text)
        elif found := re.match(r"@(!?)(%\w+)\s+(.*)", text, re.S):
            self._emit(f"if ({found[1]}{self._bits(found[2])}) {{")
            self._instruction(found[3])
            self._emit("}")
        else:
            self._instruction(text)

    def _declare(self, text: str) -> None:
        if found := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            for part in found[2].split(","):
                if many := re.match(r"\s*(%\w+)<(\d+)>", part):
                    for i in range(int(many[2])):
                        self._registers[_register(f"{many[1]}{i}")] = found[1]
                else:
                    self._registers[_register(part.strip())] = found[1]
        elif found := re.match(r"\.local\s+\.align\s+\d+\s+\.b8\s+(\S+)\[(\d+)\]", text):
            self._arrays[found[1]] = int(found[2])
        elif re.match(r"\.param\s+\.(?:align \d+ )?\.?\w+\s+\w+", text):
            self._arrays[text.split()[-1].split("[")[0]] = 16
        elif not text.startswith((".pragma", ".loc")):
            raise NotImplementedError(text)

    def _bits(self, text: str) -> str:
        """An operand's bits, or a number."""
        text = text.strip()
        if text in _SPECIAL:
            return _SPECIAL[text]
        if text.startswith("%"):
            return _register(text)
        if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return f"0x{found[1]}u"
        if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return f"0x{found[1]}ull"
        if text == "slm_shared":
            return "0u"
        if re.fullmatch(r"-?(0[xX])?[0-9a-fA-F]+U?", text):
            return f"((int64_t){text.rstrip('U')}ll)"
        if text in self._arrays:
            return f"((uint64_t){text})"
        raise NotImplementedError(f"an operand {text!r}")

    def _value(self, text: str, token: str) -> str:
        if token == "pred":
            return self._bits(text)
        bits = self._bits(text)
        if bits.startswith("((int64_t)"):
            return f"(({_c_type(token)}){bits})"
        return f"as<{_c_type(token)}>({bits})"

    def _set(self, register: str, token: str, value: str) -> None:
        """Into a register, which may be wider."""
        if register == "_":
            return
        name, kind = _register(register), _c_type(token)
        if token == "pred":
            self._emit(f"{name} = {value};")
        elif kind.startswith("int"):
            self._emit(f"{name} = ({kind})({value});")
        else:
            self._emit(f"{name} = as<uint{token[1:]}_t>(({kind})({value}));")

    def _address(self, text: str, space: str) -> str:
        inner = text.strip("[] ")
        found = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", inner)
        base, offset = (found[1], found[2]) if found else (inner, "0")
        if space == "param":
            held = base in self._arrays
            return f"((uint64_t){'' if held else '&'}{base} + {offset})"
        if space == "shared":
            return f"(shared() + (uint32_t)({self._bits(base)} + {offset}))"
        return f"({self._bits(base)} + {offset})"

    def _instruction(self, text: str) -> None:
        opcode, _, rest = text.partition(" ")
        parts, given = opcode.split("."), _operands(rest)
        method = getattr(self, f"_{parts[0]}", None)
        if _REFUSED & set(parts) or (method is None and parts[0] not in _OPERATORS):
            raise NotImplementedError(text)
        if parts[0] in _ROUNDED and parts[-1][0] == "f" and "rn" not in parts:
            raise NotImplementedError(f"what NVIDIA's assembler may contract: {text}")
        if parts[0] in _OPERATORS and not {"hi", "wide"} & set(parts):
            self._operator(parts, given)
        else:
            method(parts, given)

    def _operator(self, op: Sequence[str], args: Sequence[str]) -> None:
        token = op[-1]
        if token[0] == "s" and op[0] not in ("div", "rem"):  # sums wrap around
            token = "u" + token[1:]
        a, b = (self._value(x, token) for x in args[1:])
        self._set(args[0], token, f"{a} {_OPERATORS[op[0]]} {b}")

    def _ret(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._emit("return;")

    _exit = _ret

    def _bra(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._emit(f"goto {_label(args[0])};")

    def _brx(self, op: Sequence[str], args: Sequence[str]) -> None:
        cases = " ".join(
            f"case {i}: goto {_label(to)};" for i, to in enumerate(self._targets[args[1]])
        )
        self._emit(f'switch ({self._bits(args[0])}) {{ {cases} default: emu::fail("no target"); }}')

    def _bar(self, op: Sequence[str], args: Sequence[str]) -> None:
        if "warp" in op:
            self._emit(f"__syncwarp({self._value(args[0], 'u32')});")
        else:
            assert args == ["0"], args
            self._emit("__syncthreads();")

    _barrier = _bar

    def _membar(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._emit("__threadfence();")

    _fence = _membar

    def _atom(self, op: Sequence[str], args: Sequence[str]) -> None:
        if "add" not in op or op[-1] != "u32":
            raise NotImplementedError(".".join(op))
        where = f"(unsigned *){self._address(args[1], 'generic')}"
        self._set(args[0], "u32", f"atomicAdd({where}, {self._value(args[2], 'u32')})")

    def _ld(self, op: Sequence[str], args: Sequence[str]) -> None:
        token, space = op[-1], _space(op)
        if "volatile" in op:  # it waits for others
            self._emit("emu::spin();")
        elif space != "param":
            self._emit("emu::step();")
        self._emit("{")
        self._emit(f"const uint64_t at = {self._address(args[1], space)};")
        targets = _listed(args[0])
        if len(targets) > 1:
            whole = _size(token) * len(targets)
            self._emit(f'if (at % {whole}) emu::fail("a load that is not aligned");')
        names = [f"l{i}" for i in range(len(targets))]
        for i, name in enumerate(names):  # a target may be part of the address
            self._emit(f"const auto {name} = get<{_c_type(token)}>(at + {i * _size(token)});")
        for name, target in zip(names, targets, strict=True):
            self._set(target, token, name)
        self._emit("}")

    _ldu = _ld

    def _st(self, op: Sequence[str], args: Sequence[str]) -> None:
        token, space = op[-1], _space(op)
        sources = _listed(args[1])
        where = self._address(args[0], space)
        if space != "param":
            self._emit("emu::step();")
        if len(sources) > 1:
            whole = _size(token) * len(sources)
            self._emit(f'if ({where} % {whole}) emu::fail("a store that is not aligned");')
        for i, source in enumerate(sources):
            value = self._value(source, token)
            self._emit(f"put<{_c_type(token)}>({where} + {i * _size(token)}, {value});")

    def _mov(self, op: Sequence[str], args: Sequence[str]) -> None:
        token = op[-1]
        if args[0].startswith("{"):
            parts = _listed(args[0])
            bits = int(token[1:]) // len(parts)
            for i, part in enumerate(parts):
                if part != "_":
                    value = f"(uint{bits}_t)({self._bits(args[1])} >> {i * bits})"
                    self._emit(f"{_register(part)} = {value};")
        elif args[1].startswith("{"):
            parts = _listed(args[1])
            bits = int(token[1:]) // len(parts)
            whole = f"uint{token[1:]}_t"
            joined = " | ".join(
                f"({whole})(uint{bits}_t){self._bits(p)} << {i * bits}" for i, p in enumerate(parts)
            )
            self._emit(f"{_register(args[0])} = {joined};")
        else:
            self._set(args[0], token, self._value(args[1], token))

    def _cvta(self, op: Sequence[str], args: Sequence[str]) -> None:
        shift = ""
        if "shared" in op:
            shift = " - shared()" if "to" in op else " + shared()"
        self._emit(f"{_register(args[0])} = {self._bits(args[1])}{shift};")

    def _cvt(self, op: Sequence[str], args: Sequence[str]) -> None:
        to, source = op[-2], op[-1]
        value = self._value(args[1], source)
        rounding = next((_ROUNDINGS[p] for p in op if p in _ROUNDINGS), None)
        if rounding:
            value = f"std::{rounding}({value})"
        if to[0] != "f" and source[0] == "f":
            assert rounding, op
            value = f"to_int<{_c_type(to)}>({value})"
        self._set(args[0], to, f"({_c_type(to)}){value}")

    def _setp(self, op: Sequence[str], args: Sequence[str]) -> None:
        token, how = op[-1], op[1]
        a, b = (self._value(x, token) for x in args[1:3])
        if how in ("nan", "num"):  # whether either is no number, or none
            either = f"({a} != {a} || {b} != {b})"
            text = either if how == "nan" else f"!{either}"
        else:
            text = f"({a} {_COMPARISONS[how]} {b})"
        if how in _UNORDERED:
            text = f"({text} || {a} != {a} || {b} != {b})"
        if how == "ne" and token[0] == "f":  # false where either is no number
            text = f"({text} && {a} == {a} && {b} == {b})"
        if len(args) == 4:
            text = f"({text} {_OPERATORS[op[2]]} {self._bits(args[3])})"
        self._set(args[0], "pred", text)

    def _selp(self, op: Sequence[str], args: Sequence[str]) -> None:
        a, b = (self._value(x, op[-1]) for x in args[1:3])
        self._set(args[0], op[-1], f"{self._bits(args[3])} ? {a} : {b}")

    def _mul(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._multiply(op, args, "")

    def _mad(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._multiply(op, args, "+")

    def _multiply(self, op: Sequence[str], args: Sequence[str], sign: str) -> None:
        token = op[-1]
        if "hi" in op:
            wide = _c_type(f"{token[0]}{2 * int(token[1:])}")
            product = " * ".join(f"({wide}){self._value(x, token)}" for x in args[1:3])
            self._set(args[0], token, f"({product}) >> {token[1:]}")
            return
        result = f"{token[0]}{2 * int(token[1:])}" if "wide" in op else "u" + token[1:]
        own = token if "wide" in op else result
        a, b = (f"({_c_type(result)}){self._value(x, own)}" for x in args[1:3])
        more = f" {sign} {self._value(args[3], result)}" if sign else ""
        self._set(args[0], result, f"{a} * {b}{more}")

    def _fma(self, op: Sequence[str], args: Sequence[str]) -> None:
        a, b, c = (self._value(x, op[-1]) for x in args[1:])
        self._set(args[0], op[-1], f"std::fma({a}, {b}, {c})")

    def _sqrt(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._set(args[0], op[-1], f"std::sqrt({self._value(args[1], op[-1])})")

    def _rcp(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._set(args[0], op[-1], f"1 / {self._value(args[1], op[-1])}")

    def _min(self, op: Sequence[str], args: Sequence[str]) -> None:
        name = "least" if op[0] == "min" else "most"
        a, b = (self._value(x, op[-1]) for x in args[1:])
        self._set(args[0], op[-1], f"{name}({a}, {b})")

    _max = _min

    def _abs(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._set(args[0], op[-1], f"std::abs({self._value(args[1], op[-1])})")

    def _neg(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._set(args[0], op[-1], f"-{self._value(args[1], op[-1])}")

    def _not(self, op: Sequence[str], args: Sequence[str]) -> None:
        sign = "!" if op[-1] == "pred" else "~"
        self._set(args[0], op[-1], f"{sign}{self._value(args[1], op[-1])}")

    def _shl(self, op: Sequence[str], args: Sequence[str]) -> None:
        token, bits = op[-1], int(op[-1][1:])
        value, amount = self._value(args[1], token), self._value(args[2], "u32")
        sign = "<<" if op[0] == "shl" else ">>"
        rest = f"{value} < 0 ? -1 : 0" if token[0] == "s" else "0"
        kind = _c_type(token)
        self._set(
            args[0], token, f"{amount} < {bits}u ? ({kind})({value} {sign} {amount}) : ({rest})"
        )

    _shr = _shl

    def _shf(self, op: Sequence[str], args: Sequence[str]) -> None:
        a, b, n = (self._value(x, "u32") for x in args[1:])
        amount = f"({n} & 31)" if "wrap" in op else f"std::min({n}, 32u)"
        both = f"((uint64_t){b} << 32 | {a})"
        text = f"{both} >> {amount}" if op[1] == "r" else f"{both} << {amount} >> 32"
        self._set(args[0], "b32", f"(uint32_t)({text})")

    def _lop3(self, op: Sequence[str], args: Sequence[str]) -> None:
        a, b, c = (self._value(x, "b32") for x in args[1:4])
        self._set(args[0], "b32", f"lop3({a}, {b}, {c}, {args[4]})")

    def _prmt(self, op: Sequence[str], args: Sequence[str]) -> None:
        a, b, c = (self._value(x, "b32") for x in args[1:])
        self._set(args[0], "b32", f"prmt({a}, {b}, {c})")

    def _bfe(self, op: Sequence[str], args: Sequence[str]) -> None:
        value, at, count = self._value(args[1], op[-1]), *(self._bits(x) for x in args[2:])
        self._set(args[0], "u32", f"field({value}, {at}, {count})")

    def _bfi(self, op: Sequence[str], args: Sequence[str]) -> None:
        a, b = (self._value(x, "u32") for x in args[1:3])
        at, count = (self._value(x, "u32") for x in args[3:])
        mask = f"(uint32_t)(((1ull << {count}) - 1) << {at})"
        self._set(args[0], "u32", f"({b} & ~{mask}) | ({a} << {at} & {mask})")

    def _popc(self, op: Sequence[str], args: Sequence[str]) -> None:
        self._set(args[0], "u32", f"__builtin_popcount({self._value(args[1], 'u32')})")

    def _dp4a(self, op: Sequence[str], args: Sequence[str]) -> None:
        assert op[1:] == ["s32", "s32"], op
        a, b, c = (self._value(x, "s32") for x in args[1:])
        self._set(args[0], "s32", f"slm_dp4a({a}, {b}, {c})")

    def _shfl(self, op: Sequence[str], args: Sequence[str]) -> None:
        to, value, lane, width, mask = args
        assert op[1:3] == ["sync", "idx"], op
        given = ", ".join(
            [self._value(mask, "u32"), self._value(value, "b32"), self._value(lane, "s32")]
        )
        across = f"32 - ({self._value(width, 'u32')} >> 8 & 31)"
        self._set(to.split("|")[0].strip(), "b32", f"__shfl_sync({given}, {across})")

    def _mma(self, op: Sequence[str], args: Sequence[str]) -> None:
        name, inputs = ".".join(op), [*args[1:3], *args[4:5]]
        if name in _MMA_SPARSE:
            assert args[5] == "0x0" or args[5] == "0", args
            called = "slm_mma_sparse_16x8x64"
        else:
            assert name == _MMA, op
            called = "slm_mma_16x8x32"
        self._emit("{")
        start = ", ".join(f"(int){self._bits(x)}" for x in _listed(args[3]))
        self._emit(f"int d[] = {{{start}}};")
        given = ["d"]
        for letter, text in zip("abe", inputs, strict=False):
            listed = ", ".join(f"(unsigned){self._bits(x)}" for x in _listed(text))
            self._emit(f"const unsigned {letter}[] = {{{listed}}};")
            given.append(letter if letter != "e" else "e[0]")
        self._emit(f"{called}({', '.join(given)});")
        for i, target in enumerate(_listed(args[0])):
            self._emit(f"{_register(target)} = (unsigned)d[{i}];")
        self._emit("}")

    def _call(self, op: Sequence[str], args: Sequence[str]) -> None:
        name, given = args
        values = ", ".join(f"any{{{argument}}}" for argument in _listed(given))
        self._emit(f"{name}({values});")


def _space(op: Sequence[str]) -> str:
    return next((part for part in op[1:] if part in _SPACES), "generic")


def _register(text: str) -> str:
    return "R_" + text.lstrip("%").strip()


def _label(text: str) -> str:
    return text.replace("$", "L")


def _statements(body: str) -> list[str]:
    """The statements of a body; a scope's braces are dropped, those of operands are not."""
    body = re.sub(r"^(\s*[\w$]+:)(?!\s*\.branchtargets)", r"\1;", body, flags=re.M)
    found = (" ".join(part.split()) for part in body.split(";"))
    stripped = (re.sub(r"^[{}\s]+", "", part) for part in found)
    return [part for part in stripped if part]
