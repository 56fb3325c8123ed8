"""A small ImageNet in the layout of the two official archives, cut out of the two photographs of scikit-learn."""

import io
import pathlib
import tarfile

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

SYNSETS = {"n01440764": 0, "n01443537": 1, "n02105855": 230, "n07583066": 924, "n13037406": 993, "n15075141": 999}
PER_SYNSET = 4
VALIDATION = 20
PNG, CMYK = "n02105855_2933.JPEG", "n07583066_647.JPEG"  # two of the odd files of the real archive


def write_archives(folder: pathlib.Path) -> None:
    """Write ILSVRC2012_img_train.tar, an archive of one archive per synset, and ILSVRC2012_img_val.tar."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    train: dict[str, bytes] = {}
    for synset in SYNSETS:
        names = [f"{synset}_{number}.JPEG" for number in range(PER_SYNSET - 1)]
        names.append({PNG[:9]: PNG, CMYK[:9]: CMYK}.get(synset, f"{synset}_10026.JPEG"))
        train[f"{synset}.tar"] = _tar({name: _image(name, rng) for name in names})
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, VALIDATION + 1)]
    (folder / "ILSVRC2012_img_train.tar").write_bytes(_tar(train))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(_tar({name: _image(name, rng) for name in names}))


def _image(name: str, rng: np.random.Generator) -> bytes:
    """A random piece of a photograph, about half as wide and high as the images of ImageNet."""
    photo = load_sample_images().images[rng.integers(2)]
    height, width = rng.integers(150, 250), rng.integers(150, 300)
    top, left = rng.integers(photo.shape[0] - height), rng.integers(photo.shape[1] - width)
    piece = Image.fromarray(photo[top : top + height, left : left + width])
    file = io.BytesIO()
    if name == PNG:
        piece.save(file, "PNG")
    else:
        piece.convert("CMYK" if name == CMYK else "RGB").save(file, "JPEG", quality=90)
    return file.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()
