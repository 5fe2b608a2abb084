"""A job's own process: `ftkit`, that ends with the server whatever happens to it.

    python -m ftkit.serve.worker PARENT train --model …

Stopped processes (SIGSTOP, while requests run) do not notice that their parent is gone; the kernel's signal at the
parent's death ends those, too.
"""

import ctypes
import os
import runpy
import signal
import sys

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)


def main() -> None:
    """Becomes `ftkit` with the arguments that follow the parent's process id."""
    parent = int(sys.argv[1])
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be watched
        sys.exit(1)
    sys.argv = ["ftkit", *sys.argv[2:]]
    runpy.run_module("ftkit", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
