"""Published weights on the Hugging Face Hub.

    hf://OWNER/REPOSITORY                      the repository's model.safetensors
    hf://OWNER/REPOSITORY@REVISION             of a branch, a tag or a commit
    hf://OWNER/REPOSITORY/FOLDER/FILE          another safetensors file
    hf://MODEL                                 the repository of a model in `PUBLISHED`

huggingface_hub (the extra `hub`) downloads into its cache; with HF_HUB_OFFLINE=1 the cache is all that is read. A file
is used only if it has the digest by which the Hub stores it.
"""

import hashlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from halvit_jax.text import one_line, pip_install

PREFIX = "hf://"
FILE = "model.safetensors"
SOURCE = re.compile(
    r"(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>[\w./-]+?))?(?:/(?P<file>[\w./-]+\.safetensors))?"
)
NEEDS = f"downloading from the Hub needs huggingface_hub: {pip_install('hub')}"

# Repository -> (model, fields): where published weights are, as safetensors.
PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "timm/deit_tiny_patch16_224.fb_in1k": ("deit_tiny", {}),
    "timm/deit_small_patch16_224.fb_in1k": ("deit_small", {}),
    "timm/deit_base_patch16_224.fb_in1k": ("deit_base", {}),
    "timm/deit_tiny_distilled_patch16_224.fb_in1k": ("deit_tiny", {"distilled": True}),
    "timm/deit_small_distilled_patch16_224.fb_in1k": ("deit_small", {"distilled": True}),
    "timm/deit_base_distilled_patch16_224.fb_in1k": ("deit_base", {"distilled": True}),
    "timm/swin_tiny_patch4_window7_224.ms_in1k": ("swin_tiny", {}),
    "timm/swin_small_patch4_window7_224.ms_in1k": ("swin_small", {}),
    "timm/swin_base_patch4_window7_224.ms_in1k": ("swin_base", {}),
    **{f"timm/pvt_v2_b{size}.in1k": (f"pvt_v2_b{size}", {}) for size in range(6)},
    **{f"timm/nextvit_{size}.bd_in1k": (f"nextvit_{size}", {}) for size in ("small", "base", "large")},
    **{f"timm/shvit_s{size}.in1k": (f"shvit_s{size}", {}) for size in range(1, 5)},
    "timm/resnet18.tv_in1k": ("resnet18", {}),
    "timm/resnet50.tv_in1k": ("resnet50", {}),
    "timm/resnet50.a2_in1k": ("resnet50", {}),
    "timm/resnet101.tv_in1k": ("resnet101", {}),
    "timm/resnext101_32x8d.tv_in1k": ("resnext101_32x8d", {}),
    "timm/regnety_160.deit_in1k": ("regnety_160", {}),
}
# Family -> where its authors publish weights as PyTorch files, for the user to fetch and to convert.
ELSEWHERE: Mapping[str, str] = {
    "mini_deit": "https://github.com/microsoft/Cream/tree/main/MiniViT",
    "mini_swin": "https://github.com/microsoft/Cream/tree/main/MiniViT",
    "pvt": "https://github.com/whai362/PVT/tree/v2/classification",
    "halvit": "the authors of HaLViT release none for its ViTs",
}


class Source(NamedTuple):
    """A file on the Hub."""

    repository: str
    revision: str | None
    file: str


def is_source(path: object) -> bool:
    """Whether this names a file on the Hub."""
    return str(path).startswith(PREFIX)


def parse(source: str) -> Source:
    """The parts of a source.

    Raises:
        ValueError: it has another form, or names a model without published weights.
    """
    found = SOURCE.fullmatch(source.removeprefix(PREFIX).removesuffix("/"))
    if found is None:
        raise ValueError(
            f"{source} is not of the form hf://OWNER/REPOSITORY[@REVISION][/FILE.safetensors] or hf://MODEL"
        )
    repository = found["repository"]
    return Source(
        repository if "/" in repository else repository_of(repository), found["revision"], found["file"] or FILE
    )


def repository_of(model: str) -> str:
    """The repository with the weights of a model.

    Raises:
        ValueError: none is known, with the place where the authors publish theirs.
    """
    for repository, (name, fields) in PUBLISHED.items():
        if name == model and not fields:
            return repository
    where = [place for family, place in ELSEWHERE.items() if model.startswith(f"{family}_")]
    known = ", ".join(sorted({name for name, _ in PUBLISHED.values()}))
    raise ValueError(f"no repository of the Hub is known for {model}; {where[0] if where else f'there are {known}'}")


def model_of(source: str) -> tuple[str | None, dict[str, Any]]:
    """The model and fields of a repository in `PUBLISHED`; (None, {}) for any other."""
    name, fields = PUBLISHED.get(parse(source).repository, (None, {}))
    return name, dict(fields)


def download(source: str) -> pathlib.Path:
    """The file in the local cache, downloaded if it is not there yet.

    Raises:
        ValueError: no such repository, revision or file, no access, no connection, or a file that is not what the Hub
            says it is.
    """
    repository, revision, file = parse(source)
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError:
        raise ValueError(f"{source}: {NEEDS}") from None
    reasons = {
        errors.GatedRepoError: "its owner must grant you access; log in with `hf auth login`",
        errors.RepositoryNotFoundError: "no such repository, or a private one; log in with `hf auth login`",
        errors.RevisionNotFoundError: f"no revision {revision}",
        errors.LocalEntryNotFoundError: "it is not in the cache, and the Hub cannot be reached",
        errors.EntryNotFoundError: f"the repository has no {file}; name another safetensors file behind it",
    }
    try:
        path = pathlib.Path(huggingface_hub.hf_hub_download(repository, file, revision=revision))
    except Exception as error:  # also of the connection and of the file system
        reason = next((text for kind, text in reasons.items() if isinstance(error, kind)), one_line(error))
        raise ValueError(f"{source}: {reason}") from error
    blob = path.resolve()
    # Large files are stored by their SHA-256, which is the name of the cached file.
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        with open(blob, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != blob.name:
            blob.unlink()
            raise ValueError(f"{source}: its SHA-256 is {digest}, the Hub says {blob.name}; it was removed, try again")
    return path
