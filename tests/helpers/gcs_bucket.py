"""The bucket of `gcs_server`: its objects, and what goes wrong with the next requests."""

import dataclasses
import datetime
import threading
from typing import Any


@dataclasses.dataclass(frozen=True)
class Stored:
    """An object: its content, generation and the time it was written."""

    data: bytes
    generation: int
    updated: str


class Bucket:
    """The objects of the one bucket there is, and what goes wrong with the next requests."""

    def __init__(self, name: str = "bucket") -> None:
        self.name = name
        self.objects: dict[str, Stored] = {}
        self.uploads: dict[str, dict[str, Any]] = {}  # resumable ones, by their id
        self.lock = threading.RLock()
        self.page = 1000  # entries of a listing
        self.unavailable = 0  # requests that are answered with 503
        self.lost_answers = 0  # writes that are done, and answered with 503
        self.forbidden: tuple[str, ...] = ()  # methods that are answered with 403
        self.delay = 0.0  # seconds before every answer
        self.requests: list[str] = []  # "METHOD path"
        self._generation = 1000

    def put(self, name: str, data: bytes, *, age: float = 0.0) -> Stored:
        """Write an object; `age` is how many seconds ago that was."""
        with self.lock:
            self._generation += 1
            when = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=age)
            self.objects[name] = Stored(data, self._generation, when.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
            return self.objects[name]

    def flip(self, name: str) -> None:
        """Change one bit in the middle of an object."""
        content = bytearray(self.objects[name].data)
        content[len(content) // 2] ^= 1
        self.put(name, bytes(content))

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects below a prefix, sorted."""
        with self.lock:
            return sorted(name for name in self.objects if name.startswith(prefix))

    def text(self, name: str) -> str:
        """The content of an object as text."""
        return self.objects[name].data.decode()
