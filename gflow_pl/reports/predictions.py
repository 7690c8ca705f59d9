"""The predicted class of every image, as a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gflow_pl.common.errors import SettingsError
from gflow_pl.files import write_text

__all__ = ["write_predictions"]


def write_predictions(
    path: str | os.PathLike[str],
    probabilities: Sequence[object],
    image_names: Iterable[object] | None = None,
    class_names: Sequence[object] | None = None,
) -> None:
    """Write the name, the most probable class and its probability for every image, in the order of the images.

    Args:
        path: The CSV file to write.
        probabilities: Class probabilities (images, classes) of every batch, as `predict_step` returned them.
        image_names: Name of every image; None writes its index. There may be more names than rows, if prediction
            ended early (`limit_predict_batches`).
        class_names: Name of every class; None writes its index.

    Raises:
        SettingsError: There is no batch, or a batch is not a tensor (images, classes).
    """
    if not probabilities:
        raise SettingsError("predict: there are no images: check the prediction data and `limit_predict_batches`.")
    batches = [batch for batch in probabilities if isinstance(batch, Tensor) and batch.ndim == 2]
    if len(batches) < len(probabilities):
        raise SettingsError("predict: the module's `predict_step` must return class probabilities (images, classes).")
    table = torch.cat(batches).float()
    highest = table.max(dim=1)
    images = range(len(table)) if image_names is None else image_names
    classes = class_names or range(table.shape[1])
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "class", "probability"])
    for image, index, probability in zip(images, highest.indices.tolist(), highest.values.tolist(), strict=False):
        writer.writerow([image, classes[index], f"{probability:.6f}"])
    write_text(path, text.getvalue())
