"""Where a model's files are: the packaged tiny model, a folder, a bucket, or a name on the hub.

Fetches at most what a decoder needs (safetensors, JSON, tokenizer files). Never imports jax.
"""

from __future__ import annotations

import pathlib
import tempfile

PACKAGED = {"tiny": pathlib.Path(__file__).resolve().parent.parent / "assets" / "tiny"}
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL of a bucket (gs://, s3://, ...) rather than a local path."""
    return "://" in str(path)


def resolve(path: str) -> str:
    """The folder or URL that holds the model `path`; downloads a hub name into the hub's cache.

    Honours HF_HUB_OFFLINE and HF_HOME. Raises ValueError when there is no such model.
    """
    path = str(path)
    if path in PACKAGED:
        return str(PACKAGED[path])
    if is_remote(path):
        check_bucket(path)
        return path.rstrip("/")
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(
            f"model.path={path!r} is not a folder: give a folder with config.json, "
            "a bucket URL (gs://...), a hub name (owner/name) or 'tiny'"
        )
    return _download(path)


def check_bucket(url: str) -> None:
    """ValueError when the package that speaks the URL's protocol is missing."""
    import fsspec

    protocol = url.split("://")[0]
    try:
        fsspec.get_filesystem_class(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url!r}: {protocol}:// does not work here ({error}): install what it needs (gcsfs "
            "for gs://, s3fs for s3://), or give a folder"
        ) from error


def _download(name: str) -> str:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else str(error)
        raise ValueError(
            f"model.path={name!r} is neither a folder here nor to be had from the hub "
            f"({why.splitlines()[0]}): give a folder, or download it first"
        ) from error


def read_text(folder: str, name: str) -> str | None:
    """The text of one file of a model, None when it does not exist."""
    if is_remote(folder):
        import fsspec

        fs, root = fsspec.core.url_to_fs(folder)
        file = f"{root}/{name}"
        return fs.cat_file(file).decode("utf-8") if fs.exists(file) else None
    file = pathlib.Path(folder) / name
    return file.read_text(encoding="utf-8") if file.exists() else None


def local_tokenizer_folder(folder: str) -> str:
    """A local folder with the tokenizer of a model; copies the small files out of a bucket."""
    if not is_remote(folder):
        return folder
    target = pathlib.Path(tempfile.mkdtemp(prefix="sdjax_tokenizer_"))
    for name in TOKENIZER_FILES:
        text = read_text(folder, name)
        if text is not None:
            (target / name).write_text(text, encoding="utf-8")
    return str(target)
