"""The kinds of records, and the headers that the kernels read them by."""

from __future__ import annotations

import pytest

from gradkern.codegen import records
from gradkern.codegen.encoding import layout_of
from gradkern.codegen.records import KINDS, RecordPart
from gradkern.codegen.records_header import FILES


@pytest.mark.parametrize(("file", "text"), FILES.items(), ids=[file.stem for file in FILES])
def test_the_headers_are_up_to_date(file, text):
    """Otherwise: ``python -m gradkern.codegen.records_header``, and build again."""
    if not file.exists():
        pytest.skip("no sources here")
    assert file.read_text().split() == text().split()


def test_every_field_is_explained_or_plain():
    """No kind is a bag of numbers: fields are integers, flags, doubles, enums or parts."""
    for kind in KINDS:
        assert kind.__doc__
        for _, t in layout_of(kind):
            assert t in (int, bool, float) or issubclass(t, RecordPart | records.IntEnum)
