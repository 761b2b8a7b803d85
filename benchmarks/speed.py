"""`iared2 bench` with one more baseline, token merging at the same MACs (merging.py). Takes the same arguments.

python benchmarks/speed.py --json docs/figures/speed-cpu-fp32.json
"""

from __future__ import annotations

import argparse
import sys

from merging import merging, merging_gmacs, r_for

from iared2 import arguments
from iared2.errors import InputError
from iared2.evaluate.speed import command


def more(model, workload):
    """Token merging with the r that matches our MACs."""
    r = r_for(model, workload.gmacs)
    return {f"merging, r = {r}": (lambda images: merging(model, images, r), merging_gmacs(model, r))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    arguments.bench(parser)
    try:
        sys.exit(command.run(parser.parse_args(), more))
    except InputError as error:
        sys.exit(f"error: {error}")
