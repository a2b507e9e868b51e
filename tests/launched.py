"""A script of launch/ in a process forked from this one, which has imported what the script needs already.

For the many lines that end before a worker starts, where imports would be all that takes time.
"""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

PATIENCE_S = 120


def forked(script: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python script *arguments` in `cwd`: its exit status and what it wrote."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            _become(script, arguments, cwd, out.fileno(), err.fileno())
        _, status = os.waitpid(child, 0)
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(
            [str(script), *arguments], os.waitstatus_to_exitcode(status), out.read(), err.read()
        )


def _become(script, arguments, cwd, out, err):
    status = 1
    signal.alarm(PATIENCE_S)  # ends the child
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for as long as the process lives
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        sys.argv = [str(script), *arguments]
        os.chdir(cwd)
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
