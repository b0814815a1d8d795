"""
Embedded data: pages depend on (arguments, index) only, truth and ink boxes are exact, and the splits cannot leak.

    python -m pytest tests/test_synthdoc.py
"""

import hashlib
import re

import pytest

from tasks import synthdoc
from nanochat.conversation import Task
from tasks.synthchat import SynthChat
from tasks.synthdoc import FACES, MIN_CHARS, SPLITS, SynthDoc, held_out_words, letters, prose, text_stream, train_words


def digest(conversation):
    return hashlib.sha256(conversation["images"][0].tobytes() + conversation["page"].truth.encode()).hexdigest()


def ink_box(image, paper):
    return image.convert("L").point([int(v != paper) for v in range(256)]).getbbox()


def test_a_page_depends_on_arguments_and_index_only():
    task, again = SynthDoc("train", 10**9, ramp=50), SynthDoc("train", 100, ramp=50)
    in_order = [digest(task[i]) for i in range(20)]
    assert [digest(again[i]) for i in reversed(range(20))] == in_order[::-1]
    assert len(set(in_order)) == 20
    for other in (SynthDoc("train", 100, seed=1), SynthDoc("heldout", 100)):
        assert not {digest(other[i]) for i in range(20)} & set(in_order)


def test_words_are_the_same_on_every_machine():
    assert SynthDoc("heldout_words", 9).text(0) == "condone skinless Epidermis liable renovate"
    assert SynthDoc("random_chars", 9).text(0) == "sdj9 855pdlds ffi3hpj3 96mxd7x x1e1d8"


@pytest.mark.parametrize("image_size, chars, titles", [
    (128, (24, 48), 0),
    ((160, 96), (10, 80), 0.5),
    (256, (200, 400), 1),
])
def test_ink_is_inside_its_box_inside_the_page(image_size, chars, titles):
    for split in SPLITS:
        task = SynthDoc(split, 60, image_size=image_size, chars=chars, titles=titles)
        for conversation in task:
            page, image = conversation["page"], conversation["images"][0]
            assert image.mode == "L" and image.size == (page.width, page.height) == (task.width, task.height)
            lefts, tops, rights, bottoms = zip(*(box.bbox for box in page.boxes))
            assert ink_box(image, page.paper) == (min(lefts), min(tops), max(rights), max(bottoms))
            assert min(lefts) > 0 and min(tops) > 0 and max(rights) < page.width and max(bottoms) < page.height
            for upper, lower in zip(page.boxes, page.boxes[1:]):
                assert upper.bbox[3] <= lower.bbox[1]


def test_truth_is_what_is_printed_in_reading_order():
    titled = 0
    for conversation in SynthDoc("train", 100, chars=[(10, 20, 1), (40, 90, 3)], titles=0.5):
        page = conversation["page"]
        for k, box in enumerate(page.boxes):
            assert box.order == k and box.text == " ".join(line for _, _, _, line in box.lines)
            assert {px for _, _, px, _ in box.lines} == {round(page.size_px * (1.4 if box.kind == "title" else 1))}
        assert [box.kind for box in page.boxes] in (["text_block"], ["title", "text_block"])
        assert page.truth == "\n\n".join(box.text for box in page.boxes) == conversation["messages"][1]["content"]
        assert conversation["chars"] == len(page.truth)
        titled += len(page.boxes) == 2
    assert 20 < titled < 80


def test_truth_and_text_agree_and_keep_to_the_lengths():
    task = SynthDoc("train", 200, chars=(24, 48))
    lengths = [task[i]["chars"] for i in range(200)]
    assert lengths == [len(task.text(i)) for i in range(200)]
    assert max(lengths) <= 48 and sum(lengths) / 200 > 28


def test_every_face_is_used_and_sizes_spread():
    pages = [conversation["page"] for conversation in SynthDoc("train", 200)]
    assert {page.face for page in pages} == set(FACES) and len(FACES) >= 6
    assert len({page.size_px for page in pages}) > 8 and len({page.paper for page in pages}) > 20


