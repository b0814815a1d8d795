"""
A data set in FineVision's format in a local folder, as the hub has it: parquet shards with pictures
as bytes.
"""
import io


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def write_streamed_set(folder, pages, n_shards):
    """Writes the configuration `pages`. The picture of every tenth row is broken."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Picture
    rows = []
    for i, page in enumerate(pages):
        picture = png(page["images"][0])
        if i % 10 == 3:
            picture = picture[:50]
        turn = {"user": "Read.", "assistant": page["messages"][-1]["content"]}
        rows.append({"images": [{"bytes": picture, "path": None}], "texts": [turn]})
    turn_type = {"user": Value("string"), "assistant": Value("string")}
    features = Features({"images": List(Picture()), "texts": List(turn_type)})
    data = Dataset.from_list(rows, features=features)
    (folder / "pages").mkdir(parents=True)
    for n in range(n_shards):
        data.shard(n_shards, n).to_parquet(folder / f"pages/train-{n}.parquet")
    readme = ("---\nconfigs:\n- config_name: pages\n  data_files:\n"
              "  - split: train\n    path: pages/train-*\n---\n")
    (folder / "README.md").write_text(readme)
