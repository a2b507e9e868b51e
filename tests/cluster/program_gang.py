"""A launcher under test: `program_gang.py MODE LOG_DIR GRACE_S` starts two ranks of `program_rank.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from framework.cluster import gang

mode, log_dir, grace_s = sys.argv[1:]
program = str(Path(__file__).with_name("program_rank.py"))
stopped = gang.launch(
    [sys.executable, program, mode],
    nproc=2,
    log_dir=Path(log_dir),
    grace_s=float(grace_s),
)
print("stopped by", stopped.name if stopped else None)