def test_ramp_starts_with_primer_pages_and_ends_free():
    task = SynthDoc("train", 2000, chars=(48, 96), ramp=1000)
    early, late = ([task[i] for i in span] for span in (range(50), range(1000, 1050)))
    assert {c["face"] for c in early} == {"mono"} and len({c["face"] for c in late}) > 4
    starts = {line[:2] for c in early for line in c["page"].boxes[0].lines[:1]}
    assert len(starts) == 1 and len({c["size_px"] for c in early}) == 1  # the n-th letter always stands in the same place
    assert max(c["chars"] for c in early) <= 32 and max(c["chars"] for c in late) > 80
    assert sum(c["size_px"] for c in early) > 1.5 * sum(c["size_px"] for c in late)


def test_training_text_has_no_held_out_word():
    held_out = held_out_words()
    assert 600 < len(held_out) < 900 and held_out.isdisjoint(train_words())
    for text in text_stream("train", 300_000, seed=3):
        assert held_out.isdisjoint(letters(text))
    task, chat = SynthDoc("train", 3000), SynthChat("train", 1000)
    for text in [task.text(i) for i in range(3000)] + [m["content"] for c in chat for m in c["messages"]]:
        assert held_out.isdisjoint(letters(text))


def test_the_other_splits_hold_what_they_say():
    for i in range(300):
        assert held_out_words() >= set(letters(SynthDoc("heldout_words", 300).text(i)))
        assert re.fullmatch("[a-z0-9]{2,8}( [a-z0-9]{2,8})*", SynthDoc("random_chars", 300).text(i))
    known = set(train_words()) | {w for word in prose(True) for w in letters(word)}
    clean = SynthDoc("heldout", 300)
    assert all(known >= set(letters(clean.text(i))) for i in range(300))
    mixed = SynthDoc("train", 300)
    assert not all(known | {w for word in prose(False) for w in letters(word)} >= set(letters(mixed.text(i)))
                   for i in range(300))  # its random strings


def test_prose_of_held_out_topics_is_not_trained_on():
    assert set(synthdoc.paragraphs(True)) & set(synthdoc.paragraphs(False)), "topics quote each other"
    runs = [{tuple(words[i:i + 16]) for i in range(len(words) - 15)} for words in (prose(True), prose(False))]
    assert len(runs[0]) > 1000 and len(runs[1]) > 10_000 and not runs[0] & runs[1]


def test_synthchat_splits_share_no_question():
    splits = [[c["messages"][0]["content"] for c in SynthChat(split, 1500)] for split in ("train", "heldout")]
    assert not set(splits[0]) & set(splits[1])
    assert max(map(len, splits[0])) < 100
    assert [c["messages"] for c in SynthChat("train", 20)] == [SynthChat("train", 99)[i]["messages"] for i in range(20)]


def test_a_task_ends():
    assert isinstance(SynthDoc("train", 3), Task) and len(list(SynthDoc("train", 3))) == len(SynthDoc("train", 3)) == 3


@pytest.mark.parametrize("arguments, message", [
    ({"split": "test"}, "unknown split 'test'"),
    ({"chars": (1, 5)}, f"{MIN_CHARS} <= low"),
    ({"chars": (48, 24)}, "48, 24"),
    ({"faces": ["comic"]}, "comic"),
    ({"image_size": 8}, "8x8 px"),
    ({"random_share": 2}, "give 0 to 1"),
    ({"size": 0}, "size 0"),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SynthDoc(**{"split": "train", "size": 1, **arguments})


def test_text_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="do not fit a page of 64x64 px.*raise image_size or lower chars"):
        SynthDoc("train", 1, image_size=64, chars=(400, 400))[0]


def test_missing_fonts_are_named(monkeypatch):
    synthdoc.font_folder.cache_clear()
    monkeypatch.setattr(synthdoc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        SynthDoc("train", 1)
