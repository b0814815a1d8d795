"""
From conversations to batches: task -> tokens and pixels -> Batch.

Which samples micro-batch k of rank r holds is arithmetic on indices, so any step can be rebuilt and
a resumed run sees exactly what the unbroken one would have seen. Where a set can only be read in
order (Stream), every batch carries the state from which reading goes on.
"""
import codecs
import math
import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from nanochat.batch import COUNTS, NO_GLYPH, Sample, collate
from nanochat.common import banner
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
    def __init__(self, task, tokenizer, mode, layout, max_tokens, bad_data="raise",
                 too_long="raise", max_images=16, pack=0, multiple=1, labels=()):
        if pack and pack < max_tokens:
            raise ValueError(f"--pack={pack}: a packed row must hold the longest sample, "
                             f"--max-seq-len={max_tokens} positions")
        self.modes = mode if isinstance(mode, list) else [mode]
        for each_mode in self.modes:
            # A layout that does not fit raises here; later it would pass for bad data.
            plan(each_mode, 1, 1, layout)
        self.tokenizer = tokenizer
        self.layout = layout
        self.max_tokens = max_tokens
        self.bad_data = bad_data
        self.too_long = too_long
        self.max_images = max_images
        self.pack = pack
        self.multiple = multiple
        self.labels = tuple(labels)
        # One path for all tasks: a single one is a mixture of one.
        self.mixture = task if isinstance(task, Mixture) else Mixture([(task, 1)])
        # Names of all counts that a batch may have: what ranks add up must have equal names.
        self.counters = list(COUNTS)
        for name in self.mixture.names:
            self.counters.append(f"drawn/{name}")

    def __len__(self):
        return len(self.mixture)

    def __getitem__(self, i):
        t, row = self.mixture.place(i)
        task = self.mixture.tasks[t]
        where = f"{self.mixture.names[t]} row {row}"
        # The row is not read here: `sample` deals with whatever goes wrong while reading it.
        return self.sample(i, t, where, partial(task.__getitem__, row))

    def sample(self, i, t, where, get):
        """
        get(), a function that gives a conversation -> Sample. It is number i of the mixture and
        comes from task number t; where: data set and row, for error messages.
        """
        name = self.mixture.names[t]
        drawn = {f"drawn/{name}": 1}
        mode = self.mode_of(i)
        try:
            conversation, sample = self.read(get, mode, where)
        except BadSample as bad:
            if self.bad_data != "skip":
                raise
            # One write for the whole line: print() makes two, and several workers write at once.
            sys.stderr.write(f"skipped {bad}\n")
            return Sample([], counts={**drawn, "bad": 1})

        # Outside of the try: a sample that is too long is sound, so --bad-data must not skip it.
        sample, cut = self.fit(sample, with_id(where, conversation))
        if sample is None:
            return Sample([], counts={**drawn, **cut})
        characters = self.supervised_characters(sample)  # after the cut
        counts = {**drawn, **cut}
        knows_letters = any("glyphs" in kinds for kinds in sample.labels)
        if knows_letters and not sample.glyphs:
            counts["no_places"] = 1
        return sample._replace(characters=characters, counts=counts)

    def mode_of(self, i):
        """
        The mode of sample i. Samples take the modes in turn; each round of the mixture starts one
        further, or with as many tasks as modes each task would only ever be seen in one mode.
        """
        rounds = i // len(self.mixture.cycle)
        turn = (i + rounds) % len(self.modes)
        return self.modes[turn]

    # -------------------------------------------------------------------------
    # Reading

    def read(self, get, mode, where):
        """-> (conversation, Sample of any length); BadSample for whatever is wrong with the row."""
        try:
            conversation = get()
            where = with_id(where, conversation)
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
            images.append(preprocess(image, mode, self.layout))
            if self.labels:
                sizes.append(upright_size(image))

        plans = [image_plan for image_plan, _, _ in images]
        positions = [image_plan.positions for image_plan in plans]
        ids, mask = self.tokenizer.render_conversation(conversation, positions)
        if not any(mask):
            raise BadSample(f"{where}: there is nothing for the assistant to say")

        sample = Sample(ids, mask, images)
        if not self.labels:
            return sample
        labels = self.map_labels(conversation, plans, sizes, where)
        image_at = first_positions(ids, positions, self.tokenizer.image_token_id)
        glyphs = glyphs_of_tokens(self.tokenizer, ids, mask, labels)
        return sample._replace(labels=labels, image_at=image_at, glyphs=glyphs)

    def map_labels(self, conversation, plans, sizes, where):
        """conversation["labels"], in page px -> Sample.labels, in tokens of each image's views."""
        given = conversation.get("labels", [{} for _ in plans])  # most tasks have none
        if len(given) != len(plans):
            raise BadSample(f"{where}: {len(given)} labels for {len(plans)} images: "
                            f"there must be one dict of labels for each image")
        mapped = []
        for image_plan, size, kinds in zip(plans, sizes, given):
            found = {}
            for kind in self.labels:
                if kind in kinds:
                    found[kind] = map_points(kinds[kind], image_plan, size)
            mapped.append(found)
        return mapped

    # -------------------------------------------------------------------------
    # Fitting

    def fit(self, sample, name):
        """-> (the Sample, clipped if it is too long, or None; {what that counts as: 1})."""
        end = self.max_tokens + 1  # the last token is only a target
        too_many_images = len(sample.images) > self.max_images
        if len(sample.ids) <= end and not too_many_images:
            return sample, {}
        if self.too_long == "raise":
            raise ValueError(
                f"{name} takes {sample.positions} positions and {len(sample.images)} images, "
                f"the limit is {self.max_tokens} and {self.max_images}: raise --max-seq-len or "
                f"--max-images, use shorter pages, or --too-long=clip|drop")

        # A cut image has more features than placeholders; without an answer there is no loss.
        cuts_an_image = self.tokenizer.image_token_id in sample.ids[end:]
        leaves_an_answer = any(sample.mask[1:end])
        can_be_clipped = not too_many_images and not cuts_an_image and leaves_an_answer
        if self.too_long == "drop" or not can_be_clipped:
            return None, {"dropped": 1}
        clipped = sample._replace(ids=sample.ids[:end], mask=sample.mask[:end],
                                  glyphs=sample.glyphs[:end])
        return clipped, {"clipped": 1}

    def supervised_characters(self, sample):
        # From tokens, since the text may have been cut. <|assistant_end|> has no characters.
        first_special = len(self.tokenizer.ranks)
        said = [token for token, supervised in zip(sample.ids, sample.mask)
                if supervised and token < first_special]
        return len(self.tokenizer.decode(said))


