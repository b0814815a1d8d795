"""
From conversations to batches: task -> tokens and pixels -> Batch.

Which samples micro-batch k of rank r holds is arithmetic on indices, so any step can be rebuilt and
a resumed run sees exactly what the unbroken one would have seen. Where a set can only be read in
order (Stream), every batch carries the state from which reading goes on.
"""
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from nanochat.batch import COUNTS, Sample, collate
from nanochat.conversation import BadSample, open_image
from nanochat.image_modes import plan, preprocess, to_tokens, upright_size
from nanochat.mixture import Mixture, Stream, draws

# What malformed rows raise. Other errors (a full disk, a lost connection) are not the row's fault.
UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, FileNotFoundError)


class Sampler:
    """
    Turns conversation i of a task into a Sample. Picklable: it travels to the loader's workers.

    mode       a Mode, or a list of modes, which samples take in turn
    max_tokens positions a sample may have, its images included
    bad_data   raise | skip: null or empty text, unreadable picture, missing column, ...; a skipped
               sample is counted, and named on stderr
    too_long   raise | clip | drop: samples over max_tokens or max_images. Clipping cuts the end of
               the text; where that would cut an image or leave no answer, and where there are too
               many images, the sample is dropped
    max_images images of a sample, and of a packed row
    pack       positions of a row that holds several samples; 0 = one sample a row
    multiple   rows are padded to a multiple of so many positions: compiled kernels are made for
               one shape each, so there should be few shapes
    labels     kinds of labels to carry along, e.g. ("glyphs",), of those in conversation["labels"]
    """
    def __init__(self, task, tokenizer, mode, stride, max_tokens, bad_data="raise",
                 too_long="raise", max_images=16, pack=0, multiple=1, labels=()):
        if pack and pack < max_tokens:
            raise ValueError(f"--pack={pack}: a packed row must hold the longest sample, "
                             f"--max-seq-len={max_tokens} positions")
        self.modes = mode if isinstance(mode, list) else [mode]
        for mode in self.modes:
            # A stride that does not fit raises here; later it would pass for bad data.
            plan(mode, 1, 1, stride)
        self.task = task
        self.tokenizer = tokenizer
        self.stride = stride
        self.max_tokens = max_tokens
        self.bad_data = bad_data
        self.too_long = too_long
        self.max_images = max_images
        self.pack = pack
        self.multiple = multiple
        self.labels = tuple(labels)
        self.mixture = task if isinstance(task, Mixture) else Mixture([(task, 1)])
        self.counters = [*COUNTS, *(f"drawn/{name}" for name in self.mixture.names)]

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        t, row = self.mixture.place(i)
        where = f"{self.mixture.names[t]} row {row}"
        return self.sample(i, t, where, partial(self.mixture.tasks[t].__getitem__, row))

    def sample(self, i, t, where, get):
        """
        get(), a function that gives a conversation -> Sample. It is number i of the mixture and
        comes from task number t; where: data set and row, for error messages.
        """
        drawn = {f"drawn/{self.mixture.names[t]}": 1}
        try:
            conversation, sample = self.read(get, self.mode_of(i), where)
        except BadSample as bad:
            if self.bad_data != "skip":
                raise
            sys.stderr.write(f"skipped {bad}\n")  # one write, since several workers write
            return Sample([], counts={**drawn, "bad": 1})

        name = f"{where}: conversation {conversation.get('id', '?')}"
        sample, cut = self.fit(sample, name)
        characters = self.supervised_characters(sample)
        return sample._replace(characters=characters, counts={**drawn, **cut})

    def mode_of(self, i):
        """
        The mode of sample i. Samples take the modes in turn; each round of the mixture starts one
        further, or with as many tasks as modes each task would only ever be seen in one mode.
        """
        rounds = i // len(self.mixture.cycle)
        return self.modes[(i + rounds) % len(self.modes)]

    # -------------------------------------------------------------------------
    # Reading

    def read(self, get, mode, where):
        """-> (conversation, Sample of any length); BadSample for whatever is wrong with the row."""
        try:
            conversation = get()
            return conversation, self.render(conversation, mode, where)
        except BadSample:
            raise
        except UNUSABLE as e:
            raise BadSample(f"{where}: {type(e).__name__}: {e}") from e

    def render(self, conversation, mode, where):
        """Conversation -> Sample of any length: pixels, tokens and, where wanted, labels."""
        check_texts(conversation["messages"], where)
        images = []
        sizes = []
        for source in conversation["images"]:
            image = open_image(source, where)
            images.append(preprocess(image, mode, self.stride))
            if self.labels:
                sizes.append(upright_size(image))
        plans = [image_plan for image_plan, _, _ in images]
        ids, mask = self.tokenizer.render_conversation(conversation, [p.positions for p in plans])
        if not any(mask):
            raise BadSample(f"{where}: there is nothing for the assistant to say")
        labels = ()
        if self.labels:
            labels = self.map_labels(conversation, plans, sizes, where)
        return Sample(ids, mask, images, labels=labels, label_kinds=self.labels)

    def map_labels(self, conversation, plans, sizes, where):
        """conversation["labels"], in page px -> Sample.labels, in tokens of each image's views."""
        given = conversation.get("labels", [{} for _ in plans])
        if len(given) != len(plans):
            raise BadSample(f"{where}: {len(given)} labels for {len(plans)} images: "
                            f"there must be one dict of labels for each image")
        mapped = []
        for image_plan, size, kinds in zip(plans, sizes, given):
            found = {}
            for kind in self.labels:
                if kind in kinds:
                    values = [value for value, _, _ in kinds[kind]]
                    xy = np.array([(x, y) for _, x, y in kinds[kind]])
                    found[kind] = (values, to_tokens(image_plan, size, xy))
            mapped.append(found)
        return mapped

    # -------------------------------------------------------------------------
    # Fitting

    def fit(self, sample, name):
        """-> (the Sample, clipped or without ids if it is too long, what that counts as)."""
        end = self.max_tokens + 1  # the last token is only a target
        too_many_images = len(sample.images) > self.max_images
        if len(sample.ids) <= end and not too_many_images:
            return sample, {}
        if self.too_long == "raise":
            raise ValueError(
                f"{name} takes {sample.positions} positions and {len(sample.images)} images, "
                f"the limit is {self.max_tokens} and {self.max_images}: raise --max-seq-len or "
                f"--max-images, use shorter pages, or --too-long=clip|drop")

        cuts_an_image = self.tokenizer.image_token_id in sample.ids[end:]
        leaves_an_answer = any(sample.mask[1:end])
        can_be_clipped = not too_many_images and not cuts_an_image and leaves_an_answer
        if self.too_long == "drop" or not can_be_clipped:
            return Sample([]), {"dropped": 1}
        return sample._replace(ids=sample.ids[:end], mask=sample.mask[:end]), {"clipped": 1}

    def supervised_characters(self, sample):
        first_special = len(self.tokenizer.ranks)
        said = [token for token, supervised in zip(sample.ids, sample.mask)
                if supervised and token < first_special]
        return len(self.tokenizer.decode(said))


