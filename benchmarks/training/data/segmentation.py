"""Images whose pixels have classes.

Folders `train` and `test` have each a folder `images` and, with files of the same
names, `masks`, whose pixels are the numbers of their classes; 255 is none.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import DataError, first_line
from .samples import Data, Examples, IGNORED


_UNLABELLED = 255


def load_segmentation(folder: Path, image_size: tuple[int, int] | None) -> Data:
    """Images and masks of the classes of their pixels; 255 is no class."""
    train, test = (_read_split(folder / name, image_size) for name in ("train", "test"))
    if train.inputs.shape[1:] != test.inputs.shape[1:]:
        raise DataError(
            f"{folder} has training images of shape {train.inputs.shape[1:]} but test "
            f"images of shape {test.inputs.shape[1:]}; give one by --image-size."
        )
    num_classes = int(train.targets.max()) + 1
    if test.targets.max() >= num_classes:
        raise DataError(
            f"{folder / 'test'} has a class {test.targets.max()}, where the training "
            f"masks have {num_classes} classes."
        )
    return Data(train, test, num_classes)


def _read_split(folder: Path, image_size: tuple[int, int] | None) -> Examples:
    masks = {path.stem: path for path in sorted((folder / "masks").glob("*"))}
    paths = sorted((folder / "images").glob("*"))
    if not paths:
        raise DataError(f"{folder / 'images'} has no images.")
    inputs, targets = [], []
    for path in paths:
        if path.stem not in masks:
            raise DataError(f"{folder / 'masks'} has no mask for {path.name}.")
        image = _read_image(path, image_size, "RGB", Image.Resampling.BILINEAR)
        mask_path = masks[path.stem]
        mask = _read_image(mask_path, image_size, None, Image.Resampling.NEAREST)
        if mask.ndim != 2:
            raise DataError(f"{mask_path} has colours, where a mask has class numbers.")
        if mask.shape != image.shape[:2]:
            raise DataError(f"{mask_path} is not of the size of its image {path.name}.")
        if inputs and image.shape != inputs[0].shape:
            raise DataError(
                f"{path} is not of the size of {paths[0].name}; give one by "
                "--image-size."
            )
        if not np.all((mask == np.round(mask)) & (mask >= 0) & (mask <= _UNLABELLED)):
            raise DataError(
                f"{mask_path} has the values {mask.min()} to {mask.max()}; a mask has "
                f"class numbers from 0 to {_UNLABELLED - 1}, or {_UNLABELLED} for none."
            )
        inputs.append(image)
        mask = mask.astype(np.int32)
        targets.append(np.where(mask == _UNLABELLED, np.int32(IGNORED), mask))
    images = np.stack(inputs).transpose(0, 3, 1, 2)
    return Examples(images, np.stack(targets), std=255.0)


def _read_image(
    path: Path,
    size: tuple[int, int] | None,
    mode: str | None,
    resampling: Image.Resampling,
) -> np.ndarray:
    try:
        with Image.open(path) as image:
            image = image.convert(mode) if mode else image
            if size is not None:
                height, width = size
                image = image.resize((width, height), resampling)
            return np.asarray(image)
    # Pillow raises a `SyntaxError` for some broken files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path} cannot be read as an image ({first_line(error)})."
        ) from error
