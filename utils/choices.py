"""The names that flags accept. Without imports, so that parsers can be built before torch is loaded."""

SPLITS = ("train", "val", "test")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")
BACKENDS = ("pil", "tensor")
AUTO_AUGMENTS = ("ra", "ta_wide", "augmix", "imagenet", "cifar10", "svhn")  # the last three: torchvision's policies
OPTIMIZERS = ("sgd", "sgd_nesterov", "rmsprop", "adamw")
SCHEDULERS = ("steplr", "cosineannealinglr", "exponentiallr")
WARMUPS = ("linear", "constant")
EMBEDDINGS = ("cls_token", "dist_token", "reg_token", "pos_embed", "relative_position_bias_table")  # timm's names
CLASS_WEIGHTS = ("none", "balanced", "sqrt")
MASK_POLICIES = ("learned", "prior", "uniform", "none")
OBJECTIVES = ("published", "published-unscaled", "reinforce", "pathwise")
BASELINES = ("none", "ema", "loo")
POLICY_SIGNS = ("cooperative", "adversarial")
TRACKER_NAMES = ("tensorboard", "wandb", "trackio")
FORMATS = ("table", "csv", "json")  # of predictions
