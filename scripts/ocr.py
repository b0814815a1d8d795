"""
Reads pictures and PDFs with a trained model, answers questions about them, or chats without any.

    python -m scripts.ocr page.png scans/ 'photos/*.jpg' report.pdf > text.txt
    curl -s https://example.org/page.png | python -m scripts.ocr - --jsonl
    python -m scripts.ocr chart.png --prompt="What is the highest value?"
    python -m scripts.ocr --prompt="Who are you?"

Files may be pictures, PDFs, folders and patterns; "-" is standard input. --chat talks line by line.
Text goes to standard output. Progress and remarks go to standard error: pages that loop, were cut
or are low in confidence, and files that cannot be read. Those do not stop the others, but then the
exit status is 1.
"""
import argparse
import contextlib
import glob
import io
import json
import os
import struct
import sys
from dataclasses import dataclass
from itertools import islice

from PIL import Image
from tqdm import tqdm

from nanochat.common import compute_init, run_main
from nanochat.conversation import FORMATS, MAX_PIXELS, OCR_PROMPT, ocr_conversation
from nanochat.reader import add_arguments, load_engine

# What PIL raises for files that are no pictures, or broken ones
BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
POINTS_PER_INCH = 72  # the unit of PDF pages

# -----------------------------------------------------------------------------
# Files and their pages


@dataclass
class Page:
    """One page of a file, or the reason why it (or the whole file) cannot be read."""
    path: str
    number: int = None              # from 1; None where the file is one page
    image: Image.Image = None
    error: Exception = None         # in place of the image

    @property
    def name(self):
        return self.path if self.number is None else f"{self.path} page {self.number}"


def files_of(arguments):
    """Paths (or "-") in order. A folder stands for its pages, a pattern for what it matches."""
    for argument in arguments:
        if os.path.isdir(argument):
            yield from files_in(argument)
        elif argument == "-" or os.path.exists(argument):
            yield argument
        else:
            # Without a match the pattern stays, and opening it becomes an error like any other.
            yield from sorted(glob.glob(argument, recursive=True)) or [argument]


def files_in(folder):
    """Pictures and PDFs (by their names) in a folder and those below it, sorted."""
    endings = {".pdf"}
    for ending, kind in Image.registered_extensions().items():
        if kind in FORMATS:
            endings.add(ending)
    wanted = []
    others = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if os.path.splitext(name)[1].lower() in endings:
                wanted.append(os.path.join(parent, name))
            else:
                others += 1
    if others or not wanted:
        print(f"{folder}: {others} files are not pictures or PDFs by their names", file=sys.stderr)
    # A folder without any is returned itself, and opening it becomes an error like any other.
    return sorted(wanted) or [folder]


def pages(files, dpi):
    """Yields a Page at a time over all files; no picture is held longer than its turn."""
    for path in files:
        try:
            yield from pages_of(path, dpi)
        except BROKEN as error:
            yield Page(path, error=error)


def pages_of(path, dpi):
    """Yields the pages of one file, a path or "-". Raises if the file as a whole cannot be read."""
    if path == "-":
        source = io.BytesIO(sys.stdin.buffer.read())
    else:
        source = open(path, "rb")
    with source:
        head = source.read(1024)
        source.seek(0)
        if not head:
            raise ValueError("the file is empty")
        if b"%PDF-" in head:
            yield from pdf_pages(path, source, dpi)
        else:
            yield from picture_pages(path, source)


def picture_pages(path, source):
    """Yields the pages of a picture: one, or those of a TIFF."""
    with Image.open(source, formats=FORMATS) as image:
        check_pixels(image.width, image.height, "make it smaller")
        # The frames of a TIFF are pages. Those of other formats are an animation: only the first
        # is read.
        frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
        for k in range(frames):
            image.seek(k)
            image.load()
            number = k + 1 if frames > 1 else None
            yield Page(path, number, image.copy())


def pdf_pages(path, source, dpi):
    """Yields the pages of a PDF, drawn at `dpi`; a page that cannot be drawn has its error."""
    try:
        import pypdfium2
    except ImportError:
        raise ValueError("PDFs need pypdfium2: pip install pypdfium2") from None
    try:
        document = pypdfium2.PdfDocument(source)
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"not a PDF that can be opened, encrypted or broken ({error})") from error
    with contextlib.closing(document):
        for k in range(len(document)):
            try:
                image = draw_pdf_page(document, k, dpi)
            except (ValueError, pypdfium2.PdfiumError) as error:
                yield Page(path, k + 1, error=error)
            else:
                yield Page(path, k + 1, image)


