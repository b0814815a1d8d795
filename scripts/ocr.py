"""
Reads pictures and PDFs with a trained model, answers questions about them, or chats without any.

    python -m scripts.ocr examples/
    python -m scripts.ocr page.png scans/ 'photos/*.jpg' report.pdf > text.txt
    curl -s https://example.org/page.png | python -m scripts.ocr - --jsonl
    python -m scripts.ocr chart.png --prompt="What is the highest value?"
    python -m scripts.ocr --prompt="Who are you?"

Without --checkpoint it reads with the trained model in checkpoints/reader, which is part of the
repository: a reader of small pages, to which larger ones are given in windows.

Files may be pictures, PDFs, folders and patterns; "-" is standard input. --chat talks line by line.
Text goes to standard output. Progress and remarks go to standard error: pages (or windows of them)
that loop, were cut or are low in confidence, and files that cannot be read. Those do not stop the
others, but then the exit status is 1.
"""
import contextlib
import glob
import io
import json
import logging
import math
import os
import stat
import sys
from dataclasses import dataclass, field
from itertools import count

import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from nanochat.common import (
    ArgumentParser, compute_init, integer, positive_int, real, run_main)
from nanochat.conversation import FORMATS, MAX_PIXELS, OCR_PROMPT, ocr_conversation
from nanochat.image_modes import to_rgb
from nanochat.reader import READER, add_arguments, load_engine

POINTS_PER_INCH = 72  # the unit of PDF pages
CHAT_ROOM = 200       # positions that the answer to a line of --chat has, at least
PDF_HEAD = 1024       # bytes in which a PDF's signature may begin; readers allow for junk before it
MISSING = 100         # pages in a row that a PDF claims and does not have, before it is given up

# -----------------------------------------------------------------------------
# Files and their pages


@dataclass
class Page:
    """One page of a file, or the reason why it (or the whole file) cannot be read."""
    path: str
    number: int = None              # from 1; None where the file is one page
    image: Image.Image = None       # RGB, upright
    error: Exception = None         # in place of the image
    notes: list = field(default_factory=list)  # what a person should know: text that is not drawn

    @property
    def name(self):
        """What to call it in the output: the whole path, since folders may hold equal names."""
        path = printable(self.path)
        return path if self.number is None else f"{path} page {self.number}"


def printable(path):
    """
    A path that any UTF-8 stream takes. Bytes of file names that are not UTF-8 reach Python as lone
    surrogates, which cannot be encoded: they become backslash escapes.
    """
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def files_of(arguments):
    """Paths (or "-") in order. A folder stands for its pages, a pattern for what it matches."""
    for argument in arguments:
        if os.path.isdir(argument):
            yield from files_in(argument)
        elif argument == "-" or os.path.exists(argument):
            yield argument
        else:
            # Without a match the pattern stays, and opening it becomes an error like any other.
            yield from matches_of(argument) or [argument]


def matches_of(pattern):
    """Files that match, and those in folders that match; each once, as ** matches both."""
    found = {}
    for path in sorted(glob.glob(pattern, recursive=True)):
        files = files_in(path) if os.path.isdir(path) else [path]
        for file in files:
            found.setdefault(os.path.normpath(file), file)
    return list(found.values())


def files_in(folder):
    """Pictures and PDFs (by their names) in a folder and those below it, sorted."""
    endings = {".pdf"}
    for ending, kind in Image.registered_extensions().items():
        if kind in FORMATS:
            endings.add(ending)
    wanted = []
    others = 0
    linked = 0
    unreadable = []  # folders
    for parent, folders, names in os.walk(folder, onerror=lambda e: unreadable.append(e.filename)):
        for name in names:
            if os.path.splitext(name)[1].lower() in endings:
                wanted.append(os.path.join(parent, name))
            else:
                others += 1
        # Not entered, since a link to a folder above it would never end.
        linked += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
    if others or not wanted:
        print(f"{folder}: {others} files are not pictures or PDFs by their names", file=sys.stderr)
    if linked:
        print(f"{folder}: {linked} folders are links and were left out: name them", file=sys.stderr)
    # A folder that cannot be read, or has nothing to read, stands for itself: opening it as a file
    # becomes an error like any other.
    return sorted(wanted + unreadable) or [folder]


