"""What the command lines share: options from dataclasses, recipes by name, and errors of one line."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence

import jsonargparse

from fastssl.errors import FastsslError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)


def run(main: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> None:
    """Call `main` and end the process with its exit code; an error that the user can mend is one line and code 2."""
    try:
        code = main(list(sys.argv[1:] if arguments is None else arguments))
    except FastsslError as error:
        code = _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as error:  # a full disk, a folder that went away
        code = _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def new_parser(description: str, prog: str | None = None) -> jsonargparse.ArgumentParser:
    """A parser that raises instead of exiting and wants every option spelt out."""
    return jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)


def parse(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> jsonargparse.Namespace:
    """Parse; options may be spelt with - or _.

    Raises:
        FastsslError: in one line, with the nearest option for a misspelt one.
    """
    arguments = [_underscored(argument) for argument in arguments]
    try:
        return parser.parse_args(arguments)
    except jsonargparse.ArgumentError as error:
        raise FastsslError(_one_line(str(error), _options(parser, arguments))) from None
    except UnicodeDecodeError as error:
        raise FastsslError(f"a recipe must be UTF-8 text ({error.reason} at byte {error.start})") from None


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _underscored(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _options(parser: jsonargparse.ArgumentParser, arguments: list[str]) -> list[str]:
    """All long options of the parser and of the sub-command that was called."""
    options = [o for action in parser._actions for o in action.option_strings]
    for action in parser._actions:
        choices = action.choices if isinstance(action.choices, dict) else {}
        for name in arguments[:1]:
            if name in choices:
                options += _options(choices[name], [])
    return [o for o in options if o.startswith("--")]


def _one_line(message: str, options: list[str]) -> str:
    """jsonargparse's messages, shorter, with what would be right."""
    message = " ".join(message.split())
    if match := re.search(r"""unrecognized arguments: (\S+)|does not accept option '([^']+)'""", message):
        wrong = match[1] or f"--{match[2]}"
        close = difflib.get_close_matches(wrong.split("=")[0], options, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
        return f"unknown option or key {wrong}: {hint}"
    if match := re.match(r"""Parser key "([^"]+)": (.*)""", message):
        option, reason = match[1], re.sub(r"<class '(\w+)'>", r"\1", match[2]).replace("typing.", "")
        if union := re.search(r"Subtypes: \[(.*)\] Errors: .* Given value: (.*)", reason):
            reason = f"Expected {union[1].replace(', NoneType', ' or null')}. Got value: {union[2]}"
        return f"{option}: {reason}"
    return message
