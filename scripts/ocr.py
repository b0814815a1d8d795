"""
Reads pictures and PDFs with a trained checkpoint; or answers a question about them; or chats, without a picture.

    python -m scripts.ocr page.png scans/ 'photos/*.jpg' report.pdf > text.txt      # pictures, folders, globs, PDFs
    curl -s https://example.org/page.png | python -m scripts.ocr - --jsonl          # "-": standard input
    python -m scripts.ocr chart.png --prompt="What is the highest value?"
    python -m scripts.ocr --prompt="Who are you?"                                   # or --chat, line by line

Text goes to standard output, progress and remarks to standard error: pages that loop, were cut or are low in confidence, and
files that cannot be read. Those do not stop the others, but then the exit status is 1.
"""
import argparse
import contextlib
import glob
import io
import json
import os
import struct
import sys
from itertools import islice

from PIL import Image
from tqdm import tqdm

from nanochat.common import compute_init, run_main
from nanochat.reader import add_arguments, load_engine
from nanochat.conversation import FORMATS, MAX_PIXELS, OCR_PROMPT, ocr_conversation

BROKEN = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def files_of(arguments):
    """Paths (or "-") in order: a folder stands for its pictures and PDFs, a pattern for what it matches."""
    kinds = {".pdf", *(end for end, kind in Image.registered_extensions().items() if kind in FORMATS)}
    for path in arguments:
        if os.path.isdir(path):
            inside = sorted(os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names)
            wanted = [name for name in inside if os.path.splitext(name)[1].lower() in kinds]
            if not wanted or len(wanted) < len(inside):
                print(f"{path}: {len(inside) - len(wanted)} files are no pictures or PDFs by their names", file=sys.stderr)
            yield from wanted or [path]  # an empty folder is then an error like any other
        elif path == "-" or os.path.exists(path):
            yield path
        else:
            yield from sorted(glob.glob(path, recursive=True)) or [path]


def pages_of(path, dpi):
    """Yields (page number from 1, or None in a file of one page; PIL image or the exception that it is), one at a time."""
    source = io.BytesIO(sys.stdin.buffer.read()) if path == "-" else open(path, "rb")
    with source:
        head = source.read(1024)
        source.seek(0)
        if not head:
            raise ValueError("the file is empty")
        if b"%PDF-" in head:
            yield from pdf_pages(source, dpi)
            return
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px, over {MAX_PIXELS} px: make it smaller")
            frames = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1  # elsewhere frames are an animation
            for k in range(frames):
                image.seek(k)
                image.load()
                yield (k + 1 if frames > 1 else None), image.copy()


def pdf_pages(source, dpi):
    try:
        import pypdfium2
        document = pypdfium2.PdfDocument(source)
    except ImportError:
        raise ValueError("PDFs need pypdfium2: pip install pypdfium2") from None
    except pypdfium2.PdfiumError as error:
        raise ValueError(f"not a PDF that can be opened, encrypted or broken ({error})") from error
    with contextlib.closing(document):
        for k in range(len(document)):
            try:
                with contextlib.closing(document[k]) as page:
                    width, height = (side * dpi / 72 for side in page.get_size())
                    if width * height > MAX_PIXELS:
                        raise ValueError(f"{width:.0f} x {height:.0f} px at {dpi} dpi, over {MAX_PIXELS} px: lower --dpi")
                    with contextlib.closing(page.render(scale=dpi / 72)) as bitmap:
                        yield k + 1, bitmap.to_pil().convert("RGB")
            except (ValueError, pypdfium2.PdfiumError) as error:
                yield k + 1, error


def pages(files, dpi):
    """Yields (file, page number or None, image or exception) over all files, none held longer than its turn."""
    for path in files:
        try:
            yield from ((path, number, image) for number, image in pages_of(path, dpi))
        except BROKEN as error:
            yield path, None, error


def say(engine, conversation, args):
    """Prints the answer as its tokens come; -> Result."""
    for piece, result in engine.stream(conversation, args.max_new_tokens, args.temperature):
        print(piece, end="", flush=True)
    print()
    return result


def chat(engine, args):
    """One question (--prompt), or lines from standard input until it ends."""
    messages = []
    for line in [args.prompt] if args.prompt else sys.stdin:
        messages.append({"role": "user", "content": line.strip()})
        messages.append({"role": "assistant", "content": say(engine, {"messages": messages, "images": [], "id": "chat"}, args).text})


def read(engine, batch, args):
    """-> Result or exception for each (file, page number, image or exception) of a batch."""
    prompt = "\n" + args.prompt if args.prompt else OCR_PROMPT
    conversations = [ocr_conversation(image, "", path, prompt) for path, _, image in batch if not isinstance(image, Exception)]
    if args.stream and conversations:
        try:
            return [say(engine, conversations[0], args)]
        except ValueError as error:  # too long
            return [error]
    results = iter(engine.generate_each(conversations, args.max_new_tokens, args.temperature))
    return [image if isinstance(image, Exception) else next(results) for _, _, image in batch]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("files", nargs="*", help="pictures, PDFs, folders, patterns; - is standard input")
    add_arguments(parser)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--prompt", default="", help="a question about each page, in place of reading it; or without one")
    parser.add_argument("--chat", action="store_true", help="talk: a line of standard input, an answer, and so on")
    parser.add_argument("--batch-size", type=int, default=16, help="pages generated together")
    parser.add_argument("--dpi", type=int, default=144, help="resolution at which PDF pages are drawn")
    parser.add_argument("--jsonl", action="store_true", help="a JSON object a page: file, page, text, confidence, tokens, flags, or error")
    parser.add_argument("--stream", action="store_true", help="print text as it comes, one page at a time")
    args = parser.parse_args(argv)
    if not (args.files or args.prompt or args.chat) or (args.files and args.chat) or (args.stream and args.jsonl):
        raise ValueError("give files to read, or --prompt or --chat without any; --stream prints text, not --jsonl")
    if min(args.batch_size, args.dpi) < 1:
        raise ValueError("--batch-size and --dpi must be at least 1")
    with contextlib.redirect_stdout(sys.stderr):  # what set-up has to say is no text of a page
        engine, _ = load_engine(args, compute_init(args.device_type))
    if not args.files:
        return chat(engine, args)

    files, failed, bar = list(files_of(args.files)), 0, tqdm(unit="page", disable=None)
    source = pages(files, args.dpi)
    while batch := list(islice(source, 1 if args.stream else args.batch_size)):
        names = [path if number is None else f"{path} page {number}" for path, number, _ in batch]
        headings = [f"== {name}\n" if len(files) > 1 or number is not None else "" for name, (_, number, _) in zip(names, batch)]
        if args.stream:
            print(headings[0], end="")
        for (path, number, _), name, heading, result in zip(batch, names, headings, read(engine, batch, args)):
            if isinstance(result, Exception):
                failed += 1
                print(f"error: {name}: {result}", file=sys.stderr)
                record = {"error": str(result)}
            else:
                record = {"text": result.text, "confidence": result.confidence, "tokens": result.tokens, "flags": result.flags}
                if result.flags:
                    print(f"look at {name}: {', '.join(result.flags)} (confidence {result.confidence:.2f} nats/token)", file=sys.stderr)
            if args.jsonl:
                print(json.dumps({"file": path, "page": number, **record}, ensure_ascii=False), flush=True)
            elif not args.stream and "text" in record:
                print(heading + result.text, flush=True)
        bar.update(len(batch))
    bar.close()
    if failed:
        print(f"{failed} files or pages could not be read", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
