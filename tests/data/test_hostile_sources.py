"""Sources of unknown origin: reading one runs no code in it, and reads no file but it."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest
import torch
import zarr

from gradkern.data import open_source
from gradkern.util import untrusted


class Payload:
    """What runs a command when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def npy(path: Path, payload: Payload) -> str:
    np.save(path / "x.npy", np.array([payload, payload], dtype=object), allow_pickle=True)
    return str(path / "x.npy")


def npz(path: Path, payload: Payload) -> str:
    np.savez(path / "x.npz", x=np.array([payload, payload], dtype=object), allow_pickle=True)
    return f"{path / 'x.npz'}:x"


def pt(path: Path, payload: Payload) -> str:
    torch.save({"x": payload}, path / "x.pt")
    return str(path / "x.pt")


def bare_pickle(path: Path, payload: Payload) -> str:
    (path / "x.pt").write_bytes(pickle.dumps(payload))
    return str(path / "x.pt")


def zarr_v2(path: Path, payload: Payload) -> str:
    (path / "x.zarr" / "x").mkdir(parents=True)
    (path / "x.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    (path / "x.zarr" / "x" / ".zarray").write_text(
        '{"zarr_format": 2, "shape": [2], "chunks": [2], "dtype": "|O", "compressor": null, "fill_value": null, '
        '"order": "C", "filters": [{"id": "pickle"}]}'
    )
    (path / "x.zarr" / "x" / "0").write_bytes(pickle.dumps(np.array([payload, payload], dtype=object)))
    return f"{path / 'x.zarr'}:x"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [npy, npz, pt, bare_pickle, zarr_v2])
def test_reading_a_source_unpickles_nothing(make, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    address = make(tmp_path, Payload(trace))
    with pytest.raises(Exception) as error:
        source = open_source(address)
        source.read(0, source.samples)
    assert not isinstance(error.value, AssertionError)
    assert not trace.exists()


@pytest.mark.parametrize("link", ["external", "virtual"])
def test_an_hdf5_file_leads_to_no_other(link: str, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "secret.h5", "w") as other:
        other["x"] = np.ones((4, 3), dtype=np.float32)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if link == "external":
            file["x"] = h5py.ExternalLink("secret.h5", "x")
        else:
            layout = h5py.VirtualLayout((4, 3), dtype="f4")
            layout[:] = h5py.VirtualSource("secret.h5", "x", shape=(4, 3))
            file.create_virtual_dataset("x", layout)
    with pytest.raises(ValueError, match="another file"):
        open_source(f"{tmp_path / 'a.h5'}:x")


def test_numbers_are_still_read(tmp_path: Path) -> None:
    zarr.save_group(str(tmp_path / "x.zarr"), x=np.ones((4, 3), dtype=np.float32))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones((4, 3), dtype=np.float32)
        file["again"] = h5py.SoftLink("/x")
    for address in (f"{tmp_path / 'x.zarr'}:x", f"{tmp_path / 'a.h5'}:x", f"{tmp_path / 'a.h5'}:again"):
        assert open_source(address).read(0, 4)[0].sum() == 12


@pytest.mark.parametrize("protocol", ["", "file://", "local://"])
def test_links_out_of_a_zarr_folder(protocol: str, tmp_path: Path) -> None:
    zarr.save_array(str(tmp_path / "x.zarr"), np.ones((4, 3), dtype=np.float32))
    os.rename(tmp_path / "x.zarr" / "c", tmp_path / "secret")
    os.symlink(tmp_path / "secret", tmp_path / "x.zarr" / "c")
    with pytest.raises(ValueError, match="a symbolic link that leads out of"):
        open_source(f"{protocol}{tmp_path}/x.zarr")


def sharded(path: Path) -> str:
    zarr.create_array(str(path / "x.zarr"), shape=(8, 4), shards=(8, 4), chunks=(1, 4), dtype="f4")
    about = json.loads((path / "x.zarr" / "zarr.json").read_text())
    about["shape"][0] = about["chunk_grid"]["configuration"]["chunk_shape"][0] = 1 << 40
    (path / "x.zarr" / "zarr.json").write_text(json.dumps(about))
    return str(path / "x.zarr")


def expanded(path: Path) -> str:
    torch.save(torch.zeros(1).expand(8, 1 << 40), path / "x.pt")
    return str(path / "x.pt")


def wide(path: Path) -> str:
    with h5py.File(path / "x.h5", "w") as file:
        file.create_dataset("x", (8, 1 << 40), "f4", chunks=(1, 1 << 20))
    return f"{path / 'x.h5'}:x"


def deflated(path: Path) -> str:
    np.savez_compressed(path / "x.npz", x=np.zeros((8, 1 << 20), dtype=np.float32))
    return f"{path / 'x.npz'}:x"


@pytest.mark.parametrize(
    ("make", "memory"), [(sharded, 1 << 40), (expanded, 1 << 40), (wide, 1 << 40), (deflated, 1 << 24)]
)
def test_a_header_that_asks_for_more_than_the_memory(
    make, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(untrusted, "physical_memory", lambda: memory)
    with pytest.raises(ValueError, match="and this machine has"):
        open_source(make(tmp_path))


def test_a_table_of_many_columns_takes_no_time(tmp_path: Path) -> None:
    """The time does not grow with the square of their number."""
    numbers = pandas.DataFrame(np.arange(60_000, dtype=np.float32).reshape(2, -1))
    begin = time.process_time()
    assert open_source(numbers).read(0, 2)[0].shape == (2, 30_000)
    assert time.process_time() - begin < 5
