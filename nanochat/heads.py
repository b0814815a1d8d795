"""
Auxiliary losses: linear heads that name the letters a vision token shows (local_loss.py) and the
place of the next character (place_loss.py). Only rendered pages have the labels for them.

The heads are for training. They are not part of the model and not saved with it; a run keeps them
with the optimizer state. A head is a module with
    loss_counts(batch)    {name of a loss: how many terms it is summed over}
    losses(taps, batch)   {name of a loss: (sum in nats, how many terms)}
"""
import torch.nn as nn

from nanochat.local_loss import EMPTY, EMPTY_WEIGHT, INK, LocalHead, cells_of
from nanochat.place_loss import CELL, TOKEN, PlaceHead

LABELS = ("glyphs",)  # the kinds of labels that they need: Sampler(labels=...)


def make_heads(model, local_weight, place_weight):
    """
    {"local": LocalHead, "place": PlaceHead} on the model's device, without those of weight 0; None
    if both are off. Weights: of --local-loss and --place-loss.
    """
    if local_weight < 0 or place_weight < 0:
        raise ValueError(f"--local-loss={local_weight}, --place-loss={place_weight}: must be 0 "
                         f"(off) or more")
    if not local_weight and not place_weight:
        return None
    if model.encoder.layout != "grid":
        raise ValueError(f"--local-loss={local_weight}, --place-loss={place_weight}: the second "
                         f"stage {model.encoder.kind} gives a sequence, only tokens on a grid have "
                         f"an area of the page: use 0")
    heads = nn.ModuleDict()
    stride = model.cfg.token_stride
    if local_weight:
        heads["local"] = LocalHead(model.encoder.width, stride)
    if place_weight:
        heads["place"] = PlaceHead(model.cfg.gpt.n_embd, cells_of(stride))
    return heads.to(model.device)


def loss_weights(local_weight, place_weight):
    """{name of a loss: its weight} for --local-loss and --place-loss."""
    weights = {"text": 1.0}
    if local_weight:
        weights[INK] = local_weight
        weights[EMPTY] = EMPTY_WEIGHT * local_weight
    if place_weight:
        weights[TOKEN] = place_weight
        weights[CELL] = place_weight
    return weights


class WithHeads(nn.Module):
    """
    The model and its heads as one module, which is what a training step calls and what DDP wraps.
    Its losses are the model's and the heads'.
    """
    def __init__(self, model, heads):
        super().__init__()
        self.model = model
        self.heads = heads

    def loss_counts(self, batch):
        """As DeepseekOCR's."""
        counts = self.model.loss_counts(batch)
        for head in self.heads.values():
            counts.update(head.loss_counts(batch))
        return counts

    def forward(self, batch):
        taps = {}
        losses = self.model(batch, taps)
        for head in self.heads.values():
            losses.update(head.losses(taps, batch))
        return losses
