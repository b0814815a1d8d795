"""
From conversations to batches: task -> tokens and pixels -> Batch. Micro-batch k of rank r is a matter of arithmetic on
indices, so any step can be rebuilt, and a resumed run sees exactly what the unbroken one would have seen. Where a set can only be
read in order (Stream), a batch carries the state that does the same.
"""
import sys
from dataclasses import replace
from functools import partial

import torch

from nanochat.batch import COUNTS, Sample, collate
from nanochat.conversation import BadSample, open_image
from nanochat.image_modes import plan, preprocess
from nanochat.mixture import Mixture, Stream, draws

UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError)  # what malformed rows give rise to


class Sampler:
    """
    Turns conversation i of a task into a Sample. Picklable: it travels to the loader's workers. mode: a Mode, or several, which
    samples take in turn, shifted by one in every round of a mixture, so that no task keeps to one of them. Samples that do not fit:
    bad_data  raise | skip: null or empty text, unreadable picture, missing column, ...; what is skipped is counted and named on stderr
    too_long  raise | clip | drop: over max_tokens positions. Text is clipped at its end; a sample is dropped where that would cut an
              image or leave no answer, or if it has over max_images images
    pack      positions of a row for several samples, with max_images images at most; 0 = one sample a row
    multiple  rows are padded to a multiple of so many positions: few shapes, where each is compiled on its own
    """
    def __init__(self, task, tokenizer, mode, stride, max_tokens, bad_data="raise", too_long="raise", max_images=16, pack=0, multiple=1):
        if pack and pack < max_tokens:
            raise ValueError(f"--pack={pack}: a packed row must hold the longest sample, --max-seq-len={max_tokens} positions")
        self.modes = mode if isinstance(mode, list) else [mode]
        for mode in self.modes:
            plan(mode, 1, 1, stride)  # a stride that does not fit the mode raises now: it is no fault of the data
        self.task, self.tokenizer, self.stride, self.max_tokens = task, tokenizer, stride, max_tokens
        self.bad_data, self.too_long, self.max_images, self.pack, self.multiple = bad_data, too_long, max_images, pack, multiple
        self.mixture = task if isinstance(task, Mixture) else Mixture([(task, 1)])
        self.counters = [*COUNTS, *(f"drawn/{name}" for name in self.mixture.names)]

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        t, row = self.mixture.place(i)
        return self.sample(i, t, f"{self.mixture.names[t]} row {row}", partial(self.mixture.tasks[t].__getitem__, row))

    def sample(self, i, t, where, get):
        """Conversation get(), number i of the mixture and of its task number t -> Sample. where: data set and row, for errors."""
        mode = self.modes[(i + i // len(self.mixture.cycle)) % len(self.modes)]
        counts = {f"drawn/{self.mixture.names[t]}": 1}
        try:
            conversation = get()
            for m in conversation["messages"]:
                parts = m["content"] if isinstance(m["content"], (list, tuple)) else [{"type": "text", "text": m["content"]}]
                if m["role"] != "system" and not any(p["type"] == "image" or (p["text"] or "").strip() for p in parts):
                    raise BadSample(f"{where}: a message of the {m['role']} is null or empty")
            images = [preprocess(open_image(image, where), mode, self.stride) for image in conversation["images"]]
            ids, mask = self.tokenizer.render_conversation(conversation, [p.positions for p, _, _ in images])
            if not any(mask):
                raise BadSample(f"{where}: nothing for the assistant to say")
        except UNUSABLE as e:
            bad = e if isinstance(e, BadSample) else BadSample(f"{where}: {type(e).__name__}: {e}")
            if self.bad_data != "skip":
                raise bad from e.__cause__ if bad is e else e
            sys.stderr.write(f"skipped {bad}\n")  # in one piece: several workers write
            return Sample([], counts={**counts, "bad": 1})
        end = self.max_tokens + 1  # the last token is only a target
        if len(ids) > end or len(images) > self.max_images:
            if self.too_long == "raise":
                raise ValueError(f"{where}: conversation {conversation.get('id', '?')} takes {len(ids) - 1} positions and {len(images)} "
                                 f"images, the limit is {self.max_tokens} and {self.max_images}: raise --max-seq-len or --max-images, "
                                 f"use shorter pages, or --too-long=clip|drop")
            whole = len(images) <= self.max_images and self.tokenizer.image_token_id not in ids[end:] and any(mask[1:end])
            if self.too_long == "drop" or not whole:
                return Sample([], counts={**counts, "dropped": 1})
            ids, mask, counts = ids[:end], mask[:end], {**counts, "clipped": 1}
        said = [token for token, m in zip(ids, mask) if m and token < len(self.tokenizer.ranks)]
        return Sample(ids, mask, images, len(self.tokenizer.decode(said)), counts)


def micro_batches(start, stop, size, rank, world):
    """The samples of this rank's micro-batches start..stop-1: number k holds (k * world + rank) * size ... + size."""
    return [range(first, first + size) for first in ((k * world + rank) * size for k in range(start, stop))]


class StreamBatches(torch.utils.data.IterableDataset):
    """Micro-batches start..stop-1 of a rank; number k is made by worker k % workers, which is the order in which DataLoader asks them."""
    def __init__(self, sampler, collate, size, start, stop, rank, world, workers, states):
        self.sampler, self.collate, self.size, self.start, self.stop = sampler, collate, size, start, stop
        self.rank, self.world, self.workers, self.states = rank, world, workers, states

    def __iter__(self):
        mixture, worker = self.sampler.mixture, getattr(torch.utils.data.get_worker_info(), "id", 0)
        state = self.states.get(str(worker)) or {"drawn": 0, "parts": [None] * len(mixture.tasks)}
        drawn, parts = state["drawn"], list(state["parts"])
        shares = (self.rank, self.world, worker, self.workers)
        sources = [task.draws(*shares, part) if isinstance(task, Stream) else draws(task, name, *shares, part)
                   for task, name, part in zip(mixture.tasks, mixture.names, parts)]
        for k in range(self.start - self.start % self.workers + worker, self.stop, self.workers):
            if k < self.start:
                yield None  # its turn in this round was before the stop
                continue
            samples = []
            for drawn in range(drawn + 1, drawn + self.size + 1):
                t, _ = mixture.cycle[(drawn - 1) % len(mixture.cycle)]
                where, get, parts[t] = next(sources[t])
                samples.append(self.sampler.sample(drawn - 1, t, where, get))
            yield replace(self.collate(samples), state={"worker": worker, "workers": self.workers, "drawn": drawn, "parts": list(parts)})


def loader(sampler, size, start, stop, rank=0, world=1, workers=0, pin_memory=False, states=None):
    """
    Iterator of Batch for micro-batches start..stop-1 of this rank. A task with indices must be long enough: nothing is repeated.
    states: {worker: Batch.state of its last batch}, for a stream that goes on.
    """
    make = partial(collate, pack=sampler.pack, max_images=sampler.max_images, multiple=sampler.multiple)
    common = dict(num_workers=workers, pin_memory=pin_memory, prefetch_factor=4 if workers else None)
    if sampler.mixture.streams:
        if any(s["workers"] != max(1, workers) for s in (states or {}).values()):
            raise ValueError(f"--workers={workers}: a stream goes on with as many workers as it was begun with")
        stream = StreamBatches(sampler, make, size, start, stop, rank, world, max(1, workers), states or {})
        return filter(None, torch.utils.data.DataLoader(stream, batch_size=None, **common))
    needed = stop * world * size
    if needed > len(sampler):
        raise ValueError(f"{stop} micro-batches of {size} on {world} ranks need {needed} samples, the task has {len(sampler)}")
    return iter(torch.utils.data.DataLoader(
        sampler, batch_sampler=micro_batches(start, stop, size, rank, world), collate_fn=make, **common))


def ahead(batches, device):
    """
    The same batches, their pixels on the device. On CUDA the next batch's travel on a stream of their own while this one is computed
    with; the rest of a batch is small, and the model takes it from pinned memory itself.
    """
    def send(batch):
        batch.views = {side: v.to(device, non_blocking=True) for side, v in batch.views.items()}
        return batch
    if device.type != "cuda":
        yield from map(send, batches)
        return
    copies, waiting = torch.cuda.Stream(), None
    for batch in batches:
        with torch.cuda.stream(copies):
            sent = send(batch)
        if waiting is not None:
            yield waiting
        torch.cuda.current_stream().wait_stream(copies)
        for v in sent.views.values():
            v.record_stream(torch.cuda.current_stream())  # its memory is not given away before this stream is done with it
        waiting = sent
    if waiting is not None:
        yield waiting