def pages(files, dpi):
    """Yields a Page at a time over all files; no picture is held longer than its turn."""
    for path in files:
        try:
            yield from pages_of(path, dpi)
        except Exception as error:
            # Decoders raise whatever they stumble over (a TypeError for some truncated TIFFs), and
            # one bad file must not stop those after it. It is reported, and the exit status is 1.
            yield Page(path, error=error)


def pages_of(path, dpi):
    """Yields the pages of one file, a path or "-". Raises if the file as a whole cannot be read."""
    if path == "-":
        source = io.BytesIO(sys.stdin.buffer.read())
    else:
        source = open(path, "rb")
    if not source.seekable():  # a pipe, as of `<(curl ...)`
        with source:
            source = io.BytesIO(source.read())
    with source:
        if is_pdf(source):
            yield from pdf_pages(path, source, dpi)
        else:
            yield from picture_pages(path, source)


def is_pdf(source):
    """Whether an open file is a PDF, by its content; ValueError if it is empty."""
    head = source.read(PDF_HEAD)
    source.seek(0)
    if not head:
        raise ValueError("the file is empty")
    if b"%PDF-" not in head:
        return False
    # A picture may have these bytes near its start too, for example in a comment.
    try:
        Image.open(source, formats=FORMATS)
        return False
    except UnidentifiedImageError:
        return True
    finally:
        source.seek(0)


def count_pages(files):
    """Pages in all files, without decoding them; None if that cannot be known beforehand."""
    if "-" in files or any(is_pipe(path) for path in files):
        return None  # they can be read only once
    total = 0
    for path in files:
        try:
            with open(path, "rb") as source:
                total += count_pdf_pages(source) if is_pdf(source) else count_frames(source)
        except Exception:
            total += 1  # its error, which `pages` will find again and report
    return total


def is_pipe(path):
    return os.path.exists(path) and stat.S_ISFIFO(os.stat(path).st_mode)


def count_frames(source):
    with Image.open(source, formats=FORMATS) as image:
        return n_frames(image)


def n_frames(image):
    """Pages of a picture. The frames of a TIFF are pages; those of other formats, an animation."""
    return image.n_frames if image.format == "TIFF" else 1


def count_pdf_pages(source):
    with contextlib.closing(open_pdf(source)) as document:
        return len(document)


def picture_pages(path, source):
    """Yields the pages of a picture: one, or those of a TIFF."""
    try:
        image = Image.open(source, formats=FORMATS)
    except UnidentifiedImageError as error:
        # PIL names the open file, which for standard input is an address in memory.
        raise ValueError(f"cannot identify it: no picture ({', '.join(FORMATS)}), and no PDF, "
                         f"which has %PDF- in its first {PDF_HEAD} bytes") from error
    with image:
        is_one = image.format != "TIFF" or not has_frame(image, 1)
        if is_one:
            yield Page(path, image=frame_of(image))
            return
        for k in count():
            # Page by page and not by their number: a file that is cut short still has the first.
            try:
                image.seek(k)
            except EOFError:
                return
            except Exception as error:  # where the next one is, is lost as well
                yield Page(path, k + 1, error=error)
                return
            try:
                yield Page(path, k + 1, frame_of(image))
            except Exception as error:
                # One broken page, whatever its decoder raises, must not stop those after it.
                yield Page(path, k + 1, error=error)


def has_frame(image, k):
    """Whether an open picture has a frame k, broken or not; it is then at its first one again."""
    try:
        image.seek(k)
    except EOFError:
        return False
    except Exception:
        pass  # broken: whoever reads it gets this error again
    finally:
        image.seek(0)
    return True


def frame_of(image):
    """The frame that an open picture is at, as RGB."""
    check_pixels(image.width, image.height, "make it smaller")
    image.load()
    # Converted here already, so that a picture which cannot be (broken EXIF, gray levels that are
    # not finite) is an error of this page and not of its whole batch.
    return to_rgb(image.copy())


