from __future__ import annotations

from ..codes.kernel import translate
from ..host.memory import allocate, as_bytes, shaped
from ..host.parallel import pieces
from . import reader


class Files:
    def read(self, infos, weights, threads, show_progress=False):
        return reader.read(infos, weights, threads, show_progress)

    def visit(self, infos, see, threads, show_progress=False):
        return reader.visit(infos, see, threads, show_progress)

    def find_overflow(self, infos, table, threads=1):
        return reader.find_overflow(infos, table)

    def mapped(self):
        return None


class Bin:
    def __init__(self, checkpoint):
        self.c = checkpoint

    def mapped(self):
        from .files import load_bin

        return {n: v for f in self.c.files for n, v in load_bin(f).items()}

    def read(self, infos, weights, threads, show_progress=False):
        loaded = self.mapped()
        tensors = {i.name: loaded[i.name].detach() for i in infos}
        counts = {}
        for name, job in weights.items():
            source, target = tensors[name].contiguous(), None
            if job.decision is not None:
                if not job.decision.convert and translate(as_bytes(source), None, job.table).above:
                    job.decision.convert = True
                if job.decision.convert:
                    tensors[name] = target = shaped(allocate(source.numel()), source.dtype, tuple(source.shape))
            counts[name] = translate(as_bytes(source), None if target is None else as_bytes(target), job.table)
        return tensors, counts

    def visit(self, infos, see, threads, show_progress=False):
        loaded = self.mapped()
        for i in infos:
            flat = as_bytes(loaded[i.name].contiguous())
            for a, b in pieces(flat.numel()):
                see(i.name, flat[a:b])

    def find_overflow(self, infos, table, threads=1):
        loaded = self.mapped()
        return any(translate(as_bytes(loaded[i.name].contiguous()), None, table).above for i in infos)


def source_of(c):
    return Bin(c) if c.is_bin else Files()
