"""`python -m bench <command>`: each command is a module here with `add_arguments(parser)` and `main(args) -> int`."""

import argparse
import gc
import importlib
import os
import sys
from typing import NoReturn

from .installation import spelled

# PyTorch's profiler, which counts a CPU's memory, else prints when it starts and stops. torch reads this at import.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

COMMANDS = {
    "kernels": "time each kernel against its floor: bytes and FLOPs counted, roofs measured in the same run",
    "layer": "time one DoRA linear layer against the frozen base, PEFT's LoRA and PEFT's DoRA",
    "block": "time a gated MLP, and q, k and v, alone: ours together and layer by layer, the frozen base and PEFT's",
    "experts": "time a layer's fused experts alone, beside the frozen base and PEFT's expert LoRA",
    "model": "time a training step of a whole model with random weights",
    "all": "kernels, layer, block, experts and model of one preset, within a number of minutes",
    "roofs": "measure what a GPU reaches: copies, L2, products of each format, the shortest launch",
    "day": "all that is measured on a GPU at hand, in slices of some minutes; --rehearse runs it on a CPU",
    "step": "train the embedded model, ours and PEFT's on the same data and seed: loss curves",
    "recovery": "train the embedded model in each format, merge-aware and not: what merging back keeps of the tune",
    "questions": "time the choices that the design rests on, each against its alternative",
    "predict": "the tables of kernels, layer, block, model, experts and a mixture, for a GPU that is not here",
    "report": "tables and plots from committed results",
    "offline": "compile every kernel for every GPU generation, without a GPU, and hold it to its limits",
    "tune": "propose launch configurations: timed on a GPU, else ranked by static figures",
}
EXTRA = {"matplotlib", "peft", "tqdm"}
"""What the extra `bench` brings."""


class Parser(argparse.ArgumentParser):
    """A mistake is said without the usage, in which it would drown."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: list[str]) -> int:
    listing = "\n".join(f"  {name:<10}{summary}" for name, summary in COMMANDS.items())
    top = Parser(
        prog=spelled(),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"commands:\n{listing}\n\n`{spelled()} <command> --help` explains one.",
    )
    top.add_argument("command", choices=COMMANDS, metavar="command")
    if not argv:
        top.error(f"it needs a command: {', '.join(COMMANDS)}; --help explains them")
    command = top.parse_args(argv[:1]).command
    # Imported only when asked for: a command's libraries need not be installed for the others.
    module = importlib.import_module(f".{command}", __package__)
    parser = Parser(
        prog=f"{spelled()} {command}",
        allow_abbrev=False,
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv[1:])
    gc.freeze()  # garbage is collected between contestants: what was imported need not be looked through each time
    return module.main(args)


def command() -> None:
    """`dora-bench`, and `python -m bench`: exits with the command's status; 130, as shells do, after Ctrl-C."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if error.name not in EXTRA:
            raise
        sys.exit(f'error: {spelled()} needs {error.name}: pip install "dora-kernels[bench]"')


if __name__ == "__main__":
    command()
