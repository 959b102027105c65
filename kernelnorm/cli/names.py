"""The names that options take, for help texts, error messages and completion.

They are written out because the tables that have them import PyTorch, which takes seconds; a test
compares them with these tables.
"""

CASES = ("digits-vgg8", "cifar10-vgg8", "imagenette-densenet121", "imagewoof-resnet18")
"""The keys of :data:`kernelnorm.experiments.recipes.RECIPES`."""

MODELS = (
    "vgg8",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "efficientnet_b0",
    "mobilenet_v3_small",
    "knresnet13",
    "knresnet18",
    "knresnet34",
    "knresnet50",
)
"""What :func:`kernelnorm.models.list_models` returns."""

NORMS = (
    "batch",
    "group",
    "layer",
    "instance",
    "positional",
    "local_context",
    "local_context_sliding",
    "batch_renorm",
    "batch_channel",
    "evonorm_s0",
    "frn",
    "lrn",
    "ws_group",
    "weight_norm",
    "nf",
    "none",
    "kernel",
)
"""The norms of :mod:`kernelnorm.norms`."""

PUBLISHED = ("knresnet18", "knresnet34", "knresnet50")
"""The keys of :data:`kernelnorm.models.published.PUBLISHED`."""

# The values that options of ``bench`` take, as in kernelnorm.experiments.bench.plan.
DTYPES = ("float32", "bfloat16", "float16")
MEMORY_FORMATS = ("channels_last", "contiguous")
MODES = ("eager", "compile", "reduce-overhead")
PASSES = ("train", "inference")
