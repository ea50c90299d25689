"""A file for HDF5 to write into that survives a full disk."""

from __future__ import annotations

from io import FileIO


class GuardedFile:
    """A file that keeps its first error to itself.

    HDF5 that meets a failed write can crash the whole process when it closes the file. So it is
    told that all is well, nothing more is written, and `check` raises the error afterwards.
    """

    def __init__(self, raw: FileIO) -> None:
        self.raw = raw
        self.error: OSError | None = None

    def check(self) -> None:
        """Raise what the operating system said, if anything."""
        if self.error is not None:
            raise self.error

    def write(self, data: memoryview) -> int:
        """Write all of `data`; the operating system may take it in pieces."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[self.raw.write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int) -> int:
        """Set the size in bytes."""
        try:
            if self.error is None:
                self.raw.truncate(size)
        except OSError as error:
            self.error = error
        return size

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to `offset`."""
        return self.raw.seek(offset, whence)

    def tell(self) -> int:
        """Where the next byte goes."""
        return self.raw.tell()

    def readinto(self, buffer: memoryview) -> int | None:
        """Read into `buffer`."""
        return self.raw.readinto(buffer)

    def read(self, size: int = -1) -> bytes | None:
        """Read `size` bytes; h5py knows a file by this method."""
        return self.raw.read(size)

    def flush(self) -> None:
        """Nothing is buffered here."""
