"""Right answers made wrong, for judges that must know faults which a model seldom makes by itself.

A policy finds whatever its judge has never seen as a fault. One that is rare in a model's own answers, such
as a part left out, is therefore made of right ones. Knows nothing of a task but what stands between the parts
of its answers.
"""

from __future__ import annotations

import random


def damaged(text: str, *, separator: str, draw: random.Random) -> list[str]:
    """`text` with one part left out, with one part said twice and with two neighbours swapped, shuffled.

    Parts are what `separator` separates; which of them is hit is drawn. Left out is what would be empty or
    the same as before.
    """
    parts = text.split(separator)
    gone, twice = draw.randrange(len(parts)), draw.randrange(len(parts))
    found = [[*parts[:gone], *parts[gone + 1 :]], [*parts[:twice], parts[twice], *parts[twice:]]]
    if len(parts) > 1:
        first = draw.randrange(len(parts) - 1)
        found.append([*parts[:first], parts[first + 1], parts[first], *parts[first + 2 :]])
    texts = [separator.join(each) for each in found if each]
    draw.shuffle(texts)
    return [each for each in texts if each != text]