def with_id(where, conversation):
    """
    `where`, with the conversation's own name: of a folder's page the file, of a shuffled row its
    number in the data set.
    """
    id = conversation.get("id")
    return where if id is None or str(id) in where else f"{where}: conversation {id}"


def map_points(labels, image_plan, page_size):
    """[(value, x, y), ...] in page px -> (values, {side in px: TokenPoints})."""
    values = []
    points = []
    for value, x, y in labels:
        values.append(value)
        points.append((x, y))
    return values, to_tokens(image_plan, page_size, points)


def first_positions(ids, positions, image_token_id):
    """Where in ids each image begins; positions: how many placeholders each one has."""
    found = []
    start = 0
    for n in positions:
        first = ids.index(image_token_id, start)
        found.append(first)
        start = first + n
    return found


def glyphs_of_tokens(tokenizer, ids, mask, labels):
    """
    -> Sample.glyphs. Empty unless there is one image, with labels, and its glyphs, in their order,
    spell what the assistant says, but for whitespace. Glyphs before that text are page headers and
    the like, which nobody is asked to read.
    """
    if len(labels) != 1 or "glyphs" not in labels[0]:
        return ()
    printed, _ = labels[0]["glyphs"]
    decoder = codecs.getincrementaldecoder("utf-8")()
    spelled = []  # characters said so far
    first_characters = []  # of each token: which of `spelled` it begins with
    for token, supervised in zip(ids, mask):
        first = NO_GLYPH
        if supervised and token < len(tokenizer.ranks):
            inside_a_character = has_bytes_left(decoder)
            characters = "".join(decoder.decode(tokenizer.decode_bytes([token])).split())
            # A character of several tokens is the glyph of the first of them.
            begins_one = characters or has_bytes_left(decoder)
            if begins_one and not inside_a_character:
                first = len(spelled)
            spelled.extend(characters)
        first_characters.append(first)

    before = len(printed) - len(spelled)
    # The edge of the page may have cut off a letter, or the answer may not be what is printed, as
    # with a table: then it is not known which glyph a token stands for.
    if before < 0 or list(printed[before:]) != spelled:
        return ()
    return [NO_GLYPH if first == NO_GLYPH else before + first for first in first_characters]


def has_bytes_left(decoder):
    """Whether an incremental decoder waits for the rest of a character."""
    undecoded, _ = decoder.getstate()
    return bool(undecoded)


