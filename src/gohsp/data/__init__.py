"""Images in, batches out: where images come from, how they become tensors, and how they are batched.

A `DataSource` names a data set and its splits. `open_split` turns one split into a `Split`: random access
to decoded images and their labels, whatever the storage. `Preprocessing` says what a model expects of an
image; `eval_transform` and `train_transform` build it with timm. `loader` makes a reproducible, standard
`torch.utils.data.DataLoader` of the three; `calibration_images` draws images without touching a label.

Sources (`DataSource.source`):

- a folder of class folders, with or without split sub-folders (timm's folder reader);
- ``hfds/<hub id or local folder>``: Hugging Face datasets (``pip install 'gohsp[hf]'``), where a split may be
  a slice such as ``train[:90%]``;
- ``wds/<folder>``: webdataset shards (uncompressed tar files) on a local disk;
- ``digits``: scikit-learn's 1,797 grey 8x8 digits, for trials that finish in seconds.
"""

from __future__ import annotations

from gohsp.data.loading import calibration_images, loader
from gohsp.data.preprocessing import Augment, Preprocessing, Transform, eval_transform, train_transform
from gohsp.data.resident import ResidentImages, ResidentLoader, resident_images
from gohsp.data.sources import DataSource, Split, UnreadableImageError, open_split
from gohsp.data.spool import Spool

__all__ = [
    "Augment",
    "DataSource",
    "Preprocessing",
    "ResidentImages",
    "ResidentLoader",
    "Split",
    "Spool",
    "Transform",
    "UnreadableImageError",
    "calibration_images",
    "eval_transform",
    "loader",
    "open_split",
    "resident_images",
    "train_transform",
]
