"""Finds the bytes of files that lie uncompressed in a zip archive."""

import struct
import zipfile
from typing import BinaryIO

# Where a member's header in the archive has the lengths of its name and of an extra field, and how
# long the header is without them.
_LENGTHS, _HEADER = 26, 30


def offset(file: BinaryIO, member: zipfile.ZipInfo) -> int:
  """Returns where in an archive the content of an uncompressed member starts, in bytes."""
  file.seek(member.header_offset + _LENGTHS)
  return member.header_offset + _HEADER + sum(struct.unpack("<HH", file.read(4)))