def check_texts(messages, where):
    """BadSample if a message, other than a system message, has neither text nor an image."""
    for message in messages:
        content = message["content"]
        if not isinstance(content, (list, tuple)):
            content = [{"type": "text", "text": content}]
        # An empty answer would teach the model to say nothing. An empty system message is usual.
        if message["role"] != "system" and not any(map(says_something, content)):
            raise BadSample(f"{where}: a message of the {message['role']} is null or empty")


def says_something(part):
    if part["type"] == "image":
        return True
    text = part["text"] or ""  # hub sets have null here
    return bool(text.strip())


# -----------------------------------------------------------------------------
# Batches

MAX_WORKERS = 24  # per rank: more would only fill memory with batches that wait
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
PREFETCH = 2  # batches each worker is ahead, so that one slow page does not stop a step


def usable_cores():
    """Cores that this process may use: what a container or a batch system leaves us of them."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS
        cores = os.cpu_count()
    # A container may have a share of the time of all cores instead (docker run --cpus).
    if os.path.exists(CPU_QUOTA):
        quota, period = Path(CPU_QUOTA).read_text().split()  # microseconds, or "max"
        if quota != "max":
            cores = min(cores, math.ceil(int(quota) / int(period)))
    return cores


def loader_workers(asked):
    """
    Data loader processes of this rank. -1: its share of the cores that this process may use, minus
    two for training itself, at most MAX_WORKERS.
    """
    if asked >= 0:
        return asked
    if asked != -1:
        raise ValueError(f"--workers={asked}: must be -1 (as many as the cores allow), 0 or more")
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(MAX_WORKERS, usable_cores() // ranks_here - 2))


def batch_bytes(sampler, size):
    """Roughly what a batch takes in memory if every sample has one large page."""
    largest = 0  # bytes of a sample's pixels
    for mode in sampler.modes:
        page_side = 2 * mode.size  # px, large enough for a tiled mode to cut tiles
        views = plan(mode, page_side, page_side, sampler.layout).views
        pixels = sum(3 * side ** 2 * n for side, n in views.items())
        largest = max(largest, pixels)
    numbers = 3 * 8 * sampler.max_tokens  # ids, targets and positions, int64 each
    return size * (largest + numbers)


def workers_that_fit(sampler, size, asked, room=None):
    """
    loader_workers(asked), whose waiting batches may not fit into shared memory, where workers put
    them. In a full one a worker dies with a bus error, hours into a run. So -1 gives as many as
    fit, and for a number that was asked for there is a warning.
    room: bytes; default: the size of /dev/shm. (What is free there now is not the same for every
    rank, and streams need as many workers when they are resumed.)
    """
    workers = loader_workers(asked)
    if room is None:
        if not workers or not os.path.isdir("/dev/shm"):
            return workers
        room = shutil.disk_usage("/dev/shm").total
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    batch = batch_bytes(sampler, size)
    per_worker = ranks_here * (PREFETCH + 1) * batch  # one more is being made
    if workers * per_worker <= room:
        return workers

    fitting = int(room // per_worker)
    used = fitting if asked == -1 else workers
    waiting = workers * ranks_here * (PREFETCH + 1)
    banner(f"{workers} workers on {ranks_here} ranks may put {waiting} batches of "
           f"{batch / 1e6:,.0f} MB, {workers * per_worker / 1e9:.1f} GB together,\ninto /dev/shm, "
           f"which has {room / 1e9:.1f} GB: enough for {fitting} workers. --workers={asked} "
           f"starts {used}.\nGive the container more (docker run --shm-size), or lower "
           f"--device-batch-size or --workers.")
    return used


def loader(sampler, size, start, stop, rank=0, world=1, workers=0, pin_memory=False, states=None):
    """
    Iterator of Batch: micro-batches start..stop-1 of this rank, of `size` samples each. A task with
    indices must be long enough, since no sample is repeated.
    workers: as for loader_workers. states: {worker: Batch.state of its last batch}, from which a
    stream goes on.
    """
    workers = workers_that_fit(sampler, size, workers)
    make_batch = partial(collate, pack=sampler.pack, max_images=sampler.max_images,
                         multiple=sampler.multiple)
    common = {
        "num_workers": workers,
        "pin_memory": pin_memory,
        "prefetch_factor": PREFETCH if workers else None,  # without workers it has to be None
    }
    if sampler.mixture.streams:
        states = states or {}
        check_workers(states, workers)
        dataset = StreamBatches(sampler, make_batch, size, start, stop, rank, world,
                                max(1, workers), states)
        # batch_size=None: the data set makes whole batches itself.
        batches = torch.utils.data.DataLoader(dataset, batch_size=None, **common)
        return filter(None, raising(iter(batches)))  # drops the None of turns before `start`

    # Fail now, and not in a worker after hours.
    needed = stop * world * size
    if needed > len(sampler):
        raise ValueError(f"{stop} micro-batches of {size} on {world} ranks need {needed} samples, "
                         f"the task has {len(sampler)}")
    indices = micro_batches(start, stop, size, rank, world)
    dataset = MicroBatches(sampler, make_batch)
    batches = torch.utils.data.DataLoader(dataset, sampler=indices, batch_size=None, **common)
    return raising(iter(batches))  # workers begin at once


def micro_batches(start, stop, size, rank, world):
    """Yields the sample numbers of this rank's micro-batches start..stop-1, each a range."""
    for k in range(start, stop):
        first = (k * world + rank) * size
        yield range(first, first + size)