def check_texts(messages, where):
    """BadSample if a message, other than a system message, has neither text nor an image."""
    for message in messages:
        content = message["content"]
        if not isinstance(content, (list, tuple)):
            content = [{"type": "text", "text": content}]
        if message["role"] != "system" and not any(map(says_something, content)):
            raise BadSample(f"{where}: a message of the {message['role']} is null or empty")


def says_something(part):
    return part["type"] == "image" or bool((part["text"] or "").strip())


# -----------------------------------------------------------------------------
# Batches

def loader(sampler, size, start, stop, rank=0, world=1, workers=0, pin_memory=False, states=None):
    """
    Iterator of Batch: micro-batches start..stop-1 of this rank, of `size` samples each. A task with
    indices must be long enough, since no sample is repeated.
    states: {worker: Batch.state of its last batch}, from which a stream goes on.
    """
    make_batch = partial(collate, pack=sampler.pack, max_images=sampler.max_images,
                         multiple=sampler.multiple)
    common = {
        "num_workers": workers,
        "pin_memory": pin_memory,
        "prefetch_factor": 4 if workers else None,
    }
    if sampler.mixture.streams:
        states = states or {}
        check_workers(states, workers)
        dataset = StreamBatches(sampler, make_batch, size, start, stop, rank, world,
                                max(1, workers), states)
        batches = torch.utils.data.DataLoader(dataset, batch_size=None, **common)
        return filter(None, batches)  # without the turns that were before the start

    needed = stop * world * size
    if needed > len(sampler):
        raise ValueError(f"{stop} micro-batches of {size} on {world} ranks need {needed} samples, "
                         f"the task has {len(sampler)}")
    indices = micro_batches(start, stop, size, rank, world)
    return iter(torch.utils.data.DataLoader(
        sampler, batch_sampler=indices, collate_fn=make_batch, **common))


