"""A bucket of Google Cloud Storage, in memory."""

from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
  """A file system in memory under the name gs, which counts what is fetched."""

  protocol = "gs"
  store: dict = {}
  pseudo_dirs = [""]
  fetched: list = []

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(str(path).replace("gs://", "memory://"))

  def cat_file(self, path, start=None, end=None, **options):
    content = super().cat_file(path, start, end, **options)
    self.fetched.append(len(content))
    return content