def open_pdf(source):
    """An open file -> pypdfium2.PdfDocument, to be closed by the caller."""
    try:
        import pypdfium2
    except ImportError:
        raise ValueError("PDFs need pypdfium2: pip install pypdfium2") from None
    # Its warning about XFA forms names no file; `notes_on` says it of each page.
    logging.getLogger("pypdfium2").setLevel(logging.ERROR)
    try:
        document = pypdfium2.PdfDocument(source)
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            raise ValueError("the PDF needs a password: save a copy without one") from error
        raise ValueError(f"not a PDF that can be opened, broken, without pages or encrypted in an "
                         f"unknown way ({error})") from error
    # The values of form fields are drawn only if this is done before any page is loaded.
    document.init_forms()
    return document


class MissingPage(ValueError):
    """A page that a PDF counts but does not have, or only in pieces."""


def pdf_pages(path, source, dpi):
    """Yields the pages of a PDF, drawn at `dpi`; a page that cannot be drawn has its error."""
    with contextlib.closing(open_pdf(source)) as document:
        n_pages = len(document)
        missing = 0  # in a row
        for k in range(n_pages):
            try:
                image, notes = draw_pdf_page(document, k, dpi)
                page = Page(path, k + 1, image, notes=notes)
                missing = 0
            except Exception as error:
                page = Page(path, k + 1, error=error)
                missing = missing + 1 if isinstance(error, MissingPage) else 0
            yield page
            # A damaged file may count a million pages and have one.
            if missing == MISSING and k + 1 < n_pages:
                yield Page(path, error=MissingPage(
                    f"pages {k + 2} to {n_pages} are left out: {MISSING} in a row before them are "
                    f"missing, so the file probably counts more pages than it has"))
                return


def draw_pdf_page(document, k, dpi):
    """-> (PIL image, RGB, of page k, from 0, of an open PDF; list of notes on it)."""
    from pypdfium2 import PdfiumError
    try:
        page = document[k]
    except PdfiumError as error:
        raise MissingPage("the page is missing or broken") from error
    scale = dpi / POINTS_PER_INCH
    with contextlib.closing(page):
        check_page_size(*page.get_size(), dpi)
        with contextlib.closing(page.render(scale=scale)) as bitmap:
            image = bitmap.to_pil().convert("RGB")
        return image, notes_on(document, page, image)


def check_page_size(width, height, dpi):
    """ValueError for a PDF page of width x height points that cannot be drawn at `dpi`."""
    if width <= 0 or height <= 0:
        raise ValueError(f"the page has no area, {width:g} x {height:g} points: nothing of it can "
                         f"be drawn")
    pixels_per_dpi = width * height / POINTS_PER_INCH ** 2  # those of the page at 1 dpi
    most = int(math.sqrt(MAX_PIXELS / pixels_per_dpi))
    fix = f"lower --dpi to {most}" if most else "no --dpi is low enough, so the file is damaged"
    scale = dpi / POINTS_PER_INCH
    check_pixels(width * scale, height * scale, fix, f" at {dpi} dpi")


def notes_on(document, page, image):
    """Notes about an open page of a PDF, drawn as `image`, whose text is not in the picture."""
    from pypdfium2.raw import FORMTYPE_XFA_FULL
    notes = []
    if document.get_formtype() == FORMTYPE_XFA_FULL:
        notes.append("the file is an XFA form, which is not drawn: this is the page that it has "
                     "for programs without XFA; print the form to a PDF")
    is_blank = all(low == high for low, high in image.getextrema())
    if is_blank:
        with contextlib.closing(page.get_textpage()) as text_page:
            text = text_page.get_text_range()
        letters = len("".join(text.split()))
        if letters:
            notes.append(f"the page is drawn blank, but the file has {letters} characters of text "
                         f"for it: hidden, or in a font that is broken or not embedded")
    return notes


