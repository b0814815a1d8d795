"""
Pages of your own: a folder of pictures (subfolders too) with the text of each beside it as name.txt or name.md, in UTF-8; or a JSON-lines
file with {"image": path from the file's folder, "text": ..., "prompt": ... (optional)} a line.
"""
import json
from pathlib import Path

from tasks.common import OCR_PROMPT, Task, ocr_conversation, open_image
from tasks.synthdoc import stable_hash

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")


class Folder(Task):
    """
    split   "train" and "val" share the pages out by the hash of the picture's name, val_share of them to val; "all" has both.
            Pages that are added later move no other page.
    Raises FileNotFoundError or ValueError that name the file (and line) for what is absent, broken or not UTF-8.
    """
    def __init__(self, path, split="all", val_share=0.1, prompt=OCR_PROMPT):
        if split not in ("all", "train", "val") or not 0 <= val_share <= 1:
            raise ValueError(f"split={split!r}, val_share={val_share}: give all, train or val, and a share of 0 to 1")
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: give a folder of pictures with texts, or a .jsonl file")
        self.folder = path if path.is_dir() else path.parent
        pages = self.beside(prompt) if path.is_dir() else self.lines(path, prompt)
        if not pages:
            raise ValueError(f"{path} has no pages: give a folder of pictures ({' '.join(PICTURES)}) with texts, or a .jsonl file")
        self.pages = [page for page in pages if split == "all" or (stable_hash(page[0].rpartition(".")[0]) % 1000 < 1000 * val_share) == (split == "val")]
        if not self.pages:
            raise ValueError(f"none of the {len(pages)} pages of {path} falls to {split}: change the validation share, now {val_share}")

    def beside(self, prompt):
        """[(picture, text, prompt), ...] of a folder."""
        pictures = [p for p in sorted(self.folder.rglob("*")) if p.suffix.lower() in PICTURES]
        texts = [[t for t in (p.with_suffix(".txt"), p.with_suffix(".md")) if t.is_file()] for p in pictures]
        odd = [f"{p} ({len(found)})" for p, found in zip(pictures, texts) if len(found) != 1]
        if odd:
            raise ValueError(f"{len(odd)} of {len(pictures)} pictures do not have one text beside them, name.txt or name.md: {', '.join(odd[:3])}")
        return [(p.relative_to(self.folder).as_posix(), self.text(t), prompt) for p, (t,) in zip(pictures, texts)]

    def text(self, path):
        try:
            return path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 ({e}): convert it") from e

    def lines(self, path, prompt):
        """[(picture, text, prompt), ...] of a JSON-lines file."""
        pages = []
        for k, line in enumerate(self.text(path).split("\n"), 1):
            try:
                row = json.loads(line)
                page = row["image"], row["text"], row.get("prompt", prompt)
            except (ValueError, LookupError, TypeError, AttributeError) as e:
                raise ValueError(f"{path} line {k}: expected an object with image and text ({e!r})") from e
            if not all(isinstance(value, str) for value in page) or not (self.folder / page[0]).is_file():
                raise ValueError(f"{path} line {k}: {page[0]!r} is no picture file here, or text or prompt is not a text")
            pages.append(page)
        return pages

    def __len__(self):
        return len(self.pages)

    def __getitem__(self, i):
        self.check_index(i)
        name, text, prompt = self.pages[i]
        return ocr_conversation(open_image(self.folder / name, str(self.folder / name)), text, name, prompt, image_name=name)
