"""The benchmark of real networks runs, end to end, on one small one."""

import pytest

from benchmarks import networks


@pytest.mark.slow
def test_quick_run_of_the_networks_benchmark(tmp_path, capsys):
    assert networks.main(["--quick", "--nets", "eegnet", "--threads", "1", "--out", str(tmp_path / "r.json")]) == 0
    assert "100 %" in capsys.readouterr().out
    assert (tmp_path / "r.json").exists()
