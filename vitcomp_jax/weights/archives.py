"""Finds the bytes of files that are stored uncompressed in a zip archive."""

import struct
import zipfile
from typing import BinaryIO

# Offset of the lengths of a member's name and extra field in its header, and the length of the
# header without these two.
_LENGTHS, _HEADER = 26, 30


def offset(file: BinaryIO, member: zipfile.ZipInfo) -> int:
  """Returns the byte offset at which the content of an uncompressed member starts in an archive."""
  file.seek(member.header_offset + _LENGTHS)
  return member.header_offset + _HEADER + sum(struct.unpack("<HH", file.read(4)))
