"""What a disk would hold after a power cut, from the journal that faults.c wrote.

The model is pessimistic, but what Linux may do (ext4 and xfs since 4.13): a write is in memory until a
successful fsync or fdatasync of its file; then all 4096-byte pages that were dirty are on disk. A failed
one makes them clean without writing them: they get to the disk only if written to again and then synced.
A file on disk ends with its last page that got there; holes are zeros. Truncations get there by the next
successful sync of the file; new names, renames and unlinks by that of any journaled file.

With a seed it is harsher, and as legal: a random part of what was dirty got to the disk, also of what failed
syncs forgot, perhaps a truncation, and the first few of the last changes of names.
"""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Iterator, Mapping, NamedTuple

PAGE = 4096
HEAD = struct.Struct("=ciiqII")


class Record(NamedTuple):
    kind: str  # W write, T truncate to size `at`, S sync, E sync with a late error, R rename to `data`, U unlink
    pid: int
    error: int
    at: int
    path: Path
    data: bytes


def records(journal: Path) -> Iterator[Record]:
    """Everything in the journal, in the order in which it happened."""
    with journal.open("rb") as file:
        for head in iter(lambda: file.read(HEAD.size), b""):
            kind, pid, error, at, path, size = HEAD.unpack(head)
            yield Record(kind.decode(), pid, error, at, Path(os.fsdecode(file.read(path))), file.read(size))


class File:
    """A file as programs see it (`cache`) and as the disk has it (`disk`)."""

    def __init__(self, data: bytes = b"") -> None:
        self.cache, self.disk = bytearray(data), bytearray(data)
        self.dirty: set[int] = set()  # numbers of pages
        self.cut: int | None = None  # the lowest size since the last sync, if it was truncated

    def write(self, at: int, data: bytes) -> None:
        self.cache.extend(bytes(max(0, at - len(self.cache))))
        self.cache[at : at + len(data)] = data
        self.dirty.update(range(at // PAGE, (at + len(data) - 1) // PAGE + 1))

    def truncate(self, size: int) -> None:
        if size < len(self.cache):
            self.cut = size if self.cut is None else min(size, self.cut)
            self.dirty = {page for page in self.dirty if page * PAGE < size}
        self.cache = self.cache[:size].ljust(size, b"\0")

    def sync(self, error: int, chance: random.Random | None) -> None:
        if not error:
            self.disk, self.cut = self.written(True), None
        elif chance:
            self.disk = self.written(False, chance)
        self.dirty.clear()

    def written(self, cut: bool, chance: random.Random | None = None) -> bytearray:
        """The disk with the dirty pages, or by chance some of them, and before them with the truncation if `cut`."""
        disk = self.disk[: self.cut] if cut else self.disk[:]
        for page in sorted(self.dirty):
            too_early = not cut and self.cut is not None and (page + 1) * PAGE > self.cut
            if not too_early and (chance is None or chance.random() < 0.5):
                data = self.cache[page * PAGE : (page + 1) * PAGE]
                disk.extend(bytes(max(0, page * PAGE - len(disk))))
                disk[page * PAGE : page * PAGE + len(data)] = data
        return disk


class Disk:
    """All journaled files; `base` is what they held when the journal began."""

    def __init__(self, base: Mapping[Path, bytes] | None = None, seed: int | None = None) -> None:
        self.seed, self.chance = seed, None if seed is None else random.Random(seed)
        self.files = {path: File(data) for path, data in (base or {}).items()}
        self.names = [dict(self.files)]  # as they are on disk, and after each change of them since

    def apply(self, record: Record) -> None:
        file = self.files.setdefault(record.path, File())
        if record.kind in "RU":
            del self.files[record.path]
        if record.kind == "R":
            self.files[Path(os.fsdecode(record.data))] = file
        if self.files != self.names[-1]:
            self.names.append(dict(self.files))
        if record.kind == "W":
            file.write(record.at, record.data)
        elif record.kind == "T":
            file.truncate(record.at)
        elif record.kind == "S":
            file.sync(record.error, self.chance)
            self.names = self.names if record.error else [dict(self.files)]

    def after_cut(self) -> dict[Path, bytes]:
        """What the disk holds if the power fails now."""
        if self.seed is None:
            return {path: bytes(file.disk) for path, file in self.names[0].items()}
        chance = random.Random(self.seed)
        names = chance.choice(self.names)
        return {path: bytes(file.written(chance.random() < 0.5, chance)) for path, file in names.items()}


def disk_after(journal: Path, upto: int | None = None, seed: int | None = None,
               base: Mapping[Path, bytes] | None = None) -> dict[Path, bytes]:  # fmt: skip
    """What is on disk if the power fails after `upto` records of the journal (None: all)."""
    disk = Disk(base, seed)
    for record in list(records(journal))[:upto]:
        disk.apply(record)
    return disk.after_cut()
