"""A dataclass becomes the command line.

    @dataclass
    class Args:
        max_steps: int = 1000  # number of optimizer updates          <- the comment is the --help

    def main():
        args = parse(Args, __doc__)      # --max_steps 2000, --max-steps=2000, --compile / --no_compile, --data a b c

    if __name__ == "__main__":
        run(main)                        # bad input: one line on stderr, exit code 2

A field's type says how its flag is read: int, float, str, bool, `T | None`, `list[T]` and `Literal[...]`. A value that
begins with a hyphen is joined to its flag by `=`. Bad values raise ValueError with one clear line; `run` prints it.
"""

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys
import typing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)  # argparse would print its usage first; one line is clearer


def parse(cls, description: str | None = None, argv: list[str] | None = None):
    """Read `argv` (default: the process's arguments) into an instance of the dataclass `cls`.

    Raises ValueError with one line for an unknown flag (with the nearest known one) or a value of the wrong kind.
    """
    source = "".join(map(inspect.getsource, filter(dataclasses.is_dataclass, cls.__mro__[::-1])))
    help_of = dict(re.findall(r"^\s+(\w+)\s*:[^#\n]*?#\s*(.+)$", source, re.MULTILINE))
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser._negative_number_matcher = re.compile("-[^-]")  # one hyphen begins a value: -1e-3, or a text
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        required = default is dataclasses.MISSING
        text = f"{help_of.get(field.name, '')} ({'required' if required else f'default: {default}'})".replace("%", "%%")
        options = _options(typing.get_type_hints(cls)[field.name]) | {"required": required, "help": text.strip()}
        parser.add_argument(f"--{field.name}", **options)
        if not required:  # told last, because the action of a bool repeats a default that it knows in its help
            parser.set_defaults(**{field.name: default})
    return cls(**vars(_parse_known(parser, sys.argv[1:] if argv is None else argv)))


def _options(kind) -> dict:
    """What argparse must know to read a value of this type."""
    arguments = typing.get_args(kind)
    if type(None) in arguments:  # T | None
        return _options(next(a for a in arguments if a is not type(None)))
    if typing.get_origin(kind) is list:
        return _options(arguments[0]) | {"nargs": "+"}
    if typing.get_origin(kind) is typing.Literal:
        return {"type": type(arguments[0]), "choices": list(arguments)}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    return {"type": kind, "metavar": kind.__name__.upper()}


def _parse_known(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse with hyphens and underscores alike in flag names (`--max-steps` = `--max_steps`, `--no_x` = `--no-x`)."""
    known = {flag.replace("-", "_"): flag for flag in parser._option_string_actions}
    words = []
    for word in argv:
        name, equals, value = word.partition("=")
        flag = known.get(name.replace("-", "_")) if name.startswith("--") else name
        if flag is None:
            near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
            raise ValueError(f"unknown flag {name}; " + (f"did you mean --{near[0][2:]}?" if near else "see --help"))
        words.append(flag + equals + value)
    args, rest = parser.parse_known_args(words)
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; see --help")
    return args


def run(main) -> None:
    """Call `main`; bad input (ValueError, OSError) and Ctrl-C become one line on stderr and exit code 2.

    Set GLASSBOX_TRACEBACK=1 to see where it was raised. Other exceptions are bugs and keep their traceback.
    """
    try:
        code = main()
        sys.stdout.flush()  # a reader that went away is noticed here, not after the exit code is decided
        sys.exit(code)
    except BrokenPipeError:  # the reader of our output went away (`| head`): no fault of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if os.environ.get("GLASSBOX_TRACEBACK"):
            raise
        print("error:", " ".join(str(error).split()) or "interrupted", file=sys.stderr)  # Ctrl-C alone has no message
        sys.exit(2)
