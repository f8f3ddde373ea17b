# An address is followed by the number of bytes there; kernel.py, the one caller, tells what they hold.
def paths() -> list[str]: ...
def translate(
    path: str, src: int, src_size: int, dst: int, dst_size: int, table: bytes, /
) -> tuple[int, int, int, int]: ...
def histogram(src: int, src_size: int, /) -> bytes: ...
def run_max(src: int, src_size: int, rows: int, columns: int, width: int, out: int, out_size: int, /) -> None: ...
def requantize(
    path: str,
    src: int,
    src_size: int,
    dst: int,
    dst_size: int,
    rows: int,
    columns: int,
    height: int,
    width: int,
    before: int,
    before_size: int,
    after: int,
    after_size: int,
    /,
) -> tuple[float, float]: ...
def dequantize(
    path: str,
    src: int,
    src_size: int,
    src_stride: int,
    dst: int,
    dst_size: int,
    dst_stride: int,
    rows: int,
    columns: int,
    height: int,
    width: int,
    top: int,
    left: int,
    scales: int,
    scales_size: int,
    /,
) -> None: ...
