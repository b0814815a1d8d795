"""
What shows early whether a model reads, and why not when it does not: validation loss, the same
loss with every page swapped for another (the gap), the mean cosine between pages' features at
several depths of the encoder, and predictions beside truths. Always on the same pages.
"""
import math
from itertools import islice

import torch
import torch.nn.functional as F

from nanochat.batch import collate
from nanochat.common import all_reduce, dist_info, print0
from nanochat.dataloader import Sampler
from nanochat.engine import Engine
from nanochat.metrics import one_minus_ned

READ_PAGES = 16  # pages that are read aloud, and whose features are compared
BATCH_PAGES = 32


class Evaluator:
    """
    Fixed validation pages, and everything that is measured on them.

    modes             the image modes trained in; pages are validated in the first, statistics of
                      the compressor's output are re-estimated in each
    sampler_settings  keyword arguments of Sampler: limits and what happens to bad samples
    val_task          held-out pages; statistics_task: pages like those trained on
    """
    def __init__(self, tokenizer, modes, stride, sampler_settings, val_task, statistics_task,
                 val_pages=64, statistics_pages=256):
        self.tokenizer = tokenizer
        self.mode = modes[0]
        self.stride = stride
        self.sampler_settings = sampler_settings
        self.val_batches, usable = self.batches(val_task, val_pages, self.mode)
        self.statistics_batches = []  # for each mode
        for mode in modes:
            batches, _ = self.batches(statistics_task, statistics_pages, mode)
            self.statistics_batches.append(batches)
        self.pages = [val_task[i] for i in usable[:READ_PAGES]]
        self.pixels = self.val_batches[0].views[self.mode.size][:READ_PAGES]

    def batches(self, task, n, mode):
        """-> (batches of the first n usable samples of a task, their indices)."""
        sampler = Sampler(task, self.tokenizer, mode, self.stride, **self.sampler_settings)
        numbered = ((i, sampler[i]) for i in range(len(task)))
        usable = list(islice((pair for pair in numbered if pair[1].ids), n))
        if len(usable) < 2:
            raise ValueError(f"validation needs at least 2 pages, there is {len(usable)}: give "
                             f"more, or raise --val-share")
        indices = [i for i, _ in usable]
        samples = [sample for _, sample in usable]
        left_out = indices[-1] + 1 - len(indices)
        if left_out:
            print0(f"validation leaves out {left_out} samples that cannot be used (--bad-data, "
                   f"--too-long)")
        # Batches of nearly equal size: none may hold a single page, since the gap needs another.
        n_batches = math.ceil(len(samples) / BATCH_PAGES)
        size = math.ceil(len(samples) / n_batches)
        batches = [collate(samples[k:k + size]) for k in range(0, len(samples), size)]
        return batches, indices

    def __call__(self, model):
        """
        -> (figures by name, [(conversation, prediction, 1-NED), ...] of the pages read).
        Leaves the model in training mode.
        """
        model.eval()
        for batches in self.statistics_batches:
            reestimate_statistics(model, batches)
        figures = validate(model, self.val_batches)
        for depth, cosine in cosines(model, self.pixels).items():
            figures[f"vision/cosine_{depth}"] = cosine
        pages_read = read_pages(Engine(model, self.tokenizer, self.mode), self.pages)
        figures["val/one_minus_ned"] = sum(score for *_, score in pages_read) / len(pages_read)
        model.train()
        return figures, pages_read


@torch.no_grad()
def reestimate_statistics(model, batches):
    """
    Measures the running statistics of the compressor's output anew, on the pages of `batches` in
    one mode; each rank takes its share. Running averages lag behind weights that move fast.
    """
    encoder = model.encoder
    if encoder.standardize.kind == "none" or encoder.standardize.frozen:
        return
    rank, _, world_size = dist_info()
    side = max(batches[0].views)  # px, of the global view

    def compressor_outputs():
        for batch in batches[rank::world_size]:
            pixels = batch.views[side].to(model.device).to(model.dtype)
            yield encoder.sam_model(pixels / 127.5 - 1.0)

    encoder.standardize.reestimate(compressor_outputs(), side // model.cfg.token_stride)


def page_cosine(features):
    """(N, ...) features -> mean cosine over all pairs of pages. 1 = every page looks the same."""
    x = F.normalize(features.float().flatten(1), dim=1)
    n = x.size(0)
    sum_over_pairs = (x @ x.mT).sum() - n  # without each page's 1 with itself
    return sum_over_pairs.item() / (n * (n - 1))


@torch.no_grad()
def cosines(model, pixels):
    """
    {depth: page_cosine there} for (N, 3, S, S) uint8 pages, from SAM to the projector. The
    compressor's output is taken before standardisation, which would hide a collapse.
    """
    taps = {}
    model.project(pixels, taps)
    return {depth: page_cosine(features) for depth, features in taps.items()}


@torch.no_grad()
def validate(model, batches):
    """
    -> loss in nats per token and per character, and the gap in nats per character: the loss with
    images deranged within each batch, minus the loss. Batches are shared out over ranks.
    """
    rank, _, world_size = dist_info()
    own_pages = 0.0
    other_pages = 0.0
    tokens = 0
    characters = 0
    for batch in batches[rank::world_size]:
        batch = batch.to(model.device)
        nats, count = model(batch)["text"]
        own_pages += nats.item()
        other_pages += model(batch.deranged())["text"][0].item()
        tokens += count
        characters += batch.characters
    totals = [own_pages, other_pages, tokens, characters]
    own_pages, other_pages, tokens, characters = all_reduce(totals)
    return {
        "val/loss": own_pages / tokens,
        "val/loss_per_char": own_pages / characters,
        "vision/gap": (other_pages - own_pages) / characters,
    }


def read_pages(engine, conversations, margin=16):
    """
    Reads pages greedily in one batch, each up to `margin` tokens past the longest truth, or to the
    end of the decoder's positions. -> [(conversation, prediction, 1-NED), ...]
    """
    truths = [conversation["messages"][-1]["content"] for conversation in conversations]
    longest = max(len(engine.tokenizer.encode(truth)) for truth in truths)
    _, prompt_lengths = engine.prompt_batch(conversations)
    room = engine.model.cfg.gpt.sequence_len - max(prompt_lengths)
    results = engine.generate(conversations, min(longest + margin, room))
    rows = []
    for conversation, truth, result in zip(conversations, truths, results):
        rows.append((conversation, result.text, one_minus_ned(result.text, truth)))
    return rows
