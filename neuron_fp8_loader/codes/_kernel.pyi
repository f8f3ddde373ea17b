# An address is followed by the number of bytes there; kernel.py, the one caller, tells what they hold.
def paths() -> list[str]: ...
def translate(
    path: str, src: int, src_size: int, dst: int, dst_size: int, table: bytes, /
) -> tuple[int, int, int, int]: ...
def histogram(src: int, src_size: int, /) -> bytes: ...
def best_mantissas(
    scales: int,
    scales_size: int,
    rows: int,
    columns: int,
    errors: int,
    errors_size: int,
    mantissas: int,
    mantissas_size: int,
    /,
) -> None: ...
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
    scales: int,
    scales_size: int,
    errors: int,
    errors_size: int,
    row_scales: int,
    row_scales_size: int,
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
) -> bool: ...
def place(
    path: str,
    src: int,
    src_size: int,
    rows: int,
    columns: int,
    dst: int,
    dst_size: int,
    stride: int,
    /,
) -> None: ...
def read(
    path: str,
    handle: int,
    offset: int,
    done: int,
    piece: int,
    nanoseconds: int,
    direct: bool,
    segments: int,
    segments_size: int,
    tables: int,
    tables_size: int,
    cells: int,
    cells_size: int,
    /,
) -> tuple[int, int]: ...
