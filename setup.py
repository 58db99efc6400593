"""Builds ``gradkern/_C.so``: the CPU part always, the CUDA part where torch has CUDA and a toolkit is found.

Metadata lives in ``pyproject.toml``; this file is only about the extension.  Environment:

``GRADKERN_REQUIRE_EXT=1``  a failed extension build fails the install (the tests and CI set it).  Otherwise the
                            package installs without it and runs on its reference path.
``GRADKERN_BUILD_EXT=0``    do not try to build the extension.
``USE_CUDA=0``              CPU part alone, whatever is found.
``MAX_JOBS``                number of compile jobs (torch's own variable).

Nothing here depends on the machine it runs on: every instruction set is compiled in by ``#pragma GCC target``
inside the sources and chosen at run time, so one build serves every x86-64, and no GPU needs to be visible.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext as plain_build_ext

MODULE = "gradkern._C"
# Of torch, the sources include the headers of its stable ABI alone (csrc/torch_abi.h), as of this version, so the
# library runs under this torch and every later one, whichever it was built with.  It is no Python module either.
OLDEST_TORCH = "0x020b000000000000"  # 2.11
# The kernels are C++20, and include nothing of torch, which before 2.13 would append -std=c++17 here.
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
# Compute capabilities that get machine code where no GPU says otherwise; later ones run the PTX of the last.
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
HOW_TO = "pip install --no-build-isolation ."


def say(text: str) -> None:
    print(f"gradkern: {text}", file=sys.stderr, flush=True)


def env_is(name: str, value: str) -> bool:
    return os.environ.get(name, "").strip().lower() in {value, {"1": "true", "0": "false"}[value]}


VERSION: list[str] = []  # what an installation adds to its version
STRICT = env_is("GRADKERN_REQUIRE_EXT", "1")


def without_extension(why: str) -> None:
    """Carry on without the extension, or stop where the caller asked for strictness."""
    if STRICT:
        raise SystemExit(f"gradkern: {why}\ngradkern: GRADKERN_REQUIRE_EXT is set, so this is an error.")
    say(f"{why} Installing without compiled kernels: results are the same, the speed is not. To build: {HOW_TO}")
    VERSION.append("no.kernels")


def version() -> str:
    """Of the package; an installation without kernels says so, because pip shows its version and nothing else."""
    source = Path("gradkern/__init__.py").read_text()
    own = next(line.split('"')[1] for line in source.splitlines() if line.startswith("__version__"))
    installing = {"dist_info", "bdist_wheel", "editable_wheel"} & set(sys.argv)
    return "+".join([own, *VERSION]) if installing else own


def description() -> str:
    """README for a registry's page: relative links and the picture, which exist in a checkout alone, as plain text."""
    return re.sub(r"!?\[([^\]]*)\]\((?!\w+://)[^)]*\)", r"\1", Path("README.md").read_text(encoding="utf-8"))


def cuda_sources(torch, cpp_extension) -> tuple[list[str], str]:
    """The CUDA sources to build, and otherwise why there are none."""
    sources = sorted(glob("csrc/cuda/*.cu") + glob("csrc/cuda/*.cpp"))
    if env_is("USE_CUDA", "0"):
        return [], "USE_CUDA=0"
    if not sources:
        return [], "this version has no CUDA sources"
    if torch.version.cuda is None:
        return [], f"torch {torch.__version__} has no CUDA"
    home = cuda_toolkit(cpp_extension.CUDA_HOME)
    if home is None:
        return [], "no CUDA toolkit found (set CUDA_HOME)"
    cpp_extension.CUDA_HOME = home
    return sources, ""


def cuda_toolkit(guess: str | None) -> str | None:
    """The folder of a whole toolkit: compiler and headers.

    torch's guess is the folder above that of the nvcc on the PATH, which is wrong where that nvcc is a link.
    """
    nvcc = shutil.which("nvcc")
    linked = str(Path(nvcc).resolve().parent.parent) if nvcc else None
    for home in (os.environ.get("CUDA_HOME"), guess, linked, "/usr/local/cuda"):
        if home and Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            return home
    return None


