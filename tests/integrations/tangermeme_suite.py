"""tangermeme's own tests through gradkern's drop-ins: ``python tests/integrations/tangermeme_suite.py CHECKOUT …``.

CHECKOUT is a clone of https://github.com/jmschrei/tangermeme; more arguments go to pytest.  The two functions are
replaced in tangermeme's modules before its tests are imported.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = ("test_deep_lift_shap.py", "test_pisa.py")


def main(arguments: list[str]) -> int:
    if not arguments or not (Path(arguments[0]) / "tests" / FILES[0]).is_file():
        print(__doc__)
        return 2
    checkout = Path(arguments.pop(0)).resolve()
    sys.path[:] = [str(ROOT)] + [p for p in sys.path if Path(p or ".").resolve() != HERE]
    import tangermeme.deep_lift_shap  # the installed one
    import tangermeme.pisa

    from gradkern.integrations.tangermeme import deep_lift_shap, pisa

    tangermeme.deep_lift_shap.deep_lift_shap = deep_lift_shap
    tangermeme.pisa.pisa = pisa
    sys.modules.pop("tests", None)
    sys.path.insert(0, str(checkout))  # its tests are a package
    files = [str(checkout / "tests" / name) for name in FILES]
    fixed = ["-q", "-p", "no:cacheprovider", "-c", "/dev/null", f"--rootdir={checkout}"]
    return int(pytest.main([*fixed, *files, *arguments]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
