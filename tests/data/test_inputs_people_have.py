"""Inputs that people have: each is read, or refused in one line that says what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from gradkern.cli.main import main
from gradkern.cli.models import load_model
from gradkern.data import open_source, run

X = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)


def frame():
    import pandas

    return pandas.DataFrame(X, columns=list("abcd"))


class Exporter:
    """An array of another library, by DLPack alone."""

    def __init__(self) -> None:
        self.tensor, self.shape = torch.from_numpy(X), X.shape

    def __dlpack__(self, **options):
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class Arrayed:
    """An array of another library, by ``__array__`` alone."""

    def __init__(self, x: np.ndarray = X) -> None:
        self.x, self.shape = x, x.shape

    def __getitem__(self, rows):
        return Arrayed(self.x[rows])

    def __array__(self, dtype=None, copy=None):
        return self.x


def csv(folder: Path, header: bool, name: str = "x.csv") -> str:
    frame().to_csv(folder / name, index=False, header=header, sep="\t" if name.endswith("tsv") else ",")
    return str(folder / name)


def parts(folder: Path) -> str:
    for i, part in enumerate(np.split(X, [2, 3, 7])):
        np.save(folder / f"part{i}.npy", part)
    return f"{folder}/part*.npy"


def arrow(folder: Path):
    import pyarrow

    return pyarrow.Table.from_pandas(frame())


def listed():
    import pandas

    return pandas.DataFrame({"x": list(X), "label": 1})


def arrow_lists():
    import pyarrow

    return pyarrow.table({"x": X.tolist(), "name": ["a"] * len(X)}).select(["x"])


def tensors():
    import pyarrow

    blocks = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(X.reshape(9, 2, 2))
    return pyarrow.table({"x": blocks})


def nullable(dtype: str):
    """A column whose samples 0 and 5 are missing, beside others."""
    table = frame().assign(e=[True] * 9).astype({"e": dtype})
    table.loc[[0, 5], "e"] = None
    return table


def files_of_other_types(folder: Path) -> str:
    whole = frame().mul(10).round()
    whole[:4].astype(int).to_csv(folder / "a0.csv", index=False)
    whole[4:].to_csv(folder / "a1.csv", index=False)
    return f"{folder}/a*.csv"


def parquets(folder: Path, first, second) -> str:
    for i, part in enumerate((first, second)):
        part.to_parquet(folder / f"{i}.parquet")
    return str(folder)


def transformed():
    import datasets

    return datasets.Dataset.from_dict({"x": (X / 2).tolist()}).with_transform(
        lambda batch: {"x": [2 * torch.tensor(row) for row in batch["x"]]}
    )


def in_folder(folder: Path, *names: str) -> str:
    for name, part in zip(names, np.array_split(X, len(names)), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / name, part)
    return str(folder)


def numbered():
    import pandas

    return pandas.DataFrame(X)


def wide(folder: Path) -> str:
    frame().to_parquet(folder / "x.parquet")
    return f"{folder}/x.parquet"


def written(folder: Path, table, **options) -> str:
    table.to_csv(folder / "x.csv", **{"index": False, **options})
    return str(folder / "x.csv")


READ = {
    "frame": lambda folder: frame(),
    "arrow": arrow,
    "csv": lambda folder: csv(folder, True),
    "csv without header": lambda folder: csv(folder, False),
    "tsv": lambda folder: csv(folder, True, "x.tsv"),
    "parts": parts,
    "lists": lambda folder: X.tolist(),
    "dlpack": lambda folder: Exporter(),
    "array": lambda folder: Arrayed(),
    "masked, nothing hidden": lambda folder: np.ma.array(X),
    "one array in a list": lambda folder: [X],
    "a column of lists": lambda folder: listed(),
    "a column of lists of Python's": lambda folder: listed().assign(x=[row.tolist() for row in X], id=range(len(X))),
    "an Arrow column of lists": lambda folder: arrow_lists(),
    "wide parquet": lambda folder: wide(folder),
    "wide parquet, named": lambda folder: wide(folder) + ":a,b,c,d",
    "lists by name": lambda folder: {"x": X.tolist()},
    "csv with pandas's own names": lambda folder: written(folder, numbered()),
    "Arrow tensors": lambda folder: tensors(),
    "one glob for one letter": lambda folder: parts(folder).replace("*", "?"),
    "a name with brackets": lambda folder: f"{in_folder(folder, 'x[1].npy')}/x[1].npy",
    "a folder with brackets": lambda folder: f"{in_folder(folder, 'a [b]/0.npy', 'a [b]/1.npy')}/a [b]/*.npy",
    "any depth": lambda folder: f"{in_folder(folder, 'a/0.npy', 'b/c/0.npy')}/**/*.npy",
    "whatever is there": lambda folder: f"{in_folder(folder, 'a1²2.npy', 'a1²3.npy')}/*",
    "nested tensor": lambda folder: torch.nested.nested_tensor(list(torch.tensor(X)), layout=torch.jagged),
    "a transform": lambda folder: transformed(),
    "an index of pandas's": lambda folder: parquets(folder, frame()[:4].set_axis(np.linspace(0, 1, 4)), frame()[4:]),
    "files of other types": lambda folder: parquets(folder, frame()[:4], frame()[4:].astype(float)[list("dbca")]),
    "csv of some columns": lambda folder: written(folder, frame(), index=True) + ":a,b,c,d",
}


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_source_that_people_have_is_read(make, tmp_path) -> None:
    source = open_source(make(tmp_path), dtype=torch.float32)
    assert source.samples == 9
    for start, stop in ((0, 9), (1, 8), (2, 3), (6, 9)):
        (rows,) = source.read(start, stop)
        if make is READ["Arrow tensors"]:
            assert rows.shape[1:] == (2, 2)
            rows = rows.flatten(1)
        np.testing.assert_allclose(rows.numpy(), X[start:stop], rtol=1e-6)


def sparse(folder: Path):
    import scipy.sparse

    return scipy.sparse.csr_array(X)


def text(folder: Path):
    return frame().assign(name="sample")


def lines(folder: Path, content: str) -> str:
    (folder / "x.csv").write_text(content)
    return str(folder / "x.csv")


def objects(folder: Path) -> str:
    np.save(folder / "x.npy", np.array([np.ones(2), np.ones(3)], dtype=object), allow_pickle=True)
    return str(folder / "x.npy")


def two_tables(folder: Path, names: list[str]) -> str:
    frame()[:5].to_csv(folder / "a1.csv", index=False)
    frame()[5:].set_axis(names, axis=1).to_csv(folder / "a2.csv", index=False)
    return f"{folder}/a*.csv"


def items(*given):
    """A Dataset."""
    methods = {"__len__": lambda _: len(given), "__getitem__": lambda _, i: given[i]}
    return type("Given", (Dataset,), methods)()


def splits():
    import datasets

    return datasets.DatasetDict({"train": datasets.Dataset.from_dict({"x": [1.0]})})


def damaged(folder: Path) -> str:
    (folder / "x.npz").write_bytes(b"PK")
    return str(folder / "x.npz")


def masked_items():
    return items((X[0], 0), (np.ma.array(X[1], mask=X[1] > 0), 1))


REFUSED = {
    "a shorter line": (lambda folder: lines(folder, "a,b\n1,2\n1\n1,2\n1\n"), "sample 1 in line 3 has 1, sample 3"),
    "a gap in a column": (lambda folder: lines(folder, "a\n1.5\n\n2.5\n"), "sample 1 in line 3 has 0"),
    "separators at the ends": (lambda folder: lines(folder, "a,b,\n1,2,\n3,4,\n"), "no number in any row"),
    "one text": (lambda folder: lines(folder, "a,b\n1,2\n1,x\n"), r"'b' holds .*'x' in sample 1"),
    "names alone": (lambda folder: lines(folder, "a,b\n"), "got no samples"),
    "damaged": (damaged, "x.npz cannot be read"),
    "a missing list": (lambda folder: listed()[["x"]].assign(x=[X[0], None, *X[2:]]), "sample 1 could not be read"),
    "a masked sample": (lambda folder: masked_items(), "sample 1 is a masked array"),
    "a list of numbers": (lambda folder: items(*X.tolist()), r"sample 0 is a list of 4.*np\.array"),
    "splits": (lambda folder: splits(), r"holds the datasets \['train'\]"),
    "other columns in parquet": (
        lambda folder: parquets(folder, frame(), frame().rename(columns={"d": "e"})),
        "other columns",
    ),
    "other kinds in parquet": (lambda folder: parquets(folder, frame(), frame().astype({"d": str})), "other types"),
    "no path": (lambda folder: "", "empty path"),
    "no such field": (
        lambda folder: open_source(items((X[0], 0), (X[1], 1)), 5),
        "columns=5, but a sample is 2 fields",
    ),
    "samples in a list": (lambda folder: list(X), r"np\.stack\(arrays\), for inputs tuple\(arrays\)"),
    "masked": (lambda folder: np.ma.array(X, mask=X > 0), r"array\.filled\(value\)"),
    "sparse": (sparse, r"x\.toarray\(\)"),
    "sparse tensor": (lambda folder: torch.from_numpy(X).to_sparse(), r"x\.to_dense\(\)"),
    "text": (text, r"the column 'name' holds .*columns="),
    "two columns of one name": (lambda folder: frame().set_axis(list("abca"), axis=1), "several columns named 'a'"),
    "a saved index": (lambda folder: written(folder, frame(), index=True), "index=False"),
    "years": (lambda folder: lines(folder, "2019,2020,2021\n1,5,2\n"), "may hold names .* or a sample"),
    "two numbers": (lambda folder: lines(folder, "0,1\n5,2\n"), "may hold names .* or a sample"),
    "semicolons": (lambda folder: written(folder, frame(), sep=";"), "separated by ';'"),
    "a longer line": (lambda folder: lines(folder, "a,b\n1,2\n1,2,3\n"), "cannot be read as a table"),
    "nothing": (lambda folder: lines(folder, ""), "cannot be read as a table"),
    "objects": (lambda folder: objects(folder), "not an array of numbers that can be read"),
    "no such column": (lambda folder: wide(folder) + ":z", r"got the column 'z', but .* has \['a', 'b', 'c', 'd'\]"),
    "other columns": (lambda folder: two_tables(folder, list("abce")), "other columns"),
    "a folder": (lambda folder: str(folder), r"is a folder.*\*\.npy"),
    "ragged lists": (lambda folder: [[1.0, 2.0], [1.0]], "different shapes: sample 0 has"),
    "no parts": (lambda folder: f"{folder}/no*.npy", "there are no files at"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_source_that_cannot_be_read_is_refused_with_advice(make, words: str, tmp_path) -> None:
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        open_source(make(tmp_path)).read(0, 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "Float32"])
def test_every_chunk_of_a_table_has_its_dtype(dtype, tmp_path) -> None:
    for source in (open_source(nullable(dtype)), open_source(files_of_other_types(tmp_path))):
        assert len({source.read(i, i + 1)[0].dtype for i in range(9)}) == 1
    assert open_source(nullable(dtype)).read(4, 7)[0].isnan().any(1).tolist() == [False, True, False]


class Reversed(SequentialSampler):
    def __iter__(self):
        return reversed(range(9))


@pytest.mark.parametrize("sampler", [Reversed(X), SequentialSampler(range(4))])
def test_a_loader_whose_rows_are_not_the_samples_of_its_dataset(sampler) -> None:
    with pytest.raises(ValueError, match=r"in order|has 4 samples and its dataset 9, expected as many"):
        open_source(DataLoader(items(*X), sampler=sampler))


@pytest.mark.parametrize("first", ["0.5,0.5,1.0", "0.5,,1.0", "0,0,1", "1,2,4", "3,2,1", "1e3,nan,2"])
def test_the_first_sample_of_a_csv_without_names_is_not_taken_for_names(first, tmp_path) -> None:
    source = open_source(lines(tmp_path, f"{first}\n1,2,3\n7,1,2\n"), dtype=torch.float64)
    expected = [float(cell or "nan") for cell in first.split(",")]
    assert source.samples == 3
    np.testing.assert_array_equal(source.read(0, 3)[0], [expected, [1, 2, 3], [7, 1, 2]])


def test_tables_of_columns_in_another_order_and_files_with_numbers(tmp_path) -> None:
    frame()[:5].to_csv(tmp_path / "a1.csv", index=False)
    frame()[5:][list("dbca")].to_csv(tmp_path / "a2.csv", index=False)
    np.testing.assert_allclose(open_source(f"{tmp_path}/a*.csv").read(0, 9)[0], X, rtol=1e-6)
    for i in range(9):
        np.save(tmp_path / f"{i + 5}.npy", X[i : i + 1])
    np.testing.assert_array_equal(open_source(f"{tmp_path}/*.npy").read(0, 9)[0], X)  # 5, …, 9, 10, …


def test_a_tuple_of_lists_is_a_tuple_of_inputs() -> None:
    first, second = open_source(([[1.0, 2.0], [3.0, 4.0]], [[5.0], [6.0]])).read(0, 2)
    assert (first.tolist(), second.tolist()) == ([[1, 2], [3, 4]], [[5], [6]])


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize(
    ("dtype", "words"), [(np.int16, "only floating numbers have gradients"), (np.float64, "the model is float32")]
)
def test_a_dtype_that_the_model_cannot_take_names_the_way_out(dtype, words, engine, tmp_path) -> None:
    with pytest.raises(TypeError, match=rf"{words}.*input_dtype=torch\.float32 \(--input-dtype float32\)"):
        run(nn.Linear(4, 2).eval(), X.astype(dtype), tmp_path / "a.zarr", engine=engine)


def test_columns_of_a_table(tmp_path) -> None:
    (rows,) = open_source(f"{csv(tmp_path, True)}:d,a").read(0, 9)
    np.testing.assert_allclose(rows.numpy(), X[:, [3, 0]], rtol=1e-6)


def test_tilde_in_a_source_is_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", X)
    assert open_source("~/x.npy").samples == 9


def test_a_cast_keeps_imaginary_parts() -> None:
    with pytest.raises(TypeError, match="complex, and a cast would drop the imaginary parts"):
        open_source(X.astype(np.complex64), dtype=torch.float32).read(0, 2)


# ---------------------------------------------------------------------------------------------------------------
# Weights, and a plan


def with_norm() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def random() -> nn.Module:
    return nn.Linear(4, 3)


HERE = "tests.data.test_inputs_people_have"


@pytest.mark.parametrize("wrap", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "net.module."])
def test_weights_are_read_from_every_kind_of_checkpoint(prefix: str, wrap: str | None, tmp_path) -> None:
    wanted = {name: value + 1 for name, value in with_norm().state_dict().items()}
    content = {prefix + name: value for name, value in wanted.items()}
    torch.save({wrap: content, "epoch": 3} if wrap else content, tmp_path / "w.pt")
    loaded = load_model(f"{HERE}:with_norm", str(tmp_path / "w.pt")).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("content", [{"a": torch.ones(1)}, {"state_dict": 3}, [1], {"x": Path("a")}])
def test_file_that_is_no_checkpoint_is_refused(content, tmp_path) -> None:
    torch.save(content, tmp_path / "w.pt")
    (tmp_path / "w.safetensors").write_bytes(b"x")
    for name in ("w.pt", "w.safetensors"):
        with pytest.raises(ValueError, match="--weights: ") as caught:
            load_model(f"{HERE}:with_norm", str(tmp_path / name))
        assert "\n" not in str(caught.value)


NETS = """
import functools
import torch
from torch import nn
from parts_of_nets import inner

