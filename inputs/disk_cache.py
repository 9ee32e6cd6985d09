"""A folder in which trainings keep what is computed once of their pairs.

    disk = DiskCache(Path("runs/cache"), dict(vae_sha256=..))
    file = disk.file(facts, make)           # made only if there is none of these facts
"""
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import weights
from inputs.processes import Processes

CACHE_VERSION = 1               # to be raised with what is cached, or how


class DiskCache(NamedTuple):
    """A folder of what is computed once, by what it depends on; trainings share it."""
    folder: Path
    facts: dict                 # the base's, that all of it depends on
    processes: Processes = Processes()

    def file(self, facts, make):
        """Returns the file of (tensors, metadata) that make() returns, which is made if need be.

        facts: what it depends on, as JSON takes it. A file's name holds the digests of these and
        of its own content, so that a damaged one is made again.
        """
        facts = json.dumps([CACHE_VERSION, self.facts, facts], sort_keys=True)
        key = hashlib.sha256(facts.encode()).hexdigest()[:24]
        for file in self.folder.glob(f"{key}-*.safetensors"):
            if weights.fingerprint(file) == file.stem.removeprefix(f"{key}-"):
                return file
        temporary = self.folder / f"{key}.{os.getpid()}"
        tensors, metadata = make()
        weights.save(tensors, temporary, metadata)
        file = self.folder / f"{key}-{weights.fingerprint(temporary)}.safetensors"
        temporary.replace(file)
        return file
