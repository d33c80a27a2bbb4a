"""Builds entrenar._kernels: csrc/kernels.c once per instruction set, with its own flags, beside cffi's dispatcher.

Everything else about the package is in pyproject.toml. What the build does not find, it does without, with a warning:
without OpenMP kernels run on one thread, without a compiler entrenar runs on its NumPy reference.

    ENTRENAR_SANITIZE=address,undefined    builds the kernels for `make sanitize`
    ENTRENAR_BUILD_WIDE=1                  adds the instruction set "wide": 16 lanes compiled for AVX2, for tests
"""

import hashlib
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

sys.path.insert(0, str(Path(__file__).parent / "csrc"))
import build_kernels  # noqa: E402

HEADERS = [str(path) for path in sorted(Path("csrc").iterdir()) if path.suffix in (".h", ".inc", ".c", ".py")]

# -fno-math-errno and -fno-trapping-math keep every value as it is, nan and inf too: they only promise that nobody
# reads errno or the floating-point exception flags. -ffast-math would lose the -inf of masks; it never comes in here.
FLAGS = ["-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi",
         "-Wno-unknown-pragmas"]


def sanitizer_flags() -> list[str]:
    chosen = os.environ.get("ENTRENAR_SANITIZE")
    if not chosen:
        return []
    # Python's own flags carry -fwrapv, under which signed overflow is no error.
    return [f"-fsanitize={chosen}", "-fno-wrapv", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer",
            "-g", "-O1"]


class BuildKernels(build_ext):
    def build_extension(self, ext):
        ext.optional = not os.environ.get("ENTRENAR_SANITIZE")  # a failed build is a warning
        openmp = self.openmp_flags()
        flags = [*FLAGS, *openmp, *sanitizer_flags()]
        ext.depends = HEADERS
        stamp, recipe = Path(self.build_temp, "recipe.txt"), self.recipe(flags)
        built = Path(self.get_ext_fullpath(ext.name))
        if not self.force and built.exists() and stamp.exists() and stamp.read_text() == recipe:
            return
        self.force = True
        stamp.unlink(missing_ok=True)

        def compile_isa(isa):
            return self.compiler.compile(
                ["csrc/kernels.c"], output_dir=f"{self.build_temp}/{isa.name}", macros=build_kernels.renames(isa),
                extra_postargs=[*flags, *isa.flags], depends=HEADERS)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_isa, build_kernels.isas()))
        ext.extra_objects = sum(objects, [])
        ext.extra_compile_args = [*openmp, *sanitizer_flags()]
        ext.extra_link_args = [*openmp, *sanitizer_flags()[:1]]
        super().build_extension(ext)
        stamp.write_text(recipe)

    def recipe(self, flags):
        """All that goes into the build. setuptools looks at file times alone, which miss other flags, another
        compiler, and a source that was saved while it was compiled."""
        sources = hashlib.blake2b(b"".join(Path(source).read_bytes() for source in HEADERS)).hexdigest()
        return " ".join([*self.compiler.compiler_so, *flags, *(isa.name for isa in build_kernels.isas()), sources])

    def openmp_flags(self):
        """-fopenmp if a program with it really compiles and links (clang often lacks libomp)."""
        program = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "openmp.c")
            source.write_text(program)
            try:
                objects = self.compiler.compile([str(source)], output_dir="/", extra_postargs=["-fopenmp"])
                self.compiler.link_executable(objects, f"{folder}/openmp", extra_postargs=["-fopenmp"])
                return ["-fopenmp"]
            except (CompileError, LinkError):
                self.warn("no OpenMP here: the kernels will run on one thread (with clang, install libomp-dev)")
                return []


setup(
    cffi_modules=["csrc/build_kernels.py:ffi"],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