net = nn.Linear(4, 3)
imported = inner

@functools.cache
def cached(): return nn.Linear(4, 3)

def hidden():
    frequencies, shift = torch.randn(2), torch.randn(3)
    model = seeded()
    model.register_buffer("frequencies", frequencies, persistent=False)
    model.shift = shift
    return model

def seeded():
    with torch.random.fork_rng():  # what is drawn elsewhere stays random
        torch.manual_seed(1)
        return nn.Linear(4, 3)

def loads():
    model = nn.Linear(4, 3)
    model.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.ones(3)})
    return model

def head_is_random(): return nn.Sequential(loads(), nn.Linear(3, 2))

constant = seeded()
def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    (tmp_path / "nets_of_test.py").write_text(NETS)
    (tmp_path / "parts_of_nets.py").write_text("from torch import nn\ninner = nn.Linear(4, 3)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("nets_of_test", "parts_of_nets"):
        sys.modules.pop(name, None)


def test_random_weights_are_refused(nets) -> None:
    """Also those that were made when a module was imported, that are kept, that are a part, that no state_dict has."""
    random = {
        "net": "bias, weight", "imported": "bias, weight", "cached": "bias, weight",
        "hidden": "frequencies, shift", "head_is_random": "1.bias, 1.weight", "tied": "0.bias, 0.weight, 1.bias, …",
    }  # fmt: skip
    for name, named in random.items():
        with pytest.raises(ValueError, match=rf"so these are random \({named}\)\. Give --weights"):
            load_model(f"nets_of_test:{name}")
    for name in ("seeded", "loads", "constant"):
        load_model(f"nets_of_test:{name}")
    load_model(f"{HERE}:with_norm")


def test_weights_that_fit_twice_in_part_or_not(nets, tmp_path) -> None:
    def load(name: str, content: dict) -> nn.Module:
        torch.save(content, tmp_path / "w.pt")
        return load_model(f"nets_of_test:{name}", str(tmp_path / "w.pt"))

    fits = {"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}
    assert not load("net", fits).weight.any()
    with pytest.raises(ValueError, match=r"are random \(frequencies, shift\)\. w?.*w.pt does not have them: give a"):
        load("hidden", fits)
    student, teacher = ({f"{who}.{k}": v + i for k, v in fits.items()} for i, who in enumerate(("student", "teacher")))
    with pytest.raises(ValueError, match=r"several sets of weights that fit, behind 'student\.', 'teacher\.'"):
        load("net", student | teacher)
    with pytest.raises(ValueError, match=r"several sets of weights, \['state_dict', 'model'\]"):
        load("net", {"model": fits, "state_dict": fits})
    with pytest.raises(ValueError, match=r"it lacks \['bias'\], and has nothing in addition"):
        load("net", {"weight": fits["weight"]})
    with pytest.raises(ValueError, match=r"weight is \[4, 3\] there, expected \[3, 4\]"):
        load("net", fits | {"weight": torch.zeros(4, 3)})
    tied = {"0.weight": torch.ones(3, 3), "0.bias": torch.ones(3), "1.bias": torch.ones(3)}
    assert load("tied", tied)[1].weight.sum() == 9


def test_a_plan_writes_nothing(tmp_path) -> None:
    np.save(tmp_path / "x.npy", X)
    words = [
        "run",
        f"{HERE}:with_norm",
        str(tmp_path / "x.npy"),
        str(tmp_path / "a.zarr"),
        "--chunk",
        "4",
        "--threads",
        "1",
    ]
    planned = CliRunner().invoke(main, [*words, "--dry-run"])
    assert "9 samples in 3 chunks of 4" in planned.stdout, planned.output
    ranked = CliRunner().invoke(main, ["importance", *words[1:3], "--dry-run"])
    assert "9 samples in 1 chunks of 9" in ranked.stdout, ranked.output
    for said in (planned.stdout, ranked.stdout):
        assert "of memory besides model and source, about" in said
    assert not (tmp_path / "a.zarr").exists()
    done = CliRunner().invoke(main, [*words, "--quiet"])
    assert (done.exit_code, done.output) == (0, "")
    assert "0 samples in 0 chunks" in CliRunner().invoke(main, [*words, "--dry-run"]).stdout