def check_pixels(width, height, fix, at=""):
    """ValueError for a picture that is too large to be decoded."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width:.0f} x {height:.0f} px{at}, over {MAX_PIXELS} px: {fix}")


# -----------------------------------------------------------------------------
# Reading


def read_batch(engine, batch, args):
    """-> a Result, or the exception in its place, for each Page of a batch."""
    readable = [page for page in batch if page.error is None]
    prompt = "\n" + args.prompt if args.prompt else OCR_PROMPT
    conversations = [ocr_conversation(page.image, "", page.path, prompt) for page in readable]
    if args.stream:
        answers = [say(engine, conversation, args) for conversation in conversations]
    else:
        answers = answers_of(engine, conversations, args)
    # Back in the order of the batch, with the pages that have no answer.
    answers = iter(answers)
    results = []
    for page in batch:
        results.append(next(answers) if page.error is None else page.error)
    return results


def answers_of(engine, conversations, args):
    """-> a Result for each conversation, or the exception that reading it ended in."""
    try:
        return engine.generate_each(conversations, token_limit(args), args.temperature)
    except torch.OutOfMemoryError:
        raise  # of no page in particular: a smaller --batch-size helps
    except Exception as error:
        if len(conversations) == 1:
            return [error]
    # Which one failed is not known, and its failure must not take the others with it.
    return [answer for one in conversations for answer in answers_of(engine, [one], args)]


def token_limit(args):
    """Tokens that an answer may take; None = as many as the decoder has room for."""
    return None if args.max_new_tokens == -1 else args.max_new_tokens


def say(engine, conversation, args):
    """Prints the answer as its tokens come. -> Result, or the exception that it ended in."""
    pieces = engine.stream(conversation, token_limit(args), args.temperature)
    try:
        for piece, result in pieces:
            print(piece, end="", flush=True)
    except (torch.OutOfMemoryError, BrokenPipeError):
        raise
    except Exception as error:
        return error
    print()
    return result


def batches(source, size):
    """
    Lists of up to `size` Pages; fewer where their pictures are large, since memory is for one
    picture of the largest size and not for `size` of them.
    """
    batch = []
    pixels = 0
    for page in source:
        batch.append(page)
        if page.image is not None:
            pixels += page.image.width * page.image.height
        if len(batch) == size or pixels >= MAX_PIXELS:
            yield batch
            batch = []
            pixels = 0
    if batch:
        yield batch


def read_files(engine, args):
    """Reads every page of args.files and prints it. -> number of files or pages that failed."""
    files = list(files_of(args.files))
    source = pages(files, args.dpi)
    batch_size = 1 if args.stream else args.batch_size
    failed = 0
    # None: no bar where standard error is no terminal. Streamed text would be torn apart by it.
    with tqdm(unit="page", disable=True if args.stream else None) as bar:
        if not bar.disable:
            bar.total = count_pages(files)
            bar.refresh()
        for batch in batches(source, batch_size):
            headings = [heading(page, len(files)) for page in batch]
            if args.stream:
                print(headings[0], end="")
            results = read_batch(engine, batch, args)
            for page, title, result in zip(batch, headings, results):
                remark(page, result)
                is_error = isinstance(result, Exception)
                if is_error:
                    failed += 1
                if args.jsonl:
                    show(json_of(page, result), sys.stdout)
                elif not args.stream and not is_error:
                    show(title + result.text, sys.stdout)
            bar.update(len(batch))
    return failed


def show(text, file):
    """Prints at once, and clear of a progress bar on the same terminal."""
    with tqdm.external_write_mode(file=file):
        print(text, file=file, flush=True)


def heading(page, n_files):
    """The line above a page's text; a single picture needs none."""
    if n_files == 1 and page.number is None:
        return ""
    return f"== {page.name}\n"


def remark(page, result):
    """Says on standard error what a person should know about this page."""
    for note in page.notes:
        show(f"note: {page.name}: {note}", sys.stderr)
    if isinstance(result, Exception):
        show(f"error: {page.name}: {reason(result)}", sys.stderr)
        return
    # Of a page that was read in windows, which of them to look at.
    for note in getattr(result, "notes", []):
        show(f"note: {page.name}: {note}", sys.stderr)
    for name, part in getattr(result, "windows", [("", result)]):
        if part.flags:
            reasons = ", ".join(part.flags)
            confidence = f"confidence {part.confidence:.2f} nats/token"
            show(f"look at {page.name} {name}".rstrip() + f": {reasons} ({confidence})",
                 sys.stderr)


def reason(error):
    """The message of an error. Those that were not written for people need their kind as well."""
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    return f"{type(error).__name__}: {error}"


