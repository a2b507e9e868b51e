"""Losses as pure functions of tensors. This room imports torch and nothing else: no rank, no model.

Every loss returns `Items` (losses per unit and weights), is additive over units and takes no
`reduction`. See `items.py` for the contract.
"""
