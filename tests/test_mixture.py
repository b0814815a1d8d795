"""
Proves that a mixture keeps its shares in every cycle, also when mixtures are nested; that Shuffled
takes every sample once an epoch; and that a stream gives each row once an epoch and goes on from
the state of any sample. (What the loader makes of them: tests/test_dataloader.py.)

    python -m pytest tests/test_mixture.py
"""
import json
from collections import Counter
from itertools import islice

import pytest

from nanochat.conversation import Task
from nanochat.mixture import First, Mixture, Shuffled, Stream, draws

# -----------------------------------------------------------------------------
# Mixture


def items(letter, n):
    """A plain list will do as a task: ["a0", "a1", ...]"""
    return [f"{letter}{i}" for i in range(n)]


def test_each_cycle_has_the_shares():
    mixture = Mixture([(items("a", 60), 6), (items("b", 30), 3), (items("c", 11), 1)])
    assert len(mixture) == 100  # c's eleventh item would begin a cycle that a and b cannot fill
    drawn = [mixture[i] for i in range(100)]
    for start in range(0, 100, 10):
        letters = Counter(item[0] for item in drawn[start:start + 10])
        assert letters == {"a": 6, "b": 3, "c": 1}


def test_each_task_is_read_once_in_its_own_order():
    mixture = Mixture([(items("a", 60), 6), (items("b", 30), 3), (items("c", 11), 1)])
    drawn = [mixture[i] for i in range(100)]
    for letter, n in (("a", 60), ("b", 30), ("c", 10)):
        assert [item for item in drawn if item[0] == letter] == items(letter, n)


def test_shares_are_spread_evenly_over_a_cycle():
    assert "".join(Mixture([("aaaaaa", 3), ("bbbb", 2)])) == "ababaababa"
    drawn = "".join(Mixture([("a" * 90, 90), ("b" * 10, 10)]))  # 90:10 is 9:1
    for start in range(0, 100, 10):
        assert drawn[start:start + 10].count("b") == 1


def test_a_nested_mixture_keeps_all_proportions():
    inner = Mixture([(items("a", 900), 1), (items("b", 900), 2)])
    # 3 of 7 samples are a and b in 1:2.
    mixture = Mixture([(inner, 3), (items("c", 900), 4)])
    assert mixture.shares == [1, 2, 4]
    # 2 of 5 samples are a and b in 1:2: that takes a cycle of 15.
    mixture = Mixture([(inner, 2), (items("c", 900), 3)])
    assert mixture.shares == [2, 4, 9] and len(mixture.cycle) == 15
    # Two levels deep.
    mixture = Mixture([(mixture, 1), (items("d", 900), 1)])
    assert mixture.shares == [2, 4, 9, 15]


def test_tasks_of_one_name_are_numbered():
    mixture = Mixture([([1], 1), (Shuffled([2], 1, 0), 1), ("3", 1)])
    assert mixture.names == ["list-0", "list-1", "str"]


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_shares_are_positive_integers(share):
    with pytest.raises(ValueError, match=f"share {share} of list: must be a positive integer"):
        Mixture([(items("a", 60), share)])


# -----------------------------------------------------------------------------
# Shuffled


def test_shuffled_takes_each_sample_once_an_epoch():
    task = Shuffled(range(20), 60, seed=0)
    drawn = [task[i] for i in range(len(task))]
    epochs = [drawn[:20], drawn[20:40], drawn[40:]]
    for epoch in epochs:
        assert sorted(epoch) == list(range(20))
    assert epochs[0] != epochs[1] != epochs[2]


def test_shuffled_depends_on_seed_and_index_alone():
    in_order = [Shuffled(range(20), 40, seed=0)[i] for i in range(40)]
    task = Shuffled(range(20), 40, seed=0)
    backwards = [task[i] for i in reversed(range(40))]
    assert backwards[::-1] == in_order
    assert [Shuffled(range(20), 40, seed=1)[i] for i in range(40)] != in_order


# -----------------------------------------------------------------------------
# Streams, of one worker: several need the loader

ROWS = 42  # seven to a shard
WINDOW = 5


def rows_of(shards):
    for shard in shards:
        for k in range(7):
            yield {"text": f"{shard}.{k}"}


def to_conversation(row, where):
    return row["text"]