def json_of(page, result):
    """One line of JSON about a page."""
    record = {"file": printable(page.path), "page": page.number}
    if isinstance(result, Exception):
        record["error"] = reason(result)
    else:
        record["text"] = result.text
        record["confidence"] = result.confidence  # nats per token
        record["tokens"] = result.tokens
        record["flags"] = result.flags
    return json.dumps(record, ensure_ascii=False)


# -----------------------------------------------------------------------------
# Without pictures


def ask(engine, args):
    """One question (--prompt), answered."""
    question = {"role": "user", "content": args.prompt.strip()}
    result = say(engine, {"messages": [question], "images": [], "id": "--prompt"}, args)
    if isinstance(result, Exception):
        raise result


def chat(engine, args):
    """Answers each line of standard input, until it ends."""
    messages = []
    for line in sys.stdin:
        question = {"role": "user", "content": line.strip()}
        asked = turns_that_fit(engine, [*messages, question], token_limit(args) or CHAT_ROOM)
        result = say(engine, {"messages": asked, "images": [], "id": "chat"}, args)
        if isinstance(result, Exception):
            # Too long even without the turns before it: only this line is forgotten.
            print(f"error: {result}", file=sys.stderr)
            continue
        dropped = (len(messages) + 1 - len(asked)) // 2
        if dropped:
            positions = engine.model.cfg.gpt.sequence_len
            print(f"the decoder has {positions} positions: the first {dropped} turns of this chat "
                  f"no longer fit and were dropped", file=sys.stderr)
        messages = [*asked, {"role": "assistant", "content": result.text}]


def turns_that_fit(engine, messages, max_new_tokens):
    """The latest turns that leave room for the answer in the decoder, at least the last message."""
    room = engine.model.cfg.gpt.sequence_len - max_new_tokens
    while len(messages) > 1:
        prompt = engine.tokenizer.render_for_completion({"messages": messages, "images": []})
        if len(prompt) <= room:
            break
        messages = messages[2:]  # a question and its answer
    return messages


# -----------------------------------------------------------------------------


def parse_arguments(argv):
    parser = ArgumentParser(__doc__)
    # Input
    parser.add_argument("files", nargs="*",
                        help="pictures, PDFs, folders, patterns; - is standard input")
    parser.add_argument("--dpi", type=integer(1, 10_000), default=144,
                        help="resolution at which PDF pages are drawn")
    parser.add_argument("--prompt", default="",
                        help="a question about each page, in place of reading it; or to the model "
                             "alone")
    parser.add_argument("--chat", action="store_true",
                        help="talk: a line of standard input, an answer, and so on")
    # Model and generation
    add_arguments(parser, checkpoint=str(READER))
    parser.add_argument("--temperature", type=real(), default=0.0, help="0 = greedy")
    parser.add_argument("--batch-size", type=positive_int, default=16,
                        help="pages generated together")
    # Output
    parser.add_argument("--jsonl", action="store_true",
                        help="print a JSON object for each page: file, page, text, confidence, "
                             "tokens and flags, or file, page and error")
    parser.add_argument("--stream", action="store_true",
                        help="print text as it comes, one page at a time")
    args = parser.parse_args(argv)
    if not (args.files or args.prompt or args.chat):
        raise ValueError("nothing to do: give files to read, or --prompt or --chat without any")
    if args.files and args.chat:
        raise ValueError("--chat talks without pictures: leave the files out, or ask about them "
                         "with --prompt")
    if args.prompt and args.chat:
        raise ValueError("--prompt asks one question, --chat takes them from standard input: give "
                         "only one")
    if args.jsonl and not args.files:
        raise ValueError("--jsonl is for files: leave it out, or name some")
    if args.stream and args.jsonl:
        raise ValueError("--stream prints text as it comes, --jsonl whole pages: give only one")
    return args


def work(engine, args):
    """What the flags ask for. -> number of files or pages that failed."""
    if args.files:
        return read_files(engine, args)
    if args.prompt:
        ask(engine, args)
    else:
        chat(engine, args)
    return 0


def main(argv=None):
    args = parse_arguments(argv)
    # What is printed during set-up is not part of any page's text.
    with contextlib.redirect_stdout(sys.stderr):
        engine, _ = load_engine(args, compute_init(args.device_type))
    failed = work(engine, args)
    if failed:
        print(f"{failed} files or pages could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
