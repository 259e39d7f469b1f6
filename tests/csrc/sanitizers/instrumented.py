"""Makes the extension in the file FASTSSL_INSTRUMENTED fastssl._C: a plugin of pytest, or `-m` with a module to run.

The tests' own way to ask for it is `python -m pytest -p tests.csrc.sanitizers.instrumented` or
`python -m tests.csrc.sanitizers.instrumented tests.csrc.sanitizers.exercise`.
"""

import importlib.util
import os
import runpy
import sys

import torch  # noqa: F401  (it loads the extension's libraries)

spec = importlib.util.spec_from_file_location("fastssl._C", os.environ["FASTSSL_INSTRUMENTED"])
assert spec is not None and spec.loader is not None
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["fastssl._C"] = module  # before anything imports fastssl

if __name__ == "__main__":
    runpy.run_module(sys.argv[1], run_name="__main__")