def micro_batches(start, stop, size, rank, world):
    """The sample numbers of this rank's micro-batches start..stop-1, each a range."""
    batches = []
    for k in range(start, stop):
        first = (k * world + rank) * size
        batches.append(range(first, first + size))
    return batches


def check_workers(states, workers):
    # Each worker reads its own shards, so a state means nothing to another number of workers.
    for state in states.values():
        if state["workers"] != max(1, workers):
            raise ValueError(f"--workers={workers}: the stream was begun with "
                             f"{state['workers']}, resume with as many workers")


class StreamBatches(torch.utils.data.IterableDataset):
    """
    Micro-batches start..stop-1 of a rank. Worker k % workers makes number k: that is the order in
    which DataLoader asks its workers, so batches arrive in order.
    """
    def __init__(self, sampler, collate, size, start, stop, rank, world, workers, states):
        self.sampler = sampler
        self.collate = collate
        self.size = size
        self.start = start
        self.stop = stop
        self.rank = rank
        self.world = world
        self.workers = workers
        self.states = states

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        shares = (self.rank, self.world, worker, self.workers)
        reader = StreamReader(self.sampler, shares, self.states.get(str(worker)))

        # DataLoader's round begins with worker 0. On resume in the middle of a round, workers
        # that had their turn before the stop pass it with None, which `loader` leaves out.
        first = self.start - self.start % self.workers + worker
        for k in range(first, self.stop, self.workers):
            if k < self.start:
                yield None
                continue
            samples = [reader.next_sample() for _ in range(self.size)]
            state = {"worker": worker, "workers": self.workers, **reader.state()}
            yield replace(self.collate(samples), state=state)


class StreamReader:
    """
    What one worker draws from the tasks of a mixture, and how far it is.
    shares: (rank, world, worker, workers); state: of `state()`, to go on from there.
    """
    def __init__(self, sampler, shares, state):
        self.sampler = sampler
        self.mixture = sampler.mixture
        self.drawn = 0  # samples, over all tasks
        self.states = [None] * len(self.mixture.tasks)  # how far each task is
        if state is not None:
            self.drawn = state["drawn"]
            self.states = list(state["parts"])

        self.sources = []
        for task, name, begin in zip(self.mixture.tasks, self.mixture.names, self.states):
            if isinstance(task, Stream):
                source = task.draws(*shares, begin)
            else:
                source = draws(task, name, *shares, begin)
            self.sources.append(source)

    def next_sample(self):
        i = self.drawn
        t, _ = self.mixture.place(i)
        where, get, self.states[t] = next(self.sources[t])
        self.drawn += 1
        return self.sampler.sample(i, t, where, get)

    def state(self):
        return {"drawn": self.drawn, "parts": list(self.states)}


def ahead(batches, device):
    """
    The same batches with their pixels on the device. On CUDA the next batch's pixels are copied on
    a stream of their own while the current batch is computed. The rest of a batch is small; the
    model copies it from pinned memory when it needs it.
    """
    if device.type != "cuda":
        for batch in batches:
            yield send_pixels(batch, device)
        return

    copies = torch.cuda.Stream()
    waiting = None
    for batch in batches:
        with torch.cuda.stream(copies):
            sent = send_pixels(batch, device)
        if waiting is not None:
            yield waiting
        compute = torch.cuda.current_stream()
        compute.wait_stream(copies)
        for stack in sent.views.values():
            # The allocator must not reuse this memory before the computing stream is done with it.
            stack.record_stream(compute)
        waiting = sent
    if waiting is not None:
        yield waiting


def send_pixels(batch, device):
    views = {}
    for side, stack in batch.views.items():
        views[side] = stack.to(device, non_blocking=True)
    batch.views = views
    return batch
