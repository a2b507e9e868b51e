import pytest
import torch
from torch import nn

from framework.train.optim import adamw, decays


def test_only_matrices_that_are_no_embeddings_decay():
    assert decays("lm.model.layers.0.mlp.up_proj.weight", 2)
    assert not decays("lm.model.embed_tokens.weight", 2)
    assert not decays("lm.transformer.wte.weight", 2)
    assert not decays("lm.model.norm.weight", 1)


def test_decay_moves_a_matrix_and_spares_a_norm():
    """With a zero gradient AdamW leaves 1 - lr * decay = 1 - 0.1 * 0.5 = 0.95 of a decayed weight."""
    matrix, norm = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = adamw(
        [("up.weight", matrix), ("norm.weight", norm)], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]
    matrix.grad, norm.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    torch.testing.assert_close(norm.detach(), torch.ones(2))


def test_a_name_may_have_a_rate_of_its_own():
    """AdamW's first step moves a weight by lr * sign(gradient): 0.01 by default, 3 and 5 times that here."""
    named = {name: nn.Parameter(torch.zeros(2, 2)) for name in ("policy.up", "critic.up", "critic.score.up")}
    named["critic.norm"] = nn.Parameter(torch.zeros(2))
    optimizer = adamw(
        named.items(),
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=0.5,
        lr_scales={"critic.": 3.0, "critic.score.": 5.0},
    )
    found = [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in optimizer.param_groups]
    assert found == [(1, 0.5, 1.0), (1, 0.5, 3.0), (1, 0.0, 3.0), (1, 0.5, 5.0)]
    for group in optimizer.param_groups:
        group["lr"] = 0.01 * group["lr_scale"]
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: -float(parameter.detach().flatten()[0]) for name, parameter in named.items()}
    assert moved == pytest.approx(
        {"policy.up": 0.01, "critic.up": 0.03, "critic.norm": 0.03, "critic.score.up": 0.05}, rel=1e-5
    )
