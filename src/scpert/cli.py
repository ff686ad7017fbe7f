"""Command line: ``scpert quickstart`` and ``scpert benchmark``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__

__all__ = ["main"]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scpert", description="Genetic-perturbation screens in single cells.")
    parser.add_argument("--version", action="version", version=f"scpert {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    quick = commands.add_parser(
        "quickstart",
        help="split, train, predict, compare with baselines and the noise ceiling, infer the network",
        description="Without DATA: on an embedded simulated screen. Writes results.h5ad, figures and report.html.",
    )
    quick.add_argument("data", nargs="?", metavar="DATA.h5ad", help="a screen; none: simulated data")
    quick.add_argument("--perturbation-key", default="perturbation", metavar="K", help="column of the labels")
    quick.add_argument("--control", default="control", metavar="C", help="label of the control cells")
    quick.add_argument("--library-size-key", metavar="K", help="column with the full library size (small panels)")
    quick.add_argument("--model", default="gpovae", help="name of a model (default: gpovae)")
    quick.add_argument("--split", default="cells", choices=("cells", "perturbations", "combinations"))
    quick.add_argument("--max-epochs", type=_positive, metavar="N", help="passes over the training cells")
    quick.add_argument("--seed", type=int, default=0, metavar="S")
    quick.add_argument("--out", default="scpert-quickstart", metavar="DIR", help="folder for the results")

    bench = commands.add_parser("benchmark", help="compare models on screens, resumable", add_help=False)
    bench.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors of scpert are printed as one sentence, with exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    from .errors import ScpertError

    try:
        if argv[:1] == ["benchmark"]:
            from .benchmark import main as benchmark

            return int(benchmark(argv[1:]) or 0)
        arguments = _parser().parse_args(argv)
        from ._quickstart import quickstart

        quickstart(
            arguments.data,
            perturbation_key=arguments.perturbation_key,
            control=arguments.control,
            library_size_key=arguments.library_size_key,
            model=arguments.model,
            split=arguments.split,
            max_epochs=arguments.max_epochs,
            out=arguments.out,
            random_state=arguments.seed,
        )
    except ScpertError as error:
        # a step that failed has left its line of progress open
        print(f"\nscpert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nscpert: interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
