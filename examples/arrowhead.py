"""Trains a small network on ArrowHead and exports it, for the command line.

python examples/arrowhead.py            # writes arrowhead.pt2 and arrowhead.npy
gradkern run arrowhead.pt2 arrowhead.npy arrowhead.zarr --method jacobian --reductions importance
gradkern report arrowhead.zarr --model arrowhead.pt2 --source arrowhead.npy --names "class 0,class 1,class 2"
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from demo import arrow_heads, train


def main(arguments: list[str] | None = None) -> tuple[Path, Path]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the two files go")
    parser.add_argument("--quick", action="store_true", help="one epoch: to see that it runs")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    problem = arrow_heads()
    accuracy = train(problem, 1 if args.quick else problem.epochs)
    args.folder.mkdir(parents=True, exist_ok=True)
    model, data = args.folder / "arrowhead.pt2", args.folder / "arrowhead.npy"
    free = ({0: torch.export.Dim("N")},)  # the batch axis: any number of samples
    torch.export.save(torch.export.export(problem.network, (problem.x[:2],), dynamic_shapes=free), model)
    np.save(data, problem.x.numpy())
    print(f"{model}: test accuracy {accuracy:.1%};  {data}: {len(problem.x)} samples {tuple(problem.x.shape[1:])}")
    return model, data


if __name__ == "__main__":
    main()
