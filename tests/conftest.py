from __future__ import annotations

import atexit
import os
import shutil
import tempfile

import hypothesis

# What one test compiles, others and the processes that they start need not compile again (half of the suite's time).
# JAX does not write these files in one piece; who finds half of one warns, which is ignored, and compiles.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    folder = tempfile.mkdtemp(prefix="jaxmp-compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Virtual devices share the cores: on a busy machine one of eight may keep the others waiting for longer than XLA bears.
WAIT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {WAIT}".strip()

# Compiling takes longer than hypothesis' deadline, and a rule that holds today should be tested with the same examples
# tomorrow. (Tests on several devices start a process of their own: eight devices would slow down all others.)
hypothesis.settings.register_profile("jaxmp", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("jaxmp")