def draw_pdf_page(document, k, dpi):
    """PIL image (RGB) of page k, from 0, of an open PDF."""
    scale = dpi / POINTS_PER_INCH
    with contextlib.closing(document[k]) as page:
        width, height = page.get_size()  # points
        check_pixels(width * scale, height * scale, "lower --dpi", f" at {dpi} dpi")
        with contextlib.closing(page.render(scale=scale)) as bitmap:
            return bitmap.to_pil().convert("RGB")


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
        answers = engine.generate_each(conversations, args.max_new_tokens, args.temperature)
    answers = iter(answers)
    return [page.error or next(answers) for page in batch]


def say(engine, conversation, args):
    """Prints the answer as its tokens come. -> Result, or the ValueError of what is too long."""
    try:
        for piece, result in engine.stream(conversation, args.max_new_tokens, args.temperature):
            print(piece, end="", flush=True)
    except ValueError as error:
        return error
    print()
    return result


def read_files(engine, args):
    """Reads every page of args.files and prints it. -> number of files or pages that failed."""
    files = list(files_of(args.files))
    source = pages(files, args.dpi)
    batch_size = 1 if args.stream else args.batch_size
    failed = 0
    with tqdm(unit="page", disable=None) as bar:
        while batch := list(islice(source, batch_size)):
            headings = [heading(page, len(files)) for page in batch]
            if args.stream:
                print(headings[0], end="")
            results = read_batch(engine, batch, args)
            for page, title, result in zip(batch, headings, results):
                failed += isinstance(result, Exception)
                remark(page, result)
                if args.jsonl:
                    print(json_of(page, result), flush=True)
                elif not args.stream and not isinstance(result, Exception):
                    print(title + result.text, flush=True)
            bar.update(len(batch))
    return failed


def heading(page, n_files):
    """The line above a page's text; a single picture needs none."""
    if n_files == 1 and page.number is None:
        return ""
    return f"== {page.name}\n"


def remark(page, result):
    """Says on standard error what a person should know about this page."""
    if isinstance(result, Exception):
        print(f"error: {page.name}: {result}", file=sys.stderr)
    elif result.flags:
        reasons = ", ".join(result.flags)
        print(f"look at {page.name}: {reasons} (confidence {result.confidence:.2f} nats/token)",
              file=sys.stderr)


def json_of(page, result):
    """One line of JSON about a page."""
    record = {"file": page.path, "page": page.number}
    if isinstance(result, Exception):
        record["error"] = str(result)
    else:
        record["text"] = result.text
        record["confidence"] = result.confidence  # nats per token
        record["tokens"] = result.tokens
        record["flags"] = result.flags
    return json.dumps(record, ensure_ascii=False)


def chat(engine, args):
    """One question (--prompt), or lines from standard input until it ends."""
    messages = []
    for line in [args.prompt] if args.prompt else sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        result = say(engine, {"messages": messages, "images": [], "id": "chat"}, args)
        if isinstance(result, Exception):
            raise result
        messages.append({"role": "assistant", "content": result.text})


# -----------------------------------------------------------------------------


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("files", nargs="*",
                        help="pictures, PDFs, folders, patterns; - is standard input")
    add_arguments(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--prompt", default="",
                        help="a question about each page, in place of reading it; or to the model "
                             "alone")
    parser.add_argument("--chat", action="store_true",
                        help="talk: a line of standard input, an answer, and so on")
    parser.add_argument("--batch-size", type=int, default=16, help="pages generated together")
    parser.add_argument("--dpi", type=int, default=144,
                        help="resolution at which PDF pages are drawn")
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
    if args.stream and args.jsonl:
        raise ValueError("--stream prints text as it comes, --jsonl whole pages: give only one")
    if min(args.batch_size, args.dpi) < 1:
        raise ValueError("--batch-size and --dpi must be at least 1")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    # What is printed during set-up is not part of any page's text.
    with contextlib.redirect_stdout(sys.stderr):
        engine, _ = load_engine(args, compute_init(args.device_type))
    if not args.files:
        chat(engine, args)
        return
    failed = read_files(engine, args)
    if failed:
        print(f"{failed} files or pages could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
