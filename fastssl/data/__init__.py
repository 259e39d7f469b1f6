"""Images and what is done to them: sources, augmentation recipes, and the loaders that execute them."""

NAMED = ("embedded", "cifar10", "cifar100")


def is_named(data: str) -> bool:
    """Whether `data` names a source ("cifar10", "cifar10:FOLDER") and not a folder of images."""
    return data.split(":")[0] in NAMED
