"""The same samples in every kind of source.  `MAKERS` are functions of a folder, in which they may write files."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

X = np.random.default_rng(0).standard_normal((23, 2, 5)).astype(np.float32)


class Items(Dataset):
    """Pairs of a sample and a label."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int):
        return X[i], i % 3


def npy(folder):
    np.save(folder / "x.npy", X)
    return str(folder / "x.npy")


def npz(folder):
    np.savez(folder / "x.npz", x=X, y=np.arange(23))
    return f"{folder}/x.npz:x"


def memmap(folder):
    np.save(folder / "m.npy", X)
    return np.load(folder / "m.npy", mmap_mode="r")


def tensors(folder):
    torch.save({"x": torch.tensor(X)}, folder / "x.pt")
    return f"{folder}/x.pt:x"


def safetensors(folder):
    from safetensors.numpy import save_file

    save_file({"x": X}, folder / "x.safetensors")
    return f"{folder}/x.safetensors:x"


def zarr_array(folder):
    import zarr

    array = zarr.create_array(str(folder / "a.zarr"), shape=X.shape, chunks=(4, 2, 5), dtype="float32")
    array[...] = X
    return array


def zarr_path(folder):
    import zarr

    group = zarr.create_group(str(folder / "g.zarr"))
    group.create_array("train/x", data=X)
    return f"{folder}/g.zarr:train/x"


def hdf5(folder):
    import h5py

    with h5py.File(folder / "x.h5", "w") as file:
        file["deep/x"] = X
    return f"{folder}/x.h5:deep/x"


def huggingface(folder):
    import datasets

    return datasets.Dataset.from_dict({"x": list(X), "y": list(range(23))}).with_format("torch")


def huggingface_unformatted(folder):
    import datasets

    features = datasets.Features({"x": datasets.Array2D((2, 5), "float32")})
    return datasets.Dataset.from_dict({"x": X}, features=features)


def parquet(folder):
    import pyarrow as arrow
    import pyarrow.parquet as pq

    for i, part in enumerate((X[:9], X[9:])):
        column = arrow.array(part.tolist(), type=arrow.list_(arrow.list_(arrow.float32())))
        pq.write_table(arrow.table({"x": column}), folder / f"part{i}.parquet", row_group_size=4)
    return str(folder)


def arrow(folder):
    import pyarrow

    return pyarrow.table(
        {"x": X.tolist()}, schema=pyarrow.schema([("x", pyarrow.list_(pyarrow.list_(pyarrow.float32())))])
    )


def frame(folder):
    """A table has one row of features per sample."""
    import pandas

    return pandas.DataFrame(X.reshape(len(X), -1), columns=[f"feature {i}" for i in range(10)])


def csv(folder):
    frame(folder).to_csv(folder / "x.csv", index=False)
    return str(folder / "x.csv")


def parts(folder):
    for i, part in enumerate(np.array_split(X, 3)):
        np.save(folder / f"{i}.npy", part)
    return str(folder / "*.npy")


MAKERS = [
    lambda folder: torch.tensor(X),
    lambda folder: X,
    lambda folder: {"x": X},
    lambda folder: Items(),
    lambda folder: DataLoader(Items(), batch_size=4),
    lambda folder: DataLoader(Items(), batch_size=4, num_workers=1),
    lambda folder: TensorDataset(torch.tensor(X)),
    *(npy, npz, memmap, tensors, safetensors, zarr_array, zarr_path, hdf5, huggingface, parquet),
    *(huggingface_unformatted, parts, arrow),
]
TABLES = [frame, csv]  # samples [10] of the same numbers
