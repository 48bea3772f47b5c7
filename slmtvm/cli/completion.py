"""Print a script that completes commands in a shell.

Written from the parser itself: the script needs neither Python nor slmtvm to complete a word.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

_FIRST_SENTENCE = re.compile(r"[^(:;]*")


@dataclass(frozen=True)
class _Option:
    names: tuple[str, ...]
    help: str
    takes_value: bool
    values: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell", choices=("bash", "zsh", "fish"),
        help='the shell; bash and zsh: eval "$(slmtvm completion bash)" in its start-up file, '
        "fish: slmtvm completion fish > ~/.config/fish/completions/slmtvm.fish",
    )  # fmt: skip


def run(options: argparse.Namespace) -> int:
    print(completion_script(options.shell, options.parser))
    return 0


def completion_script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for ``shell``, "bash", "zsh" or "fish", of the command that ``parser`` reads."""
    (verbs,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    summaries = {a.dest: a.help or "" for a in verbs._choices_actions}
    options = {"": tuple(_options(parser))}
    options |= {name: tuple(_options(verb)) for name, verb in verbs.choices.items()}
    positional = {name: tuple(_positional(verb)) for name, verb in verbs.choices.items()}
    if shell == "fish":
        return "\n".join(_fish(summaries, options, positional))
    start = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"
    return (start if shell == "zsh" else "") + _bash(options, positional)


def _options(parser: argparse.ArgumentParser) -> Iterator[_Option]:
    for action in parser._actions:
        if action.option_strings:
            text = action.help if action.help and action.help != argparse.SUPPRESS else ""
            yield _Option(
                tuple(action.option_strings),
                (_FIRST_SENTENCE.match(text) or [""])[0].strip(),
                action.nargs != 0,
                _values(action),
            )


def _positional(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if not action.option_strings:
            yield from _values(action)


def _values(action: argparse.Action) -> tuple[str, ...]:
    if action.dest == "target":
        from slmtvm.target import known_targets

        return ("host", *known_targets(), *known_targets(cuda=True))
    return tuple(str(choice) for choice in action.choices or ())


def _bash(options: dict[str, tuple[_Option, ...]], positional: dict[str, tuple[str, ...]]) -> str:
    verbs = [verb for verb in options if verb]
    values = [
        f'    "{verb} {name}") words="{" ".join(option.values)}" ;;'
        for verb, some in options.items()
        for option in some
        for name in option.names
        if option.values
    ]
    # A value of any kind, such as a file: the shell's own completion.
    others = [
        f'    "{verb} {name}") return ;;'
        for verb, some in options.items()
        for option in some
        for name in option.names
        if option.takes_value and not option.values
    ]
    flags = [
        f'        "{verb}") words="{" ".join(n for o in some for n in o.names)}" ;;'
        for verb, some in options.items()
    ]
    plain = {"": tuple(verbs), **positional}
    names = [f'        "{verb}") words="{" ".join(some)}" ;;' for verb, some in plain.items()]
    return "\n".join(
        [
            "_slmtvm() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
            '  local verb="" word words=""',
            "  COMPREPLY=()",
            '  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
            f'    case "$word" in {"|".join(verbs)}) verb="$word"; break ;; esac',
            "  done",
            '  case "$verb $previous" in',
            *values,
            *others,
            "    *)",
            '      case "$current" in',
            '      -*) case "$verb" in',
            *flags,
            "        esac ;;",
            '      *) case "$verb" in',
            *names,
            "        esac ;;",
            "      esac ;;",
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            "complete -o default -F _slmtvm slmtvm",
        ]
    )


def _fish(
    summaries: dict[str, str],
    options: dict[str, tuple[_Option, ...]],
    positional: dict[str, tuple[str, ...]],
) -> Iterator[str]:
    for verb, summary in summaries.items():
        yield f"complete -c slmtvm -n __fish_use_subcommand -a {verb} -d {_quoted(summary)}"
    for verb, some in options.items():
        when = f"'__fish_seen_subcommand_from {verb}'" if verb else "__fish_use_subcommand"
        for option in some:
            names = " ".join(
                f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names
            )
            value = " -r" if option.takes_value else ""
            value += f" -a {_quoted(' '.join(option.values))}" if option.values else ""
            yield f"complete -c slmtvm -n {when} {names}{value} -d {_quoted(option.help)}"
        if words := positional.get(verb):
            yield f"complete -c slmtvm -n {when} -a {_quoted(' '.join(words))}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
