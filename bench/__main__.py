"""Benchmarks of pyreg.  `python -m bench COMMAND --help` says more; `--quick` is a first look in a minute or two."""

import argparse
import importlib
import sys
from pathlib import Path

# Python puts the checkout in front, whose ./pyreg is not compiled; behind the installed one it does no harm.
ROOT = Path(__file__).resolve().parents[1]
sys.path = [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "bench")] + [str(ROOT)]

COMMANDS = {
    "compare": "ops against NumPy, PyTorch, Flax and oneDNN",
    "train_step": "a training step with the framework's dropout, with pyreg's, and without; --framework NAME",
    "imports": "what importing pyreg does to the speed of PyTorch's own operations",
    "accuracy": "how right batch statistics are, beside PyTorch's and Flax's",
    "roofline": "bandwidth of each cache level, and how far each kernel is from it",
    "scaling": "one op over threads and sizes; with a busy neighbour; where threads pay",
    "plan": "what the figures of this machine predict for larger ones",
    "pictures": "draw the pictures of the manual from the figures of report",
    "report": "run all of these and write the figures into the documentation",
}


FRAMEWORKS = {  # of train_step, each with the end of its module's name
    "flax": "",
    "torch": "_torch",
    **dict.fromkeys(("linen", "equinox", "haiku", "keras", "others"), "_others"),
}


def module_of(command, arguments):
    """A training step is in a module of its own for some frameworks, so that no other framework is needed."""
    if command != "train_step":
        return command
    first = argparse.ArgumentParser(f"python -m bench {command}", add_help=False, allow_abbrev=False)
    first.add_argument("--framework", choices=FRAMEWORKS, default="flax")
    return command + FRAMEWORKS[first.parse_known_args(arguments)[0].framework]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name not in arguments[:1]:
            continue  # its imports take seconds, or fail
        try:
            module = importlib.import_module(f"bench.{module_of(name, arguments)}")
        except ImportError as missing:
            raise SystemExit(f"{name} cannot run: {missing}.  ./run bench {name} installs what it needs") from None
        command.description = module.__doc__
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    if not args.command:
        parser.print_help()
        return
    args.run(args)


if __name__ == "__main__":
    main()
