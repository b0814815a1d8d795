"""
Pages of your own: a folder of pictures (subfolders too) with the text of each beside it as name.txt or name.md, in UTF-8; or a JSON-lines
file with {"image": path from the file's folder, "text": ..., "prompt": ... (optional)} a line.
"""
import json
from pathlib import Path

from nanochat.common import stable_hash
from nanochat.conversation import OCR_PROMPT, Task, column, ocr_conversation, open_image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")


class Folder(Task):
    """
    split: "train" and "val" share the pages out by the hash of the picture's name, val_share of them to val (a page that is added later
    moves no other); "all" has both. What is absent, broken or not UTF-8 is an error that names the file (and line).
    """
    def __init__(self, path, split="all", val_share=0.1, prompt=OCR_PROMPT):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: give a folder of pictures with texts beside them, or a .jsonl file")
        self.folder, self.prompt = path if path.is_dir() else path.parent, prompt
        pages = self.beside() if path.is_dir() else self.lines(path)
        self.pages = [page for page in pages if split == "all" or (stable_hash(page[0].rpartition(".")[0]) % 1000 < 1000 * val_share) == (split == "val")]
        if not self.pages:
            raise ValueError(f"{path}: none of its {len(pages)} pages ({' '.join(PICTURES)}) is for {split} at a validation share of {val_share}")

    def beside(self):
        """[(picture, text, prompt), ...] of a folder."""
        pages = []
        for picture in (p for p in sorted(self.folder.rglob("*")) if p.suffix.lower() in PICTURES):
            texts = [t for t in (picture.with_suffix(".txt"), picture.with_suffix(".md")) if t.is_file()]
            if len(texts) != 1:
                raise ValueError(f"{picture} has {len(texts)} texts beside it: needs one, {picture.stem}.txt or {picture.stem}.md")
            pages.append((picture.relative_to(self.folder).as_posix(), self.text(texts[0]), self.prompt))
        return pages

    def lines(self, path):
        """The same of a JSON-lines file."""
        pages = []
        for k, line in enumerate(self.text(path).split("\n"), 1):
            try:
                row = {"prompt": self.prompt, **json.loads(line)}
            except (ValueError, TypeError) as e:
                raise ValueError(f"{path} line {k} is not a JSON object ({e})") from e
            pages.append(tuple(column(row, name, f"{path} line {k}", str) for name in ("image", "text", "prompt")))
            if not (self.folder / pages[-1][0]).is_file():
                raise FileNotFoundError(f"{path} line {k}: no picture {self.folder / pages[-1][0]}")
        return pages

    def text(self, path):
        try:
            return path.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 ({e}): convert it") from e

    def __len__(self):
        return len(self.pages)

    def __getitem__(self, i):
        self.check_index(i)
        name, text, prompt = self.pages[i]
        return ocr_conversation(open_image(self.folder / name, "folder"), text, name, prompt, image_name=name)
