"""What going back towards the start weights costs and keeps: figures over x, 0 the start and 1 the tuned.

Made from "interpolate" lines, each of which holds x, held-out numbers and what was retained there.
"""

from __future__ import annotations

from collections.abc import Sequence

from framework.track import parts
from framework.track.chart import chart
from framework.track.parts import Record
from framework.track.retention import strata


def figures(looks: Sequence[Record]) -> str:
    """Forgetting and held-out losses over x; "" where nothing was interpolated."""
    by_x = {float(look["x"]): look for look in looks}  # a run that went on has looked twice
    ordered = [{**by_x[x], "step": x} for x in sorted(by_x)]
    kinds = strata(ordered)
    forgotten = {k: [(x, 100 * y) for x, y in parts.points(ordered, f"{k}/relative")] for k in kinds}
    names = dict.fromkeys(
        key.removesuffix("/loss") for look in ordered for key in look if key.endswith("/loss")
    )
    losses = {name: parts.points(ordered, f"{name}/loss") for name in names if name not in kinds}
    about = "of the way from the start weights (0) to the tuned ones (1)"
    return chart(
        "Forgotten on the way back", forgotten, unit=f"% more perplexity, {about}", from_zero=True, over="x"
    ) + chart("Held-out loss on the way back", losses, unit=f"nats a token, {about}", over="x")
