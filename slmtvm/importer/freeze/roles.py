"""What each graph input is for: the tokens, or something that follows from the position alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx

from slmtvm.errors import InvalidModelError, UnsupportedOpError
from slmtvm.importer.graph import Array, Graph, Port
from slmtvm.importer.rewrite.earlier_tokens import Earlier

_TOKENS = re.compile(r"(decoder_)?input_ids?|tokens?|ids|input")
_MASK = re.compile(r"(decoder_|encoder_)?(attention|input|padding)_mask|mask")
_POSITIONS = re.compile(r"position_ids|positions?|cache_position")
_SEGMENTS = re.compile(r"(token_type|segment)_ids")
_PAST = re.compile(r"past.*|cache.*")
_PAIRS = re.compile(r"(decoder_)?(attention|attn|causal)_(mask|bias)|mask")
_PAST_LENGTH = re.compile(r"past_(key_values_|seq_|sequence_)?length")
HIDDEN_STATES = "encoder_hidden_states"  # of a decoder's file, as optimum names it
MASK = "mask"  # the role of an input that says which tokens are visible
PAIRS = "pairs"  # of one that says which tokens each sees, in a decoder: those before it
_USE_CACHE = "use_cache_branch"  # optimum's merged decoders
_KEPT = re.compile(r"(num_)?logits_to_keep")  # of how many last tokens; 0 is all of them

_WRITTEN_AT = re.compile(r"write_ind(ices|ex)")  # of a cache of fixed size, by sequence
_VALID_KEYS = re.compile(r"nonpad_kv_seqlen")  # how many of it are valid

_STACKED_RANK = 5  # of a past that holds (keys and values, batch, heads, length, head_dim)
_MAX_PAST_ELEMENTS = 1 << 28  # of one layer


@dataclass(frozen=True)
class Roles:
    """``tokens`` stays an input, and so do ``segments`` where there are any: of which of two texts
    each token is; and ``earlier`` tokens; ``fixed`` are specialised away."""

    tokens: Port
    # name -> (role, input); roles are MASK, PAIRS, "arange", "zeros", "past", "no" (one false or
    # 0), "count" (how many tokens there are) and "states" (zeros for an encoder's hidden states)
    fixed: dict[str, tuple[str, Port]]
    visible: Array | None = None  # bool (length,), where not all tokens are
    length: int | None = None  # of sequences, where the inputs have a fixed one
    segments: Port | None = None
    earlier: Earlier | None = None

    @property
    def by_token(self) -> list[Port]:
        """The inputs that stay: each has a number for every token."""
        others = (self.segments, self.earlier.port if self.earlier else None)
        return [self.tokens, *(port for port in others if port is not None)]

    def with_segments(self) -> Roles | None:
        """The same with token types as an input; None where there are none."""
        found = [port for role, port in self.fixed.values() if role == "zeros"]
        if len(found) != 1:
            return None
        fixed = {name: given for name, given in self.fixed.items() if name != found[0].name}
        return replace(self, fixed=fixed, segments=found[0])

    def under(self, visible: Array) -> Roles:
        """The same for sequences of which some tokens are hidden; positions count visible ones."""
        return replace(self, visible=visible)

    def values(self, length: int) -> dict[str, Array]:
        """The fixed inputs for one sequence of ``length`` tokens that starts at position 0."""
        visible = np.ones(length, bool) if self.visible is None else self.visible
        return {name: _value(role, port, visible) for name, (role, port) in self.fixed.items()}


def assign_roles(graph: Graph) -> Roles:
    """The role of every graph input, by its name, type and rank.

    Raises UnsupportedOpError naming inputs whose role is unknown, or of a fixed batch, and
    InvalidModelError for a cache of impossible size.
    """
    tokens: list[Port] = []
    fixed: dict[str, tuple[str, Port]] = {}
    unknown: list[Port] = []
    pairs: list[Port] = []
    for port in graph.inputs:
        name = port.name.rsplit(".", 1)[-1] if port.name.startswith("model.") else port.name
        integer = np.issubdtype(_dtype(port), np.integer)
        rank = None if port.dims is None else len(port.dims)
        if _PAST.fullmatch(name) and rank is not None and rank >= 3:
            fixed[port.name] = ("past", port)
        elif rank in (0, 1) and (name == _USE_CACHE or (integer and _is_count(name))):
            fixed[port.name] = ("no", port)
        elif rank in (0, 1) and integer and _VALID_KEYS.fullmatch(name):
            fixed[port.name] = ("count", port)
        elif integer and _TOKENS.fullmatch(name) and rank == 2:
            tokens.append(port)
        elif _MASK.fullmatch(name) and rank == 2:
            fixed[port.name] = (MASK, port)
        elif rank == len(_OF_PAIRS) and _PAIRS.fullmatch(name) and _is_of_pairs(port):
            pairs.append(port)
        elif integer and _POSITIONS.fullmatch(name) and rank in (1, 2):
            fixed[port.name] = ("arange", port)
        elif name == HIDDEN_STATES and rank == 3 and isinstance((port.dims or ())[-1], int):
            fixed[port.name] = ("states", port)
        elif integer and _SEGMENTS.fullmatch(name) and rank == 2:
            fixed[port.name] = ("zeros", port)
        else:
            unknown.append(port)
    if any(role == "past" for role, _ in fixed.values()):
        fixed |= {port.name: (PAIRS, port) for port in pairs}
    else:  # of an encoder nobody knows what it hides
        unknown += pairs
    if not tokens and len(unknown) == 1 and unknown[0].dims is not None:
        # A single integer matrix can only be the tokens, whatever its name.
        port = unknown[0]
        if np.issubdtype(_dtype(port), np.integer) and len(port.dims or ()) == 2:
            tokens.append(unknown.pop())
    where = str(graph.path)
    if unknown or len(tokens) != 1:
        listing = ", ".join(f"{p.name!r} {list(p.dims or ())}" for p in unknown or tokens)
        raise UnsupportedOpError(
            f"inputs whose role is not known: {listing or 'no token input'}; known are input_ids, "
            "attention_mask (batch, sequence), position_ids, token_type_ids and past_key_values.*"
            + "".join(dict.fromkeys(map(_hint, unknown))),
            where=where,
        )
    per_token = (
        p for role, p in fixed.values() if role not in ("past", "no", "count", "states", PAIRS)
    )
    lengths = {_fixed_length(port, where) for port in (tokens[0], *per_token)} - {None}
    if len(lengths) > 1:
        raise UnsupportedOpError(
            f"inputs have fixed lengths of {sorted(filter(None, lengths))}; export the model with "
            "a dynamic one",
            where=where,
        )
    for port in (p for role, p in fixed.values() if role == "past"):
        _check_size(port, where)
    return Roles(tokens[0], fixed, length=next(iter(lengths), None))


_OF_PAIRS = ("batch", "heads", "tokens", "keys")


def _is_of_pairs(port: Port) -> bool:
    """Whether an input of four dimensions has one of any length for tokens, and one for keys."""
    *_, rows, keys = port.dims or ()
    return not isinstance(rows, int) and not isinstance(keys, int)


def _is_count(name: str) -> bool:
    """Whether an input counts something that is 0 here."""
    return any(known.fullmatch(name) for known in (_PAST_LENGTH, _KEPT, _WRITTEN_AT))


def _hint(port: Port) -> str:
    """What to do about an input that often stands in exports, and cannot be compiled."""
    if "embed" in port.name:
        return "; export the model with input_ids, its embedding included"
    if ("mask" in port.name or "bias" in port.name) and len(port.dims or ()) > 2:
        return (
            "; a mask of every pair of positions cannot be compiled: export the model with one "
            "of valid positions (batch, sequence) or without"
        )
    return ""


def pair_values(seen: Array, dtype: np.dtype[Any]) -> Array:
    """What an input of PAIRS holds where a token sees another, ``seen`` bool: true, or as a float
    that is added to scores, 0, and elsewhere the least there is."""
    if dtype.kind != "f":
        return seen.astype(dtype)
    return np.where(seen, 0, np.finfo(dtype).min).astype(dtype)


def _dtype(port: Port) -> np.dtype[np.generic]:
    try:
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(port.elem_type))
    except (KeyError, ValueError, TypeError):
        return np.dtype(np.float32)  # an unknown type is no token type; the role check reports it


def _fixed_length(port: Port, where: str) -> int | None:
    """The length of an input of tokens where it is fixed; the batch must not be, or must be 1."""
    assert port.dims is not None
    *batch, length = port.dims
    if batch and isinstance(batch[0], int) and batch[0] != 1:
        raise UnsupportedOpError(
            f"input {port.name!r} has a fixed batch of {batch[0]}; export it with a dynamic one",
            where=where,
        )
    return length if isinstance(length, int) else None


def _check_size(port: Port, where: str) -> None:
    sizes = [d for d in port.dims or () if isinstance(d, int)]
    if any(d < 0 for d in sizes) or math.prod(max(d, 1) for d in sizes) > _MAX_PAST_ELEMENTS:
        raise InvalidModelError(
            f"input {port.name!r} has impossible dimensions {list(port.dims or ())}", where=where
        )


def _value(role: str, port: Port, visible: Array) -> Array:
    dtype, length = _dtype(port), len(visible)
    dims = port.dims or ()
    if role == "past":
        # Batch 1, no past: every other symbolic dimension is the past length.
        sizes = [d if isinstance(d, int) else 0 for d in dims]
        batch = 1 if len(dims) == _STACKED_RANK else 0
        sizes[batch] = 1 if not isinstance(dims[batch], int) else sizes[batch]
        return np.zeros(sizes, dtype)
    if role == "no":
        return np.zeros([1] * len(dims), dtype)
    if role == "count":
        return np.full([1] * len(dims), length, dtype)
    if role == "states":
        width = dims[2]
        assert isinstance(width, int)
        return np.zeros((1, length, width), dtype)
    if role == PAIRS:
        heads = dims[1] if isinstance(dims[1], int) else 1
        seen = np.tri(length, dtype=bool) & visible
        return np.broadcast_to(pair_values(seen, dtype), (1, heads, length, length))
    shape = (1, length)[2 - len(dims) :]
    if role == "arange":
        # As everyone counts them: a hidden token has the position of the last visible one.
        return np.maximum(np.cumsum(visible) - 1, 0).astype(dtype).reshape(shape)
    if role == MASK:
        return visible.astype(dtype).reshape(shape)
    return np.zeros(shape, dtype)
