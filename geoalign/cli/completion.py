"""``geoalign completion bash|zsh``: a completion script, made from the parsers of all verbs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from geoalign.cli.options import examples

SHELLS = ("bash", "zsh")
_FILES = ("FILE", "FOLDER", "CAMERA", "MODEL", "PATH", "RUN", "PNG")
_OFFER = """\
# Sets `offered` and `files` to what may follow the words given, those behind `geoalign`.
_geoalign_offer() {{
    local word verb= prev=
    offered= files=
    for word in "$@"; do
        case "$verb/$word" in
        {verbs}) verb=${{verb:+$verb }}$word ;;
        esac
        prev=$word
    done
    case "$verb/$prev" in
{values}
    *)
        case "$verb" in
{options}
        esac
        ;;
    esac
}}
"""
_BASH = """\
_geoalign() {
    local offered= files= cur=${COMP_WORDS[COMP_CWORD]} last=$((COMP_CWORD - 1)) found
    if [[ $cur == = ]]; then  # bash ends a word at "="
        cur= last=$COMP_CWORD
    fi
    if [[ ${COMP_WORDS[last]} != = ]]; then
        _geoalign_offer "${COMP_WORDS[@]:1:last}"
    elif [[ ${COMP_WORDS[last - 1]} == --* ]]; then
        _geoalign_offer "${COMP_WORDS[@]:1:last - 1}"
    else
        files=1
    fi
    COMPREPLY=()
    [[ $offered ]] && mapfile -t COMPREPLY < <(compgen -W "$offered" -- "$cur")
    [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
    if [[ $files ]]; then
        mapfile -t found < <(compgen -f -- "$cur")
        (( ${#found[@]} )) && compopt -o filenames && COMPREPLY+=("${found[@]}")
    fi
    return 0
}
complete -F _geoalign geoalign
"""
_ZSH = """\
_geoalign() {
    local offered= files= ret=1
    local -a open closed
    if [[ $PREFIX == --*=* ]]; then
        _geoalign_offer "${(@)words[2,CURRENT-1]}" "${PREFIX%%=*}"
        compset -P '*='
    elif [[ $PREFIX == *=* ]]; then
        files=1
        compset -P '*='
    else
        _geoalign_offer "${(@)words[2,CURRENT-1]}"
    fi
    open=(${(M)${=offered}:#*[=.]}) closed=(${${=offered}:#*[=.]})
    (( $#open )) && compadd -S '' -a open && ret=0
    (( $#closed )) && compadd -a closed && ret=0
    [[ -n $files ]] && _files && ret=0
    return ret
}
# A file _geoalign of $fpath is this function at its first call; sourced, it names the function.
if [[ $funcstack[1] == _geoalign ]]; then _geoalign "$@"; else compdef _geoalign geoalign; fi
"""


def add_parser(subparsers: Any, summary: str) -> None:
    """Add ``completion``."""
    shown = examples(
        "geoalign completion bash > ~/.local/share/bash-completion/completions/geoalign",
        "geoalign completion zsh > ~/.geoalign.zsh          and `source ~/.geoalign.zsh` after compinit in ~/.zshrc",
    )
    parser = subparsers.add_parser(
        "completion",
        description=f"{summary}: prints a script for the shell to read.",
        **shown,
    )
    parser.add_argument("shell", choices=SHELLS, help="which shell the script is for")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(script(args.shell), end="")
    return 0


def script(shell: str) -> str:
    """The script for ``shell``: what may stand where is the same text for both."""
    found = dict(parsers())
    tree = [f'"{" ".join(path[:-1])}/{path[-1]}"' for path in found if path]
    values, options = [], []
    for path, parser in found.items():
        name = " ".join(path)
        words = _words(parser)
        options.append(f'        "{name}") offered="{" ".join(words)}"{_files_if(parser)} ;;')
        for action in parser._actions:
            told = _values(action)
            if told is not None and action.option_strings:
                patterns = "|".join(f'"{name}/{option}"' for option in action.option_strings)
                values.append(f"    {patterns}) {told} ;;")
    offer = _OFFER.format(verbs="|".join(tree), values="\n".join(values), options="\n".join(options))
    return f"#compdef geoalign\n{offer}{_ZSH}" if shell == "zsh" else offer + _BASH


def parsers() -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every parser of the command by its words: (), ("train",), ("data",), ("data", "check"), ..."""
    from geoalign.cli.main import VERBS, parser_of

    root = argparse.ArgumentParser(prog="geoalign", add_help=False)
    top = root.add_subparsers()
    yield (), root
    for verb in VERBS:
        parser = _verbs_of(parser_of(verb))[verb.name]
        top._name_parser_map[verb.name] = parser
        yield (verb.name,), parser
        for name, below in _verbs_of(parser).items():
            yield (verb.name, name), below


def _verbs_of(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    """The parsers of the next word, by that word."""
    return next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def _words(parser: argparse.ArgumentParser) -> list[str]:
    """What may stand at any place behind the verb: options, sub-verbs, choices of arguments, settings."""
    words = [option for action in parser._actions for option in action.option_strings]
    words += _verbs_of(parser)
    for action in parser._actions:
        if not action.option_strings and action.choices and not isinstance(action, argparse._SubParsersAction):
            words += map(str, action.choices)
        if action.dest == "overrides":
            words += settings()
    return words


def settings() -> list[str]:
    """Every setting as it begins on a command line: ``optim.lr=``."""
    from geoalign.config.schema import Config

    def walk(section: Any, prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and hasattr(inner, "model_fields"):
                yield from walk(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}="

    return list(walk(Config, ""))


def _values(action: argparse.Action) -> str | None:
    """Shell assignments for what may follow an option; None for one that takes nothing."""
    if action.nargs == 0:
        return None
    if "--config" in action.option_strings or "--against" in action.option_strings:
        from geoalign.config.source import preset_names

        return f'offered="{" ".join(preset_names())}"; files=1'
    if action.metavar == "CAMERA":
        from geoalign.geometry.presets import PRESETS

        return f'offered="{" ".join(PRESETS)}"; files=1'
    if action.choices:
        return f'offered="{" ".join(map(str, action.choices))}"'
    return "files=1" if _takes_file(action) else ":"


def _takes_file(action: argparse.Action) -> bool:
    named = str(action.metavar or "").upper()
    return action.type is Path or any(part in named for part in _FILES)


def _files_if(parser: argparse.ArgumentParser) -> str:
    """Files are offered where an argument without an option is one."""
    return "; files=1" if any(not a.option_strings and _takes_file(a) for a in parser._actions) else ""
