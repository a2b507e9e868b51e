"""Micro-batches of given segments, packed or padded, for the tests of models."""

import torch

from framework.batch import Batch


def segments(lengths, vocab_size, seed=1):
    """Random token ids, one tensor per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (n,), generator=generator) for n in lengths]


def batch(rows, *, packed=True):
    """Every next token of every row is trained."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    if packed:
        ids = torch.cat(rows)[None]
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        starts = boundaries[:-1].tolist()
    else:
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        positions = torch.arange(width).repeat(len(rows), 1)
        starts = [width * i for i in range(len(rows))]
    trained = torch.tensor([s + t for s, n in zip(starts, lengths, strict=True) for t in range(n - 1)])
    return Batch(
        input_ids=ids,
        position_ids=positions,
        boundaries=boundaries,
        trained=trained,
        targets=torch.cat([row[1:] for row in rows]),
        weights=torch.ones(len(trained)),
        segments=torch.cat([torch.full((n - 1,), i) for i, n in enumerate(lengths)]),
        sources=torch.zeros(len(rows), dtype=torch.int64),
        packed=packed,
        max_length=width,
        units=float(len(trained)),
    )


def one_by_one(lm, rows):
    """The model's own log-probabilities, each row alone: [K] in the order of `batch`."""
    answers = []
    for row in rows:
        logits = lm(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        answers.append(logits.log_softmax(-1).gather(1, row[1:, None])[:, 0])
    return torch.cat(answers)
