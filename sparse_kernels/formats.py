"""How a 2:4 matrix is stored for the kernels: the dtype of its values, and the layout of values and metadata.

A packed matrix (R rows, C columns, 2:4 along the columns) is one buffer: [values (R, C/2), row-major | metadata]. The
library does not document the order of the metadata; kernels.cu has the order of each format, and
`matmul_plan.writes_metadata` compares it with the library's before anything relies on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels.cusparselt import DataType

SIDE_MULTIPLE = 16
"""Both sides of a 2:4 matrix must be multiples of this for the kernels and the library."""


@dataclass(frozen=True)
class PackedFormat:
    """One format.

    Attributes:
        dtype: of the values, and of the products' other operand.
        data_type: of that dtype in cuSPARSELt.
        result: the dtype of the products' result and of a bias.
        sides, tokens: both sides of a matrix, and the rows of the other operand, must be multiples of these.
    """

    dtype: torch.dtype
    data_type: DataType
    result: torch.dtype
    sides: int = SIDE_MULTIPLE
    tokens: int = 8

    @property
    def scaled(self) -> bool:
        """Whether operands have scales: see operands.py."""
        return self.dtype.itemsize == 1

    def value_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the kept entries."""
        return rows * columns // 2 * self.dtype.itemsize

    def metadata_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the metadata: a bit for each entry of the matrix."""
        return rows * columns // 8

    def packed_bytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed matrix; the library may append a few of its own."""
        return self.value_bytes(rows, columns) + self.metadata_bytes(rows, columns)

    def values(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """The values of a packed matrix, (R, C/2) of `dtype`: a view."""
        return packed[: self.value_bytes(rows, columns)].view(self.dtype).view(rows, columns // 2)

    def metadata(self, packed: Tensor, rows: int, columns: int) -> Tensor:
        """The metadata of a packed matrix, uint8: a view."""
        start = self.value_bytes(rows, columns)
        return packed[start : start + self.metadata_bytes(rows, columns)]


BF16 = PackedFormat(torch.bfloat16, DataType.BFLOAT16, torch.bfloat16)
FP16 = PackedFormat(torch.float16, DataType.FLOAT16, torch.float16)
E4M3 = PackedFormat(torch.float8_e4m3fn, DataType.E4M3, torch.bfloat16, sides=32, tokens=16)
FORMATS = {form.dtype: form for form in (BF16, FP16, E4M3)}
"""The formats by the dtype of a product's operand."""
HALVES = (torch.bfloat16, torch.float16)
"""The dtypes of 16 bits, which values can have, too."""
