"""
What shows early whether a model reads, and why not when it does not: validation loss, the same
loss with every page swapped for another (the gap), the mean cosine between pages' features at
several depths of the encoder, how many letters and places its heads name, and predictions beside
truths. Always on the same pages.
"""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F

from nanochat.batch import collate
from nanochat.common import all_reduce, dist_info, gather, print0
from nanochat.conversation import truth_of
from nanochat.dataloader import Sampler
from nanochat.engine import Engine
from nanochat.heads import LABELS
from nanochat.local_loss import local_accuracy
from nanochat.metrics import one_minus_ned
from nanochat.mixture import task_name
from nanochat.place_loss import place_accuracy

READ_PAGES = 16  # pages whose predictions are shown and whose features are compared
BATCH_PAGES = 32


class Evaluator:
    """
    Fixed validation pages, and everything that is measured on them.

    mode              the image mode that pages are validated in
    sampler_settings  keyword arguments of Sampler: limits and what happens to bad samples
    val_task          held-out pages
    heads             that learn beside the model, of make_heads: their accuracy is measured too
    letters_task      held-out pages that know where their letters are, on which that is measured
                      if those of val_task do not
    """
    def __init__(self, tokenizer, mode, layout, sampler_settings, val_task, val_pages=64,
                 heads=None, letters_task=None):
        self.tokenizer = tokenizer
        self.mode = mode
        self.layout = layout
        self.sampler_settings = dict(sampler_settings)
        self.heads = heads
        if heads is not None:
            self.sampler_settings["labels"] = LABELS
        print0(f"preparing {val_pages} pages for validation")
        self.val_batches, usable = self.batches(val_task, val_pages)
        self.pages = [val_task[i] for i in usable[:READ_PAGES]]
        self.pixels = self.val_batches[0].views[self.mode.size][:READ_PAGES]
        self.labeled_batches = self.val_batches
        has_letters = any(batch.label_points("glyphs") for batch in self.val_batches)
        if heads is not None and letters_task is not None and not has_letters:
            print0(f"letters and places are asked for on {val_pages} other pages, of "
                   f"{task_name(letters_task)}")
            self.labeled_batches, _ = self.batches(letters_task, val_pages)

    def usable(self, task, n):
        """
        -> (indices of the first n samples that have a picture and that --bad-data and --too-long
        let pass, their Samples). On text alone there would be nothing to see.
        """
        sampler = Sampler(task, self.tokenizer, self.mode, self.layout, **self.sampler_settings)
        indices = []
        samples = []
        for i in range(len(task)):
            if len(indices) == n:
                break
            sample = sampler[i]
            if sample.ids and sample.images:
                indices.append(i)
                samples.append(sample)
        return indices, samples

    def batches(self, task, n):
        """-> (batches of the first n usable samples of a task, their indices)."""
        indices, samples = self.usable(task, n)
        if len(indices) < 2:
            raise ValueError(f"validation needs at least 2 pages; of {len(task)} samples of "
                             f"{task_name(task)} {len(indices)} have a picture and can be used: "
                             f"give more, or raise --val-share")
        left_out = indices[-1] + 1 - len(indices)
        if left_out:
            print0(f"validation leaves out {left_out} samples that have no picture or cannot be "
                   f"used (--bad-data, --too-long)")
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
        figures = validate(model, self.val_batches)
        for depth, cosine in cosines(model, self.pixels).items():
            figures[f"vision/cosine_{depth}"] = cosine
        figures.update(self.accuracies(model))
        pages_read = read_pages(Engine(model, self.tokenizer, self.mode), self.pages)
        figures["val/one_minus_ned"] = sum(score for *_, score in pages_read) / len(pages_read)
        model.train()
        return figures, pages_read

    def accuracies(self, model):
        """{"vision/<head>_accuracy": share of right answers} of the heads that have labels."""
        gauges = {"local": local_accuracy, "place": place_accuracy}
        found = {}
        for name, head in (self.heads or {}).items():
            accuracy = gauges[name](model, head, self.labeled_batches)
            if accuracy is not None:
                found[f"vision/{name}_accuracy"] = accuracy
        return found


def page_cosine(features):
    """(N, ...) features -> mean cosine over all pairs of pages. 1 = every page looks the same."""
    x = F.normalize(features.float().flatten(1), dim=1)
    n = x.size(0)
    sum_over_pairs = (x @ x.mT).sum() - n  # without each page's 1 with itself
    return sum_over_pairs.item() / (n * (n - 1))


@torch.no_grad()
def cosines(model, pixels):
    """{depth: page_cosine there} for (N, 3, S, S) uint8 pages, from SAM to the projector."""
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
    Reads pages greedily, each up to `margin` tokens past the longest truth, or to the end of the
    decoder's positions; those whose prompt leaves no room for an answer are left out.
    -> [(conversation, prediction, 1-NED), ...], on every rank: they share the reading.
    """
    # A long dialog that was clipped in training may fill the decoder with its questions alone.
    decoder = engine.model.cfg.gpt.sequence_len
    _, prompt_lengths = engine.prompt_batch(conversations)
    fitting = [(c, length) for c, length in zip(conversations, prompt_lengths) if length < decoder]
    if not fitting:
        raise ValueError(f"no prompt of these pages leaves room for an answer: the decoder has "
                         f"{decoder} positions; use a mode with fewer tokens")

    # What little room it leaves is no limit for the others: a batch has one, and it has its own.
    longest = max(len(engine.tokenizer.encode(truth_of(c))) for c, _ in fitting)
    batches = defaultdict(list)  # tokens that a page may take -> pages
    for conversation, length in fitting:
        batches[min(longest + margin, decoder - length)].append(conversation)

    rank, _, world_size = dist_info()
    rows = []
    for limit, batch in batches.items():
        mine = batch[rank::world_size]
        results = engine.generate(mine, limit) if mine else []
        texts = gather([result.text for result in results])  # one list for each rank
        for k, conversation in enumerate(batch):
            text = texts[k % world_size][k // world_size]
            rows.append((conversation, text, one_minus_ned(text, truth_of(conversation))))
    return rows