def fingerprint() -> str:
    """A hash of everything that is compiled for a GPU: what has been validated on one is valid for these sources."""
    paths = sorted([*Path("csrc").glob("*.h"), *Path("csrc/cuda").iterdir()])
    return hashlib.sha256(b"\0".join(p.name.encode() + b"\0" + p.read_bytes() for p in paths)).hexdigest()[:16]


def cuda_macros() -> list[tuple[str, str]]:
    return [("GRADKERN_WITH_CUDA", "1"), ("GRADKERN_CUDA_FINGERPRINT", fingerprint())]


def compile_flags() -> list[str]:
    if sys.platform == "win32":
        return ["/O2"]
    # No -std: torch appends the one that its headers need.  No -march, no -ffast-math: see the module docstring.
    # -fopenmp-simd: the pragmas that let a sum be taken in the lanes of a vector; no OpenMP library comes with it.
    # -fno-trapping-math: a comparison may run where it is not needed, without which gcc vectorizes no clamp, so none of
    # the activations.  Values do not change, only the processor's exception flags, which are never read.
    flags = ["-O3", "-g0", "-fno-trapping-math", "-fopenmp-simd", "-fvisibility=hidden"]
    return [*flags, "-Wno-unknown-pragmas", "-Wno-psabi"]


def extensions() -> tuple[list, type[plain_build_ext]]:
    """The extension modules and the command that builds them; empty, with a line that says why, where impossible."""
    if env_is("GRADKERN_BUILD_EXT", "0"):
        return [], plain_build_ext
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        without_extension(f"torch cannot be imported where the build runs ({error}).")
        return [], plain_build_ext

    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++", "cl")):
        without_extension("no C++ compiler found.")
        return [], plain_build_ext
    # A ninja installed next to this Python is found even where its environment is not activated.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    if not sources:
        without_extension("no C++ sources under csrc/.")
        return [], plain_build_ext
    cuda, why_not = cuda_sources(torch, cpp_extension)
    if cuda:
        say(f"building the CPU and the CUDA part (torch {torch.__version__}, toolkit {cpp_extension.CUDA_HOME}).")
        if torch.cuda.device_count() == 0:  # torch asks the visible GPUs for their architectures, and there are none
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(ARCHITECTURES) + "+PTX")
    else:
        say(f"building the CPU part alone ({platform.machine()}): {why_not}.")

    make = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = make(
        MODULE,
        sources + cuda,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[("TORCH_TARGET_VERSION", OLDEST_TORCH), *(cuda_macros() if cuda else [])],
        extra_compile_args={"cxx": compile_flags(), "nvcc": NVCC_FLAGS},
        extra_link_args=["-Wl,--as-needed"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    hint = " With USE_CUDA=0 the CPU part alone is built." if cuda else ""
    return [module], forgiving(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True), hint)


def forgiving(base: type, hint: str) -> type:
    """torch's build command, but a build that fails leaves an installable package unless strictness was asked for.

    setuptools' own ``optional=True`` cannot do this: torch raises RuntimeError, which it does not catch.
    """

    class BuildExt(base):
        def finalize_options(self) -> None:
            super().finalize_options()
            if self.editable_mode:  # setuptools would compile into a temporary folder, so everything anew each time
                self.build_temp = str(Path("build") / "editable")

        def run(self) -> None:
            inplace = self.inplace
            try:
                super().run()
            except Exception as error:
                # A library of an older build must not be taken for this one's.
                for stale in glob("gradkern/_C*.so") if inplace else ():
                    os.remove(stale)
                reason = (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".")
                if not inplace and not self.editable_mode:  # its version is told already, and promises kernels
                    raise SystemExit(
                        f"gradkern: the extension could not be built: {reason}.{hint}\n"
                        "gradkern: to install without compiled kernels: GRADKERN_BUILD_EXT=0 pip install ."
                    ) from error
                without_extension(f"the extension could not be built: {reason}.{hint}")
                self.inplace, self.extensions = inplace, []

    return BuildExt


ext_modules, build_command = extensions()
setup(
    license="BSD-3-Clause",
    version=version(),
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=ext_modules,
    cmdclass={"build_ext": build_command},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if ext_modules else {},
)
