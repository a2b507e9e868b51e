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
