"""The only place that knows foreign model classes; everyone else asks here."""

from gohsp.models.compaction import EQUALITY_TOLERANCE, Compaction, compact, relative_difference
from gohsp.models.description import (
    blocks_of,
    check_finite,
    describe,
    example_image,
    input_size,
    plain_attention,
    pretrained_cfg,
    resize,
    resized,
    told_size,
    working_copy,
)
from gohsp.models.labels import class_names, num_classes, require_classifier, set_class_names
from gohsp.models.libraries import (
    OWN,
    build,
    check_specification,
    fill_buffers,
    fit_problems,
    is_library_model,
    listed,
    require_remakeable,
    specification,
)
from gohsp.models.plain import remade, save_plain, sayable

__all__ = [
    "EQUALITY_TOLERANCE",
    "OWN",
    "Compaction",
    "blocks_of",
    "build",
    "check_finite",
    "check_specification",
    "class_names",
    "compact",
    "describe",
    "example_image",
    "fill_buffers",
    "fit_problems",
    "input_size",
    "is_library_model",
    "listed",
    "num_classes",
    "plain_attention",
    "pretrained_cfg",
    "relative_difference",
    "remade",
    "require_classifier",
    "require_remakeable",
    "resize",
    "resized",
    "save_plain",
    "sayable",
    "set_class_names",
    "specification",
    "told_size",
    "working_copy",
]
