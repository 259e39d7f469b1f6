"""TFRecord files: where the records lie, and the image and label in a tf.train.Example. Needs no TensorFlow."""

import os
import struct
from functools import cache
from typing import Any

IMAGE, LABEL = "image/encoded", "image/class/label"


def index(path: str) -> tuple[list[int], list[int]]:
    """Offsets and lengths of the records of a file.

    Reads the frames only (uint64 length, its masked crc32c, data, crc32c of the data), so data damaged in the middle
    show when they are decoded.

    Raises:
        ValueError: it is cut short or no TFRecord; the message says where.
        OSError: it cannot be read.
    """
    offsets: list[int] = []
    lengths: list[int] = []
    file = os.open(path, os.O_RDONLY)
    try:
        size, position = os.fstat(file).st_size, 0
        while position < size:
            head = os.pread(file, 12, position)
            if len(head) < 12:
                raise ValueError(f"it is cut short: it ends within the head of record {len(offsets)}")
            length, crc = struct.unpack("<QI", head)
            if crc != _masked_crc(head[:8]):
                what = "a record" if offsets else "a TFRecord file (a compressed one must be unpacked)"
                raise ValueError(f"at byte {position} there is not {what}: wrong checksum")
            if position + length + 16 > size:
                missing = position + length + 16 - size
                raise ValueError(f"it is cut short: record {len(offsets)} needs {missing:,} more bytes")
            offsets.append(position + 12)
            lengths.append(length)
            position += length + 16
    finally:
        os.close(file)
    return offsets, lengths


def image(record: bytes) -> bytes:
    """The encoded image in a serialised tf.train.Example.

    Raises:
        ValueError: it is no Example, or has no image.
    """
    values = _features(record)[IMAGE].bytes_list.value
    if len(values) != 1:
        raise ValueError(f"its tf.train.Example has {len(values)} values of {IMAGE} instead of one")
    return bytes(values[0])


def label(record: bytes) -> int | None:
    """The label in a serialised tf.train.Example, None if it has none.

    Raises:
        ValueError: it is no Example.
    """
    values = _features(record)[LABEL].int64_list.value
    return int(values[0]) if values else None


def _features(record: bytes) -> Any:
    from google.protobuf import message

    try:
        return _example().FromString(record).features.feature
    except message.DecodeError:
        raise ValueError("it is not a tf.train.Example") from None


@cache
def _example() -> Any:
    """The message class of tensorflow/core/example/example.proto, in a pool of its own: TensorFlow may be there too."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # only who has TFRecords needs them

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="tensorflow", syntax="proto3")

    def add(name: str, *fields: tuple[str, int, int, str], within: Any = None) -> Any:
        """A message; fields are (name, label, type, type's name) and numbered from 1."""
        made = (within.nested_type if within is not None else file.message_type).add(name=name)
        for number, (field, repeated, type_, type_name) in enumerate(fields, 1):
            made.field.add(name=field, number=number, label=repeated, type=type_, type_name=type_name or None)
        return made

    one, many = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    add("BytesList", ("value", many, kind.TYPE_BYTES, ""))
    add("FloatList", ("value", many, kind.TYPE_FLOAT, ""))
    add("Int64List", ("value", many, kind.TYPE_INT64, ""))
    lists = [("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")]
    feature = add("Feature", *((name, one, kind.TYPE_MESSAGE, f".tensorflow.{type_}") for name, type_ in lists))
    feature.oneof_decl.add(name="kind")
    for field in feature.field:
        field.oneof_index = 0
    entry_type = ".tensorflow.Features.FeatureEntry"
    features = add("Features", ("feature", many, kind.TYPE_MESSAGE, entry_type))
    value = ("value", one, kind.TYPE_MESSAGE, ".tensorflow.Feature")
    entry = add("FeatureEntry", ("key", one, kind.TYPE_STRING, ""), value, within=features)
    entry.options.map_entry = True
    add("Example", ("features", one, kind.TYPE_MESSAGE, ".tensorflow.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


def _crc_table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, reflected
        table.append(value)
    return table


_TABLE = _crc_table()


def _masked_crc(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF  # masked, as TFRecord wants it
