"""
What shows early whether a model reads, and why not when it does not: validation loss, the same loss with every page swapped
for another (the gap), the mean pairwise cosine between pages' features at four depths, and predictions beside truths.
"""
import torch
import torch.nn.functional as F

from nanochat.common import all_reduce, dist_info
from nanochat.metrics import one_minus_ned


@torch.no_grad()
def reestimate_statistics(model, batches):
    """Running statistics of the compressor's output, anew from the pages of `batches` in one mode (each rank takes its share)."""
    encoder, (rank, _, world) = model.encoder, dist_info()
    if encoder.standardize.kind == "none" or encoder.standardize.frozen:
        return
    side = max(batches[0].views)  # of the global view
    def outputs():
        for batch in batches[rank::world]:
            yield encoder.sam_model(batch.views[side].to(model.device).to(model.dtype) / 127.5 - 1.0)
    encoder.standardize.reestimate(outputs(), side // model.cfg.token_stride)


def page_cosine(features):
    """(N, ...) features -> mean cosine over all pairs of pages, each flattened. 1 = every page looks the same."""
    x = F.normalize(features.float().flatten(1), dim=1)
    n = x.size(0)
    return ((x @ x.mT).sum() - n).item() / (n * (n - 1))


@torch.no_grad()
def cosines(model, pixels):
    """{"sam": , "compressor": , "clip": , "projector": } for (N, 3, S, S) uint8 pages; compressor before standardisation."""
    taps = {}
    model.project(pixels, taps)
    return {name: page_cosine(features) for name, features in taps.items()}


@torch.no_grad()
def validate(model, batches):
    """
    -> loss in nats per token and per character, and the gap in nats per character: loss with images deranged within each
    batch minus loss. A gap near zero means that the page is ignored. Batches are shared out over ranks.
    """
    rank, _, world = dist_info()
    right = wrong = tokens = characters = 0.0
    for batch in batches[rank::world]:
        batch = batch.to(model.device)
        right += model(batch)["text"][0].item()
        wrong += model(batch.deranged())["text"][0].item()
        tokens += batch.supervised()
        characters += batch.characters
    right, wrong, tokens, characters = (all_reduce(v, model.device) for v in (right, wrong, tokens, characters))
    return {"val/loss": right / tokens, "val/loss_per_char": right / characters, "vision/gap": (wrong - right) / characters}


def read_pages(engine, conversations, max_new_tokens):
    """-> [(conversation, prediction, 1-NED)], greedy, in one batch."""
    results = engine.generate(conversations, max_new_tokens)
    rows = []
    for c, r in zip(conversations, results):
        truth = c["messages"][-1]["content"]
        rows.append((c, r.text, one_minus_ned(r.text, truth)))
    return rows
