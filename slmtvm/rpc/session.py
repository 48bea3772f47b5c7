"""A session of TVM's client with one RPC server: its functions, by name, and what is no answer."""

from __future__ import annotations

from typing import Any

from slmtvm.errors import RpcError


class Session:
    """Calls the functions of a server; ``where`` names it in errors. Not for several threads at a
    time."""

    def __init__(self, remote: Any, where: str) -> None:
        """remote: a ``tvm.rpc.RPCSession``."""
        self.where = where
        self._remote: Any = remote
        self._functions: dict[str, Any] = {}

    def has(self, name: str) -> bool:
        """Whether the server has a function of this name; RpcError where it does not answer."""
        if name not in self._functions:
            try:
                self._functions[name] = self._remote.get_function(name)
            except AttributeError:  # all else is a server that is lost
                return False
            except Exception as error:
                raise RpcError(last_line(error), where=self.where) from error
        return True

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function gives; RpcError with the server's words, or where it is lost."""
        if self._remote is None:
            raise RpcError("was given back already", where=self.where)
        if not self.has(name):
            raise RpcError(f"has no function {name}", where=self.where)
        try:
            return self._functions[name](*arguments)
        except Exception as error:  # TVM's errors have no common class
            raise RpcError(last_line(error), where=self.where) from error

    def load(self, library: str, *functions: str) -> None:
        """Have the server load a library that was uploaded, whose ``functions`` can then be called.

        Raises RpcError where it cannot.
        """
        try:
            module = self._remote.load_module(library)
            self._functions |= {name: module[name] for name in functions}
        except Exception as error:
            raise RpcError(last_line(error), where=self.where) from error

    def close(self) -> None:
        """Give the server back."""
        self._remote = None
        self._functions = {}


def last_line(error: Exception) -> str:
    """Of TVM's errors, which hold a traceback in C++, what the server said."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