def check_workers(states, workers):
    # Each worker reads its own shards, so a state means nothing to another number of workers.
    for state in states.values():
        if state["workers"] != max(1, workers):
            raise ValueError(f"--workers={workers}: the stream was begun with "
                             f"{state['workers']}, resume with as many workers")


class Failure:
    """
    An error in a worker, on its way to the main process. DataLoader would send it along with the
    worker's traceback of twenty lines, which tells nothing about a bad sample.
    """
    def __init__(self, error):
        self.is_bad_sample = isinstance(error, BadSample)
        self.message = str(error)  # some errors of other libraries cannot be pickled

    def raise_again(self):
        raise (BadSample if self.is_bad_sample else ValueError)(self.message)


def in_a_worker():
    return torch.utils.data.get_worker_info() is not None


def raising(batches):
    """The same batches; a Failure among them is raised."""
    for batch in batches:
        if isinstance(batch, Failure):
            batch.raise_again()
        yield batch


class MicroBatches(torch.utils.data.Dataset):
    """The micro-batch of any range of sample numbers."""
    def __init__(self, sampler, collate):
        self.sampler = sampler
        self.collate = collate

    def __getitem__(self, indices):
        try:
            return self.collate([self.sampler[i] for i in indices])
        except (ValueError, OSError) as error:
            if not in_a_worker() or os.environ.get("NANOCHAT_TRACEBACK"):
                raise
            return Failure(error)


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
        try:
            yield from self.batches()
        except (ValueError, OSError) as error:
            if not in_a_worker() or os.environ.get("NANOCHAT_TRACEBACK"):
                raise
            yield Failure(error)

    def batches(self):
        info = torch.utils.data.get_worker_info()
        worker = info.id if info else 0
        shares = (self.rank, self.world, worker, self.workers)
        before = self.states.get(str(worker))  # the states went through JSON, whose keys are text
        reader = StreamReader(self.sampler, shares, before)

        # DataLoader's round begins with worker 0. On resume in the middle of a round, workers
        # that had their turn before the stop pass it with None, which `loader` leaves out.
        round_start = self.start - self.start % self.workers
        first = round_start + worker
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
        for t, task in enumerate(self.mixture.tasks):
            if isinstance(task, Stream):
                source = task.draws(*shares, self.states[t])
            else:
                source = draws(task, self.mixture.names[t], *shares, self.states[t])
            self.sources.append(source)

    def next_sample(self):
        i = self.drawn
        t, _ = self.mixture.place(i)  # the row does not matter: the source knows where it is
        source = self.sources[t]
        where, get, self.states[t] = next(source)
        self.drawn += 1
        return self.sampler.sample(i, t, where, get)

    def state(self):
        # These names are in checkpoints. A copy of the list, because it changes with every draw.
        return {"drawn": self.drawn, "parts": list(self.states)}


def ahead(batches, device):
    """
    The same batches with their pixels on the device. On CUDA the next batch's pixels are copied
    while the current batch is computed. The rest of a batch is small: the model copies it from
    pinned memory when it needs it.
    """
    if device.type != "cuda":
        for batch in batches:
            yield send_pixels(batch, device)
        return

    copies = torch.cuda.Stream()  # on a stream of their own, copies do not queue behind kernels
    waiting = None  # the batch whose pixels were sent in the last turn
    for batch in batches:
        with torch.cuda.stream(copies):
            sent = send_pixels(batch, device)
        # One batch late: its step is launched after the copy of the next batch has begun.
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
