"""Where the images of a WebDataset shard lie: reads a tar's headers and labels, and skips the rest.

Not with the standard library's tarfile: that takes twice as long, and a tar that was cut between two members is
a whole one to it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastssl.data.decode import EXTENSIONS

BLOCK = 512
ZEROS = bytes(BLOCK)
Image = tuple[str, int, int]  # member, offset, length
REGULAR, LINKS, WITHOUT_DATA = (b"0", b"\0", b"7"), (b"1", b"2"), (b"1", b"2", b"3", b"4", b"5", b"6")
LONGEST_HEAD = 2**20  # of a name or a pax header: more is damage


@dataclass
class TarIndex:
    """The images of one shard, in its order."""

    members: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)  # None: the sample has no .cls


@dataclass
class _Sample:
    images: list[tuple[str, Image]] = field(default_factory=list)  # with its extension
    label: int | None = None


def index(path: str) -> TarIndex:
    """Find the images and labels of a shard by WebDataset's rules.

    Members with the same path up to the first dot of the file name are one sample. Its image is the member with an
    image's extension, its label the integer in its `.cls`; members of other kinds mean nothing here.

    Raises:
        ValueError: it is cut short or no tar, or a sample is ambiguous; the message says where.
        OSError: it cannot be read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        samples: dict[str, _Sample] = {}
        for member, offset, length in _members(file):
            folder, slash, base = member.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                continue
            extension = "." + extension.lower()
            if extension.endswith(EXTENSIONS):
                sample = samples.setdefault(folder + slash + stem, _Sample())
                sample.images.append((extension, (member, offset, length)))
            elif extension == ".cls":
                sample = samples.setdefault(folder + slash + stem, _Sample())
                sample.label = _label(os.pread(file, length, offset), member)
    finally:
        os.close(file)
    found = TarIndex()
    for key, sample in samples.items():
        if sample.images:
            member, offset, length = only_image(key, sample.images)
            found.members.append(member)
            found.offsets.append(offset)
            found.lengths.append(length)
            found.labels.append(sample.label)
    return found


def only_image(key: str, images: list[tuple[str, Image]]) -> Image:
    """The image of a sample: `a.jpg` is that of sample a, whatever `a.mask.png` there is.

    Args:
        key: of the sample.
        images: its members that are images, each with its extension in small letters.

    Raises:
        ValueError: there are several.
    """
    if len(images) > 1:
        images = [image for image in images if image[0] in EXTENSIONS] or images
    if len(images) > 1:
        names = ", ".join(image[0] for _, image in images[:3])
        raise ValueError(f"its sample '{key}' has {len(images)} images ({names}): a key ends at the first dot")
    return images[0][1]


def _label(text: bytes, member: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"its member '{member}' is not a class number: {text[:20]!r}")
    return int(text)


def _members(file: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of each regular file in a tar (ustar, pax or GNU)."""
    size, position = os.fstat(file).st_size, 0
    name, length_given = "", -1  # of the next member, from a header of its own
    while True:
        header = os.pread(file, BLOCK, position)
        if len(header) < BLOCK:
            raise ValueError(f"it is cut short: it ends at byte {size:,} without the zeros of a tar's end")
        if header == ZEROS:
            return _check_end(file, position)
        kind, length = header[156:157], _checked_length(header, position)
        data = position + BLOCK
        if kind in REGULAR or kind in WITHOUT_DATA:
            length = length_given if length_given >= 0 else length
            member = name or _short_name(header)
            if kind in LINKS and member.lower().endswith(EXTENSIONS):
                raise ValueError(f"its member '{member}' is a link: pack it with --hard-dereference --dereference")
            name, length_given = "", -1
            length = 0 if kind in WITHOUT_DATA else length
        else:
            member = "a header" if kind in (b"L", b"K", b"x", b"g") else _short_name(header)
        if data + length > size:
            missing = data + length - size
            raise ValueError(f"it is cut short: {missing:,} bytes of '{member}' at byte {position:,} are missing")
        if kind in REGULAR:
            if not member.endswith("/"):  # a folder, in the oldest tars
                yield member, data, length
        elif kind in (b"L", b"x"):
            if length > LONGEST_HEAD:
                raise ValueError(f"it is damaged: a header of {length:,} bytes at byte {position:,}")
            text = os.pread(file, length, data)
            if kind == b"L":
                name = _text(text)
            else:
                name, length_given = _pax(text, position)
        elif kind == b"S":
            raise ValueError(f"its member '{member}' is sparse: pack it without --sparse")
        position = data + -(-length // BLOCK) * BLOCK


def _check_end(file: int, position: int) -> None:
    """After the first zero block there must be nothing but zeros: members after it would be left out unsaid."""
    while rest := os.pread(file, 2**20, position):
        if rest.count(0) < len(rest):
            raise ValueError(
                f"there are more data after a tar's end at byte {position:,}: join tars with tar -A, not cat"
            )
        position += len(rest)


def _checked_length(header: bytes, position: int) -> int:
    """The length of the data, from a header whose checksum is right."""
    try:
        expected = _number(header[148:156])
        if sum(header) - sum(header[148:156]) + 8 * ord(" ") == expected:
            return _number(header[124:136])
    except ValueError:
        pass
    if position == 0 and header.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise ValueError("it is compressed: unpack it, images are compressed themselves")
    raise ValueError("it is not a tar" if position == 0 else f"it is damaged: no header at byte {position:,}")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary for what they cannot hold."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _short_name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:  # GNU's magic differs, and other things stand there
        return f"{_text(header[345:500])}/{name}"
    return name


def _pax(text: bytes, position: int) -> tuple[str, int]:
    """Name and length from a pax header, lines of `LENGTH KEY=VALUE`; "" and -1 for what it does not give."""
    name, length = "", -1
    while text:
        digits, _, _ = text.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits) <= len(text):
            raise ValueError(f"it is damaged: wrong pax header at byte {position:,}")
        key, _, value = text[len(digits) + 1 : int(digits) - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            length = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise ValueError(f"the member at byte {position:,} is sparse: pack it without --sparse")
        text = text[int(digits) :]
    return name, length


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
