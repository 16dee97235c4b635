"""Packages by name, folders mapped into them, and the optional native module.

Everything else is in pyproject.toml. `kernels/` and `bench/` are installed inside el4ner, because a top-level
module `kernels` would hide the package of that name which transformers looks for.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def warn(reason: str) -> None:
    """Say on stderr why the native module is left out. pip shows it with -v, `el4ner doctor` always."""
    line = "=" * 100
    message = f"WARNING: el4ner._native was not built: {reason}\nThe install goes on; Numba kernels are used instead."
    print(f"{line}\n{message}\n{line}", file=sys.stderr)


def native_module() -> list[Extension]:
    """el4ner._native, or nothing (with a warning) when nanobind is missing."""
    try:
        import nanobind
    except ImportError as error:
        warn(f"nanobind is not installed ({error})")
        return []
    source = Path(nanobind.source_dir())
    # The module knows which calls it was built for; kernels/_dispatch.py refuses one that is older than its callers.
    interface = hashlib.sha256(Path("el4ner/_native.pyi").read_bytes()).hexdigest()[:16]
    if sys.platform == "win32":
        flags = ["/std:c++17", "/O2", "/EHsc"]
    else:
        # No fused multiply-add behind our back: results equal the reference's.
        flags = ["-std=c++17", "-O3", "-fvisibility=hidden", "-fno-strict-aliasing", "-ffp-contract=off"]
    return [
        Extension(
            "el4ner._native",
            sources=["csrc/module.cpp", "csrc/span_topk.cpp", "csrc/nanobind_runtime.cpp"],
            depends=["el4ner/_native.pyi", *sorted(str(path) for path in Path("csrc").glob("*.hpp"))],
            include_dirs=["csrc", nanobind.include_dir(), str(source), str(source.parent / "ext/robin_map/include")],
            define_macros=[
                ("NDEBUG", None),
                ("NB_COMPACT_ASSERTIONS", None),
                ("EL4NER_INTERFACE", f'"{interface}"'),
            ],
            extra_compile_args=flags,
            language="c++",
            optional=True,  # setuptools then goes on without it
        )
    ]


class WarningBuildExt(build_ext):
    """build_ext that says loudly when the optional module could not be built."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension; the error goes on to setuptools, which skips an optional extension."""
        try:
            super().build_extension(ext)
        except Exception as error:
            warn(f"{type(error).__name__}: {error}")
            raise


setup(
    packages=[
        "el4ner",
        "el4ner.engines",
        "el4ner.voters",
        "el4ner.stages",
        "el4ner.data",
        "el4ner.kernels",
        "el4ner.bench",
    ],
    package_dir={"el4ner.kernels": "kernels", "el4ner.bench": "bench"},
    package_data={
        "el4ner": ["py.typed", "*.pyi"],
        "el4ner.data": ["*.jsonl", "*.yaml", "*.md", "*.npz"],
        "el4ner.bench": ["*.yaml"],
    },
    ext_modules=native_module(),
    cmdclass={"build_ext": WarningBuildExt},
)