def stream(shards=6, seed=0):
    datasets = pytest.importorskip("datasets")
    kwargs = {"shards": list(range(shards))}
    rows = datasets.IterableDataset.from_generator(rows_of, gen_kwargs=kwargs)
    return Stream(rows, to_conversation, "texts", WINDOW, seed)


def read(source, n, state=None, rank=0, world=1):
    """n samples -> [(where, text, state after it)], the states through JSON as in a checkpoint."""
    found = []
    for where, get, after in islice(source.draws(rank, world, 0, 1, state), n):
        found.append((where, get(), json.loads(json.dumps(after))))
    return found


def texts(found):
    return [text for _, text, _ in found]


@pytest.mark.parametrize("world", [1, 2])
def test_a_stream_gives_each_row_once_an_epoch(world):
    everything = list(rows_of(range(6)))
    n = ROWS // world
    for epoch in range(2):
        drawn = []
        for rank in range(world):
            drawn += texts(read(stream(), 2 * n, rank=rank, world=world))[epoch * n:(epoch + 1) * n]
        assert sorted(drawn) == sorted(row["text"] for row in everything)


def test_a_stream_is_shuffled_within_windows():
    in_order = [row["text"] for row in rows_of(range(6))]
    first = texts(read(stream(), ROWS))
    assert first != in_order
    for start in range(0, ROWS, WINDOW):
        assert sorted(first[start:start + WINDOW]) == sorted(in_order[start:start + WINDOW])
    assert texts(read(stream(seed=1), ROWS)) != first


@pytest.mark.parametrize("stop", [1, WINDOW - 1, WINDOW, 21, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS])
def test_a_stream_goes_on_after_any_sample(stop):
    """Within a window, at its end, and at the end of an epoch."""
    unbroken = read(stream(), 3 * ROWS)
    state = unbroken[stop - 1][2]
    resumed = read(stream(), 3 * ROWS - stop, state)
    assert len(resumed) == len(unbroken) - stop
    for expected, found in zip(unbroken[stop:], resumed):
        assert found[:2] == expected[:2]  # where it is, and its text


def test_an_error_in_a_row_does_not_end_the_stream():
    source = stream()
    source.to_conversation = to_number
    failed = 0
    for _, get, _ in islice(source.draws(0, 1, 0, 1, None), ROWS):
        try:
            get()
        except ValueError:
            failed += 1
    assert failed == 7  # shard 0


def to_number(row, where):
    if row["text"].startswith("0."):
        raise ValueError(where)
    return float(row["text"])


def test_a_stream_without_rows_is_named():
    with pytest.raises(ValueError, match="texts has no row for worker 0 of 1 on rank 0 of 1"):
        read(stream(shards=0), 1)


def test_first_keeps_rows_of_a_streamed_set():
    first = First(stream(), 10)
    assert len(first) == 10 and [*first] == [row["text"] for row in islice(rows_of(range(6)), 10)]
    with pytest.raises(IndexError, match="index 10 is out of range: First has 10 items"):
        first[10]


def test_indexed_tasks_beside_a_stream_share_their_rows_out():
    task = items("a", 24)
    drawn = []
    for rank in range(2):
        for worker in range(3):
            for where, get, _ in islice(draws(task, "letters", rank, 2, worker, 3, None), 4):
                drawn.append(get())
                assert where == f"letters row {drawn[-1][1:]}"
    assert sorted(drawn) == sorted(task)


def test_indexed_tasks_beside_a_stream_resume():
    task = items("a", 7)
    unbroken = list(islice(draws(task, "letters", 0, 1, 0, 1, None), 20))
    _, _, state = unbroken[9]
    resumed = list(islice(draws(task, "letters", 0, 1, 0, 1, state), 10))
    assert [get() for _, get, _ in resumed] == [get() for _, get, _ in unbroken[10:]]


# -----------------------------------------------------------------------------
# Task


class Letters(Task):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        self.check_index(i)
        return "ab"[i]


def test_what_a_task_says_of_itself_by_default():
    task = Letters()
    assert list(task) == ["a", "b"]  # a plain for loop ends
    assert task.name == "Letters" and task.answer_metric is None
    assert task.truth(0) is None and task.image_name(0) is None
    task.name = "mine"
    assert Mixture([(task, 1)]).names == ["mine"]
