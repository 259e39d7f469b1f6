"""Finds image files in folders."""

import os
from pathlib import Path

import torch

from fastssl.data.decode import EXTENSIONS
from fastssl.data.exclude import Exclusions, Report
from fastssl.data.stored import FolderImages


def find(root: Path, excluded: Exclusions, report: Report) -> FolderImages:
    """The images below `root`; sub-folders of the first level that hold images are the classes.

    Classes are counted before anything is left out, so that leaving out an image moves no label.

    Args:
        root: the folder.
        excluded: files and folders to leave out.
        report: gets the folders that cannot be listed.
    """
    files: list[tuple[Path, bool]] = []  # and whether to leave it out
    unlisted: list[str] = []
    seen: set[str] = set()
    outside: set[str] = set()  # folders that are left out

    def cannot_list(error: OSError) -> None:
        unlisted.append(error.filename)
        if error.filename not in outside:
            report(error.filename, error.strerror or str(error))

    for folder, folders, names in os.walk(root, followlinks=True, onerror=cannot_list):
        if (real := os.path.realpath(folder)) in seen:  # a link back up, or twice to the same folder
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # which of two links to a folder is followed must not depend on the file system
        below = (os.path.join(folder, name) for name in folders)
        outside |= {path for path in below if folder in outside or path in excluded}
        images = (os.path.join(folder, name) for name in names if is_image(name))
        files += [(Path(path), folder in outside or path in excluded) for path in images]
    files.sort()
    depth = len(root.parts)
    parts = [path.parts[depth:] for path, _ in files]
    kept = [i for i, (_, out) in enumerate(files) if not out]
    paths = tuple(files[i][0] for i in kept)
    if any(len(p) == 1 for p in parts):  # some images lie directly in the folder: unlabelled
        return FolderImages(paths, None)
    named = {p[0] for p in parts} | {Path(f).name for f in unlisted if len(Path(f).parts) == depth + 1}
    classes = tuple(sorted(named))
    index = {name: label for label, name in enumerate(classes)}
    labels = torch.tensor([index[parts[i][0]] for i in kept], dtype=torch.int64) if classes else None
    return FolderImages(paths, labels, classes)


def is_image(name: str) -> bool:
    """Whether a file name is an image's."""
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def disguised(root: str) -> list[str]:
    """Folders with the name of an image and no images below them: harmless to a training, and hardly meant."""
    holding, odd = set[str](), list[str]()
    for at, folders, names in os.walk(root, topdown=False):
        if any(map(is_image, names)) or any(os.path.join(at, name) in holding for name in folders):
            holding.add(at)
        elif at != root and is_image(os.path.basename(at)):
            odd.append(at)
    return sorted(odd)
